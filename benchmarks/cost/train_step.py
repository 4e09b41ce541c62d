"""Times whole training steps, and counts what they compute and move.

    pip install -e ".[examples]"
    python benchmarks/train_step.py                          # about five minutes on two cores
    python benchmarks/train_step.py --models gpt2-small --batch-size 8        # a GPU or a TPU

FLOPs and bytes accessed are the compiler's for the whole step, and do not change from run to run.
Times are ratios to AdamW's in the same turn of one process: medians over the turns, and quartiles.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._shared.measuring import environment, format_table, interleaved, ratio_cell
from benchmarks.cost import models
from benchmarks.cost.compile_time import training_program
from benchmarks.cost.contenders import BASELINE, CONTENDERS, Contender, build

BATCH_SIZES = {"mlp": 64, "mlp1m": 64, "resnet20": 64, "gpt10m": 4, "gpt2-small": 4}


def loop(compiled: Any, carry: Any, batch: Any) -> Callable[[int], None]:
    """A function that takes so many training steps."""
    box = [(carry, None)]

    def run(calls: int) -> None:
        for _ in range(calls):
            box[0] = compiled(box[0][0], batch)
        jax.block_until_ready(box[0])

    return run


def measure(
    model: models.Model, contenders: dict[str, Contender], batch_size: int, repetitions: int
) -> list[list[str]]:
    """Rows of counts and times for one network."""
    key = jax.random.key(0)
    batch = model.batch(key, batch_size)
    counts, functions = {}, {}
    for name, contender in contenders.items():
        step, arguments = training_program(contender, model, batch_size)
        compiled = step.lower(*arguments).compile()
        costs, memory = compiled.cost_analysis(), compiled.memory_analysis()
        counts[name] = (costs["flops"], costs["bytes accessed"], memory.temp_size_in_bytes)
        functions[name] = loop(compiled, contender.init(model.init(key)), batch)
    timings = interleaved(functions, repetitions, block_seconds=0.2)
    base = counts[next(iter(counts))]
    return [
        [
            name,
            f"{counts[name][0] / base[0]:.3f}",
            f"{counts[name][1] / base[1]:.3f}",
            f"{counts[name][2] / 1e6:.1f}",
            f"{np.median(timing.seconds) * 1e3:.3g}",
            ratio_cell(timing.ratio),
        ]
        for name, timing in timings.items()
    ]


def main() -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    methods = [BASELINE, "auto_sample", "auto_sample, lean", "explicit"]
    add("--models", nargs="+", choices=models.MODELS, default=list(models.MODELS)[:4])
    add("--methods", nargs="+", choices=CONTENDERS, default=methods)
    add("--batch-size", type=int, help=f"(default: {BATCH_SIZES})")
    add("--peer", type=Path, help="ivon.py of the authors' JAX implementation")
    add("--repetitions", type=int, default=15, help="turns of each contender (default: 15)")
    args = parser.parse_args()
    print(environment())
    contenders = build(args.methods, args.peer)
    header = ["", "FLOPs, ratio", "bytes, ratio", "temporaries, MB", "ms per step"]
    for name in args.models:
        model = models.MODELS[name]()
        size = args.batch_size or BATCH_SIZES[name]
        shapes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
        number = sum(x.size for x in shapes)
        print(f"\n{name}: {number:,} parameters in {len(shapes)} leaves, batch {size}\n")
        rows = measure(model, contenders, size, args.repetitions)
        print(format_table([[*header, f"ratio to {BASELINE} [quartiles]"], *rows]), flush=True)


if __name__ == "__main__":
    main()
