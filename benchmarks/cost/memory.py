"""Memory of whole training steps: what is kept between steps, and the peak within one.

    python benchmarks/cost/memory.py
    pip install "jax[tpu]"
    python benchmarks/cost/memory.py --tpu v5e:2x2 --models mlp1m gpt10m      # without a TPU

Bytes per parameter, from the compiler (nothing is run): parameters and state; the same with the
gradients, activations and temporaries of a step, at its peak.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks._shared.journal import parse
from benchmarks._shared.measuring import environment
from benchmarks.cost.contenders import (
    BASELINE,
    CONTENDERS,
    Contender,
    build,
    kept,
    models,
    monte_carlo,
    target,
    training_program,
)
from benchmarks.cost.models import Model
from examples._shared.reporting import format_table


@dataclass(frozen=True)
class Options:
    """The command line."""

    tpu: str | None = None
    """Topology such as v5e:2x2, compiled by libtpu."""
    models: tuple[str, ...] = ("mlp1m", "resnet20", "gpt10m")
    methods: tuple[str, ...] = tuple(name for name in CONTENDERS if name != "antithetic")
    batch_size: int | None = None
    """64 images or 4 windows of text without it."""


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each network."""
    options = parse(Options, __doc__, argv)
    where = target(options.tpu)
    print(environment())
    contenders = build(options.methods)
    contenders |= {f"mc_value_and_grad, {n} samples": monte_carlo(n) for n in (1, 4)}
    for name, model in models(options.models).items():
        size, (number, _) = options.batch_size or model.batch_size, model.describe()
        measured = {n: measure(c, model, size, where) for n, c in contenders.items()}
        base = measured[BASELINE][1]
        rows = [
            [method, f"{between / number:.1f}", f"{peak / number:.1f}", f"{peak / base:.3f}"]
            for method, (between, peak) in measured.items()
        ]
        print(f"\n{name}: {number:,} parameters, batch {size}\n")
        header = ["bytes per parameter:", "kept", "peak", "peak, ratio"]
        print(format_table([header, *rows]), flush=True)


def measure(contender: Contender, model: Model, size: int, where: Any) -> tuple[int, int]:
    """Bytes kept, and at the peak."""
    step, arguments = training_program(contender, model, size, where)
    memory = step.lower(*arguments).compile().memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return kept(arguments[0]), peak - memory.alias_size_in_bytes


if __name__ == "__main__":
    main()
