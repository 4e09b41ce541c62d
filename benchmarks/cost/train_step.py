"""Times whole training steps, and counts what they compute and move.

    python benchmarks/cost/train_step.py                       # about five minutes on two cores
    python benchmarks/cost/train_step.py --models gpt2-small --batch-size 8      # a GPU or a TPU

FLOPs and bytes accessed are the compiler's for the whole step, and do not change from run to run.
Times are ratios to AdamW's in the same turn of one process: medians over the turns, and quartiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment, interleaved, jax_loop, ratio_cell
from benchmarks.cost import contenders
from benchmarks.cost.contenders import BASELINE, Contender, chosen
from benchmarks.cost.models import MODELS, Model
from examples._shared.reporting import format_table


@dataclass(frozen=True)
class Options:
    """The command line."""

    models: tuple[str, ...] = ("mlp", "mlp1m", "resnet20", "gpt10m")
    methods: tuple[str, ...] = contenders.USUAL
    batch_size: int | None = None
    """64 images or 4 windows of text without it."""
    repetitions: int = 15
    """Turns of each contender."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each network."""
    options = parse(Options, __doc__, argv)
    print(environment())
    compared = contenders.build(options.methods)
    header = ["", "FLOPs, ratio", "bytes, ratio", "temporaries, MB", "ms per step"]
    for name, model in chosen(options.models, MODELS).items():
        size, (number, leaves) = options.batch_size or model.batch_size, model.describe()
        print(f"\n{name}: {number:,} parameters in {leaves} leaves, batch {size}\n")
        rows = measure(model, compared, size, options.repetitions)
        print(format_table([[*header, f"ratio to {BASELINE} [quartiles]"], *rows]), flush=True)


def measure(
    model: Model, compared: dict[str, Contender], batch_size: int, repetitions: int
) -> list[list[str]]:
    """Rows of counts and times for one network."""
    key = jax.random.key(0)
    batch = model.batch(key, batch_size)
    counts, functions = {}, {}
    for name, contender in compared.items():
        step, arguments = contenders.training_program(contender, model, batch_size)
        compiled = step.lower(*arguments).compile()
        costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
        counts[name] = (costs["flops"], costs["bytes accessed"], memory.temp_size_in_bytes)
        carry = contender.init(model.init(key))
        functions[name] = jax_loop(
            lambda carry, batch, f=compiled: f(carry, batch)[0], carry, batch
        )
    timings = interleaved(functions, repetitions, block_seconds=0.2)
    base = counts[BASELINE]
    return [
        [
            name,
            f"{counts[name][0] / base[0]:.3f}",
            f"{counts[name][1] / base[1]:.3f}",
            f"{counts[name][2] / 1e6:.1f}",
            f"{np.median(seconds) * 1e3:.3g}",
            ratio_cell(seconds / timings[BASELINE]),
        ]
        for name, seconds in timings.items()
    ]


if __name__ == "__main__":
    main()
