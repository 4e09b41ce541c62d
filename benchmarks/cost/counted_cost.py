"""Counts what the optimizer's step moves and computes, by the compiler, for this machine and TPUs.

    python benchmarks/cost/counted_cost.py
    pip install "jax[tpu]" && python benchmarks/cost/counted_cost.py --tpu v5e:2x2  # without a TPU

Per parameter of float32, for the update and `optax.apply_updates` with donated buffers: bytes that
all kernels read and write, floating-point operations, temporaries, and what exists between two
steps (parameters and state). Nothing is run, so that the figures do not change from run to run.
On TPUs, arrays that are copied to on-chip memory and back are counted several times: look at the
leaf that is too large for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment
from benchmarks.cost.contenders import (
    CONTENDERS,
    Contender,
    kept,
    known,
    optimizer_program,
    target,
)
from benchmarks.cost.models import Shapes, count, gpt2
from examples._shared.reporting import format_table

TREES = {
    "one leaf of 32768 x 2048": lambda: {"w": (32768, 2048)},
    "gpt2 of 1e7, 148 leaves": partial(gpt2, 10_000_000),
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    tpu: str | None = None
    """Topology such as v5e:2x2 or v5p:2x2x1, compiled by libtpu."""
    trees: tuple[str, ...] = tuple(TREES)
    methods: tuple[str, ...] = tuple(CONTENDERS)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each tree."""
    options = parse(Options, __doc__, argv)
    where = target(options.tpu)
    print(environment())
    header = ["bytes per parameter:", "kept", "accessed", "FLOPs", "temporaries"]
    for tree in known(options.trees, TREES):
        shapes = TREES[tree]()
        methods = known(options.methods, CONTENDERS)
        rows = [[name, *counted(CONTENDERS[name](), shapes, where)] for name in methods]
        print(f"\n{tree}\n\n{format_table([header, *rows])}", flush=True)


def counted(contender: Contender, shapes: Shapes, where: Any) -> list[str]:
    """The figures of one contender."""
    step, arguments = optimizer_program(contender, shapes, where)
    compiled, number = step.lower(*arguments).compile(), count(shapes)
    costs = compiled.cost_analysis()
    return [
        f"{kept(arguments[0][0]) / number:.1f}",
        f"{costs['bytes accessed'] / number:.2f}",
        f"{costs['flops'] / number:.0f}",
        f"{compiled.memory_analysis().temp_size_in_bytes / number:.2f}",
    ]


if __name__ == "__main__":
    main()
