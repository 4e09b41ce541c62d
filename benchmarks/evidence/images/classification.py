"""Compares SGD, AdamW and IVON on images: accuracy, calibration, unfamiliar inputs, cost.

Run `python examples/image_classification.py` for the handwritten digits that ship inside
scikit-learn (under two minutes on two cores), `--help` for MNIST, CIFAR-10 and the options.
The training loop to copy is `make_ivon_step` in `image_training.py`.

All methods share the network, the initial weights and batches of each seed, the number of
gradient evaluations, the schedule (linear warmup, cosine to zero) and weight decay on every
parameter. Hyperparameters were chosen by `--tune`, which tries equally many settings per method
and selects by the NLL on held-out training images; the test set plays no part in it.
"""

import itertools
import json
import sys
import time
from collections.abc import Sequence

try:
    import jax.numpy as jnp
    import numpy as np
    from tqdm import tqdm

    from benchmarks.evidence.images.image_metrics import sample_curves
    from benchmarks.evidence.images.image_options import Options, parse_options
    from benchmarks.evidence.images.image_report import Column, format_table, write_figure
    from benchmarks.evidence.images.image_training import (
        average,
        make_model,
        make_predictor,
        make_trainer,
        predictions,
        train,
    )
    from benchmarks.evidence.images.image_tuning import (
        at_the_edge,
        format_tried,
        grid,
        select,
        try_settings,
    )
    from examples._shared.datasets import DataError, ImageData, load_dataset
    from examples._shared.unfamiliar import LETTERS, letters, photo_patches
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

LABELS = {"sgd": "SGD", "adamw": "AdamW", "ivon": "IVON"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    start = time.perf_counter()
    options = parse_options(argv)
    try:
        data = load_dataset(options.dataset, options.data_dir)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = len(data.train_labels) - (len(data.train_labels) // 5 if options.tune else 0)
    if options.batch_size > size:
        print(f"error: --batch-size is above {size}, all there is to train on", file=sys.stderr)
        return 2
    announce(options, data)
    if options.tune:
        tune(options, data)
    else:
        report(options, data, compare(options, data))
    print(f"Wall-clock time {time.perf_counter() - start:.0f} s, compilation included.")
    return 0


def announce(options: Options, data: ImageData) -> None:
    """Says what is about to be run, and on what."""
    print(f"{options.dataset}: {data.note}")
    print(
        f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images; the split "
        "is fixed, seeds vary weights, batches and noise"
    )
    print(f"{_length(options)} in batches of {options.batch_size}")
    if options.tune:
        print(
            "Tuning on the training images alone: each seed holds out another 20 % of them;\n"
            f"IVON is scored on predictions averaged over {options.posterior_samples} samples"
        )
        return
    for method in options.methods:
        values = options.hyperparameters[method].items()
        print(f"  {LABELS[method]:<6}" + ", ".join(f"{name} {value:g}" for name, value in values))
    if not options.tuned:
        print("  not tuned on this data set: run --tune first, then give its choice to --set")


# --- Comparison -----------------------------------------------------------------------------------


def compare(options: Options, data: ImageData) -> list[Column]:
    """Trains every method from every seed and collects what each way of predicting gives."""
    shape = data.train_images.shape[1:]
    sets = {"test": data.test_images, "letters": letters(shape), "patches": photo_patches(shape)}
    images = jnp.concatenate(list(sets.values()))
    ends = np.cumsum([len(each) for each in sets.values()])[:-1]

    def by_set(log_probs) -> dict[str, np.ndarray]:
        return dict(zip(sets, np.split(np.asarray(log_probs), ends), strict=True))

    model = make_model(shape)
    predictor = make_predictor(model, options.posterior_samples)
    train_data = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    trainers = {
        method: make_trainer(method, values, model, train_data, options.epochs, options.batch_size)
        for method, values in options.hyperparameters.items()
    }
    columns = {method: Column(LABELS[method], LABELS[method]) for method in options.methods}
    at_mean = Column("IVON at the mean", "IVON, mean")
    if "ivon" in columns:
        columns["ivon"].label = f"IVON, {_count(options.posterior_samples, 'sample')}"

    with tqdm(total=options.seeds * len(columns) * options.epochs, unit="epoch") as bar:
        # Seeds outside, methods inside: a machine that is busy for a while slows all methods.
        for seed, (method, column) in itertools.product(range(options.seeds), columns.items()):
            bar.set_description(f"seed {seed}, {LABELS[method]}")
            values = options.hyperparameters[method]
            trained = train(trainers[method], values, train_data, seed, on_epoch=bar.update)
            point, samples = predictions(method, trained, predictor, images, seed)
            column.seconds.append(float(np.median(trained.seconds)))
            if samples is None:
                column.log_probs.append(by_set(point))
            else:
                at_mean.seconds.append(column.seconds[-1])
                at_mean.log_probs.append(by_set(point))
                column.log_probs.append(by_set(average(samples)))
                test_samples = np.asarray(samples[:, : len(data.test_labels)])
                column.curves.append(sample_curves(test_samples, data.test_labels))
    plain = [column for method, column in columns.items() if method != "ivon"]
    return plain + ([at_mean, columns["ivon"]] if "ivon" in columns else [])


def _length(options: Options) -> str:
    return f"{_count(options.seeds, 'seed')}, {_count(options.epochs, 'epoch')}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("s" if number > 1 else "")


def report(options: Options, data: ImageData, columns: Sequence[Column]) -> None:
    """Prints the table and writes the figure and, if asked for, the JSON file."""
    several = options.seeds > 1
    spread = "± standard error over seeds" if several else "of one seed, hence no ±"
    print(f"\n{format_table(columns, data.test_labels)}\n")
    print(
        f"Mean {spread}. Higher is better for accuracy and AUROC, lower for the rest.\n"
        "ECE: 15 bins of equal width. Brier: summed over classes. AUROC: predictive entropy tells\n"
        f"test images from rendered letters ({LETTERS}: unlike digits) or patches of photographs.\n"
        "Seconds per epoch: wall-clock time of one compiled pass over the training set for one\n"
        "seed, shuffling included, compilation and evaluation not; median over epochs.\n"
    )
    bands = "; bands and bars: one standard error" if several else ""
    title = f"{options.dataset}: {_length(options)}{bands}"
    write_figure(options.output, columns, data.test_labels, title)
    print(f"Figure written to {options.output}")
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(options, data, columns), indent=1) + "\n")
        print(f"Results of every seed written to {options.json}")


