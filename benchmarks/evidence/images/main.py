"""Image classification: accuracy and calibration of IVON and of seven others, and three claims.

`python benchmarks/evidence/images/main.py` trains the perceptron on scikit-learn's digits, with
`--dataset mnist --data-dir DIR [--model resnet]` on MNIST. Settings were chosen on held-out
training images (`--tune` searches again). The perceptrons by SGD, AdamW and IVON are then trained
much too long as well. On two cores the default takes some 5 minutes, MNIST with five seeds 10 and
the ResNet with three 25.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared import tuning
from benchmarks._shared.journal import Evidence, Journal, parse, read_journal, write_tables
from benchmarks._shared.methods import Values, auroc, average, seed_keys
from benchmarks.evidence.images.methods import (
    METHODS,
    NETWORKS,
    POINTS,
    VARIATIONAL,
    Fitted,
    Trainer,
    at_mean,
    fitted_by,
    sample_log_probs,
)
from benchmarks.evidence.images.report import CURVE, command, write_report
from benchmarks.evidence.images.tuning import CHOSEN, GRIDS, overlong_values
from examples._shared.datasets import DataError, ImageData, load_dataset, stratified_split
from examples._shared.reporting import cell
from examples._shared.unfamiliar import letters, photo_patches
from ivon_jax import Posterior, metrics

# Epochs of the usual runs, and how many times as many over-long ones have.
LENGTHS = {("mlp", "digits"): (100, 8), ("mlp", "mnist"): (10, 5), ("resnet", "mnist"): (5, 0)}
SAMPLES = {"mlp": 256, "resnet": 64}
REPORTED = 64  # samples behind the tables of methods that draw them
KEPT_SEEDS = 3  # over-long runs with the b2 of the usual ones
BATCH_SIZE = 50
LOOKS = 16  # at an over-long run
LOOK_SAMPLES = 16  # posterior samples of a look
LOOK_IMAGES = 2000  # of the training images
TUNING_NOTES = (
    "`{command} --tune --grid {grid}`\n\nEach setting was trained on 80 % of the training images "
    "for {epochs} epochs, as many steps as in the comparison, and scored on the other 20 % "
    "({splits} split: ± where several). The NLL chooses."
)


@dataclass(frozen=True)
class Options(Evidence):
    """The command line; what is left out depends on network and data."""

    results: Path = Path("images.jsonl")
    dataset: Literal["digits", "mnist"] = "digits"
    data_dir: Path | None = None
    """Folder with the IDX files of MNIST."""
    model: Literal["mlp", "resnet"] = "mlp"
    seeds: int = 10
    epochs: int = 0
    """Of the usual runs; 0: by data and network."""
    overlong: int = -1
    """Length of the over-long runs in usual ones; 0: none, -1: by data and network."""
    tune: bool = False
    """Search hyperparameters instead of comparing."""
    grid: Literal["digits", "example", "mnist", "resnet"] | None = None
    """Of --tune; without it, by data and network."""
    splits: int = 1
    """Splits of the training images for --tune."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model, self.dataset) not in LENGTHS:
            raise SystemExit(f"no settings of the {self.model} on {self.dataset}: pass mnist")
        epochs, overlong = LENGTHS[self.model, self.dataset]
        grid = self.grid or ("resnet" if self.model == "resnet" else self.dataset)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "epochs", self.epochs or epochs)
        object.__setattr__(self, "overlong", overlong if self.overlong < 0 else self.overlong)

    def identity(self) -> dict[str, Any]:
        """What all runs of a command have in common."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "epochs": self.epochs,
            "batch_size": BATCH_SIZE,
            "samples": SAMPLES[self.model],
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Computes what is missing, and reports."""
    options = parse(Options, __doc__, argv)
    if not options.report:
        try:
            study = Study(options, load_dataset(options.dataset, options.data_dir))
        except DataError as error:
            raise SystemExit(f"error: {error}") from None
        if options.tune:
            return tune(study)
        compare(study)
    return write_report(read_journal(options.results), options.identity(), options.overlong)


