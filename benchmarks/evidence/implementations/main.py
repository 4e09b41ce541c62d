"""Against other implementations: the authors' `ivon-opt` and PyTorch's AdamW, and ours and optax's.

    pip install -e ".[examples,oracle]"
    python benchmarks/evidence/implementations/main.py             # some 4 minutes on two cores
    python benchmarks/evidence/implementations/main.py --report    # tables

Both sides train the same perceptron on scikit-learn's digits from the same weights, with the same
batches, settings and number of gradients; only IVON's noise differs. Test NLL is compared by seed,
and a training step is timed in turn, in one process.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, parse, read_journal, write_tables
from benchmarks._shared.measuring import interleaved, ratio_cell
from benchmarks._shared.tuning import described
from benchmarks.evidence.implementations.task import SETTINGS, Task, Trained
from examples._shared.reporting import cell, mean_and_error
from ivon_jax import metrics

BATCH_SIZE = 50
SIDES = ("jax", "torch")
NAMES = {
    ("ivon", "jax"): "ivon_jax",
    ("ivon", "torch"): "ivon-opt (PyTorch)",
    ("adamw", "jax"): "optax AdamW",
    ("adamw", "torch"): "PyTorch AdamW",
}
ERRORS = 2.0  # standard errors that make a difference
METRICS = {
    "nll": ("NLL", 1, 4),
    "nll_samples": ("NLL, samples", 1, 4),
    "accuracy": ("accuracy, %", 100, 2),
    "accuracy_samples": ("accuracy, %, samples", 100, 2),
}
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by side and seed


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("implementations.jsonl")
    seeds: int = 30
    """Runs of each."""
    epochs: int = 30
    """Passes over the images."""
    samples: int = 64
    """Posterior samples."""
    repetitions: int = 40
    """Of the timing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.seeds, self.epochs, self.samples, self.repetitions) < 1:
            raise SystemExit("--seeds, --epochs, --samples and --repetitions must be at least 1")

    @property
    def common(self) -> dict[str, int]:
        """What all runs have in common."""
        return {"epochs": self.epochs, "batch_size": BATCH_SIZE, "samples": self.samples}


def main(argv: Sequence[str] | None = None) -> None:
    """Computes what is missing, and reports."""
    options = parse(Options, __doc__, argv)
    if not options.report:
        compute(options)
    report(read_journal(options.results), options)


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """All runs of both sides, in turn, and the timing."""
    try:
        from benchmarks.evidence.implementations import jax_side, torch_side
    except ModuleNotFoundError as error:
        package = "ivon-opt" if error.name == "ivon" else error.name
        sys.exit(f'error: {package} is not installed; run: pip install -e ".[examples,oracle]"')
    task = Task(options.epochs, BATCH_SIZE, options.samples)
    journal = Journal(options.results, 1 + options.seeds * len(SETTINGS) * len(SIDES))
    trainers = {
        (name, side): module.Trainer(setting, task)
        for name, setting in SETTINGS.items()
        for side, module in zip(SIDES, (jax_side, torch_side), strict=True)
    }

    def timing() -> dict[str, Any]:
        """Seconds per training step of every implementation, interleaved."""
        functions = {
            NAMES[SETTINGS[name].optimizer, side]: trainer.timed()
            for (name, side), trainer in trainers.items()
            if SETTINGS[name].constant
        }
        found = interleaved(functions, options.repetitions)
        seconds = {name: timing.seconds.tolist() for name, timing in found.items()}
        return {"seconds": seconds, "versions": torch_side.versions()}

    what = {"task": "timing", "repetitions": options.repetitions, "batch_size": BATCH_SIZE}
    journal.compute(what, timing)
    for seed in range(options.seeds):
        for (name, side), trainer in trainers.items():
            run = {"task": "train", "setting": name, "side": side, "seed": seed, **options.common}
            work = partial(train_and_score, trainer.train, task, seed)
            journal.compute({**run, "values": dict(SETTINGS[name].values)}, work)


def train_and_score(train: Callable[[int], Trained], task: Task, seed: int) -> dict[str, float]:
    """One run: NLL and accuracy of the weights, or of the mean and of the averaged samples."""
    trained = train(seed)
    scored = {"seconds": trained.seconds, **score(trained.point, task.test_labels)}
    if trained.samples is not None:
        averaged = np.logaddexp.reduce(trained.samples, axis=0) - np.log(len(trained.samples))
        measured = score(averaged.astype(np.float32), task.test_labels)
        scored |= {f"{name}_samples": value for name, value in measured.items()}
    return scored


