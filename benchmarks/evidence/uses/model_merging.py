"""Merges fine-tuned networks without their data, by plain and by Hessian-weighted averages.

Run `python examples/model_merging.py`; it takes under a minute on two cores. A perceptron learns
upright handwritten digits (scikit-learn's). One copy of it is fine-tuned on other digits turned to
the left by 30 degrees, another on digits turned to the right; the two are merged, and tested on
digits of all three kinds. The reference has seen all data.

Both AdamW and IVON train all models. IVON's fine-tuning has the posterior of its base as prior, so
that `merge(posteriors, base=...)` counts the base once; its precisions come with training. Fisher
informations take another pass over the data of every model, also over the base's.

Every rule has one weight, chosen on held-out images from the same nine: what the differences to
the base are multiplied with. `--tune --seeds 3` tries 24 settings of each optimizer (some 50 with
earlier grids) and scores the merged models on held-out images. IVON is shown at the setting that
is best for any rule; AdamW, for which rules disagree, at the best one for Fisher information and
the best for task arithmetic.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence

try:
    import jax
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from benchmarks.evidence.uses.merging_training import (
        ANGLES,
        TASK_SIZE,
        VALIDATION_SIZE,
        WEIGHTS,
        Results,
        make_data,
        make_runner,
    )
    from examples._shared.reporting import (
        COLORS,
        cell,
        example_parser,
        format_table,
        mean_and_error,
        positive,
        save_figure,
    )
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

TRAININGS: dict[str, tuple[str, dict[str, float]]] = {
    "AdamW, tuned for task arithmetic": ("adamw", {"learning_rate": 3e-4, "weight_decay": 0.0}),
    "AdamW, tuned for Fisher": ("adamw", {"learning_rate": 0.03, "weight_decay": 0.0}),
    "IVON": (
        "ivon",
        {
            "learning_rate": 0.02,
            "hess_init": 0.03,
            "weight_decay": 1e-4,
            "temperature": 0.03,
            "b2": 0.997,
        },
    ),
}
GRIDS = {
    "adamw": {
        "learning_rate": (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1),
        "weight_decay": (0.0, 0.01, 0.03, 0.1),
    },
    "ivon": {
        "learning_rate": (0.005, 0.02),
        "hess_init": (0.03, 0.1),
        "weight_decay": (1e-4,),
        "temperature": (0.03, 0.1),
        "b2": (0.99, 0.997, 0.999),
    },
}
TUNING_SEED = 1000  # the seeds of tuning are not those of the report
OURS = "IVON's, base counted once"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    start = time.perf_counter()
    options = parse(argv)
    turned = ", ".join(f"{name} ({angle}°)" for name, angle in ANGLES.items())
    print(
        f"Digits: {turned}; {TASK_SIZE} training images of each kind, {VALIDATION_SIZE} held out\n"
        f"{options.seeds} seeds (split, weights, batches, noise), {options.steps:,} steps per kind"
    )
    if options.tune:
        tune(options.seeds, options.steps)
    else:
        for label, (_, values) in TRAININGS.items():
            print(f"  {label}: {describe(values)}")
        report(options)
    print(f"Wall-clock time {time.perf_counter() - start:.0f} s, compilation included.")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = example_parser(
        "Merges fine-tuned networks: averages, task arithmetic, Fisher and IVON's precisions.",
        png="model_merging.png",
        seeds=5,
    )
    parser.add_argument("--steps", type=positive, default=600, help="training steps per domain")
    parser.add_argument("--tune", action="store_true", help="try the grids instead of the report")
    return parser.parse_args(argv)


def tune(seeds: int, steps: int) -> None:
    """Prints, for every setting, the validation accuracy of every rule at its best weight."""
    data = make_data(seeds, steps, TUNING_SEED)
    for method, grid in GRIDS.items():
        run = make_runner(method)
        tried = []
        for setting in tqdm(list(itertools.product(*grid.values())), desc=method):
            values = dict(zip(grid, setting, strict=True))
            sweeps = jax.device_get(run(values, data)).sweeps
            tried.append(({label: best_weight(s)[1] for label, s in sweeps.items()}, values))
        best = max(tried, key=lambda each: max(each[0].values()))
        print(f"\n{method}: validation accuracy of the merged models, %")
        for scores, values in tried:
            mark = "*" if values is best[1] else " "
            print(f"{mark} {describe(values)}")
            print("    " + ", ".join(f"{label} {x:.1f}" for label, x in scores.items()))


def best_weight(sweep: np.ndarray) -> tuple[int, float]:
    """The index of the best weight on validation images, and its accuracy in %.

    Args:
      sweep: accuracies (seeds, validation or test, weights, domains); NaN where a merge failed.
    """
    scores = np.nan_to_num(100 * sweep[:, 0].mean(axis=(0, -1)))
    return int(scores.argmax()), float(scores.max())


def describe(values: dict[str, float]) -> str:
    """Hyperparameters in words."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


