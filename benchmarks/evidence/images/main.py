"""Image classification: accuracy and calibration of IVON and of seven others, and three claims.

`python benchmarks/evidence/images/main.py` trains the perceptron on scikit-learn's digits, with
`--dataset mnist --data-dir DIR [--model resnet]` on MNIST. Settings were chosen on held-out
training images (`--tune` searches again). SGD, AdamW and IVON are then trained much too long as
well. On two cores the default takes some 5 minutes, MNIST 10 and the ResNet 25.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared import tuning
from benchmarks._shared.journal import Evidence, Journal, parse, read_journal, write_tables
from benchmarks._shared.methods import Values, average, seed_keys
from benchmarks.evidence.images.methods import (
    METHODS,
    NETWORKS,
    POINTS,
    VARIATIONAL,
    Data,
    Trainer,
    sample_log_probs,
)
from benchmarks.evidence.images.report import command, write_report
from benchmarks.evidence.images.tuning import CHOSEN, GRIDS, guarded_values, overlong_values
from examples._shared.datasets import DataError, ImageData, load_dataset, stratified_split
from examples._shared.unfamiliar import letters, photo_patches
from ivon_jax import Posterior, metrics, predict_at_mean

EPOCHS = {("mlp", "digits"): 100, ("mlp", "mnist"): 10, ("resnet", "digits"): 30}
EPOCHS["resnet", "mnist"] = 5
SEEDS = {"mlp": 10, "resnet": 3}
OVERLONG = {"digits": 8, "mnist": 5}  # times the usual number of epochs, for the perceptron
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
    methods: tuple[str, ...] = ()
    """All that have settings by default."""
    seeds: int = 0
    """0: 10, or 3 of the ResNet."""
    epochs: int = 0
    """Of the usual runs; 0: by data and network."""
    overlong: int = -1
    """Length of the over-long runs in usual ones; -1: 8 for digits, 5 for MNIST, no ResNet."""
    tune: bool = False
    """Search hyperparameters instead of comparing."""
    grid: str = ""
    """Of --tune, by data and network by default: digits, example, mnist or resnet."""
    splits: int = 1
    """Splits of the training images for --tune."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset == "mnist" and self.data_dir is None and not self.report:
            raise SystemExit("--dataset mnist needs --data-dir, the folder with its IDX files")
        grid = self.grid or ("resnet" if self.model == "resnet" else self.dataset)
        if grid not in GRIDS:
            raise SystemExit(f"--grid must be one of {', '.join(GRIDS)}")
        known = GRIDS[grid] if self.tune else CHOSEN[self.model, self.dataset]
        if missing := [method for method in self.methods if method not in known]:
            raise SystemExit(f"no settings of {', '.join(missing)}; known: {', '.join(known)}")
        overlong = OVERLONG[self.dataset] if self.model == "mlp" else 0
        defaults: dict[str, Any] = {
            "grid": grid,
            "methods": self.methods or tuple(known),
            "seeds": self.seeds or SEEDS[self.model],
            "epochs": self.epochs or EPOCHS[self.model, self.dataset],
            "overlong": overlong if self.overlong < 0 else self.overlong,
        }
        for name, value in defaults.items():
            object.__setattr__(self, name, value)


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
    return write_report(read_journal(options.results), identity(options), options.overlong)


def identity(options: Options) -> dict[str, Any]:
    """What all runs of a command have in common."""
    return {
        "model": options.model,
        "dataset": options.dataset,
        "epochs": options.epochs,
        "batch_size": BATCH_SIZE,
        "samples": SAMPLES[options.model],
    }


class Study:
    """A network and the data, with everything that is compiled for them."""

    def __init__(self, options: Options, data: ImageData):
        self.options, self.data, self.journal = options, data, Journal(options.results)
        self.network = NETWORKS[options.model]
        apply: Any = self.network.apply
        self.at_mean = jax.jit(predict_at_mean(lambda p, x: jax.nn.log_softmax(apply(p, x))))
        self._trainers: dict[tuple[str, int], Trainer] = {}
        sizes = f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images"
        print(f"{options.dataset}: {sizes} ({data.note}); {options.epochs} epochs", file=sys.stderr)

    def run(self, task: str, method: str, values: Values, seed: int, **more: Any) -> dict[str, Any]:
        """What identifies a run."""
        images = {"train": len(self.data.train_labels), "test": len(self.data.test_labels)}
        named = {"task": task, **identity(self.options), **images, "method": method, "seed": seed}
        return {**named, "values": dict(values), **more}

    def trainer(self, method: str, data: Data, epochs: int) -> Trainer:
        """A trainer, made once."""
        if (method, epochs) not in self._trainers:
            made = Trainer(self.network, method, data, epochs, BATCH_SIZE)
            self._trainers[method, epochs] = made
        return self._trainers[method, epochs]

    def samples(self, fitted: Any, key: jax.Array, images: Any, count: int) -> jax.Array:
        """Log-probabilities of each member or draw, (samples, images, classes)."""
        return sample_log_probs(self.network, fitted, key, jnp.asarray(images), count)


