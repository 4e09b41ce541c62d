"""The grid searches behind `images.py`, and what they chose.

Within a table all methods have the same number of settings, scored by the NLL on 20 % of the
training images; the test set plays no part.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.evidence.images.ood_tuning import CHOSEN as DIGITS
from benchmarks.evidence.images.training import Values
from examples._shared.reporting import cell

Grid = dict[str, tuple[float, ...]]

# 12 settings each. Each grid is a second one, moved towards the choice of a first of 24, whose
# runs are in the same file of results. A temperature of 0.1 means an effective sample size of 10 N.
MLP_GRIDS: dict[str, Grid] = {
    "sgd": {"learning_rate": (0.01, 0.02, 0.03), "weight_decay": (3e-4, 1e-3, 2e-3, 4e-3)},
    "adamw": {"learning_rate": (3e-3, 5e-3, 1e-2), "weight_decay": (0.1, 0.2, 0.3, 0.5)},
    "dropout": {
        "learning_rate": (0.02, 0.03),
        "weight_decay": (1e-4, 1e-3, 3e-3),
        "rate": (0.02, 0.05),
    },
    "swag": {
        "learning_rate": (0.02, 0.03),
        "weight_decay": (1e-3, 3e-3),
        "swag_rate": (0.01, 0.02, 0.03),
    },
    "ensemble": {"learning_rate": (0.01, 0.02, 0.03), "weight_decay": (3e-4, 1e-3, 2e-3, 4e-3)},
    "ivon": {
        "learning_rate": (0.1, 0.2),
        "hess_init": (0.1, 0.3, 1.0),
        "weight_decay": (1e-3,),
        "temperature": (0.3, 0.1),
        "b2": (0.999,),
    },
    "ivon_bayes": {
        "learning_rate": (0.1, 0.2),
        "hess_init": (0.5, 1.0, 2.0),
        "weight_decay": (1e-3, 3e-3),
        "temperature": (1.0,),
        "b2": (0.999,),
    },
}
# 4 settings each: a run takes long. Members of the ensemble are networks of "sgd".
RESNET_GRIDS: dict[str, Grid] = {
    "sgd": {"learning_rate": (0.1, 0.3), "weight_decay": (3e-4, 3e-3)},
    "adamw": {"learning_rate": (3e-3, 1e-2), "weight_decay": (0.03, 0.3)},
    "dropout": {"learning_rate": (0.1, 0.3), "weight_decay": (3e-4,), "rate": (0.02, 0.1)},
    "swag": {"learning_rate": (0.1, 0.3), "weight_decay": (3e-4,), "swag_rate": (0.03, 0.1)},
    "ivon_bayes": {
        "learning_rate": (1.0, 3.0),
        "hess_init": (0.3, 1.0),
        "weight_decay": (1e-4,),
        "temperature": (1.0,),
        "b2": (0.999,),
    },
}
GRIDS = {"mlp": MLP_GRIDS, "resnet": RESNET_GRIDS}

NOTES = (
    "Each setting was trained on 80 % of the training images for {epochs} epochs, as many steps as "
    "in the comparison, and scored on the other 20 % ({splits} split: ± where several). The NLL "
    "chooses."
)

# Chosen by: images.py --tune --dataset mnist --data-dir DIR, where DIR held the t10k files alone.
MNIST: dict[str, Values] = {
    "sgd": {"learning_rate": 0.03, "weight_decay": 4e-3},
    "adamw": {"learning_rate": 5e-3, "weight_decay": 0.5},
    "dropout": {"learning_rate": 0.03, "weight_decay": 1e-3, "rate": 0.02},
    "swag": {"learning_rate": 0.03, "weight_decay": 1e-3, "swag_rate": 0.02},
    "ensemble": {"learning_rate": 0.03, "weight_decay": 1e-3},
    "ivon": {
        "learning_rate": 0.2,
        "hess_init": 1.0,
        "weight_decay": 1e-3,
        "temperature": 0.1,
        "b2": 0.999,
    },
    "ivon_bayes": {
        "learning_rate": 0.2,
        "hess_init": 0.5,
        "weight_decay": 1e-3,
        "temperature": 1.0,
        "b2": 0.999,
    },
}
# Chosen by: images.py --tune --dataset mnist --model resnet --data-dir DIR, likewise.
RESNET: dict[str, Values] = {
    "sgd": {"learning_rate": 0.1, "weight_decay": 3e-4},
    "adamw": {"learning_rate": 0.01, "weight_decay": 0.03},
    "dropout": {"learning_rate": 0.1, "weight_decay": 3e-4, "rate": 0.1},
    "swag": {"learning_rate": 0.1, "weight_decay": 3e-4, "swag_rate": 0.1},
    "ensemble": {"learning_rate": 0.1, "weight_decay": 3e-4},
    "ivon_bayes": {
        "learning_rate": 1.0,
        "hess_init": 1.0,
        "weight_decay": 1e-4,
        "temperature": 1.0,
        "b2": 0.999,
    },
}
CHOSEN: dict[str, dict[str, dict[str, Values]]] = {
    "mlp": {
        # Chosen by: out_of_domain.py --tune --seeds 5, from 24 settings each; AdamW's by
        # image_classification.py --tune --seeds 5, from 48.
        "digits": {
            "sgd": DIGITS["sgd"],
            "adamw": {"learning_rate": 0.05, "weight_decay": 0.3},
            **{m: DIGITS[m] for m in ("dropout", "swag", "ensemble", "ivon", "ivon_bayes")},
        },
        "mnist": MNIST,
    },
    # Not tuned on the digits.
    "resnet": {"digits": RESNET, "mnist": RESNET},
}


def grid(model: str, method: str) -> list[dict[str, float]]:
    """All settings of a method."""
    choices = GRIDS[model][method]
    return [dict(zip(choices, x, strict=True)) for x in itertools.product(*choices.values())]


def overlong_values(values: Values, factor: int) -> dict[str, float]:
    """Hyperparameters of a run that is longer by a factor.

    IVON's b2 moves towards 1, as its authors advise for longer runs, so that as much as before is
    left of the initial curvature at the end; all else stays as it was chosen.
    """
    return {**values, "b2": values["b2"] ** (1.0 / factor)} if "b2" in values else dict(values)


def guarded_values(values: Values) -> dict[str, float]:
    """Hyperparameters of an over-long run of IVON with the usual b2 and the guard."""
    return {**values, "precision_floor": 0.1}


Scored = Mapping[int, tuple[Values, list[float], list[float]]]  # values, NLL, accuracy per split


def best(tried: Scored) -> int:
    """Place of the setting with the lowest mean NLL; a run that diverged disqualifies its own."""
    means = {place: float(np.mean(nll)) for place, (_, nll, _) in tried.items()}
    return min(means, key=lambda place: means[place] if math.isfinite(means[place]) else math.inf)


def tuning_rows(tried: Scored) -> list[Sequence[str]]:
    """A table of all settings of a method, the choice marked."""
    chosen = best(tried)
    rows: list[Sequence[str]] = [("setting", "NLL, held out", "accuracy, %", "")]
    for place, (values, nll, accuracy) in tried.items():
        mark = "chosen" if place == chosen else ""
        rows.append((described(values), cell(nll, 4), cell(np.multiply(accuracy, 100), 2), mark))
    return rows


def described(values: Values) -> str:
    """Hyperparameters in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())


def at_edges(model: str, method: str, values: Values) -> list[str]:
    """Hyperparameters whose chosen value is the first or last of several in the grid."""
    return [
        name.replace("_", " ")
        for name, choices in GRIDS[model][method].items()
        if len(choices) > 1 and values[name] in (choices[0], choices[-1])
    ]