# --- Table ----------------------------------------------------------------------------------------


def report(options: argparse.Namespace) -> None:
    """Trains and merges, prints the tables and writes the figure."""
    data = make_data(options.seeds, options.steps)
    runners = {method: make_runner(method) for method in GRIDS}
    results = {}
    for label, (method, values) in tqdm(TRAININGS.items(), unit="training"):
        results[label] = jax.device_get(runners[method](values, data))
    for label, each in results.items():
        print(f"\nTrained by {label}\n{table(each, results['IVON'])}")
    spread = ", ± one standard error over seeds" if options.seeds > 1 else ""
    print(
        f"\nTest accuracy in %{spread}.\n"
        "The mean over the three kinds of images is what to compare. Weight: the best on held-out\n"
        "images; mean at 1: without that choice (nan: the merged precision is not positive).\n"
        f"Last column: the mean minus that of '{OURS}', seed by seed.\n"
        "'IVON's precisions' is merge(posteriors), and with the base counted once it is\n"
        "merge(posteriors, base=...). The joint model of AdamW learns all images from scratch,\n"
        "that of IVON the turned ones under the posterior of its base.\n"
    )
    print(f"Taking the digits turned to the left out again, by the weight -1\n{removals(results)}")
    print(
        "\nMerged: by IVON's precisions and the base, at weight 1. Taking one of two models out\n"
        "gives back the other, to rounding error. Out of the joint model, which has learned both\n"
        "together, it is an approximation; compare with the model that never saw them.\n"
    )
    save_figure(draw(results), options.output)


def table(results: Results, ours: Results) -> str:
    """Accuracies by domain of the single models, of every rule, and of the joint model."""
    rows = [["", *ANGLES, "mean", "weight", "mean at 1", "minus IVON's"]]
    sweep = ours.sweeps[OURS]
    reference = 100 * sweep[:, 1, best_weight(sweep)[0]].mean(axis=-1)

    def add(label: str, accuracies: np.ndarray, weight: str = "-", at_one: str = "-") -> None:
        mean = 100 * accuracies.mean(axis=-1)
        cells = [cell(100 * domain, 1) for domain in accuracies.T]
        rows.append([label, *cells, cell(mean, 1), weight, at_one, cell(mean - reference, 1)])

    single = [label for label in results.models if "fine-tuned" in label]
    for label in ("base", *single, "average"):
        add(label, results.models[label])
    for label, sweep in ordered(results):
        index, _ = best_weight(sweep)
        at_one = 100 * sweep[:, 1, WEIGHTS.index(1.0)].mean(axis=-1)
        add(label, sweep[:, 1, index], f"{WEIGHTS[index]:g}", cell(at_one, 1))
    add("joint training", results.models["joint"])
    return format_table(rows)


def ordered(results: Results) -> list[tuple[str, np.ndarray]]:
    """The sweeps in the order of `RULE_STYLES`: jit has sorted them by name."""
    return [(label, results.sweeps[label]) for label in RULE_STYLES if label in results.sweeps]


