"""Grid search: all settings of a grid, and whether one of them lies at an edge."""

import itertools
from collections.abc import Mapping, Sequence

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
