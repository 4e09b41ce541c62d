"""Memory of whole training steps: what is kept between steps, and the peak within one.

    pip install -e ".[examples]"
    python benchmarks/memory.py
    pip install "jax[tpu]"
    python benchmarks/memory.py --tpu v5e:2x2 --models mlp1m gpt10m      # without a TPU

Bytes per parameter, from the compiler (nothing is run): parameters and state; the same with the
gradients, activations and temporaries of a step, at its peak.
"""

import argparse
import importlib.metadata
import os
import sys
from typing import Any

if "--tpu" in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu only compiles
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax

from benchmarks._shared.measuring import environment, format_table
from benchmarks.cost import models
from benchmarks.cost.compile_time import training_program
from benchmarks.cost.contenders import BASELINE, CONTENDERS, Contender
from benchmarks.cost.counted_cost import sharding
from benchmarks.cost.train_step import BATCH_SIZES
from ivon_jax import ivon, mc_value_and_grad


def monte_carlo(num_samples: int) -> Contender:
    """`mc_value_and_grad`, one sample after another, with the state alone carried."""
    tx = ivon(1e-3, ess=1e6)

    def init(params: Any) -> Any:
        return tx.init(params), jax.random.key(0)

    def step(carry: Any, value_and_grad: Any) -> tuple[Any, jax.Array]:
        state, key = carry
        key, draw_key = jax.random.split(key)
        estimate = mc_value_and_grad(value_and_grad.loss, num_samples)
        value, grads, hess = estimate(draw_key, state)
        return (tx.update(grads, state, hess=hess)[1], key), value

    return Contender(init, step)


def measure(contender: Contender, model: models.Model, size: int, where: Any) -> tuple[int, int]:
    """Bytes kept, and at the peak."""
    step, (carry, batch) = training_program(contender, model, size)
    carry, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=x.weak_type),
        (carry, batch),
    )
    memory = step.lower(carry, batch).compile().memory_analysis()
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(carry) if x.size > 4)
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return kept, peak - memory.alias_size_in_bytes


def main() -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tpu", metavar="TOPOLOGY", help="such as v5e:2x2, compiled by libtpu")
    add("--models", nargs="+", choices=models.MODELS, default=["mlp1m", "resnet20", "gpt10m"])
    add("--batch-size", type=int, help=f"(default: {BATCH_SIZES})")
    args = parser.parse_args()
    print(environment())
    if args.tpu:
        print(f"compiled for {args.tpu} by libtpu {importlib.metadata.version('libtpu')}")
    built = {name: make() for name, make in CONTENDERS.items() if name != "antithetic"}
    built |= {f"mc_value_and_grad, {n} samples": monte_carlo(n) for n in (1, 4)}
    for name in args.models:
        model, size = models.MODELS[name](), args.batch_size or BATCH_SIZES[name]
        shapes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
        number = sum(x.size for x in shapes)
        rows, base = [], 0
        for method, contender in built.items():
            kept, peak = measure(contender, model, size, sharding(args.tpu))
            base = peak if method == BASELINE else base
            rows.append(
                [method, f"{kept / number:.1f}", f"{peak / number:.1f}", f"{peak / base:.3f}"]
            )
        print(f"\n{name}: {number:,} parameters, batch {size}\n")
        header = ["bytes per parameter:", "kept", "peak", "peak, ratio"]
        print(format_table([header, *rows]), flush=True)


if __name__ == "__main__":
    main()