def removals(results: dict[str, Results]) -> str:
    """What is left after a task has been removed, beside what never learned it."""
    models = results["IVON"].models
    named = {
        "merged": "merged",
        "merged, left removed": "merged, removed",
        "joint training": "joint",
        "joint training, left removed": "joint, removed",
        "never saw left: fine-tuned on right": "fine-tuned on right",
        "base": "base",
    }
    rows = [["", *ANGLES]]
    rows += [[name, *(cell(100 * a, 1) for a in models[key].T)] for name, key in named.items()]
    return format_table(rows)


# --- Figure ---------------------------------------------------------------------------------------

RULE_STYLES = {
    "task arithmetic": (COLORS["AdamW"], "s"),
    "Fisher averaging": ("#56B4E9", "v"),
    "Fisher, base counted once": (COLORS["SGD"], "^"),
    "IVON's precisions": (COLORS["IVON, mean"], "D"),
    OURS: (COLORS["IVON"], "o"),
}


def draw(results: dict[str, Results]) -> Figure:
    """Accuracy against the weight for every training, and by domain at the chosen weights."""
    figure = Figure(figsize=(11.5, 8.2), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    for ax, (label, each) in zip(axes, results.items(), strict=False):
        draw_sweeps(ax, each)
        ax.set_title(f"Fine-tuned by {label}: mean over the three kinds", fontsize=10)
        ax.set_ylabel("test accuracy, %")
        ax.set_ylim(8, 100)
    draw_bars(axes[-1], results["IVON"])
    axes[-1].set_title("Fine-tuned by IVON, at the chosen weights", fontsize=10)
    handles, labels = axes[len(results) - 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def draw_sweeps(ax: Axes, results: Results) -> None:
    """A curve for every rule, its chosen weight ringed; the average and joint training as lines."""
    for label, line in (("average", ":"), ("joint", "--")):
        value = 100 * results.models[label].mean()
        ax.axhline(value, color=COLORS["reference"], linestyle=line, linewidth=1.2, label=label)
    for label, sweep in ordered(results):
        color, marker = RULE_STYLES[label]
        mean, error = mean_and_error(100 * sweep[:, 1].mean(axis=-1))
        ax.plot(WEIGHTS, mean, color=color, marker=marker, markersize=4, linewidth=1.5, label=label)
        ax.fill_between(WEIGHTS, mean - error, mean + error, color=color, alpha=0.12, lw=0)
        index, _ = best_weight(sweep)
        ring = {"markerfacecolor": "none", "markersize": 11, "color": color}
        ax.plot(WEIGHTS[index], mean[index], "o", **ring)
    ax.set_xscale("log")
    ax.set_xticks([0.2, 0.5, 1, 2, 4])
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set_xlabel("weight (ring: chosen on held-out images)")


def draw_bars(ax: Axes, results: Results) -> None:
    """Groups of bars: domains; bars: base, average, every rule and joint training."""
    bars = {"base": (results.models["base"], "0.8"), "average": (results.models["average"], "0.6")}
    for label, sweep in ordered(results):
        bars[label] = (sweep[:, 1, best_weight(sweep)[0]], RULE_STYLES[label][0])
    bars["joint"] = (results.models["joint"], COLORS["reference"])
    width = 0.85 / len(bars)
    for number, (label, (accuracies, color)) in enumerate(bars.items()):
        mean, error = mean_and_error(100 * accuracies)
        x = np.arange(len(ANGLES)) + (number - (len(bars) - 1) / 2) * width
        ax.bar(x, mean, width, yerr=np.nan_to_num(error), color=color, label=label)
    names = [f"{name}\n{angle}°" for name, angle in ANGLES.items()]
    ax.set_xticks(range(len(ANGLES)), names)
    ax.legend(fontsize=8, ncols=2, frameon=False, loc="upper right")
    ax.set_ylim(0, 125)
    ax.set_yticks(range(0, 101, 20))


if __name__ == "__main__":
    sys.exit(main())
