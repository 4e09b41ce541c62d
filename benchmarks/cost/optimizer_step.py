"""Times the optimizer's step alone: given gradients, updates, and `optax.apply_updates`.

    pip install -e ".[examples]"
    python benchmarks/optimizer_step.py                       # about three minutes on two cores
    python benchmarks/optimizer_step.py --size 1e8 --trees "one leaf" gpt2     # a GPU, or patience
    python benchmarks/optimizer_step.py --torch               # beside PyTorch's (extra `oracle`)

Every step is jitted with donated buffers. Contenders take turns in one process; each column is
the median over the turns of the ratio to AdamW's time in the same turn, with quartiles. The
explicit loop also writes the sample, which a loss would need.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.measuring import (
    environment,
    format_table,
    interleaved,
    jax_loop,
    ratio_cell,
)
from benchmarks.cost.contenders import BASELINE, CONTENDERS, Contender, build
from benchmarks.cost.trees import Shapes, filled, gpt2, many, one_leaf

PyTree = Any
TREES: dict[str, Callable[[int], Shapes]] = {
    "one leaf": one_leaf,
    "gpt2": gpt2,
    "500 small leaves": lambda size: many(500, 64),
    "100 scalars": lambda size: many(100, 1),
}


def make_step(contender: Contender) -> Any:
    """A jitted step from given gradients, which also returns the point they would be taken at."""

    @partial(jax.jit, donate_argnums=0)
    def step(carried: PyTree, grads: PyTree) -> PyTree:
        carry, _ = carried
        points = []

        def given(point: PyTree) -> tuple[jax.Array, PyTree]:
            points.append(point)
            return jnp.zeros([]), grads

        params = carry[0]
        new, _ = contender.step(carry, given)
        # The loop's own parameters exist anyway; a sample has to be written.
        return new, () if points[0] is params else points[0]

    return step


def measure(
    shapes: Shapes, contenders: dict[str, Contender], torch: bool, repetitions: int
) -> list[list[str]]:
    """Rows of time and ratio for one tree."""
    grads = filled(shapes, 1e-3)
    number = sum(x.size for x in grads.values())
    functions = {}
    for name, contender in contenders.items():
        carry = contender.init(filled(shapes, 1.0))
        point = () if len(carry) == 2 else filled(shapes, 0.0)
        functions[name] = jax_loop(make_step(contender), (carry, point), grads)
    if torch:
        from benchmarks.cost import torch_contenders

        functions |= torch_contenders.steps([tuple(shape) for shape in shapes.values()])
    timings = interleaved(functions, repetitions)
    return [
        [
            name,
            f"{np.median(t.seconds) * 1e6:,.0f}",
            f"{np.median(t.seconds) / number * 1e9:.2f}",
            ratio_cell(t.ratio),
        ]
        for name, t in timings.items()
    ]


def main() -> None:
    """Prints a table for each tree and size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=float, nargs="+", default=[1e5, 1e6, 1e7], help="parameters of 'one leaf'")
    add("--trees", nargs="+", choices=TREES, default=list(TREES), help="(default: all)")
    add("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--peer", type=Path, help="ivon.py of the authors' JAX implementation")
    add("--torch", action="store_true", help="PyTorch's ivon-opt and AdamW as well")
    add("--repetitions", type=int, default=15, help="turns of each contender (default: 15)")
    args = parser.parse_args()
    print(environment())
    contenders = build(args.methods, args.peer)
    for tree in args.trees:
        for size in args.size if tree == "one leaf" else args.size[-1:]:
            shapes = TREES[tree](int(size))
            number = sum(int(np.prod(shape)) for shape in shapes.values())
            rows = measure(shapes, contenders, args.torch, args.repetitions)
            header = ["", "µs per step", "ns per parameter", f"ratio to {BASELINE} [quartiles]"]
            print(f"\n{tree}: {number:,} parameters in {len(shapes)} leaves\n")
            print(format_table([header, *rows]), flush=True)


if __name__ == "__main__":
    main()
