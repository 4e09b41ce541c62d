"""Which training examples matter: sensitivities, checked by retraining, and wrong labels.

Run `python examples/sensitivity.py` (about a minute and a half on two cores).

By the memory-perturbation equation, removing example i moves the model's output for it by about
v_i e_i: prediction variance times prediction error, both known when training ends
(Nickl et al., arXiv:2310.19273). This script learns 500 of scikit-learn's digits with IVON and

1. shows the most and the least sensitive images, and the sensitivity of each class;
2. compares the estimate with the truth for 60 examples, spread evenly over the ranks of the
   estimate: each is removed and the model trained again. Retraining starts from the trained
   model and is deterministic: once by IVON with the same batches and noise, and once at the
   posterior mean alone, by L-BFGS on the whole set, to a stationary point;
3. gives a tenth of the images a wrong label and looks for these by sensitivity, and by three
   simpler scores of the same model.

Softmax regression, which is convex, is checked with IVON's diagonal posterior and with the full
covariance: the difference is what the diagonal costs.

Hyperparameters: nothing was selected by these results. Wrong labels are looked for in two
settings: in the first (λ = N) the network resists them, in the second (λ = 10 N, wider, less
decay) it learns some by heart. Five settings were looked at, width 16 to 128, decay 1e-4 to 1e-2.
The units are tanh: with ReLUs the retraining at the mean reached no stationary point, and the
agreement with IVON trained again was lower (Spearman 0.61 ± 0.11).
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from benchmarks.evidence.images.image_training import NUM_CLASSES
    from benchmarks.evidence.uses.sensitivity_report import (
        LEARNED,
        Agreement,
        Pictures,
        agreement_table,
        classes_table,
        detection_table,
        write_figure,
    )
    from benchmarks.evidence.uses.sensitivity_retraining import (
        Truth,
        full_covariance_changes,
        with_ivon,
        without_noise,
    )
    from benchmarks.evidence.uses.small_digits import (
        Apply,
        Array,
        Digits,
        PyTree,
        Recipe,
        SmoothMLP,
        SoftmaxRegression,
        Weighted,
        cross_entropy,
        load_digits,
        train,
        unweighted,
        wrong_labels,
    )
    from examples._shared.reporting import example_parser, positive
    from ivon_jax import Posterior, Sensitivity, group_sensitivity, posterior, sensitivity
    from ivon_jax.metrics import detection
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

NUM_TRAIN = 500
WRONG = 0.1  # share of the labels
WIDTH = 16
# One instance of each: compiled functions are found again by the identity of `apply`.
NETWORK, LINEAR = SmoothMLP(WIDTH), SoftmaxRegression()


class Setting(NamedTuple):
    """A network in which wrong labels are looked for, and its training."""

    model: SmoothMLP
    recipe: Recipe


RECIPE = Recipe(epochs=60, learning_rate=0.3, weight_decay=1e-3)
SETTINGS = {
    "λ = N": Setting(NETWORK, RECIPE),
    "λ = 10 N": Setting(SmoothMLP(64), RECIPE._replace(weight_decay=1e-4, temperature=0.1)),
}
AGAIN = 1 / 3  # of the first rate, in the retraining by IVON


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    start = time.perf_counter()
    parser = example_parser("Sensitivity to training examples.", "sensitivity.png", seeds=8)
    add = parser.add_argument
    add("--retrained-seeds", type=positive, default=3, help="seeds in which examples are removed")
    add("--examples", type=positive, default=60, help="number of examples removed in each")
    add("--epochs", type=positive, default=RECIPE.epochs, help="length of a training by IVON")
    add("--steps", type=positive, default=2000, help="of L-BFGS, at most")
    args = parser.parse_args(argv)
    if not 3 <= args.examples <= NUM_TRAIN:
        parser.error(f"--examples must be 3 to {NUM_TRAIN}")
    recipe = RECIPE._replace(epochs=args.epochs)
    print(
        f"{NUM_TRAIN} digits, perceptron 64-{WIDTH}-{WIDTH}-10, λ = N, {recipe.epochs} epochs at "
        f"peak rate {recipe.learning_rate:g}, δ = {recipe.weight_decay:g}, "
        f"h₀ = {recipe.hess_init:g}, β₂ = {recipe.b2:g}\n"
        f"{args.examples} examples are removed in {args.retrained_seeds} seeds; "
        f"{100 * WRONG:.0f} % of the labels are wrong in {args.seeds} seeds"
    )

    digits = load_digits()
    agreements: list[dict[str, Agreement]] = []
    detections = {name: [] for name in SETTINGS}
    total = args.retrained_seeds + len(SETTINGS) * args.seeds
    with tqdm(total=total, desc="training", disable=None) as bar:
        for seed in range(args.retrained_seeds):
            key = jax.random.key(seed)
            agreements.append(compare_with_truth(recipe, args.examples, args.steps, digits, key))
            bar.update()
        for name, (model, base) in SETTINGS.items():
            setting = Setting(model, base._replace(epochs=args.epochs))
            for seed in range(args.seeds):
                wrong, learned, scores = wrong_label_scores(setting, digits, jax.random.key(seed))
                found = aurocs(wrong, scores)
                detections[name].append({**found, LEARNED: 100 * learned[wrong].mean()})
                bar.update()
    pictures = look(recipe, digits, jax.random.key(0))

    print("\n1. Sensitivity of the classes (seed 0)\n")
    print(classes_table(pictures))
    print("\n2. The estimate and the truth: change of the output for an example that is removed\n")
    print(agreement_table(agreements))
    print(
        """
