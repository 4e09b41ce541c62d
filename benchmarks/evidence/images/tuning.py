"""The grids of `--tune`, and the settings that they chose.

Within a grid all methods have the same number of settings, scored by the NLL on 20 % of the
training images; the test set plays no part. Each grid was moved once, towards the choice of a first
one. A temperature of 0.1 means an effective sample size of ten times the number of images; IVON's
b2 is fixed at 0.999, the usual value for runs as short as these.
"""

from functools import partial
from typing import Any

from benchmarks._shared.methods import Values
from benchmarks._shared.tuning import Grid


def _plain(rate: Any, decay: Any, /, **more: Any) -> Any:
    return {"learning_rate": rate, "weight_decay": decay, **more}


def _ivon(rate: Any, hess_init: Any, decay: Any, temperature: Any, b2: Any = 0.999) -> Any:
    values = dict(learning_rate=rate, hess_init=hess_init, weight_decay=decay)
    return {**values, "temperature": temperature, "b2": b2}


_ivon_grid = partial(_ivon, b2=(0.999,))

DIGITS_SGD = _plain((0.1, 0.15, 0.2, 0.3), (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2))
DIGITS_NEAR = _plain((0.2, 0.3), (3e-4, 1e-3, 3e-3))
RATES = (0.05, 0.1, 0.2, 0.3)  # of dropout, and of SWAG's last quarter
MNIST_SGD = _plain((0.01, 0.02, 0.03), (3e-4, 1e-3, 2e-3, 4e-3))
EXAMPLE_SGD = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
EXAMPLE_ADAMW = (1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1, 3e-1)
GRIDS: dict[str, dict[str, Grid]] = {
    # 24 settings each, for the perceptron on the digits.
    "digits": {
        "sgd": DIGITS_SGD,
        "dropout": {**DIGITS_NEAR, "rate": RATES},
        "swag": {**DIGITS_NEAR, "swag_rate": RATES},
        "backprop": dict(
            learning_rate=(3e-3, 1e-2, 3e-2),
            init_std=(0.01, 0.02),
            weight_decay=(1e-3, 3e-3),
            temperature=(0.03, 0.01),
        ),
        "ensemble": DIGITS_SGD,
        "ivon": _ivon_grid((0.5, 1.0), (0.01, 0.03, 0.1), (1e-5, 1e-4), (0.3, 0.1)),
        "ivon_bayes": _ivon_grid((0.3, 0.5, 0.7), (0.2, 0.3, 0.5, 1.0), (1e-5, 1e-4), (1.0,)),
    },
    # 48 settings each, for examples/image_classification.py. IVON's choice lies at an edge, but
    # what lies beyond was in a first grid: rate 3 diverges, temperature 1 scores worse.
    "example": {
        "sgd": _plain(EXAMPLE_SGD, (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        "adamw": _plain(EXAMPLE_ADAMW, (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
        "ivon": _ivon_grid((0.5, 1.0), (0.01, 0.03, 0.1, 0.3), (1e-5, 1e-4, 1e-3), (0.1, 0.03)),
    },
    # 12 settings each.
    "mnist": {
        "sgd": MNIST_SGD,
        "adamw": _plain((3e-3, 5e-3, 1e-2), (0.1, 0.2, 0.3, 0.5)),
        "dropout": _plain((0.02, 0.03), (1e-4, 1e-3, 3e-3), rate=(0.02, 0.05)),
        "swag": _plain((0.02, 0.03), (1e-3, 3e-3), swag_rate=(0.01, 0.02, 0.03)),
        "ensemble": MNIST_SGD,
        "ivon": _ivon_grid((0.1, 0.2), (0.1, 0.3, 1.0), (1e-3,), (0.3, 0.1)),
        "ivon_bayes": _ivon_grid((0.1, 0.2), (0.5, 1.0, 2.0), (1e-3, 3e-3), (1.0,)),
    },
    # 4 settings each: a run takes long. Members of the ensemble are networks of "sgd".
    "resnet": {
        "sgd": _plain((0.1, 0.3), (3e-4, 3e-3)),
        "adamw": _plain((3e-3, 1e-2), (0.03, 0.3)),
        "dropout": _plain((0.1, 0.3), (3e-4,), rate=(0.02, 0.1)),
        "swag": _plain((0.1, 0.3), (3e-4,), swag_rate=(0.03, 0.1)),
        "ivon_bayes": _ivon_grid((1.0, 3.0), (0.3, 1.0), (1e-4,), (1.0,)),
    },
}


CHOSEN: dict[tuple[str, str], dict[str, Values]] = {
    # From the grid "digits" on five splits; AdamW's from "example".
    ("mlp", "digits"): {
        "sgd": _plain(0.2, 1e-3),
        "adamw": _plain(0.05, 0.3),
        "dropout": _plain(0.2, 1e-3, rate=0.1),
        "swag": _plain(0.2, 1e-3, swag_rate=0.1),
        "backprop": dict(learning_rate=0.03, init_std=0.01, weight_decay=1e-3, temperature=0.01),
        "ensemble": _plain(0.2, 3e-4),
        "ivon": _ivon(1.0, 0.1, 1e-5, 0.3),
        "ivon_bayes": _ivon(0.7, 0.5, 1e-5, 1.0),
    },
    # From the grid "mnist", in a folder that held the t10k files alone.
    ("mlp", "mnist"): {
        "sgd": _plain(0.03, 4e-3),
        "adamw": _plain(5e-3, 0.5),
        "dropout": _plain(0.03, 1e-3, rate=0.02),
        "swag": _plain(0.03, 1e-3, swag_rate=0.02),
        "ensemble": _plain(0.03, 1e-3),
        "ivon": _ivon(0.2, 1.0, 1e-3, 0.1),
        "ivon_bayes": _ivon(0.2, 0.5, 1e-3, 1.0),
    },
    # From the grid "resnet" on MNIST, likewise.
    ("resnet", "mnist"): {
        "sgd": _plain(0.1, 3e-4),
        "adamw": _plain(0.01, 0.03),
        "dropout": _plain(0.1, 3e-4, rate=0.1),
        "swag": _plain(0.1, 3e-4, swag_rate=0.1),
        "ensemble": _plain(0.1, 3e-4),
        "ivon_bayes": _ivon(1.0, 1.0, 1e-4, 1.0),
    },
}


def overlong_values(values: Values, factor: int) -> dict[str, Values]:
    """Hyperparameters of runs that are longer by a factor, by what their rows are called.

    IVON's b2 moves towards 1, as its authors advise for longer runs, so that as much as before is
    left of the initial curvature at the end; all else stays as it was chosen. What happens with the
    usual b2, without and with the guard, is tried too.
    """
    if "b2" not in values:
        return {"": values}
    return {
        "": {**values, "b2": values["b2"] ** (1.0 / factor)},
        ", b2 kept": values,
        ", b2 kept, guard": {**values, "precision_floor": 0.1},
    }
