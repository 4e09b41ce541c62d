"""Does a network know what it has not seen? AdamW and IVON on digits, letters and photographs.

Run `python examples/out_of_domain.py`. A perceptron learns scikit-learn's handwritten digits. Look
at two questions: is the predictive entropy small on digits and large elsewhere, and does it (or the
mutual information, what the posterior's samples disagree about) tell the two apart?

On these data IVON has the lower NLL on digits and AdamW is the better detector. Hyperparameters
were chosen on held-out digits alone.
"""

from dataclasses import dataclass
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
from examples._shared.reporting import (
    cell,
    draw_entropies,
    format_table,
    save_figure,
)
from examples._shared.training import classification_loss, train, warmup_cosine
from examples._shared.unfamiliar import LETTERS, letters, photo_patches
from ivon_jax import auto_sample, ivon, metrics, predict_samples

BATCH_SIZE = 50
NUM_SAMPLES = 64
SETS = ("digits", "letters", "photo patches")

Array = jax.Array
PyTree = Any


@dataclass(frozen=True)
class Options:
    """Tells digits from letters and photographs by the uncertainty of predictions."""

    seeds: int = 5
    epochs: int = 100
    figure: Path = Path("out_of_domain.png")


class Predictions(NamedTuple):
    """Of one method on one set of images, with the seeds on axis 0."""

    log_probs: Array
    entropy: Array
    information: Array  # mutual information of class and weights


Results = dict[str, dict[str, Predictions]]  # by method and set


def main(options: Options) -> None:
    """Trains, predicts, prints the table and writes the figure."""
    labels, results = compare(options.seeds, options.epochs)
    print(f"\n{table(results, labels)}\n")
    print(
        "Mean ± standard error over seeds. Entropy and mutual information (MI): means in nats.\n"
        "AUROC and FPR95: how well they tell digits from the unfamiliar; FPR95 is the share of\n"
        "the unfamiliar that passes as digits where 95 % of the digits do, and lower is better.\n"
        f"Letters: {LETTERS}, unlike digits."
    )
    save_figure(draw(results), options.figure)


def compare(seeds: int, epochs: int) -> tuple[Array, Results]:
    """Trains both methods from every seed; returns the digits' labels and all predictions."""
    data = load_small_digits()
    shape = data.train_images.shape[1:]
    sets = [data.test_images, letters(shape), photo_patches(shape)]
    images, ends = jnp.concatenate(sets), np.cumsum([len(each) for each in sets])[:-1]
    train_data = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    num_steps = epochs * (len(data.train_labels) // BATCH_SIZE)
    model = MLP()
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.arange(seeds))
    params = jax.vmap(lambda key: model.init(key, images[:1]))(keys[:, 0])

    def fit(label: str, make_optimizer: Any, params: PyTree, key: Array) -> tuple[PyTree, PyTree]:
        noise_key, key = jax.random.split(key)
        run = partial(train, key=key, epochs=epochs, batch_size=BATCH_SIZE, label=label)
        return run(make_optimizer(noise_key), classification_loss(model.apply), params, train_data)

    def log_probs(params: PyTree, images: Array) -> Array:
        return jax.nn.log_softmax(jnp.asarray(model.apply(params, images)))

    adamw = optax.adamw(warmup_cosine(0.05, num_steps), weight_decay=0.3)
    rate = warmup_cosine(0.7, num_steps)
    variational = ivon(rate, ess=1000, hess_init=0.5, weight_decay=1e-5, b2=0.999)
    weights, _ = jax.vmap(partial(fit, "AdamW", lambda _: adamw))(params, keys[:, 1])
    fit_ivon = partial(fit, "IVON", partial(auto_sample, variational))
    _, states = jax.vmap(fit_ivon)(params, keys[:, 1])
    at_samples = predict_samples(log_probs, NUM_SAMPLES)
    samples = {
        "AdamW": jax.vmap(lambda params: log_probs(params, images)[None])(weights),
        "IVON": jax.lax.map(lambda x: at_samples(*x, images), (keys[:, 2], states)),
    }
    return jnp.asarray(data.test_labels), {
        method: dict(zip(SETS, map(summarised, jnp.split(x, ends, axis=2)), strict=True))
        for method, x in samples.items()
    }


def summarised(samples: Array) -> Predictions:
    """Averages the probabilities of samples on axis 1."""
    log_probs = jax.nn.logsumexp(samples, axis=1) - jnp.log(samples.shape[1])
    information = jax.vmap(metrics.mutual_information)(samples)
    return Predictions(log_probs, metrics.predictive_entropy(log_probs), information)


# --- Table and figure -----------------------------------------------------------------------------


def table(results: Results, labels: Array) -> str:
    """Measures as rows, methods as columns."""
    rows = [["", *results]]

    def add(label: str, decimals: int, measure: Any, of: Any = tuple(results)) -> None:
        values = [measure(sets) if method in of else None for method, sets in results.items()]
        rows.append([label, *("-" if x is None else cell(x, decimals) for x in values)])

    def per_seed(metric: Any) -> Any:
        return lambda sets: [float(metric(seed, labels)) for seed in sets["digits"].log_probs]

    def detected(score: str, field: str, name: str) -> Any:
        def measure(sets: dict[str, Predictions]) -> list[float]:
            pairs = zip(getattr(sets["digits"], score), getattr(sets[name], score), strict=True)
            return [100 * getattr(metrics.detection(*pair), field) for pair in pairs]

        return measure

    add("accuracy", 4, per_seed(metrics.accuracy))
    add("NLL", 4, per_seed(metrics.nll))
    for score, label, of in (("entropy", "entropy", results), ("information", "MI", ["IVON"])):
        for name in SETS:
            add(f"{label}, {name}", 3, lambda x, s=score, n=name: getattr(x[n], s).mean(1), of)
        for name in SETS[1:]:
            add(f"AUROC of {label}, {name}, %", 1, detected(score, "auroc", name), of)
            add(f"FPR95 of {label}, {name}, %", 1, detected(score, "fpr95", name), of)
    return format_table(rows)


def draw(results: Results) -> Figure:
    """Entropies of every set."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for ax, (method, sets) in zip(figure.subplots(1, 2), results.items(), strict=True):
        draw_entropies(ax, method, {name: found.entropy for name, found in sets.items()})
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