class Study:
    """A network and the data, with everything that is compiled for them."""

    def __init__(self, options: Options, data: ImageData):
        self.options, self.data, self.journal = options, data, Journal(options.results)
        shape = data.train_images.shape[1:]
        self.train = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
        self.unfamiliar = {"letters": letters(shape), "patches": photo_patches(shape)}
        self._trainers: dict[tuple[str, int], Trainer] = {}
        sizes = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
        print(f"{options.dataset}: {sizes} ({data.note}); {options.epochs} epochs", file=sys.stderr)

    def run(self, task: str, method: str, values: Values, seed: int, **more: Any) -> dict[str, Any]:
        """What identifies a run."""
        images = {"train": len(self.data.train_labels), "test": len(self.data.test_labels)}
        common = {"task": task, **self.options.identity(), **images}
        return {**common, "method": method, "seed": seed, "values": dict(values), **more}

    def trainer(self, method: str, data: Any, epochs: int) -> Trainer:
        """A trainer, made once."""
        if (method, epochs) not in self._trainers:
            made = Trainer(NETWORKS[self.options.model], method, data, epochs, BATCH_SIZE)
            self._trainers[method, epochs] = made
        return self._trainers[method, epochs]

    def log_probs(self, fitted: Fitted, key: jax.Array, images: Any, count: int) -> jax.Array:
        """Log-probabilities of each member or draw, (samples, images, classes)."""
        network = NETWORKS[self.options.model]
        return sample_log_probs(network, fitted, key, jnp.asarray(images), count)


# --- Scores ---------------------------------------------------------------------------------------


