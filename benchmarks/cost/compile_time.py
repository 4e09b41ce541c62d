"""Times tracing, lowering and compilation of the optimizer's step and of whole training steps.

    python benchmarks/cost/compile_time.py           # about two minutes on two cores

Contenders take turns; caches are cleared before each. Numbers are medians over the turns.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment, ratio_cell
from benchmarks.cost import contenders
from benchmarks.cost.contenders import Program, chosen
from benchmarks.cost.models import MODELS, gpt2, many
from examples._shared.reporting import format_table

TREES = {
    "one leaf of 1e7": partial(many, 1, 10_000_000),
    "gpt2 of 1e7, 148 leaves": partial(gpt2, 10_000_000),
    "500 leaves of 64": partial(many, 500, 64),
}
HEADER = ["", "trace and lower, s", "compile, s", "ratio, compile", "ratio, both [quartiles]"]


@dataclass(frozen=True)
class Options:
    """The command line."""

    trees: tuple[str, ...] = tuple(TREES)
    models: tuple[str, ...] = ("mlp", "resnet20", "gpt10m")
    methods: tuple[str, ...] = contenders.USUAL
    repetitions: int = 3
    """Turns of each contender."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each tree and model."""
    options = parse(Options, __doc__, argv)
    print(environment())  # starts the backend
    compared = contenders.build(options.methods)
    for tree, make in chosen(options.trees, TREES).items():
        shapes = make()
        programs = {
            n: partial(contenders.optimizer_program, c, shapes) for n, c in compared.items()
        }
        print(f"\nOptimizer alone, {tree}\n")
        print(format_table([HEADER, *rows(programs, options.repetitions)]), flush=True)
    for name, model in chosen(options.models, MODELS).items():
        programs = {
            n: partial(contenders.training_program, c, model, 8) for n, c in compared.items()
        }
        print(f"\nWhole training step, {name}, {model.describe()[1]} leaves\n")
        print(format_table([HEADER, *rows(programs, options.repetitions)]), flush=True)


def seconds(program: Callable[[], Program]) -> tuple[float, float]:
    """Seconds to trace and lower, and to compile."""
    jax.clear_caches()
    function, arguments = program()
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def rows(programs: dict[str, Callable[[], Program]], repetitions: int) -> list[list[str]]:
    """A table's rows; the first program is the baseline."""
    seconds(next(iter(programs.values())))  # what jax loads and traces once is not counted
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            taken[name].append(seconds(program))
    measured = {name: np.array(x) for name, x in taken.items()}
    base = next(iter(measured.values()))
    return [
        [
            name,
            *(f"{x:.2f}" for x in np.median(values, axis=0)),
            ratio_cell(values[:, 1] / base[:, 1]),
            ratio_cell(values.sum(axis=1) / base.sum(axis=1)),
        ]
        for name, values in measured.items()
    ]


if __name__ == "__main__":
    main()