def as_json(options: Options, data: ImageData, columns: Sequence[Column]) -> dict[str, object]:
    """Settings and results, one entry per seed."""
    return {
        "dataset": options.dataset,
        "split": data.note,
        "train_size": len(data.train_labels),
        "test_size": len(data.test_labels),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "posterior_samples": options.posterior_samples,
        "hyperparameters": options.hyperparameters,
        "results": {
            column.label: column.metrics(data.test_labels)
            | {"seconds_per_epoch": column.seconds}
            | ({"by_number_of_samples": column.curves} if column.curves else {})
            for column in columns
        },
    }


# --- Tuning ---------------------------------------------------------------------------------------


def tune(options: Options, data: ImageData) -> None:
    """Prints every method's grid with validation results, and the choice as options."""
    chosen = []
    for method in options.methods:
        total = len(grid(method)) * options.seeds
        with tqdm(total=total, unit="run", desc=LABELS[method]) as bar:
            tried = try_settings(
                method,
                data.train_images,
                data.train_labels,
                seeds=options.seeds,
                epochs=options.epochs,
                batch_size=options.batch_size,
                num_samples=options.posterior_samples,
                on_run=bar.update,
            )
        print(f"\n{LABELS[method]}: {len(tried)} settings\n{format_tried(tried)}")
        best = select(tried).values
        if edges := at_the_edge(method, best):
            print(f"  chosen at the edge of the grid: {', '.join(edges)}")
        chosen += [f"{method}.{name}={value:g}" for name, value in best.items()]
    print(f"\nTo use the chosen values: --set {' '.join(chosen)}\n")


if __name__ == "__main__":
    sys.exit(main())
