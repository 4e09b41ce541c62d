"""Counts what a step moves, computes and keeps, by the compiler, for this machine and TPUs.

    python benchmarks/cost/counted_cost.py
    pip install "jax[tpu]" && python benchmarks/cost/counted_cost.py --tpu v5e:2x2  # without a TPU

Nothing is run, so that the figures do not change from run to run. All are per parameter of float32.
The optimizer alone, for trees of parameters: the update and `optax.apply_updates` with donated
buffers. Bytes that exist between two steps (parameters and state), bytes that all kernels read and
write, floating-point operations, and temporaries. On TPUs, arrays that are copied to on-chip
memory and back are counted several times: look at the leaf that is too large for it. Whole training
steps, for networks: bytes between two steps, and with gradients, activations and temporaries at the
peak of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment
from benchmarks.cost import contenders
from benchmarks.cost.contenders import BASELINE, CONTENDERS, Contender, chosen, kept
from benchmarks.cost.models import MODELS, Model, PyTree, count, gpt2
from examples._shared.reporting import format_table

TREES = {
    "one leaf of 32768 x 2048": lambda: jax.ShapeDtypeStruct((32768, 2048), jnp.float32),
    "gpt2 of 1e7, 148 leaves": partial(gpt2, 10_000_000),
}


@dataclass(frozen=True)
class Options:
    """The command line."""

    tpu: str | None = None
    """Topology such as v5e:2x2 or v5p:2x2x1, compiled by libtpu."""
    trees: tuple[str, ...] = tuple(TREES)
    models: tuple[str, ...] = ("mlp1m", "resnet20", "gpt10m")
    methods: tuple[str, ...] = tuple(CONTENDERS)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each tree and each network."""
    options = parse(Options, __doc__, argv)
    where = contenders.target(options.tpu)
    print(environment())
    compared = contenders.build(options.methods)
    header = ["bytes per parameter:", "kept", "accessed", "FLOPs", "temporaries"]
    for tree, make in chosen(options.trees, TREES).items():
        shapes = make()
        rows = [[name, *counted(c, shapes, where)] for name, c in compared.items()]
        print(f"\nOptimizer alone, {tree}\n\n{format_table([header, *rows])}", flush=True)
    compared |= {f"mc_value_and_grad, {n} samples": contenders.monte_carlo(n) for n in (1, 4)}
    header = ["bytes per parameter:", "kept", "peak", "peak, ratio"]
    for name, model in chosen(options.models, MODELS).items():
        size, (number, _) = model.batch_size, model.describe()
        memory = {n: kept_and_peak(c, model, where) for n, c in compared.items()}
        base = memory[BASELINE][1]
        rows = [
            [method, f"{between / number:.1f}", f"{peak / number:.1f}", f"{peak / base:.3f}"]
            for method, (between, peak) in memory.items()
        ]
        print(f"\nWhole training step, {name}: {number:,} parameters, batch {size}\n")
        print(format_table([header, *rows]), flush=True)


def counted(contender: Contender, shapes: PyTree, where: Any) -> list[str]:
    """The figures of the optimizer alone."""
    step, arguments = contenders.optimizer_program(contender, shapes, where)
    compiled, number = step.lower(*arguments).compile(), count(shapes)
    costs = compiled.cost_analysis()
    return [
        f"{kept(arguments[0][0]) / number:.1f}",
        f"{costs['bytes accessed'] / number:.2f}",
        f"{costs['flops'] / number:.0f}",
        f"{compiled.memory_analysis().temp_size_in_bytes / number:.2f}",
    ]


def kept_and_peak(contender: Contender, model: Model, where: Any) -> tuple[int, int]:
    """Bytes between two training steps, and at the peak of one."""
    step, arguments = contenders.training_program(contender, model, model.batch_size, where)
    memory = step.lower(*arguments).compile().memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return kept(arguments[0]), peak - memory.alias_size_in_bytes


if __name__ == "__main__":
    main()
