"""Image classification: accuracy and calibration of IVON and of six others, and three claims.

Run `python benchmarks/images.py` for the perceptron on scikit-learn's digits, and
`python benchmarks/images.py --dataset mnist --data-dir DIR [--model resnet]` for MNIST. Each method
has hyperparameters that were chosen on held-out training images (`images_tuning.py`; `--tune`
searches again). SGD, AdamW and IVON are then trained much too long as well. Finished runs go into
a file of JSON lines, from which a command that was stopped goes on.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._shared.journal import Journal, evidence_parser, read_journal, write_tables

try:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.evidence.images.networks import NETWORKS
    from benchmarks.evidence.images.prediction import POINTS, REPORTED, Predictor, average, evaluate
    from benchmarks.evidence.images.report import METHODS, write_report
    from benchmarks.evidence.images.training import (
        STEPS,
        Trainer,
        Values,
        fit,
        make_trainer,
        posterior,
        stops_of,
    )
    from benchmarks.evidence.images.tuning import (
        CHOSEN,
        GRIDS,
        NOTES,
        at_edges,
        best,
        grid,
        guarded_values,
        overlong_values,
        tuning_rows,
    )
    from examples._shared.datasets import DataError, ImageData, load_dataset, stratified_split
    from examples._shared.reporting import positive
    from examples._shared.unfamiliar import letters, photo_patches
    from ivon_jax import metrics
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

EPOCHS = {("mlp", "digits"): 100, ("mlp", "mnist"): 10, ("resnet", "digits"): 30}
EPOCHS["resnet", "mnist"] = 5
SEEDS = {"mlp": 10, "resnet": 3}
OVERLONG = {"digits": 8, "mnist": 5}  # times the usual number of epochs, for the perceptron
SAMPLES = {"mlp": 256, "resnet": 64}
KEPT_SEEDS = 3  # over-long runs with the b2 of the usual ones
BATCH_SIZE = 50
LOOKS = 16  # at an over-long run
LOOK_SAMPLES = 16  # posterior samples of a look
LOOK_IMAGES = 2000  # of the training images


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    args = parse(argv)
    if args.report:
        write_report(read_journal(args.results), identity(args), args.overlong)
        return 0
    try:
        data = load_dataset(args.dataset, args.data_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    study = Study(args, data)
    if args.tune:
        tune(study, args.splits)
    else:
        compare(study)
        write_report(read_journal(args.results), identity(args), args.overlong)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults that depend on network and data."""
    parser = evidence_parser(
        "Compares IVON with six other methods on image classification. On two cores the default "
        "takes some 5 minutes, MNIST 10 and the ResNet 25.",
        "images",
    )
    add = parser.add_argument
    add("--dataset", choices=("digits", "mnist"), default="digits", help="images to learn")
    add("--data-dir", type=Path, metavar="DIR", help="folder with the IDX files of MNIST")
    add("--model", choices=tuple(NETWORKS), default="mlp", help="network")
    add("--methods", nargs="+", choices=tuple(METHODS), help="methods; None: all")
    add("--seeds", type=positive, help="runs of each method; None: 10, or 3 of the ResNet")
    add("--epochs", type=positive, help="of the usual runs; None: by data and network")
    add(
        "--overlong",
        type=int,
        metavar="FACTOR",
        help="length of the over-long runs in usual ones, 0 for none; None: 8 for digits, 5 for "
        "MNIST, 0 for the ResNet",
    )
    add(
        "--samples",
        type=positive,
        help="the most that IVON averages; None: 256, or 64 of the ResNet",
    )
    add("--tune", action="store_true", help="search hyperparameters instead of comparing")
    add("--splits", type=positive, default=1, help="splits of the training images for --tune")
    args = parser.parse_args(argv)
    if args.dataset == "mnist" and args.data_dir is None and not args.report:
        parser.error("--dataset mnist needs --data-dir, the folder with its IDX files")
    if args.dataset == "digits" and args.data_dir is not None:
        parser.error("--data-dir has no effect on digits, which ship inside scikit-learn")
    if args.tune and args.report:
        parser.error("--tune prints its tables when it is done: leave out --report")
    args.samples = args.samples or SAMPLES[args.model]
    if args.samples & (args.samples - 1):
        parser.error("--samples must be a power of two")
    known = (GRIDS if args.tune else CHOSEN)[args.model]
    known = known if args.tune else known[args.dataset]
    if missing := [method for method in args.methods or () if method not in known]:
        parser.error(f"no settings of {args.model} for {', '.join(missing)}; known: {list(known)}")
    args.methods = args.methods or list(known)
    args.seeds = args.seeds or SEEDS[args.model]
    args.epochs = args.epochs or EPOCHS[args.model, args.dataset]
    if args.overlong is None:
        args.overlong = OVERLONG[args.dataset] if args.model == "mlp" else 0
    if args.overlong < 0 or args.overlong == 1:
        parser.error("--overlong must be 0, or at least 2")
    return args


