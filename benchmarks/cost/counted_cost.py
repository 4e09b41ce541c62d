"""Counts what the optimizer's step moves and computes, by the compiler, for this machine and TPUs.

    pip install -e ".[examples]"
    python benchmarks/counted_cost.py
    pip install "jax[tpu]" && python benchmarks/counted_cost.py --tpu v5e:2x2      # without a TPU

Per parameter of float32, for the update and `optax.apply_updates` with donated buffers: bytes that
all kernels read and write, floating-point operations, temporaries, and what exists between two
steps (parameters and state). Nothing is run, so that the figures do not change from run to run.
On TPUs, arrays that are copied to on-chip memory and back are counted several times: look at the
leaf that is too large for it.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

if "--tpu" in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu only compiles
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks._shared.measuring import environment, format_table
from benchmarks.cost.contenders import CONTENDERS, Contender
from benchmarks.cost.optimizer_step import make_step
from benchmarks.cost.trees import Shapes, abstract, gpt2

TREES: dict[str, Shapes] = {
    "one leaf of 32768 x 2048": {"w": (32768, 2048)},
    "gpt2 of 1e7, 148 leaves": gpt2(10_000_000),
}


def sharding(tpu: str | None) -> Any:
    """Of one device of a TPU topology, or nothing for this machine."""
    if tpu is None:
        return None
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit('Compiling for TPUs needs libtpu: pip install "jax[tpu]"')
    devices = topologies.get_topology_desc(topology_name=tpu, platform="tpu").devices
    return SingleDeviceSharding(devices[0])


def count(contender: Contender, shapes: Shapes, where: Any) -> list[str]:
    """The figures of one contender."""
    params = abstract(shapes, where)
    number = sum(int(np.prod(shape)) for shape in shapes.values())
    carry = jax.eval_shape(contender.init, params)
    carry = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=x.weak_type),
        carry,
    )
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(carry) if x.size > 4)
    point = () if len(carry) == 2 else params
    compiled = make_step(contender).lower((carry, point), params).compile()
    costs = compiled.cost_analysis()
    return [
        f"{kept / number:.1f}",
        f"{costs['bytes accessed'] / number:.2f}",
        f"{costs['flops'] / number:.0f}",
        f"{compiled.memory_analysis().temp_size_in_bytes / number:.2f}",
    ]


def main() -> None:
    """Prints a table for each tree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tpu", metavar="TOPOLOGY", help="such as v5e:2x2 or v5p:2x2x1, compiled by libtpu")
    add("--methods", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args()
    print(environment())
    if args.tpu:
        print(f"compiled for {args.tpu} by libtpu {importlib.metadata.version('libtpu')}")
    header = ["bytes per parameter:", "kept", "accessed", "FLOPs", "temporaries"]
    for tree, shapes in TREES.items():
        rows = [[n, *count(CONTENDERS[n](), shapes, sharding(args.tpu))] for n in args.methods]
        print(f"\n{tree}\n\n{format_table([header, *rows])}", flush=True)


if __name__ == "__main__":
    main()