def score(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """NLL and accuracy."""
    predicted, true = jnp.asarray(log_probs), jnp.asarray(labels)
    return {
        "nll": float(metrics.nll(predicted, true)),
        "accuracy": float(metrics.accuracy(predicted, true)),
    }


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal, options: Options) -> None:
    """Writes the tables."""
    rows: dict[str, list[Sequence[str]]] = {}
    seconds = [["whole runs", "ours or optax, s", "PyTorch, s", "PyTorch / ours"]]
    seeds = set()
    for name, setting in SETTINGS.items():
        sides = {side: collect(journal, options, name, side) for side in SIDES}
        both = sorted(sides["jax"].keys() & sides["torch"].keys())
        if not both:
            raise SystemExit(f"{journal.path} has no runs of {name} with {options.common}")
        seeds.add(len(both))
        rows.setdefault(setting.optimizer, []).extend(comparison(name, sides, both))
        ours, theirs = (np.array([sides[s][k]["seconds"] for k in both]) for s in SIDES)
        seconds.append([name, cell(ours, 2), cell(theirs, 2), ratio_cell(theirs / ours)])
    tables: dict[str, Sequence[Sequence[str]]] = {}
    for optimizer, title in {"ivon": "IVON: test images", "adamw": "AdamW: test images"}.items():
        names = [NAMES[optimizer, side] for side in SIDES]
        head = ["", *names, "difference by seed", "in errors", "verdict"]
        tables[title] = [head, *rows[optimizer]]
    tables["Seconds"] = seconds
    tables["A training step"] = timing_rows(journal)
    tables["Settings"] = [
        ("", "settings"),
        *((n, described(s.values)) for n, s in SETTINGS.items()),
    ]
    write_tables(
        journal, "Against other implementations", tables, notes(journal, options, min(seeds))
    )


def collect(
    journal: Journal, options: Options, name: str, side: str
) -> dict[int, Mapping[str, Any]]:
    """Results of a setting on one side, by seed."""
    values = dict(SETTINGS[name].values)
    found = journal.select(setting=name, side=side, values=values, **options.common)
    return {run["seed"]: result for run, result in found}


def comparison(name: str, sides: Results, seeds: Sequence[int]) -> list[Sequence[str]]:
    """A row per metric: both sides, the paired difference, and what follows."""
    rows: list[Sequence[str]] = []
    for metric, (label, factor, decimals) in METRICS.items():
        if metric not in sides["jax"][seeds[0]]:
            continue
        where = label if "samples" in metric or name.startswith("AdamW") else f"{label}, mean"
        ours, theirs = (factor * np.array([sides[s][k][metric] for k in seeds]) for s in SIDES)
        mean, error = mean_and_error(ours - theirs)
        ratio = float(mean / error) if mean else 0.0
        rows.append(
            [
                f"{name}: {where}",
                cell(ours, decimals),
                cell(theirs, decimals),
                cell(ours - theirs, decimals + 1),
                f"{ratio:.1f}",
                verdict(ratio),
            ]
        )
    return rows


def verdict(ratio: float) -> str:
    """What a difference of so many standard errors says."""
    if np.isnan(ratio):
        return "not known"
    return "the same" if abs(ratio) <= ERRORS else "different"


def timing_rows(journal: Journal) -> list[Sequence[str]]:
    """Median time of a step, and its ratio to ours of the same kind, turn by turn."""
    rows: list[Sequence[str]] = [("", "median, µs", "time / ours or optax [quartiles]")]
    for _, result in journal.select(task="timing")[-1:]:
        measured = result["seconds"]
        for (optimizer, _), name in NAMES.items():
            seconds = np.array(measured[name])
            ratio = seconds / np.array(measured[NAMES[optimizer, "jax"]])
            rows.append((name, f"{1e6 * np.median(seconds):.0f}", ratio_cell(ratio)))
    return rows


def notes(journal: Journal, options: Options, seeds: int) -> str:
    """How to read the tables."""
    versions = ", ".join(journal.select(task="timing")[-1][1]["versions"])
    return (
        f"1,000 training and 797 test digits of scikit-learn, a perceptron 64-128-128-10, "
        f"{options.epochs} epochs in batches of {BATCH_SIZE}, ess = 1,000, {options.samples} "
        f"posterior samples; {seeds} seeds, mean ± standard error. A seed has the same initial "
        "weights and batches on both sides; IVON's noise is each side's own. Differences are ours "
        "less PyTorch's, paired by seed: 'the same' is within two standard errors. The cosine "
        "begins with a warmup of 5 % of the steps. Both sides run step by step, forward and "
        "backward pass included; a step is timed in turn with the others. Beside it: "
        f"{versions}."
    )


if __name__ == "__main__":
    main()
