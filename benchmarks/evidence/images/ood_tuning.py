"""The grid search behind `out_of_domain.py --tune`, and what it chose."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.evidence.images.image_training import average, seed_keys
from benchmarks.evidence.images.image_tuning import Tried
from benchmarks.evidence.images.ood_methods import Run, make_runner
from examples._shared.datasets import ImageData, stratified_split
from ivon_jax import metrics

SPLITS = 5

# 24 settings each. Each grid is a second one, moved towards the choice of a first of 24. None was
# moved again, so that some choices lie at an edge. A temperature of 0.1 means an effective sample
# size of ten times the number of images.
SGD_GRID = {
    "learning_rate": (0.1, 0.15, 0.2, 0.3),
    "weight_decay": (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2),
}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": SGD_GRID,
    "dropout": {
        "learning_rate": (0.2, 0.3),
        "weight_decay": (3e-4, 1e-3, 3e-3),
        "rate": (0.05, 0.1, 0.2, 0.3),
    },
    "swag": {
        "learning_rate": (0.2, 0.3),
        "weight_decay": (3e-4, 1e-3, 3e-3),
        "swag_rate": (0.05, 0.1, 0.2, 0.3),
    },
    "backprop": {
        "learning_rate": (3e-3, 1e-2, 3e-2),
        "init_std": (0.01, 0.02),
        "weight_decay": (1e-3, 3e-3),
        "temperature": (0.03, 0.01),
    },
    "ensemble": SGD_GRID,
    "ivon": {
        "learning_rate": (0.5, 1.0),
        "hess_init": (0.01, 0.03, 0.1),
        "weight_decay": (1e-5, 1e-4),
        "temperature": (0.3, 0.1),
        "b2": (0.999,),
    },
    "ivon_bayes": {
        "learning_rate": (0.3, 0.5, 0.7),
        "hess_init": (0.2, 0.3, 0.5, 1.0),
        "weight_decay": (1e-5, 1e-4),
        "temperature": (1.0,),
        "b2": (0.999,),
    },
}

# Chosen by: out_of_domain.py --tune --seeds 5
CHOSEN: dict[str, dict[str, float]] = {
    "sgd": {"learning_rate": 0.2, "weight_decay": 1e-3},
    "dropout": {"learning_rate": 0.2, "weight_decay": 1e-3, "rate": 0.1},
    "swag": {"learning_rate": 0.2, "weight_decay": 1e-3, "swag_rate": 0.1},
    "backprop": {
        "learning_rate": 0.03,
        "init_std": 0.01,
        "weight_decay": 1e-3,
        "temperature": 0.01,
    },
    "ensemble": {"learning_rate": 0.2, "weight_decay": 3e-4},
    "ivon": {
        "learning_rate": 1.0,
        "hess_init": 0.1,
        "weight_decay": 1e-5,
        "temperature": 0.3,
        "b2": 0.999,
    },
    "ivon_bayes": {
        "learning_rate": 0.7,
        "hess_init": 0.5,
        "weight_decay": 1e-5,
        "temperature": 1.0,
        "b2": 0.999,
    },
}


def grid(method: str) -> list[dict[str, float]]:
    """All settings of a method's grid."""
    names = GRIDS[method].keys()
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*GRIDS[method].values())
    ]


@jax.jit  # under which a run that diverged scores NaN; it would be refused otherwise
def measure(log_probs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """NLL and accuracy."""
    return metrics.nll(log_probs, labels), metrics.accuracy(log_probs, labels)


def try_settings(
    method: str, data: ImageData, run: Run, splits: int, on_run: Callable[[], object]
) -> list[Tried]:
    """Trains every setting on 80 % of the training images and scores it on the other 20 %.

    Each split is a draw of its own, the same for all methods. The score is the NLL of the averaged
    prediction; the test set and the unfamiliar images play no part. There are more epochs, so that
    the number of steps is that of the comparison: what IVON forgets of its initial curvature
    depends on it.
    """
    images, labels = data.train_images, data.train_labels
    run = run._replace(epochs=round(run.epochs * len(labels) / (len(labels) - len(labels) // 5)))
    parts = [stratified_split(images, labels, len(labels) // 5, seed) for seed in range(splits)]
    runner = make_runner(method, run)
    tried = []
    for values in grid(method):
        result = Tried(values, [], [])
        for seed, (x, y, held_out, held_out_labels) in enumerate(parts):
            fitted = runner.fit(values, seed, (jnp.asarray(x), jnp.asarray(y)))
            samples = runner.predict(values, seed_keys(seed).predict, fitted, jnp.asarray(held_out))
            score, share = measure(average(samples), jnp.asarray(held_out_labels))
            result.nll.append(float(score))
            result.accuracy.append(float(share))
            on_run()
        tried.append(result)
    return tried


def edges(method: str, values: dict[str, float]) -> list[str]:
    """Names of the hyperparameters whose chosen value is the first or last of several."""
    return [
        name
        for name, choices in GRIDS[method].items()
        if len(choices) > 1 and values[name] in (choices[0], choices[-1])
    ]
