"""Compiles GPT-2's whole training step for TPU pods, without a TPU, and counts what it costs.

    pip install -e ".[examples]" "jax[tpu]"
    python benchmarks/tpu_aot.py --results aot.jsonl             # compiles what is not there yet
    python benchmarks/tpu_aot.py --results aot.jsonl --table     # prints the tables

The step is that of examples/gpt2.py, with AdamW, with IVON, and with IVON drawing one sample for
each index of the mesh axis `data`. Counted, per chip: bytes of state, peak memory and collectives,
from the program that would run; FLOPs and bytes accessed, for which the layers' loop has to be
counted by hand, since the compiler counts its body once: two layers per round against one give the
cost of a layer.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu only compiles here
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import gpt2_model
import gpt2_training
import jax
import jax.numpy as jnp
import numpy as np
from gpt2_model import Config, Layout
from gpt2_training import Settings
from hlo_collectives import KINDS, Collective, collectives
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from reporting import format_table

METHODS = {
    "AdamW": Settings("adamw", 6e-4, 100_000, 2_000, 0.1),
    "IVON": Settings("ivon", 300.0, 100_000, 2_000, 1e-6),
    "IVON, sample per group": Settings("ivon", 300.0, 100_000, 2_000, 1e-6, samples="group"),
}
SEQUENCES = 4  # per index of `data` and `fsdp`: the published batch is 480 in all
DEFAULT_TOPOLOGIES = ["v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:4x4x4"]


def mesh_shape(chips: int) -> dict[str, int]:
    """Tensor parallel over 2, weights in up to 16 shards, the rest for the batch alone."""
    fsdp = min(16, chips // 4)
    return {"data": chips // (2 * fsdp), "fsdp": fsdp, "model": 2}


def make_layout(topology: str) -> Layout:
    """A mesh over the chips of a topology such as "v5e:4x4"."""
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError('compiling for TPUs needs libtpu: pip install "jax[tpu]"')
    devices = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    shape = mesh_shape(len(devices))
    grid = np.array(devices).reshape(tuple(shape.values()))
    return Layout(Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * 3))


def compile_step(config: Config, layout: Layout, settings: Settings) -> tuple[Any, int]:
    """The compiled step, and the bytes of its state on one chip."""
    trainer = gpt2_training.make_trainer(config, layout, settings)
    params = gpt2_model.abstract_params(config, layout)
    state = gpt2_training.abstract_state(trainer, params, layout)
    rows = SEQUENCES * layout.mesh.shape["data"] * layout.mesh.shape["fsdp"]
    batch = jax.ShapeDtypeStruct(
        (1, rows, config.context + 1), jnp.int32, sharding=layout.sharding(None, "batch", None)
    )
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(trainer.step, donate_argnums=0, out_shardings=(shardings, layout.sharding()))
    with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
        compiled = step.lower(state, batch).compile()
    return compiled, sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )


def measure(preset: str, topology: str, method: str, costs: bool) -> dict[str, Any]:
    """Everything that is counted for one row of the table; FLOPs and bytes only if `costs`."""
    start = time.perf_counter()
    config, layout = gpt2_model.PRESETS[preset], make_layout(topology)
    compiled, state_bytes = compile_step(config, layout, METHODS[method])
    found = collectives(compiled.as_text())
    return {
        "preset": preset,
        "topology": topology,
        "mesh": dict(layout.mesh.shape),
        "method": method,
        "state_bytes": state_bytes,
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
        **(layer_costs(config, layout, METHODS[method], compiled) if costs else {}),
        "collectives": [[x.kind, list(x.shapes), n] for x, n in sorted(found.items())],
        "seconds": time.perf_counter() - start,
        "versions": {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")},
    }


def layer_costs(
    config: Config, layout: Layout, settings: Settings, compiled: Any
) -> dict[str, float]:
    """FLOPs and bytes accessed, with every layer counted."""
    two = dataclasses.replace(config, unroll=2)
    twice = compile_step(two, layout, settings)[0].cost_analysis()
    once = compiled.cost_analysis()

    def total(name: str) -> float:
        return once[name] + (config.depth - 1) * (twice[name] - once[name])

    return {"flops": total("flops"), "bytes_accessed": total("bytes accessed")}


def read(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows by preset, topology and method."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = map(json.loads, lines)
    return {(row["preset"], row["topology"], row["method"]): row for row in rows}


def counted(row: dict[str, Any]) -> Counter[Collective]:
    """The collectives of a row."""
    return Counter({Collective(kind, tuple(s)): n for kind, s, n in row["collectives"]})


def kind_cell(found: Counter[Collective], kind: str) -> str:
    """`how many (megabytes)`."""
    members = {x: n for x, n in found.items() if x.kind == kind}
    total = sum(x.num_bytes() * n for x, n in members.items())
    return f"{sum(members.values())} ({total / 1e6:.1f})" if members else "0"


def tables(rows: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """One table of costs per chip, and what IVON's collectives have beside AdamW's."""
    kinds = [k for k in KINDS if any(x.kind == k for row in rows.values() for x in counted(row))]
    header = ["preset, chips", "method", "state MB", "peak MB", "GFLOP", "GB accessed"]
    table = [[*header, *(f"{kind} (MB)" for kind in kinds)]]
    notes = []
    for (preset, topology, method), row in rows.items():
        base = rows.get((preset, topology, "AdamW"), row)
        mesh = "x".join(str(size) for size in row["mesh"].values())

        def cell(key: str, unit: float, digits: int, row: Any = row, base: Any = base) -> str:
            if key not in row:
                return "-"
            text = f"{row[key] / unit:.{digits}f}"
            return text if row is base else f"{text} x{row[key] / base[key]:.3f}"

        found = counted(row)
        table.append(
            [
                f"{preset}, {topology} ({mesh})" if row is base else "",
                method,
                cell("state_bytes", 1e6, 1),
                cell("peak_bytes", 1e6, 0),
                cell("flops", 1e9, 0),
                cell("bytes_accessed", 1e9, 2),
                *(kind_cell(found, kind) for kind in kinds),
            ]
        )
        if row is not base:
            notes.append(f"{preset}, {topology}, {method}: {difference(counted(base), found)}")
    return format_table(table) + "\n\nCollectives against AdamW's step:\n" + "\n".join(notes)


def difference(base: Counter[Collective], found: Counter[Collective]) -> str:
    """What a program has more and less than another, in words."""
    base, found = drop_ones(base), drop_ones(found)
    if base == found:
        return "the same, in number, kind and shape"
    gathers = {x: n for x, n in (found - base).items() if x.kind != "all-reduce"}
    size = {
        name: sum(x.num_bytes() * n for x, n in c.items())
        for name, c in (("a", base), ("b", found))
    }
    count = sum(found.values()) - sum(base.values())
    more = "other kinds: " + str(gathers) if gathers else "no gather or other kind"
    return f"{count:+d} all-reduce, {(size['b'] - size['a']) / 1e6:+.1f} MB; {more}"


def drop_ones(found: Counter[Collective]) -> Counter[Collective]:
    """The same with shapes written without axes of length 1, in a fixed order."""
    result: Counter[Collective] = Counter()
    for (kind, shapes), n in found.items():
        plain = []
        for shape in shapes:
            dtype, dims = shape[:-1].split("[")
            kept = [d for d in dims.split(",") if d not in ("", "1")]
            plain.append(f"{dtype}[{','.join(kept)}]")
        result[Collective(kind, tuple(sorted(plain)))] += n
    return result


def main() -> None:
    """Compiles what is missing in the file of results, or prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("tpu_aot.jsonl"))
    parser.add_argument(
        "--presets", nargs="+", choices=gpt2_model.PRESETS, default=list(gpt2_model.PRESETS)
    )
    parser.add_argument(
        "--topologies",
        nargs="+",
        default=DEFAULT_TOPOLOGIES,
        help="such as v5e:4x4, v5p:4x4x4, v6e:8x8",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--costs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="FLOPs and bytes accessed as well, for which everything is compiled once more",
    )
    parser.add_argument("--table", action="store_true", help="only print what is in --results")
    args = parser.parse_args()
    rows = read(args.results)
    wanted = [(p, t, m) for p in args.presets for t in args.topologies for m in args.methods]
    if not args.table:
        for number, (preset, topology, method) in enumerate(wanted, 1):
            print(f"{number} of {len(wanted)}: {preset}, {topology}, {method}", flush=True)
            if (preset, topology, method) in rows:
                continue
            row = measure(preset, topology, method, args.costs)
            rows[preset, topology, method] = row
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"  compiled in {row['seconds']:.0f} s", flush=True)
    print(tables({key: rows[key] for key in wanted if key in rows}))


if __name__ == "__main__":
    main()
