"""Compiles GPT-2's whole training step for TPU pods, without a TPU, and counts what it costs.

    pip install -e ".[examples]" "jax[tpu]"
    python benchmarks/tpu/tpu_aot.py --results aot.jsonl             # compiles what is missing
    python benchmarks/tpu/tpu_aot.py --results aot.jsonl --table     # prints the tables

The step is that of examples/gpt2, with AdamW, with IVON, and with IVON drawing one sample for each
index of the mesh axis `data`. Counted per chip, in the program that would run: bytes of the state
and of the peak, FLOPs, bytes accessed, and collectives with their bytes. FLOPs and bytes accessed
are the compiler's, which counts the body of the layers' loop once: what IVON adds to them is exact,
the ratio to AdamW's is an upper bound. Collectives count as often as they run.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu only compiles here
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.tpu.hlo_collectives import KINDS, Collective, collectives
from examples._shared.reporting import format_table
from examples.gpt2 import model as gpt2_model
from examples.gpt2 import training as gpt2_training
from examples.gpt2.model import Config, Layout
from examples.gpt2.training import AdamW, Ivon, Settings

Preset = Literal["tiny", "small", "medium", "large"]
Method = Literal["AdamW", "IVON", "IVON, own samples"]
METHODS = get_args(Method)
SEQUENCES = 4  # per index of `data` and `fsdp`: the published batch is 480 in all


@dataclass(frozen=True)
class Options:
    """What to compile and where to keep it."""

    results: Path = Path("tpu_aot.jsonl")
    presets: tuple[Preset, ...] = get_args(Preset)
    # such as v5e:4x4, v5p:4x4x4, v6e:8x8
    topologies: tuple[str, ...] = ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:4x4x4")
    methods: tuple[Method, ...] = METHODS
    micro_batches: int = 1  # per step
    table: bool = False  # only print what is in --results


def make_layout(topology: str) -> Layout:
    """A mesh: tensor parallel over 2, weights in up to 16 shards, the rest for the batch alone."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError('compiling for TPUs needs libtpu: pip install "jax[tpu]"')
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    fsdp = min(16, len(devices) // 4)
    grid = np.array(devices).reshape(-1, fsdp, 2)
    return Layout(Mesh(grid, gpt2_model.MESH_AXES, axis_types=(AxisType.Auto,) * 3))


def compile_step(
    config: Config, layout: Layout, settings: Settings, micro_batches: int
) -> tuple[Any, int]:
    """The compiled step, and the bytes of its state on one chip."""
    trainer = gpt2_training.make_trainer(config, layout, settings)
    params = gpt2_model.abstract_params(config, layout)
    state = gpt2_training.abstract_state(trainer, params, layout)
    rows = SEQUENCES * layout.mesh.shape["data"] * layout.mesh.shape["fsdp"]
    shape, split = (micro_batches, rows, config.context + 1), layout.sharding(None, "batch", None)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(trainer.step, donate_argnums=0, out_shardings=(shardings, layout.sharding()))
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
        compiled = step.lower(state, batch).compile()
    leaves = jax.tree.leaves(state)
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return compiled, sum(sizes)


def settings(method: str, layout: Layout) -> Settings:
    """The settings of GPT-2 small: rates and lengths do not change what is counted."""
    if method == "AdamW":
        return AdamW(6e-4, 100_000, 2_000)
    own = method.endswith("own samples")
    return Ivon(300.0, 100_000, 2_000, samples=layout.mesh.shape["data"] if own else 1)


def measure(preset: str, topology: str, micro_batches: int, method: str) -> dict[str, Any]:
    """Everything that is counted for one row of the table."""
    start = time.perf_counter()
    config, layout = gpt2_model.PRESETS[preset], make_layout(topology)
    compiled, state_bytes = compile_step(config, layout, settings(method, layout), micro_batches)
    costs = compiled.cost_analysis()
    found = collectives(compiled.as_text())
    return {
        "preset": preset,
        "topology": topology,
        "mesh": dict(layout.mesh.shape),
        "micro_batches": micro_batches,
        "method": method,
        "state_bytes": state_bytes,
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
        "flops": costs["flops"],
        "bytes_accessed": costs["bytes accessed"],
        "collectives": [[x.kind, list(x.shapes), n] for x, n in sorted(found.items())],
        "seconds": time.perf_counter() - start,
        "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
    }


Key = tuple[str, str, int, str]
Rows = dict[Key, dict[str, Any]]


def read(path: Path) -> Rows:
    """Rows by preset, topology, micro-batches and method."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    return {(r["preset"], r["topology"], r["micro_batches"], r["method"]): r for r in rows}


def counted(row: dict[str, Any]) -> Counter[Collective]:
    """The collectives of a row, with shapes written without axes of length 1."""
    found: Counter[Collective] = Counter()
    for kind, shapes, n in row["collectives"]:
        plain = (re.sub(r"(?<=[\[,])1(,|(?=\]))", "", shape) for shape in shapes)
        found[Collective(kind, tuple(sorted(plain)))] += n
    return found


def total(found: Counter[Collective], kind: str) -> tuple[int, float]:
    """How many of a kind, and their megabytes."""
    members = {x: n for x, n in found.items() if x.kind == kind}
    return sum(members.values()), sum(x.num_bytes() * n for x, n in members.items()) / 1e6


def tables(rows: Rows) -> str:
    """One table of costs per chip, and how IVON's collectives differ from AdamW's."""
    kinds = [k for k in KINDS if any(total(counted(row), k)[0] for row in rows.values())]
    header = ["preset, chips", "method", "state MB", "peak MB", "GFLOP", "GB accessed"]
    table = [[*header, *(f"{kind} (MB)" for kind in kinds)]]
    notes = []
    for preset, topology, micro_batches, method in sorted(rows, key=order):
        row = rows[preset, topology, micro_batches, method]
        base = rows.get((preset, topology, micro_batches, "AdamW"), row)
        mesh = "x".join(str(size) for size in row["mesh"].values())
        found = counted(row)
        more = "" if micro_batches == 1 else f", {micro_batches} micro-batches"
        name = f"{preset}, {topology} ({mesh}){more}"
        table.append(
            [
                name if row is base else "",
                method,
                f"{row['state_bytes'] / 1e6:.1f}",
                cell(row, base, "peak_bytes", 1e6, 0),
                cell(row, base, "flops", 1e9, 0),
                cell(row, base, "bytes_accessed", 1e9, 2),
                *("{} ({:.1f})".format(*total(found, kind)) for kind in kinds),
            ]
        )
        if row is not base:
            notes.append(f"{name}, {method}: {difference(counted(base), found)}")
    return format_table(table) + "\n\nCollectives against AdamW's step:\n" + "\n".join(notes)


def order(key: Key) -> tuple[Any, ...]:
    """Small models and pods first."""
    preset, topology, micro_batches, method = key
    generation, sides = topology.split(":")
    chips = math.prod(int(side) for side in sides.split("x"))
    presets = list(gpt2_model.PRESETS)
    return presets.index(preset), micro_batches, generation, chips, METHODS.index(method)


def cell(row: dict[str, Any], base: dict[str, Any], key: str, unit: float, digits: int) -> str:
    """A number, and beside it how it compares with AdamW's."""
    text = f"{row[key] / unit:.{digits}f}"
    return text if row is base else f"{text} x{row[key] / base[key]:.3f}"


def difference(base: Counter[Collective], found: Counter[Collective]) -> str:
    """What a program has more and less than another, kind by kind."""
    if base == found:
        return "the same in number, kind and shape"
    parts = []
    for kind in KINDS:
        (before, old), (after, new) = total(base, kind), total(found, kind)
        if (before, old) != (after, new):
            parts.append(f"{after - before:+d} {kind} ({new - old:+.1f} MB)")
    return ", ".join(parts) or "the same in number, kind and size"


def main(args: Sequence[str] | None = None) -> None:
    """Compiles what is missing in the file of results, and prints the tables."""
    options = tyro.cli(Options, args=args, description=(__doc__ or "").splitlines()[0])
    rows = read(options.results)
    chosen = product(options.presets, options.topologies, [options.micro_batches], options.methods)
    wanted = [] if options.table else list(chosen)
    for number, key in enumerate(wanted, 1):
        if key in rows:
            continue
        print(f"{number} of {len(wanted)}: {', '.join(map(str, key))}", flush=True)
        rows[key] = measure(*key)
        with options.results.open("a") as file:
            file.write(json.dumps(rows[key]) + "\n")
        print(f"  compiled in {rows[key]['seconds']:.0f} s", flush=True)
    print(tables(rows if options.table else {key: rows[key] for key in wanted}))


if __name__ == "__main__":
    main()
