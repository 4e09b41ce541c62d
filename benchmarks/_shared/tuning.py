"""Grid search: all settings of a grid, the best of them, and whether it lies at an edge."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from examples._shared.reporting import cell

Grid = Mapping[str, Sequence[float]]  # choices for each hyperparameter


def settings(grid: Grid) -> list[dict[str, float]]:
    """All combinations; the last hyperparameter varies fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def at_edges(grid: Grid, values: Mapping[str, float]) -> list[str]:
    """Hyperparameters whose value is the first or last of several in the grid, in words."""
    return [
        name.replace("_", " ")
        for name, choices in grid.items()
        if len(choices) > 1 and values[name] in (choices[0], choices[-1])
    ]


def described(values: Mapping[str, float]) -> str:
    """Hyperparameters in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())


class Tried(NamedTuple):
    """A setting and its results on held-out data, one entry per split or seed."""

    values: Mapping[str, float]
    nll: Sequence[float]
    accuracy: Sequence[float]


def best(tried: Sequence[Tried]) -> Tried:
    """The setting with the lowest mean NLL; a run that diverged disqualifies its own."""

    def score(one: Tried) -> float:
        mean = float(np.mean(one.nll))
        return mean if math.isfinite(mean) else math.inf

    return min(tried, key=score)


def rows(tried: Sequence[Tried]) -> Sequence[Sequence[str]]:
    """A table of all settings of a method, the choice marked."""
    chosen = best(tried)
    return [("setting", "NLL, held out", "accuracy, %", "")] + [
        (
            described(one.values),
            cell(one.nll, 4),
            cell(np.multiply(one.accuracy, 100), 2),
            "chosen" if one is chosen else "",
        )
        for one in tried
    ]