# --- Scores ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Images to train on and images to score, of which those named `test` have labels."""

    train: Data
    sets: dict[str, np.ndarray]
    labels: np.ndarray


@jax.jit  # under which a run that diverged scores NaN; it would be refused otherwise
def of_labels(log_probs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Metrics of one prediction."""
    names = ("accuracy", "nll", "ece", "brier")
    return {name: getattr(metrics, name)(log_probs, labels) for name in names}


@jax.jit
def uncertainties(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Entropy and mutual information of each averaged prediction."""
    log_probs = jax.nn.logsumexp(samples, axis=0) - jnp.log(len(samples))
    return metrics.predictive_entropy(log_probs), metrics.mutual_information(samples)


def measure(samples: dict[str, jax.Array], labels: np.ndarray) -> dict[str, Any]:
    """All metrics of the average, and how well it detects the sets that are not `test`."""
    scores = of_labels(average(samples["test"]), labels)
    measured = {name: float(value) for name, value in scores.items()}
    found = {k: [np.asarray(x) for x in uncertainties(each)] for k, each in samples.items()}
    finite = all(np.isfinite(entropy).all() for entropy, _ in found.values())
    failed = metrics.Detection(*[np.nan] * len(metrics.Detection._fields))
    detected = {}
    for name in (name for name in samples if name != "test"):
        pairs = zip(found["test"], found[name], strict=True)
        entropy, information = (metrics.detection(*x) if finite else failed for x in pairs)
        measured[f"auroc_{name}"] = entropy.auroc
        detected[name] = {**entropy._asdict(), "information": information.auroc}
    entropies = {name: float(entropy.mean()) for name, (entropy, _) in found.items()}
    return {"metrics": measured, "detection": detected, "entropy": entropies}


def evaluate(study: Study, fitted: Any, seed: int, count: int, part: Part) -> dict[str, Any]:
    """Scores of what was trained; IVON's also at the mean and against the number of samples."""
    images = jnp.concatenate(list(part.sets.values()))
    ends = np.cumsum([len(each) for each in part.sets.values()])[:-1]

    def by_set(log_probs: jax.Array) -> dict[str, jax.Array]:
        return dict(zip(part.sets, jnp.split(log_probs, ends, axis=1), strict=True))

    drawn = by_set(study.samples(fitted, seed_keys(seed).predict, images, count))
    result = measure({name: x[:REPORTED] for name, x in drawn.items()}, part.labels)
    if not isinstance(fitted, Posterior):
        return result
    precision = np.concatenate([np.ravel(p) for p in jax.tree.leaves(fitted.precision)])
    return {
        **result,
        "width": np.quantile(precision**-0.5, [0.05, 0.95]).tolist(),
        "mean": measure(by_set(study.at_mean(fitted, images)[None]), part.labels)["metrics"],
        "curve": sample_curve(np.asarray(drawn["test"]), part.labels),
    }


CURVE = ("nll", "accuracy", "ece")
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
    options, data = study.options, study.data
    shape = data.train_images.shape[1:]
    sets = {"test": data.test_images, "letters": letters(shape), "patches": photo_patches(shape)}
    train = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    part = Part(train, sets, data.test_labels)
    chosen = CHOSEN[options.model, options.dataset]
    long = [m for m in options.methods if m in POINTS + VARIATIONAL] if options.overlong else []
    kept = [method for method in long if method in VARIATIONAL]
    study.journal.total = options.seeds * (len(options.methods) + len(long))
    study.journal.total += 2 * min(options.seeds, KEPT_SEEDS) * len(kept)
    for seed in range(options.seeds):
        for method in options.methods:
            values = chosen[method]
            run = study.run("compare", method, values, seed)
            study.journal.compute(run, partial(usual, study, method, values, seed, part))
        runs = [(method, overlong_values(chosen[method], options.overlong)) for method in long]
        for method in kept if seed < KEPT_SEEDS else ():
            runs += [(method, chosen[method]), (method, guarded_values(chosen[method]))]
        for method, values in runs:
            run = study.run("overlong", method, values, seed, factor=options.overlong)
            study.journal.compute(run, partial(overlong, study, method, values, seed, part))


def usual(study: Study, method: str, values: Values, seed: int, part: Part) -> dict[str, Any]:
    """One run of the usual length."""
    trainer = study.trainer(method, part.train, study.options.epochs)
    start = time.perf_counter()
    fitted = jax.block_until_ready(trainer.fit(values, part.train, seed))
    seconds = time.perf_counter() - start
    result = evaluate(study, fitted, seed, SAMPLES[study.options.model], part)
    return {**result, "seconds": round(seconds, 2)}


def overlong(study: Study, method: str, values: Values, seed: int, part: Part) -> dict[str, Any]:
    """One over-long run, with its NLL of training and test images along the way."""
    epochs = study.options.epochs * study.options.overlong
    trainer = study.trainer(method, part.train, epochs)
    per_epoch = len(part.train[1]) // BATCH_SIZE
    epoch = sorted({max(1, round(epochs * look / LOOKS)) for look in range(1, LOOKS + 1)})
    some = (study.data.train_images[:LOOK_IMAGES], study.data.train_labels[:LOOK_IMAGES])
    looked: dict[str, list] = {"test_nll": [], "train_nll": [], "mean_test_nll": []}
    fitted = None
    for carry in trainer.stops(values, part.train, seed, [per_epoch * each for each in epoch]):
        fitted = trainer.fitted(values, *carry)
        for name, value in nlls(study, fitted, seed, part, some).items():
            looked[name].append(value)
    final = evaluate(study, fitted, seed, REPORTED, part)
    return {"epoch": epoch, **looked, "final": final}


def nlls(study: Study, fitted: Any, seed: int, part: Part, train: tuple) -> dict[str, float]:
    """The NLL of test and training images, of IVON's average and at its mean."""
    test = (part.sets["test"], part.labels)
    drawn = average(study.samples(fitted, jax.random.key(seed), test[0], LOOK_SAMPLES))

    def at(images: np.ndarray, labels: np.ndarray) -> float:
        if isinstance(fitted, Posterior):
            return nll(study.at_mean(fitted, images), labels)
        return nll(study.samples(fitted, jax.random.key(seed), images, 1)[0], labels)

    return {"test_nll": nll(drawn, test[1]), "train_nll": at(*train), "mean_test_nll": at(*test)}


def nll(log_probs: jax.Array, labels: np.ndarray) -> float:
    """Negative log-likelihood; NaN of a run that diverged."""
    return float(of_labels(log_probs, labels)["nll"])


# --- Tuning ---------------------------------------------------------------------------------------


def tune(study: Study) -> None:
    """Scores every setting on held-out training images; prints and writes the tables.

    There are more epochs, so that the number of steps is that of the comparison: what IVON forgets
    of its initial curvature depends on it.
    """
    options, labels = study.options, study.data.train_labels
    held_out = len(labels) // 5
    epochs = round(options.epochs * len(labels) / (len(labels) - held_out))
    grids = {method: GRIDS[options.grid][method] for method in options.methods}
    study.journal.total = options.splits * sum(
        len(tuning.settings(each)) for each in grids.values()
    )
    tables = {}
    for method, grid in grids.items():
        tried = []
        for values in tuning.settings(grid):
            found = []
            for split in range(options.splits):
                parts = stratified_split(study.data.train_images, labels, held_out, split)
                work = partial(trial, study, method, values, split, parts, epochs)
                found.append(study.journal.compute(study.run("tune", method, values, split), work))
            nlls, shares = ([x[name] for x in found] for name in ("nll", "accuracy"))
            tried.append(tuning.Tried(values, nlls, shares))
        edges = tuning.at_edges(grid, tuning.best(tried).values)
        note = f" (at the edge of the grid: {', '.join(edges)})" if edges else ""
        tables[f"{METHODS[method]}{note}"] = tuning.rows(tried)
    title = f"Settings tried: {options.dataset}, {options.model}"
    shown = {"command": command(**identity(options)), "grid": options.grid}
    notes = TUNING_NOTES.format(epochs=epochs, splits=options.splits, **shown)
    write_tables(read_journal(options.results), title, tables, notes)


def trial(
    study: Study, method: str, values: Values, split: int, parts: Sequence[np.ndarray], epochs: int
) -> dict[str, float]:
    """One setting on one split."""
    images, labels, held_out, held_out_labels = parts
    train = (jnp.asarray(images), jnp.asarray(labels))
    fitted = study.trainer(method, train, epochs).fit(values, train, split)
    log_probs = average(study.samples(fitted, jax.random.key(split), held_out, REPORTED))
    scores = of_labels(log_probs, held_out_labels)
    return {"nll": float(scores["nll"]), "accuracy": float(scores["accuracy"])}


if __name__ == "__main__":
    main()
