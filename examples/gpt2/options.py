"""Command line of `gpt2.py`, and what follows from it."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AxisType

from examples._shared.reporting import positive
from examples.gpt2.data import Corpus, fingerprint
from examples.gpt2.model import MESH_AXES, PRESETS, Config, Layout
from examples.gpt2.training import ADAMW_RATES, IVON_RECIPES, TINY_IVON_RATE, AdamW, Ivon, Settings

OPTIMIZER_OPTIONS = (
    "learning_rate",
    "weight_decay",
    "ess",
    "hess_init",
    "b2",
    "clip_radius",
    "samples",
)
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def parse_mesh(text: str) -> dict[str, int]:
    """`data=4,model=2` as a dict, for argparse."""
    sizes: dict[str, int] = dict.fromkeys(MESH_AXES, 1)
    seen: set[str] = set()
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1 or name in seen:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not AXIS=SIZE with another axis of {', '.join(sizes)}"
            )
        sizes[name] = int(size)
        seen.add(name)
    return sizes


def positive_float(text: str) -> float:
    """A positive number, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be positive and finite")
    return number


def local_folder(text: str) -> Path:
    """A folder on a file system, for argparse."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is not on a file system: mount the bucket, and give the folder where it is"
        )
    return Path(text)


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
        type=local_folder,
        default=Path("gpt2_run"),
        help="folder for checkpoints, metrics, and the figure (default: gpt2_run)",
    )
    add("--steps", type=positive, default=300, help="(default: 300)")
    add("--warmup", type=positive, help="steps (default: 2 %% of --steps, as published)")
    add("--batch", type=positive, default=16, help="sequences per step (default: 16)")
    add("--micro-batches", type=positive, default=1, help="per step (default: 1)")
    add("--context", type=positive, help="tokens per sequence (default: the preset's)")
    add("--seed", type=int, default=0)
    group = p.add_argument_group("optimizer, if --optimizer names one (defaults: the preset's)")
    add = group.add_argument
    add("--learning-rate", type=positive_float)
    add("--weight-decay", type=float)
    add("--ess", type=positive_float, help="IVON's effective sample size")
    add("--hess-init", type=positive_float)
    add("--b2", type=float, help="IVON's β₂")
    add("--clip-radius", type=positive_float)
    add(
        "--samples",
        type=positive,
        help="posterior samples of every micro-batch, each on its own part of it: a multiple of "
        "the mesh's `data`, so that each index of it evaluates others (default: 1 for all)",
    )
    p.add_argument(
        "--skip-bad-steps",
        action="store_true",
        help="leave the state as it is where a gradient is not finite",
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
        type=positive_float,
        help="of one device, for the utilisation (default: known "
        "devices' data sheet, else measured)",
    )
    group = p.add_argument_group("evaluation and checkpoints")
    add = group.add_argument
    add("--eval-every", type=positive, default=50, help="steps (default: 50)")
    add("--eval-batches", type=positive, default=8, help="of a micro-batch each (default: 8)")
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
    """The preset's settings with what the options change.

    Raises:
      ValueError: if an option is not one of this optimizer, or could be meant for another.
    """
    kind = AdamW if optimizer == "adamw" else Ivon
    given = {name: getattr(args, name) for name in OPTIMIZER_OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    options = ", ".join("--" + name.replace("_", "-") for name in given)
    if given and len(args.optimizer) > 1:
        raise ValueError(f"{options} would change both optimizers: name one with --optimizer.")
    if set(given) - {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"not all of {options} are options of {optimizer}.")
    warmup = args.warmup or max(1, round(0.02 * args.steps))
    if warmup >= args.steps:
        raise ValueError(f"--warmup {warmup} must be less than --steps {args.steps}.")
    if kind is AdamW:
        chosen = {"learning_rate": ADAMW_RATES[args.preset]}
    else:
        published = IVON_RECIPES[args.preset].settings
        chosen = {name: published[name] for name in OPTIMIZER_OPTIONS if name in published}
        if args.preset == "tiny":
            chosen["learning_rate"] = TINY_IVON_RATE
    return kind(**{"steps": args.steps, "warmup": warmup} | chosen | given)


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
    samples = args.samples or 1
    if samples > 1 and samples % sizes["data"]:
        raise ValueError(
            f"--samples {samples} cannot be split over data={sizes['data']}: use a multiple of it."
        )
    parts = args.micro_batches * math.lcm(samples, sizes["data"]) * sizes["fsdp"]
    if args.batch % parts:
        raise ValueError(
            f"--batch {args.batch} cannot be split into {args.micro_batches} micro-batches of "
            f"{samples} samples over data={sizes['data']}, fsdp={sizes['fsdp']}: use a multiple of "
            f"{parts}."
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
        "optimizer": {"name": type(settings).__name__, **dataclasses.asdict(settings)},
        "data": {
            "corpus": corpus.name,
            "fingerprint": fingerprint(corpus),
            "batch": args.batch,
            "micro_batches": args.micro_batches,
            "seed": args.seed,
        },
    }
