"""The command line of `main.py`, and what follows from it: mesh, model and optimizer."""

import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import AxisType

from examples.gpt2.data import Corpus
from examples.gpt2.model import MESH_AXES, PRESETS, Config, Layout
from examples.gpt2.training import ADAMW_RATES, IVON_SETTINGS, AdamW, Ivon, Settings

TUNED = ("learning_rate", "ess", "hess_init", "b2", "samples")


@dataclass(frozen=True)
class Options:
    """What can be given on the command line; the comments are its help."""

    preset: Literal["tiny", "small", "medium", "large"] = "tiny"
    # one after the other
    optimizer: tuple[Literal["adamw", "ivon"], ...] = ("adamw", "ivon")
    # text file, or folder with train.bin and val.bin (uint16 tokens as nanoGPT's prepare.py
    # writes them); None: Python's standard library, byte by byte
    data: Path | None = None
    vocabulary: int | None = None  # None: 256 for text, 50304 for token files
    output: Path = Path("gpt2_run")  # folder for checkpoints, metrics and the figure
    steps: int = 300
    warmup: int | None = None  # steps; None: 2 % of --steps, as published
    batch: int = 16  # sequences per step
    micro_batches: int = 1  # per step
    context: int | None = None  # tokens per sequence; None: the preset's
    seed: int = 0
    skip_bad_steps: bool = False  # leave the state as it is where a gradient is not finite

    # of the optimizer, if --optimizer names one; None: the preset's
    learning_rate: float | None = None
    ess: float | None = None  # IVON's effective sample size
    hess_init: float | None = None  # IVON's
    b2: float | None = None  # IVON's β₂
    # posterior samples of every micro-batch, each on its own part of it: a multiple of the mesh's
    # `data`, so that each index of it evaluates others; None: 1 for all
    samples: int | None = None

    # sizes of the mesh's axes, as in data=4,fsdp=2,model=2; empty: all devices on `data`
    mesh: str = ""
    axis_types: Literal["auto", "explicit"] = "auto"  # of the mesh
    remat: bool = True  # recompute layers in the backward pass (the tiny preset never does)
    distributed: bool = False  # several processes, found by themselves (TPU pods, Slurm, MPI)
    coordinator: str | None = None  # host:port of process 0, where they cannot be found
    num_processes: int | None = None
    process_id: int | None = None

    eval_every: int = 50  # steps
    eval_batches: int = 8  # of a micro-batch each
    eval_samples: int = 8  # of the posterior
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps
    keep: int = 3  # newest checkpoints

    def check(self) -> None:
        """Refuses values that no run can have."""
        free = ("seed", "process_id")
        for name, value in vars(self).items():
            if type(value) in (int, float) and name not in free and not 0 < value < math.inf:
                raise ValueError(f"{flag(name)} must be positive and finite, but is {value}.")
        if re.match(r"\w+:/", str(self.output)):
            raise ValueError(
                f"--output {self.output} is not on a file system: mount the bucket, and give the "
                "folder where it is."
            )


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def make_layout(options: Options) -> Layout:
    """The mesh over all devices of all processes."""
    count = jax.device_count()
    sizes = mesh_sizes(options.mesh or f"data={count}")
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"--mesh {options.mesh} needs {math.prod(sizes.values())} devices, but there are "
            f"{count}. (To try a mesh on a CPU: "
            "XLA_FLAGS=--xla_force_host_platform_device_count=8.)"
        )
    kind = AxisType.Explicit if options.axis_types == "explicit" else AxisType.Auto
    return Layout(jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=(kind,) * 3))


def mesh_sizes(text: str) -> dict[str, int]:
    """`data=4,model=2` as sizes of all axes."""
    found = re.findall(rf"({'|'.join(MESH_AXES)})=([1-9]\d*)(?:,|$)", text)
    if len(dict(found)) != len(text.split(",")):
        raise ValueError(f"--mesh {text} is not AXIS=SIZE,… with axes of {', '.join(MESH_AXES)}.")
    return dict.fromkeys(MESH_AXES, 1) | {axis: int(size) for axis, size in found}


def model_config(options: Options, corpus: Corpus) -> Config:
    """The preset with what the options change."""
    preset = PRESETS[options.preset]
    return dataclasses.replace(
        preset,
        vocabulary=corpus.vocabulary,
        context=options.context or preset.context,
        dtype="float32" if jax.default_backend() == "cpu" else "bfloat16",
        remat=preset.remat and options.remat,
    )


def optimizer_settings(options: Options, optimizer: str) -> Settings:
    """The preset's settings with what the options change."""
    kind = AdamW if optimizer == "adamw" else Ivon
    own = {field.name for field in dataclasses.fields(kind)}
    given = {name: getattr(options, name) for name in TUNED}
    given = {name: value for name, value in given.items() if value is not None}
    flags = ", ".join(map(flag, given))
    if given and len(options.optimizer) > 1:
        raise ValueError(f"{flags} would change both optimizers: name one with --optimizer.")
    if set(given) - own:
        raise ValueError(f"not all of {flags} are options of {optimizer}.")
    warmup = options.warmup or max(1, round(0.02 * options.steps))
    if warmup >= options.steps:
        raise ValueError(f"--warmup {warmup} must be less than --steps {options.steps}.")
    if kind is AdamW:
        chosen: dict[str, Any] = {"learning_rate": ADAMW_RATES[options.preset]}
    else:
        published = IVON_SETTINGS[options.preset]
        chosen = {name: value for name, value in published.items() if name in own}
    return kind(**{"steps": options.steps, "warmup": warmup} | chosen | given)


def check_divisible(options: Options, config: Config, sizes: dict[str, int]) -> None:
    """Refuses what cannot be split evenly over the mesh, before anything is compiled."""
    data, fsdp, samples = sizes["data"], sizes["fsdp"], options.samples or 1
    if samples > 1 and samples % data:
        raise ValueError(
            f"--samples {samples} cannot be split over data={data}: use a multiple of it."
        )
    parts = options.micro_batches * math.lcm(samples, data) * fsdp
    if options.batch % parts:
        raise ValueError(
            f"--batch {options.batch} cannot be split into {options.micro_batches} micro-batches "
            f"of {samples} samples over data={data}, fsdp={fsdp}: use a multiple of {parts}."
        )
    for name, axis in (("heads", "model"), ("width", "fsdp"), ("vocabulary", "model")):
        number = getattr(config, name)
        if number % sizes[axis]:
            raise ValueError(
                f"--mesh {axis}={sizes[axis]} cannot split the model's {name} of {number} evenly."
            )


def run_description(
    options: Options, config: Config, settings: Settings, corpus: Corpus
) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued: everything but the devices."""
    data = {name: getattr(options, name) for name in ("batch", "micro_batches", "seed")}
    free = {"dtype", "remat"}
    return {
        "model": {k: v for k, v in dataclasses.asdict(config).items() if k not in free},
        "optimizer": {"name": type(settings).__name__, **dataclasses.asdict(settings)},
        "data": {"corpus": corpus.name, "fingerprint": corpus.fingerprint(), **data},
    }
