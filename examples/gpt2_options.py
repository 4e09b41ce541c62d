"""Command line of `gpt2.py`, and what follows from it."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from gpt2_data import Corpus
from gpt2_model import MESH_AXES, PRESETS, Config, Layout
from gpt2_training import ADAMW_RATES, IVON_RATES, IVON_RECIPES, Settings
from jax.sharding import AxisType
from reporting import positive

AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def parse_mesh(text: str) -> dict[str, int]:
    """`data=4,model=2` as a dict, for argparse."""
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not AXIS=SIZE with an axis of {', '.join(sizes)}"
            )
        sizes[name] = int(size)
    return sizes


def parser(description: str) -> argparse.ArgumentParser:
    """The options.

    Args:
      description: text above the options.
    """
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--preset", choices=PRESETS, default="tiny")
    add(
        "--optimizer",
        nargs="+",
        choices=["adamw", "ivon"],
        default=["adamw", "ivon"],
        help="one after the other (default: both)",
    )
    add(
        "--data",
        type=Path,
        help="text file, or folder with train.bin and val.bin (uint16 tokens "
        "as nanoGPT's prepare.py writes them); default: Python's standard library, byte by byte",
    )
    add("--vocabulary", type=positive, help="default: 256 for text, 50304 for token files")
    add(
        "--output",
        type=Path,
        default=Path("gpt2_run"),
        help="folder for checkpoints, metrics, and the figure (default: gpt2_run)",
    )
    add("--steps", type=positive, default=300, help="(default: 300)")
    add("--warmup", type=positive, help="steps (default: 2 %% of --steps, as published)")
    add("--batch", type=positive, default=16, help="sequences per step (default: 16)")
    add("--micro-batches", type=positive, default=1, help="per step (default: 1)")
    add("--context", type=positive, help="tokens per sequence (default: the preset's)")
    add("--seed", type=int, default=0)
    group = p.add_argument_group("optimizer (defaults: as published for the preset)")
    add = group.add_argument
    add("--learning-rate", type=float)
    add("--weight-decay", type=float)
    add("--ess", type=float, help="IVON's effective sample size")
    add("--hess-init", type=float)
    add("--b2", type=float, help="IVON's β₂")
    add("--clip-radius", type=float)
    add(
        "--samples",
        choices=["shared", "group"],
        default="shared",
        help="whether all devices share a posterior sample (default) or each index of `data` has "
        "its own",
    )
    add(
        "--skip-bad-steps",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N steps in a row whose gradient is not finite (default: 0)",
    )
    group = p.add_argument_group("devices")
    add = group.add_argument
    add(
        "--mesh",
        type=parse_mesh,
        metavar="data=4,fsdp=2,model=2",
        help="sizes of the mesh's axes (default: all devices on `data`)",
    )
    add("--axis-types", choices=AXIS_TYPES, default="auto", help="of the mesh (default: auto)")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="of the computation (default: float32 on "
        "a CPU, else bfloat16); the posterior is always float32",
    )
    add(
        "--remat",
        action=argparse.BooleanOptionalAction,
        help="recompute layers in the backward pass (default: the preset's)",
    )
    add(
        "--distributed",
        action="store_true",
        help="several processes, found by themselves (TPU pods, Slurm, MPI)",
    )
    add("--coordinator", help="host:port of process 0, where they cannot be found")
    add("--num-processes", type=int)
    add("--process-id", type=int)
    add(
        "--peak-tflops",
        type=float,
        help="of one device, for the utilisation (default: known "
        "devices' data sheet, else measured)",
    )
    group = p.add_argument_group("evaluation and checkpoints")
    add = group.add_argument
    add("--eval-every", type=positive, default=50, help="steps (default: 50)")
    add("--eval-batches", type=positive, default=4, help="of --batch sequences (default: 4)")
    add("--eval-samples", type=positive, default=8, help="posterior samples (default: 8)")
    add("--log-every", type=positive, default=10, help="steps (default: 10)")
    add("--checkpoint-every", type=positive, default=100, help="steps (default: 100)")
    add("--keep", type=positive, default=3, help="newest checkpoints to keep (default: 3)")
    return p


def model_config(args: argparse.Namespace, corpus: Corpus) -> Config:
    """The preset with what the options change."""
    on_cpu = jax.default_backend() == "cpu"
    changes = {
        "vocabulary": corpus.vocabulary,
        "context": args.context,
        "dtype": args.dtype or ("float32" if on_cpu else "bfloat16"),
        "remat": args.remat,
    }
    known = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(PRESETS[args.preset], **known)


def optimizer_settings(args: argparse.Namespace, optimizer: str) -> Settings:
    """The published settings with what the options change."""
    warmup = args.warmup or max(1, round(0.02 * args.steps))
    if optimizer == "adamw":
        chosen = {"learning_rate": ADAMW_RATES[args.preset], "weight_decay": 0.1}
    else:
        published = dict(IVON_RECIPES[args.preset].settings)
        chosen = {k: v for k, v in published.items() if k in Settings.__dataclass_fields__}
        chosen["learning_rate"] = IVON_RATES[args.preset]
    names = ("learning_rate", "weight_decay", "ess", "hess_init", "b2", "clip_radius")
    chosen |= {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    return Settings(
        optimizer,
        steps=args.steps,
        warmup=warmup,
        samples=args.samples,
        skip_bad_steps=args.skip_bad_steps,
        **chosen,
    )


def make_layout(args: argparse.Namespace) -> Layout:
    """The mesh over all devices of all processes.

    Raises:
      ValueError: if the sizes of its axes do not give the number of devices.
    """
    devices = jax.devices()
    sizes = args.mesh or {"data": len(devices), "fsdp": 1, "model": 1}
    if math.prod(sizes.values()) != len(devices):
        text = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"--mesh {text} needs {math.prod(sizes.values())} devices, but there are "
            f"{len(devices)}. (To try a mesh on a CPU: "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8.)"
        )
    types = (AXIS_TYPES[args.axis_types],) * len(MESH_AXES)
    return Layout(jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types))


def check_divisible(args: argparse.Namespace, config: Config, layout: Layout) -> None:
    """Refuses what cannot be split evenly, before anything is compiled.

    Raises:
      ValueError: naming the option.
    """
    sizes = layout.mesh.shape
    groups = sizes["data"] * sizes["fsdp"]
    if args.batch % (args.micro_batches * groups):
        raise ValueError(
            f"--batch {args.batch} cannot be split into {args.micro_batches} micro-batches over "
            f"{groups} devices (data x fsdp): use a multiple of {args.micro_batches * groups}."
        )
    split = {
        ("heads", config.heads): "model",
        ("width", config.width): "fsdp",
        ("vocabulary", config.vocabulary): "model",
    }
    for (name, number), axis in split.items():
        if number % sizes[axis]:
            raise ValueError(
                f"--mesh {axis}={sizes[axis]} cannot split the model's {name} of {number} evenly."
            )


def run_description(
    args: argparse.Namespace, config: Config, settings: Settings, corpus: Corpus
) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued: everything but the devices."""
    model = dataclasses.asdict(config)
    for free in ("dtype", "remat", "unroll"):
        del model[free]
    return {
        "model": model,
        "optimizer": dataclasses.asdict(settings),
        "data": {
            "corpus": corpus.name,
            "tokens": len(corpus.train),
            "batch": args.batch,
            "micro_batches": args.micro_batches,
            "seed": args.seed,
        },
    }
