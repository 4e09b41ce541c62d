"""The grid search behind `image_classification.py --tune`: equal numbers of settings per method."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.evidence.images.image_training import (
    average,
    make_model,
    make_predictor,
    make_trainer,
    predictions,
    train,
)
from examples._shared.datasets import stratified_split
from examples._shared.reporting import mean_and_error
from ivon_jax import metrics

# 48 settings each. SGD and AdamW spend them on two hyperparameters, IVON on four, hence more
# coarsely; its b2 is fixed at 0.999, the usual value for runs as short as these. A temperature of
# 0.1 (ess ten times the number of examples) is that of the published run on a small data set. Each
# grid was moved once, after a first one whose choice lay at an edge. IVON's still does, but what
# lies beyond was in that first grid: rate 3 diverges, temperature 1 scores worse.
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": {
        "learning_rate": (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
        "weight_decay": (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    },
    "adamw": {
        "learning_rate": (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 3e-1),
        "weight_decay": (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    },
    "ivon": {
        "learning_rate": (0.5, 1.0),
        "hess_init": (0.01, 0.03, 0.1, 0.3),
        "weight_decay": (1e-5, 1e-4, 1e-3),
        "temperature": (0.1, 0.03),
        "b2": (0.999,),
    },
}


class Tried(NamedTuple):
    """One setting of the grid and its validation results, one entry per seed."""

    values: dict[str, float]
    nll: list[float]
    accuracy: list[float]


def grid(method: str) -> list[dict[str, float]]:
    """All settings of a method's grid."""
    names = GRIDS[method].keys()
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*GRIDS[method].values())
    ]


def try_settings(
    method: str,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    seeds: int,
    epochs: int,
    batch_size: int,
    num_samples: int,
    on_run: Callable[[], object],
) -> list[Tried]:
    """Trains every setting on 80 % of the training set and scores it on the other 20 %.

    Each seed draws a split of its own, the same for all settings and methods. The score is the
    NLL of what a method reports: for IVON, of predictions averaged over posterior samples.
    """
    model = make_model(images.shape[1:])
    predictor = make_predictor(model, num_samples)
    splits = [stratified_split(images, labels, len(labels) // 5, seed) for seed in range(seeds)]
    train_data = (jnp.asarray(splits[0][0]), jnp.asarray(splits[0][1]))
    trainer = make_trainer(method, grid(method)[0], model, train_data, epochs, batch_size)
    tried = []
    for values in grid(method):
        result = Tried(values, [], [])
        for seed, (*train_part, held_out, held_out_labels) in enumerate(splits):
            train_data = (jnp.asarray(train_part[0]), jnp.asarray(train_part[1]))
            trained = train(trainer, values, train_data, seed)
            point, samples = predictions(method, trained, predictor, jnp.asarray(held_out), seed)
            log_probs = point if samples is None else average(samples)
            true = jnp.asarray(held_out_labels)
            result.nll.append(float(metrics.nll(log_probs, true)))
            result.accuracy.append(float(metrics.accuracy(log_probs, true)))
            on_run()
        tried.append(result)
    return tried


def select(tried: Sequence[Tried]) -> Tried:
    """The setting with the lowest mean NLL; a run that diverged (NaN) disqualifies its setting."""
    return min(tried, key=_score)


def _score(tried: Tried) -> float:
    mean = float(np.mean(tried.nll))
    return mean if math.isfinite(mean) else math.inf


def at_the_edge(method: str, values: dict[str, float]) -> list[str]:
    """Names of the hyperparameters whose chosen value is the first or last of its grid."""
    return [
        name
        for name, choices in GRIDS[method].items()
        if len(choices) > 1 and values[name] in (choices[0], choices[-1])
    ]


def format_tried(tried: Sequence[Tried]) -> str:
    """The grid as a table, the selected setting marked with an asterisk."""
    names = list(tried[0].values)
    selected = select(tried)
    lines = ["  " + "".join(f"{name:>15}" for name in names) + "   validation NLL     accuracy, %"]
    for row in tried:
        score, error = mean_and_error(np.asarray(row.nll))
        share, share_error = mean_and_error(100 * np.asarray(row.accuracy))
        cells = "".join(f"{row.values[name]:>15g}" for name in names)
        if math.isfinite(_score(row)):
            results = f"   {score:.4f} ± {error:.4f}   {share:5.2f} ± {share_error:.2f}"
        else:
            results = "   diverged"
        lines.append(("* " if row is selected else "  ") + cells + results.replace(" ± nan", ""))
    return "\n".join(lines)
