"""Does a network know what it has not seen? AdamW and IVON on digits, letters and photographs.

Run `python examples/out_of_domain.py`. A perceptron learns scikit-learn's handwritten digits. Look
at three questions: is the predictive entropy small on digits and large elsewhere, does it (or the
mutual information, what the posterior's samples disagree about) tell the two apart, and how many
errors remain if the network says "I don't know" where it is least certain?

On these data IVON has the lower NLL on digits and AdamW is the better detector. Hyperparameters
were chosen on held-out digits alone.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

from examples._shared.datasets import load_small_digits
from examples._shared.networks import MLP
from examples._shared.reporting import COLORS, cell, draw_band, format_table, save_figure
from examples._shared.training import classification_loss, train, warmup_cosine
from examples._shared.unfamiliar import LETTERS, draw_entropies, letters, photo_patches
from ivon_jax import auto_sample, ivon, metrics, predict_samples

BATCH_SIZE = 50
NUM_SAMPLES = 64
COVERAGE = 0.9  # share of the digits that are answered
SETS: tuple[str, ...] = ("digits", "letters", "photo patches")

Array = jax.Array


class Predictions(NamedTuple):
    """Of one method on one set of images, with the seeds on axis 0."""

    log_probs: Array
    entropy: Array
    information: Array | None  # mutual information of class and weights, of several samples


Results = dict[str, dict[str, Predictions]]  # by method and set


def main(seeds: int = 5, epochs: int = 100, figure: Path = Path("out_of_domain.png")) -> None:
    """Trains, predicts, prints the table and writes the figure."""
    labels, results = compare(seeds, epochs)
    print(f"\n{table(results, labels)}\n")
    print(
        "Mean ± standard error over seeds. Entropy and mutual information (MI): means in nats.\n"
        "AUROC and FPR95: how well they tell digits from the unfamiliar; FPR95 is the share of\n"
        "the unfamiliar that passes as digits where 95 % of the digits do, and lower is better.\n"
        f"Last row: of the digits with the least entropy. Letters: {LETTERS}, unlike digits."
    )
    save_figure(draw(results, labels), figure)


def compare(seeds: int, epochs: int) -> tuple[Array, Results]:
    """Trains both methods from every seed; returns the digits' labels and all predictions."""
    x, y, test_x, test_y, _ = load_small_digits()
    sets = [test_x, letters(x.shape[1:]), photo_patches(x.shape[1:])]
    images, ends = jnp.concatenate(sets), np.cumsum([len(each) for each in sets])[:-1]
    num_steps = epochs * (len(y) // BATCH_SIZE)
    model = MLP()
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.arange(seeds))
    params = jax.jit(jax.vmap(lambda key: model.init(key, images[:1])))(keys[:, 0])

    def fit(method: str, params: Any, key: Array) -> tuple[Any, Any]:
        noise_key, key = jax.random.split(key)
        tx = optax.adamw(warmup_cosine(0.05, num_steps), weight_decay=0.3)
        if method == "IVON":
            settings: Any = {"ess": 1000, "hess_init": 0.5, "weight_decay": 1e-5, "b2": 0.999}
            tx = auto_sample(ivon(warmup_cosine(0.7, num_steps), **settings), noise_key)
        run = partial(train, key=key, epochs=epochs, batch_size=BATCH_SIZE, label=method)
        return run(tx, classification_loss(model.apply), params, (jnp.asarray(x), jnp.asarray(y)))

    def log_probs(params: Any, images: Array) -> Array:
        return jax.nn.log_softmax(jnp.asarray(model.apply(params, images)))

    weights, _ = jax.vmap(partial(fit, "AdamW"))(params, keys[:, 1])
    _, states = jax.vmap(partial(fit, "IVON"))(params, keys[:, 1])
    at_samples = predict_samples(log_probs, NUM_SAMPLES)
    samples = {
        "AdamW": jax.vmap(lambda params: log_probs(params, images)[None])(weights),
        "IVON": jax.lax.map(lambda x: at_samples(*x, images), (keys[:, 2], states)),
    }
    return jnp.asarray(test_y), {
        method: dict(zip(SETS, map(summarised, jnp.split(x, ends, axis=2)), strict=True))
        for method, x in samples.items()
    }


@jax.jit
def summarised(samples: Array) -> Predictions:
    """Averages the probabilities of samples on axis 1."""
    count = samples.shape[1]
    log_probs = jax.nn.logsumexp(samples, axis=1) - jnp.log(count)
    information = jax.vmap(metrics.mutual_information)(samples) if count > 1 else None
    return Predictions(log_probs, metrics.predictive_entropy(log_probs), information)


def table(results: Results, labels: Array) -> str:
    """Measures as rows, methods as columns."""
    found = {method: measures(sets, labels) for method, sets in results.items()}
    rows = [["", *results]]
    for name in found["IVON"]:
        cells = (cell(*each[name]) if name in each else "-" for each in found.values())
        rows.append([name, *cells])
    return format_table(rows)


def measures(sets: dict[str, Predictions], labels: Array) -> dict[str, tuple[Any, int]]:
    """Values of one method by seed, and with how many decimals they are shown."""
    digits = sets["digits"]
    found = {
        name: ([float(metric(seed, labels)) for seed in digits.log_probs], 4)
        for name, metric in (("accuracy", metrics.accuracy), ("NLL", metrics.nll))
    }
    for label, field in (("entropy", "entropy"), ("MI", "information")):
        scores = {name: getattr(predictions, field) for name, predictions in sets.items()}
        if scores["digits"] is None:
            continue
        found |= {f"{label}, {name}": (score.mean(axis=1), 3) for name, score in scores.items()}
        for name in SETS[1:]:
            detected = list(map(metrics.detection, scores["digits"], scores[name]))
            found[f"AUROC of {label}, {name}, %"] = [100 * each.auroc for each in detected], 1
            found[f"FPR95 of {label}, {name}, %"] = [100 * each.fpr95 for each in detected], 1
    errors = errors_by_certainty(digits, labels)
    answered = errors[:, : round(COVERAGE * errors.shape[1])]
    return found | {f"errors at {COVERAGE:.0%} coverage, %": (100 * answered.mean(axis=1), 2)}


def errors_by_certainty(digits: Predictions, labels: Array) -> np.ndarray:
    """Whether each prediction is wrong, (seeds, n), those of least entropy first."""
    wrong = digits.log_probs.argmax(axis=-1) != labels[None]
    order = jnp.argsort(digits.entropy, axis=1)
    return np.asarray(jnp.take_along_axis(wrong, order, axis=1), float)


def draw(results: Results, labels: Array) -> Figure:
    """Entropies of every set, and errors against the share of digits that are answered."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    *histograms, curve = figure.subplots(1, 3)
    for ax, (method, sets) in zip(histograms, results.items(), strict=True):
        draw_entropies(ax, method, {name: found.entropy for name, found in sets.items()})
    for method, sets in results.items():
        errors = errors_by_certainty(sets["digits"], labels)
        answered = np.arange(1, errors.shape[1] + 1)
        percent = 100 * errors.cumsum(axis=1) / answered
        draw_band(curve, 100 * answered / answered[-1], percent, COLORS[method], label=method)
    curve.set(xlabel="digits answered, %", ylabel="errors among them, %", xlim=(75, 100))
    curve.set_title('Saying "I don\'t know" to the least certain')
    curve.legend(frameon=False)
    return figure


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