@jax.jit  # under which a run that diverged scores NaN; it would be refused otherwise
def of_labels(log_probs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Metrics of one prediction."""
    names = ("accuracy", "nll", "ece", "brier")
    return {name: getattr(metrics, name)(log_probs, labels) for name in names}


entropies = jax.jit(metrics.predictive_entropy)


def measure(samples: dict[str, jax.Array], labels: np.ndarray) -> dict[str, float]:
    """Metrics of the average on `test`, and how well its entropy detects the other sets."""
    scores = of_labels(average(samples["test"]), labels)
    measured = {name: float(value) for name, value in scores.items()}
    found = {name: np.asarray(entropies(average(each))) for name, each in samples.items()}
    familiar = found.pop("test")
    for name, unfamiliar in found.items():
        measured[f"auroc_{name}"] = auroc(familiar, unfamiliar)
    return measured


def evaluate(study: Study, fitted: Fitted, seed: int, count: int) -> dict[str, Any]:
    """Scores of what was trained; IVON's also at the mean and against the number of samples."""
    sets, labels = {"test": study.data.test_images, **study.unfamiliar}, study.data.test_labels
    ends = np.cumsum([len(each) for each in sets.values()])[:-1]

    def predictions(fitted: Fitted, count: int) -> dict[str, jax.Array]:
        images = np.concatenate(list(sets.values()))
        _, _, key = seed_keys(seed)
        found = study.log_probs(fitted, key, images, count)
        return dict(zip(sets, jnp.split(found, ends, axis=1), strict=True))

    drawn = predictions(fitted, count)
    result: dict[str, Any] = {
        "metrics": measure({name: each[:REPORTED] for name, each in drawn.items()}, labels)
    }
    if isinstance(fitted, Posterior):
        result["mean"] = measure(predictions(at_mean(fitted), 1), labels)
        result["curve"] = sample_curve(np.asarray(drawn["test"]), labels)
    return result


of_groups = jax.jit(jax.vmap(of_labels, (0, None)))


def sample_curve(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """Metrics of the average of 1, 2, 4, ... samples.

    Each is the mean over all disjoint groups of so many samples, since one group of one sample
    says little about samples.
    """
    curve: dict[str, list] = {"samples": [], **{name: [] for name in CURVE}}
    size, sums = 1, log_probs
    while len(sums):
        scores = of_groups(sums - np.float32(np.log(size)), labels)
        curve["samples"].append(size)
        for name in CURVE:
            curve[name].append(float(scores[name].mean()))
        pairs = len(sums) // 2
        sums = np.logaddexp(sums[: 2 * pairs : 2], sums[1 : 2 * pairs : 2])
        size *= 2
    return curve


# --- Comparison -----------------------------------------------------------------------------------


def compare(study: Study) -> None:
    """All methods from all seeds, and the over-long runs."""
    options, factor = study.options, study.options.overlong
    work = []
    for seed in range(options.seeds):
        for method, values in CHOSEN[options.model, options.dataset].items():
            run = study.run("compare", method, values, seed)
            work.append((run, partial(usual, study, method, values, seed)))
            if not factor or method not in POINTS + VARIATIONAL:
                continue
            for suffix, longer in overlong_values(values, factor).items():
                if not suffix or seed < KEPT_SEEDS:
                    run = study.run("overlong", method, longer, seed, factor=factor)
                    work.append((run, partial(overlong, study, method, longer, seed, factor)))
    study.journal.total = len(work)
    for run, compute in work:
        study.journal.compute(run, compute)


def usual(study: Study, method: str, values: Values, seed: int) -> dict[str, Any]:
    """One run of the usual length."""
    trainer = study.trainer(method, study.train, study.options.epochs)
    start = time.perf_counter()
    fitted = jax.block_until_ready(trainer.fit(values, study.train, seed))
    seconds = time.perf_counter() - start
    result = evaluate(study, fitted, seed, SAMPLES[study.options.model])
    return {**result, "seconds": round(seconds, 2)}


def overlong(study: Study, method: str, values: Values, seed: int, factor: int) -> dict[str, Any]:
    """One over-long run, with its NLL of training and test images along the way."""
    epochs = study.options.epochs * factor
    trainer = study.trainer(method, study.train, epochs)
    per_epoch = len(study.train[1]) // BATCH_SIZE
    epoch = sorted({max(1, round(epochs * look / LOOKS)) for look in range(1, LOOKS + 1)})
    looked: dict[str, list] = {"test_nll": [], "train_nll": [], "mean_test_nll": []}
    fitted: Any = None
    for carry in trainer.stops(values, study.train, seed, [per_epoch * each for each in epoch]):
        fitted = fitted_by(method, values, *carry)
        for name, value in nlls(study, fitted, seed).items():
            looked[name].append(value)
    return {"epoch": epoch, **looked, "final": evaluate(study, fitted, seed, REPORTED)}


def nlls(study: Study, fitted: Fitted, seed: int) -> dict[str, float]:
    """The NLL of test and training images, of IVON's average and at its mean."""
    data = study.data
    test = data.test_images, data.test_labels
    train = data.train_images[:LOOK_IMAGES], data.train_labels[:LOOK_IMAGES]

    def nll(fitted: Fitted, images: Any, labels: Any, count: int = 1) -> float:
        log_probs = average(study.log_probs(fitted, jax.random.key(seed), images, count))
        return float(of_labels(log_probs, labels)["nll"])

    return {
        "test_nll": nll(fitted, *test, count=LOOK_SAMPLES),
        "train_nll": nll(at_mean(fitted), *train),
        "mean_test_nll": nll(at_mean(fitted), *test),
    }


# --- Tuning ---------------------------------------------------------------------------------------


def tune(study: Study) -> None:
    """Scores every setting on held-out training images; prints and writes the tables.

    There are more epochs, so that the number of steps is that of the comparison: what IVON forgets
    of its initial curvature depends on it.
    """
    options, labels = study.options, study.data.train_labels
    held_out = len(labels) // 5
    epochs = round(options.epochs * len(labels) / (len(labels) - held_out))
    grids = GRIDS[str(options.grid)]
    sizes = (len(tuning.settings(grid)) for grid in grids.values())
    study.journal.total = options.splits * sum(sizes)
    tables = {}
    for method, grid in grids.items():
        tried, found = tuning.settings(grid), []
        for values in tried:
            for split in range(options.splits):
                parts = stratified_split(study.data.train_images, labels, held_out, split)
                work = partial(trial, study, method, values, split, parts, epochs)
                found.append(study.journal.compute(study.run("tune", method, values, split), work))
        nll, accuracy = (
            np.reshape([each[name] for each in found], (len(tried), options.splits))
            for name in ("nll", "accuracy")
        )
        best = np.argmin(np.nan_to_num(nll.mean(axis=1), nan=np.inf))
        rows = [("setting", "NLL, held out", "accuracy, %", "")]
        for at, values in enumerate(tried):
            cells = cell(nll[at], 4), cell(100 * accuracy[at], 2), "chosen" if at == best else ""
            rows.append((tuning.described(values), *cells))
        edges = ", ".join(tuning.at_edges(grid, tried[best]))
        tables[METHODS[method] + (f" (at the edge of the grid: {edges})" if edges else "")] = rows
    title = f"Settings tried: {options.dataset}, {options.model}"
    shown = {"command": command(options.model, options.dataset), "grid": options.grid}
    notes = TUNING_NOTES.format(epochs=epochs, splits=options.splits, **shown)
    write_tables(read_journal(options.results), title, tables, notes)


def trial(
    study: Study, method: str, values: Values, split: int, parts: Sequence[np.ndarray], epochs: int
) -> dict[str, float]:
    """One setting on one split."""
    images, labels, held_out, held_out_labels = parts
    train = (jnp.asarray(images), jnp.asarray(labels))
    fitted = study.trainer(method, train, epochs).fit(values, train, split)
    log_probs = average(study.log_probs(fitted, jax.random.key(split), held_out, REPORTED))
    scores = of_labels(log_probs, held_out_labels)
    return {"nll": float(scores["nll"]), "accuracy": float(scores["accuracy"])}


if __name__ == "__main__":
    main()
