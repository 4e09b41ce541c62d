"""Times the optimizer's step alone: given gradients, updates, and `optax.apply_updates`.

    python benchmarks/cost/optimizer_step.py                   # about three minutes on two cores
    python benchmarks/cost/optimizer_step.py --size 1e8 --trees "one leaf" gpt2       # a GPU
    python benchmarks/cost/optimizer_step.py --torch           # beside PyTorch's (extra `oracle`)

Every step is jitted with donated buffers. Contenders take turns in one process; each column is
the median over the turns of the ratio to AdamW's time in the same turn, with quartiles. The
explicit loop also writes the sample, which a loss would need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment, interleaved, jax_loop, ratio_cell
from benchmarks.cost.contenders import BASELINE, CONTENDERS, Contender, build, chosen, make_step
from benchmarks.cost.models import PyTree, count, gpt2, many
from examples._shared.reporting import format_table

TREES: dict[str, Callable[[int], PyTree]] = {
    "one leaf": partial(many, 1),
    "gpt2": gpt2,
    "500 small leaves": lambda size: many(500, 64),
    "100 scalars": lambda size: many(100, 1),
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    size: tuple[float, ...] = (1e5, 1e6, 1e7)
    """Parameters of `one leaf`; the last also of `gpt2`."""
    trees: tuple[str, ...] = tuple(TREES)
    methods: tuple[str, ...] = tuple(CONTENDERS)
    torch: bool = False
    """PyTorch's ivon-opt and AdamW as well."""
    repetitions: int = 15
    """Turns of each contender."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each tree and size."""
    options = parse(Options, __doc__, argv)
    print(environment())
    contenders = build(options.methods)
    header = ["", "µs per step", "ns per parameter", f"ratio to {BASELINE} [quartiles]"]
    for tree, make in chosen(options.trees, TREES).items():
        for size in options.size if tree == "one leaf" else options.size[-1:]:
            shapes = make(int(size))
            rows = measure(shapes, contenders, options)
            print(
                f"\n{tree}: {count(shapes):,} parameters in {len(jax.tree.leaves(shapes))} leaves\n"
            )
            print(format_table([header, *rows]), flush=True)


def measure(shapes: PyTree, contenders: dict[str, Contender], options: Options) -> list[list[str]]:
    """Rows of time and ratio for one tree."""
    grads = optax.tree.full_like(shapes, 1e-3)
    functions = {}
    for name, contender in contenders.items():
        carry = contender.init(optax.tree.full_like(shapes, 1.0))
        point = () if len(carry) == 2 else optax.tree.zeros_like(shapes)
        functions[name] = jax_loop(make_step(contender), (carry, point), grads)
    if options.torch:
        functions |= torch_steps([x.shape for x in jax.tree.leaves(shapes)])
    timings = interleaved(functions, options.repetitions)
    return [
        [
            name,
            f"{np.median(seconds) * 1e6:,.0f}",
            f"{np.median(seconds) / count(shapes) * 1e9:.2f}",
            ratio_cell(seconds / timings[BASELINE]),
        ]
        for name, seconds in timings.items()
    ]


def torch_steps(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[int], None]]:
    """PyTorch's AdamW and the authors' IVON, with gradients given, on the device that it has."""
    import ivon  # pyright: ignore[reportMissingImports] the package ivon-opt
    import torch  # pyright: ignore[reportMissingImports]

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def parameters() -> list[Any]:
        made = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
        for p in made:
            p.grad = torch.full_like(p, 1e-3)
        return made

    def loop(step: Callable[[], Any]) -> Callable[[int], None]:
        def run(calls: int) -> None:
            for _ in range(calls):
                step()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    adamw = torch.optim.AdamW(parameters(), lr=1e-3)
    variational = ivon.IVON(parameters(), lr=1e-3, ess=1e6, hess_init=1.0)

    def ivon_step() -> None:
        with variational.sampled_params(train=True):
            pass  # the gradients are there
        variational.step()

    return {"PyTorch AdamW": loop(adamw.step), "PyTorch ivon-opt": loop(ivon_step)}


if __name__ == "__main__":
    main()