Spearman and Pearson compare the size of the change with the sensitivity, over the examples; those
"of e" compare it with the prediction error, without the variance. "Cosine" is that of the true and
the estimated change (median), "true / est." the median ratio of their sizes. "Change" is the median
size of the true one, and "floor" how far the same outputs move if nothing is removed: by other
batches and noise in the retraining by IVON, by what is left of convergence otherwise."""
    )
    print(f"\n3. AUROC of finding the wrong labels, {100 * WRONG:.0f} % of them\n")
    print(detection_table(detections))
    print(
        """
All scores of a column come from the same model at its posterior mean. Sensitivity is error times
variance; 0.5 is chance, and below 0.5 wrong labels are those with the *smaller* scores."""
    )
    write_figure(args.output, pictures, agreements, detections)
    print(f"Wall time {time.perf_counter() - start:.0f} s, compilation included.")
    return 0


def draw(digits: Digits, key: Array) -> Weighted:
    """The images that a seed learns, with their true labels."""
    rows = jax.random.permutation(key, len(digits.labels))[:NUM_TRAIN]
    return unweighted(digits.images[rows], digits.labels[rows])


def plain_bayes(state: PyTree, recipe: Recipe) -> Posterior:
    """The posterior at λ = N, whatever λ was in training: the V of the equation."""
    return posterior(state, temperature=1 / recipe.temperature)


@partial(jax.jit, static_argnames="apply")
def measure(apply: Apply, q: Posterior, data: Weighted) -> Sensitivity:
    """Sensitivity to each example of the data."""
    return sensitivity(apply, cross_entropy)(q, data.images, targets=data.labels)


def look(recipe: Recipe, digits: Digits, key: Array) -> Pictures:
    """Sensitivities of all training images, and their sums over classes."""
    data_key, train_key = jax.random.split(key)
    data = draw(digits, data_key)
    q = plain_bayes(train(NETWORK, recipe, data, train_key), recipe)
    logits: Any = NETWORK.apply(q.mean, data.images)
    score = measure(NETWORK.apply, q, data).score
    classes = group_sensitivity(score, data.labels, NUM_CLASSES)
    return Pictures(
        *map(np.asarray, (data.images[..., 0], data.labels, logits.argmax(-1), score, classes))
    )


# --- The estimate and the truth -------------------------------------------------------------------


def compare_with_truth(
    recipe: Recipe, num_examples: int, steps: int, digits: Digits, key: Array
) -> dict[str, Agreement]:
    """Removes examples and compares, for the network and for softmax regression."""
    data_key, train_key, same_key, other_key = jax.random.split(key, 4)
    data = draw(digits, data_key)
    decay = recipe.weight_decay
    found = {}

    apply: Apply = NETWORK.apply
    state = train(NETWORK, recipe, data, train_key)
    q = plain_bayes(state, recipe)
    rows = spread(measure(apply, q, data).score, num_examples)
    again = recipe._replace(learning_rate=AGAIN * recipe.learning_rate)
    state, truth = with_ivon(apply, again, data, state, rows, (same_key, other_key))
    found["network, IVON again"] = agreement(apply, plain_bayes(state, again), data, rows, truth)
    truth = without_noise(apply, data, decay, q.mean, rows, steps)
    found["network, at the mean"] = agreement(apply, q._replace(mean=truth.base), data, rows, truth)

    apply = LINEAR.apply
    q = plain_bayes(train(LINEAR, recipe, data, train_key), recipe)
    rows = spread(measure(apply, q, data).score, num_examples)
    truth = without_noise(apply, data, decay, q.mean, rows, steps)
    diagonal = agreement(apply, q._replace(mean=truth.base), data, rows, truth)
    first, second = map(np.asarray, full_covariance_changes(apply, data, decay, truth.base, rows))
    found["softmax regression, at the mean"] = diagonal
    found["- with the full covariance"] = diagonal._replace(estimate=first)
    found["- and to second order"] = diagonal._replace(estimate=second)
    return found


def spread(scores: Array, count: int) -> Array:
    """Rows whose scores are spread evenly over the ranks."""
    ranks = jnp.linspace(0, len(scores) - 1, count).round().astype(int)
    return jnp.argsort(scores)[ranks]


def agreement(
    apply: Apply, q: Posterior, data: Weighted, examples: Array, truth: Truth
) -> Agreement:
    """Puts the estimate for the examples beside the truth."""
    found = measure(apply, q, jax.tree.map(lambda x: x[examples], data))
    return Agreement(*map(np.asarray, (found.deviation, truth.deviation, truth.floor, found.error)))


# --- Wrong labels ---------------------------------------------------------------------------------


def wrong_label_scores(
    setting: Setting, digits: Digits, key: Array
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Which labels are wrong, which are predicted, and what each score says of every example."""
    data_key, train_key, label_key = jax.random.split(key, 3)
    true = draw(digits, data_key)
    data = true._replace(labels=wrong_labels(label_key, true.labels, WRONG))
    model, recipe = setting
    q = plain_bayes(train(model, recipe, data, train_key), recipe)
    found = measure(model.apply, q, data)
    logits: Any = model.apply(q.mean, data.images)
    scores = {
        "sensitivity": found.score,
        "training loss": cross_entropy(logits, data.labels),
        "prediction error": jnp.linalg.norm(found.error, axis=-1),
        "prediction variance": found.variance.sum(axis=-1),
    }
    wrong = np.asarray(data.labels != true.labels)
    learned = np.asarray(logits.argmax(-1) == data.labels)
    return wrong, learned, {name: np.asarray(score) for name, score in scores.items()}


def aurocs(wrong: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, float]:
    """AUROC of each score for the wrong labels."""
    return {
        name: float(detection(score[~wrong], score[wrong]).auroc) for name, score in scores.items()
    }


if __name__ == "__main__":
    sys.exit(main())