def identity(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a command have in common."""
    return {
        "model": args.model,
        "dataset": args.dataset,
        "epochs": args.epochs,
        "batch_size": BATCH_SIZE,
        "samples": args.samples,
    }


class Part(NamedTuple):
    """Images to train on and images to score."""

    train: tuple[jax.Array, jax.Array]
    sets: dict[str, np.ndarray]
    labels: np.ndarray


class Study:
    """A network and the data, with everything that is compiled for them."""

    def __init__(self, args: argparse.Namespace, data: ImageData):
        self.args, self.data = args, data
        self.network = NETWORKS[args.model]
        self.predictor = Predictor(self.network)
        self.journal = Journal(args.results)
        self._trainers: dict[tuple[str, int], Trainer] = {}
        print(
            f"{args.dataset}: {len(data.train_labels):,} training and {len(data.test_labels):,} "
            f"test images ({data.note}); {args.epochs} epochs in batches of {BATCH_SIZE}",
            file=sys.stderr,
        )

    def run(self, task: str, method: str, values: Values, seed: int, **more: Any) -> dict[str, Any]:
        """What identifies a run."""
        images = {"train": len(self.data.train_labels), "test": len(self.data.test_labels)}
        named = {"task": task, **identity(self.args), **images, "method": method, "seed": seed}
        return {**named, "values": dict(values), **more}

    def trainer(self, method: str, data: tuple[jax.Array, jax.Array], epochs: int) -> Trainer:
        """A trainer, made once."""
        if (method, epochs) not in self._trainers:
            made = make_trainer(self.network, method, data, epochs, BATCH_SIZE)
            self._trainers[method, epochs] = made
        return self._trainers[method, epochs]

    def score(
        self, method: str, values: Values, fitted: Any, seed: int, count: int, part: Part
    ) -> dict[str, Any]:
        """All metrics of a trained method."""
        return evaluate(self.predictor, method, values, fitted, seed, count, part.sets, part.labels)


# --- Comparison -----------------------------------------------------------------------------------


def compare(study: Study) -> None:
    """All methods from all seeds, and the over-long runs."""
    args, data = study.args, study.data
    shape = data.train_images.shape[1:]
    sets = {"test": data.test_images, "letters": letters(shape), "patches": photo_patches(shape)}
    train = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    part = Part(train, sets, data.test_labels)
    chosen = CHOSEN[args.model][args.dataset]
    long = [m for m in args.methods if m in POINTS or STEPS[m] == "ivon"] if args.overlong else []
    kept = [method for method in long if method not in POINTS]
    study.journal.total = args.seeds * (len(args.methods) + len(long))
    study.journal.total += 2 * min(args.seeds, KEPT_SEEDS) * len(kept)
    for seed in range(args.seeds):
        for method in args.methods:
            values = chosen[method]
            run = study.run("compare", method, values, seed)
            study.journal.compute(run, partial(usual, study, method, values, seed, part))
        for method in long:
            values = overlong_values(chosen[method], args.overlong)
            run = study.run("overlong", method, values, seed, factor=args.overlong)
            study.journal.compute(run, partial(overlong, study, method, values, seed, part))
        for method in kept if seed < KEPT_SEEDS else ():
            for values in (chosen[method], guarded_values(chosen[method])):
                run = study.run("overlong", method, values, seed, factor=args.overlong)
                study.journal.compute(run, partial(overlong, study, method, values, seed, part))


def usual(study: Study, method: str, values: Values, seed: int, part: Part) -> dict[str, Any]:
    """One run of the usual length."""
    trainer = study.trainer(method, part.train, study.args.epochs)
    start = time.perf_counter()
    fitted = jax.block_until_ready(fit(trainer, values, part.train, seed))
    seconds = time.perf_counter() - start
    result = study.score(method, values, fitted, seed, study.args.samples, part)
    return {**result, "seconds": round(seconds, 2)}


def overlong(study: Study, method: str, values: Values, seed: int, part: Part) -> dict[str, Any]:
    """One over-long run, with its NLL of training and test images along the way."""
    epochs = study.args.epochs * study.args.overlong
    trainer = study.trainer(method, part.train, epochs)
    per_epoch = len(part.train[1]) // BATCH_SIZE
    stops = sorted({max(1, round(epochs * look / LOOKS)) for look in range(1, LOOKS + 1)})
    reached = stops_of(trainer, values, part.train, seed, [per_epoch * stop for stop in stops])
    looked: dict[str, list] = {"epoch": stops, "test_nll": [], "train_nll": []}
    some = (study.data.train_images[:LOOK_IMAGES], study.data.train_labels[:LOOK_IMAGES])
    fitted = None
    for params, state in reached:
        fitted = posterior(state) if STEPS[method] == "ivon" else params
        look(study, fitted, seed, (part.sets["test"], part.labels), some, looked)
    count = min(REPORTED, study.args.samples)
    return {**looked, "final": study.score(method, values, fitted, seed, count, part)}


def look(
    study: Study,
    fitted: Any,
    seed: int,
    test: tuple[np.ndarray, np.ndarray],
    train: tuple[np.ndarray, np.ndarray],
    looked: dict[str, list],
) -> None:
    """Adds the NLL of test and training images, of IVON's average and at its mean."""
    predictor = study.predictor
    if not hasattr(fitted, "precision"):
        for name, (images, labels) in {"test_nll": test, "train_nll": train}.items():
            looked[name].append(nll(predictor.at(fitted, images), labels))
        return
    keys = jax.random.split(jax.random.key(seed), min(LOOK_SAMPLES, study.args.samples))
    drawn = average(predictor.samples({}, fitted, keys, test[0]))
    looked["test_nll"].append(nll(drawn, test[1]))
    looked["train_nll"].append(nll(predictor.at(fitted.mean, train[0]), train[1]))
    at_mean = nll(predictor.at(fitted.mean, test[0]), test[1])
    looked.setdefault("mean_test_nll", []).append(at_mean)


def nll(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """Negative log-likelihood; NaN of a run that diverged."""
    if not np.isfinite(log_probs).all():
        return float("nan")
    return float(metrics.nll(jnp.asarray(log_probs), jnp.asarray(labels)))


# --- Tuning ---------------------------------------------------------------------------------------


def tune(study: Study, splits: int) -> None:
    """Scores every setting on held-out training images; prints and writes the tables.

    There are more epochs, so that the number of steps is that of the comparison: what IVON forgets
    of its initial curvature depends on it.
    """
    args = study.args
    images, labels = study.data.train_images, study.data.train_labels
    held_out = len(labels) // 5
    epochs = round(args.epochs * len(labels) / (len(labels) - held_out))
    study.journal.total = splits * sum(len(grid(args.model, method)) for method in args.methods)
    tables = {}
    for method in args.methods:
        tried = {}
        for place, values in enumerate(grid(args.model, method)):
            found = []
            for split in range(splits):
                parts = stratified_split(images, labels, held_out, split)
                run = study.run("tune", method, values, split)
                work = partial(trial, study, method, values, split, parts, epochs)
                found.append(study.journal.compute(run, work))
            tried[place] = (values, [x["nll"] for x in found], [x["accuracy"] for x in found])
        edges = at_edges(args.model, method, tried[best(tried)][0])
        note = f" (at the edge of the grid: {', '.join(edges)})" if edges else ""
        tables[f"{METHODS[method]}{note}"] = tuning_rows(tried)
    title = f"Settings tried: {args.dataset}, {args.model}"
    write_tables(
        read_journal(args.results), title, tables, NOTES.format(epochs=epochs, splits=splits)
    )


def trial(
    study: Study, method: str, values: Values, split: int, parts: Sequence[np.ndarray], epochs: int
) -> dict[str, float]:
    """One setting on one split."""
    images, labels, held_out, held_out_labels = parts
    train = (jnp.asarray(images), jnp.asarray(labels))
    fitted = fit(study.trainer(method, train, epochs), values, train, split)
    if method in POINTS:
        log_probs = study.predictor.at(fitted, held_out)
    else:
        keys = jax.random.split(jax.random.key(split), REPORTED)
        log_probs = average(study.predictor.samples(values, fitted, keys, held_out))
    accuracy = float((log_probs.argmax(-1) == held_out_labels).mean())
    return {"nll": nll(log_probs, held_out_labels), "accuracy": accuracy}


if __name__ == "__main__":
    sys.exit(main())
