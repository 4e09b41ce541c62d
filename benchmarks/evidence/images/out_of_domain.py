"""Does a network know what it has not seen? Seven ways to train one, three kinds of images.

Run `python examples/out_of_domain.py` (under two minutes on two cores). It trains the same
perceptron on scikit-learn's handwritten digits by SGD, MC-dropout, SWAG, Bayes by Backprop, IVON
and as a deep ensemble, and asks how well the entropy of its predictions tells test digits from
rendered letters and from patches of photographs.

All share initial weights, batches and number of steps; the ensemble spends them five times. Each
was tuned with 24 settings (`GRIDS` in `ood_tuning.py`) on the NLL of held-out training images;
`--tune --seeds 5` prints the search. Neither test nor unfamiliar images chose among them.

IVON has two rows. The first chooses among temperatures below one (an effective sample size above
N). The second is plain Bayes, ess = N, and asks whether the cold temperature is to blame for what
the first one misses. Column σ helps to read them: runs are short for b2 = 0.999, which after 2,000
steps still holds 0.999²⁰⁰⁰ = 14 % of the initial curvature. With little from the data added,
σ² is about 1/(0.14 ess h₀), much the same for every weight and at every temperature, while Bayes
by Backprop fits σ to each weight.
"""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from benchmarks.evidence.images.image_report import SET_COLORS
    from benchmarks.evidence.images.image_training import average, seed_keys
    from benchmarks.evidence.images.image_tuning import format_tried, select
    from benchmarks.evidence.images.ood_methods import METHODS, Run, make_runner
    from benchmarks.evidence.images.ood_tuning import (
        CHOSEN,
        SPLITS,
        edges,
        grid,
        measure,
        try_settings,
    )
    from examples._shared.datasets import ImageData, load_dataset
    from examples._shared.reporting import (
        cell,
        example_parser,
        format_table,
        mean_and_error,
        positive,
        save_figure,
    )
    from examples._shared.unfamiliar import LETTERS, letters, photo_patches
    from ivon_jax import Posterior, metrics
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

UNFAMILIAR = {"letters": "letters", "patches": "photo patches"}
BATCH_SIZE = 50
TALLEST = 0.4  # share at which the figure cuts a bar off


class Scores(NamedTuple):
    """What one trained method says about every set of images."""

    accuracy: float
    nll: float
    entropy: dict[str, np.ndarray]  # of each image, by set
    information: dict[str, np.ndarray]  # mutual information, likewise
    widths: np.ndarray | None  # 5 % and 95 % quantiles of σ over the weights

    def detection(self, name: str) -> metrics.Detection:
        """How well the entropy tells a set from the test images."""
        return metrics.detection(self.entropy["test"], self.entropy[name])

    def information_auroc(self, name: str) -> float:
        """AUROC of the mutual information."""
        return metrics.detection(self.information["test"], self.information[name]).auroc


Results = dict[str, list[Scores]]  # by method, one entry per seed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    begin = time.perf_counter()
    args = options().parse_args(argv)
    data = load_dataset("digits")
    run = Run(args.epochs, BATCH_SIZE, args.posterior_samples)
    print(
        f"digits: {len(data.train_labels):,} training and {len(data.test_labels)} test images; "
        f"{args.epochs} epochs in batches of {BATCH_SIZE}"
    )
    if args.tune:
        tune(args, data, run)
    else:
        report(args, run, data, compare(args, data, run))
    print(f"Wall-clock time {time.perf_counter() - begin:.0f} s, compilation included.")
    return 0


def options() -> ArgumentParser:
    """The command line."""
    parser = example_parser(
        "Tells digits from letters and photographs by predictive entropy.", "out_of_domain.png", 5
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to compare"
    )
    parser.add_argument("--epochs", type=positive, default=100, help="passes over the training set")
    parser.add_argument(
        "--posterior-samples", type=positive, default=64, help="samples per prediction"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search hyperparameters on held-out training images instead of comparing; "
        f"each seed is another split, {SPLITS} were used for the defaults",
    )
    return parser


# --- Comparison -----------------------------------------------------------------------------------


def compare(args: Namespace, data: ImageData, run: Run) -> Results:
    """Trains every method from every seed and scores its predictions."""
    for method in args.methods:
        values = ", ".join(f"{name} {value:g}" for name, value in CHOSEN[method].items())
        print(f"  {METHODS[method].label:<17} {values}")
    shape = data.train_images.shape[1:]
    sets = {"test": data.test_images, "letters": letters(shape), "patches": photo_patches(shape)}
    images = jnp.concatenate(list(sets.values()))
    ends = np.cumsum([len(each) for each in sets.values()])[:-1]
    train_data = (jnp.asarray(data.train_images), jnp.asarray(data.train_labels))
    test_labels = jnp.asarray(data.test_labels)

    def by_set(values: jax.Array) -> dict[str, np.ndarray]:
        return dict(zip(sets, np.split(np.asarray(values), ends), strict=True))

    results: Results = {method: [] for method in args.methods}
    with tqdm(total=args.seeds * len(args.methods), unit="run") as bar:
        for method in args.methods:
            runner, values = make_runner(method, run), CHOSEN[method]
            for seed in range(args.seeds):
                bar.set_description(f"{METHODS[method].label}, seed {seed}")
                fitted = runner.fit(values, seed, train_data)
                samples = runner.predict(values, seed_keys(seed).predict, fitted, images)
                log_probs, entropy, information = uncertainties(samples)
                nll, accuracy = measure(log_probs[: ends[0]], test_labels)
                results[method].append(
                    Scores(
                        accuracy=float(accuracy),
                        nll=float(nll),
                        entropy=by_set(entropy),
                        information=by_set(information),
                        widths=width_quantiles(fitted) if isinstance(fitted, Posterior) else None,
                    )
                )
                bar.update()
    return results


@jax.jit
def uncertainties(samples: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Averaged log-probabilities, their entropy, and the samples' mutual information."""
    log_probs = average(samples)
    return log_probs, metrics.predictive_entropy(log_probs), metrics.mutual_information(samples)


def width_quantiles(q: Posterior) -> np.ndarray:
    """5 % and 95 % quantiles over all weights of the posterior's standard deviation."""
    precision = np.concatenate([np.ravel(p) for p in jax.tree.leaves(q.precision)])
    return np.quantile(precision**-0.5, [0.05, 0.95])


# --- Tables ---------------------------------------------------------------------------------------


def report(args: Namespace, run: Run, data: ImageData, results: Results) -> None:
    """Prints the tables and writes the figure."""
    steps = run.num_steps((jnp.asarray(data.train_images), jnp.asarray(data.train_labels)))
    print(f"\n{format_table(cost_rows(results, steps, run.num_samples))}")
    for name, label in UNFAMILIAR.items():
        print(f"\n{format_table(detection_rows(results, name, label))}")
    spread = "Mean ± standard error over seeds." if args.seeds > 1 else "One seed, hence no ±."
    print(READING.format(spread=spread, letters=LETTERS))
    save_figure(draw(results, args.seeds), args.output)


READING = """
{spread} Gradients: gradient evaluations of a batch in training.
Passes: forward passes through a network per prediction. H: mean entropy of the predictions, in
nats; a model that knows what it does not know has a small H on digits and a large one elsewhere.
σ: the middle 90 % of the weights' posterior standard deviations, where there is one per weight.
AUROC, AUPR and FPR95, in %, tell test digits from unfamiliar images by the entropy. AUPR out takes
the unfamiliar images as positives, AUPR in the digits. FPR95 is the share of unfamiliar images
that pass as digits where 95 % of the digits do: lower is better; higher is for the others. The
last column has the mutual information as the score. Letters: {letters}, unlike digits.
"""


def cost_rows(results: Results, steps: int, num_samples: int) -> list[list[str]]:
    """Cost, quality in domain, and width of the posterior."""
    rows = [["digits", "gradients", "passes", "accuracy, %", "NLL", "H", "σ, 5 % to 95 %"]]
    for method, scores in results.items():
        chosen = METHODS[method]
        widths = [each.widths for each in scores if each.widths is not None]
        low, high = np.mean(widths, axis=0) if widths else (np.nan, np.nan)
        rows.append(
            [
                chosen.label,
                f"{chosen.networks * steps:,}",
                str(chosen.samples or num_samples),
                cell([100 * each.accuracy for each in scores], 2),
                cell([each.nll for each in scores], 4),
                cell([each.entropy["test"].mean() for each in scores], 3),
                f"{low:.3f} to {high:.3f}" if widths else "",
            ]
        )
    return rows


def detection_rows(results: Results, name: str, label: str) -> list[list[str]]:
    """How well each method tells one unfamiliar set from the test images."""
    rows = [[label, "H", "AUROC", "AUPR out", "AUPR in", "FPR95", "AUROC of MI"]]
    for method, scores in results.items():
        found = np.array([each.detection(name) for each in scores])
        rows.append(
            [
                METHODS[method].label,
                cell([each.entropy[name].mean() for each in scores], 3),
                *(cell(100 * column, 1) for column in found.T),
                cell([100 * each.information_auroc(name) for each in scores], 1)
                if METHODS[method].samples != 1
                else "",
            ]
        )
    return rows


# --- Figure ---------------------------------------------------------------------------------------


def draw(results: Results, seeds: int) -> Figure:
    """Entropy histograms of every method, and AUROC with standard errors."""
    figure = Figure(figsize=(14, 5.6), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(2.5, 1))
    histograms, summary = parts
    axes = histograms.subplots(2, 4, sharex=True, sharey=True).ravel()
    for ax, (method, scores) in zip(axes, results.items(), strict=False):
        draw_entropies(ax, METHODS[method].label, scores)
    axes[0].set_ylim(0, TALLEST)
    for ax in axes[len(results) :]:
        ax.set_axis_off()
    for ax in axes[: len(results)][-4:]:
        ax.tick_params(labelbottom=True)  # also where the axis below is off
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, loc="center left", frameon=False)
    histograms.supxlabel("predictive entropy, nats", fontsize=10)
    histograms.supylabel("share of images", fontsize=10)
    draw_auroc(summary.subplots(), results, "AUROC ± standard error" if seeds > 1 else "AUROC")
    return figure


def draw_entropies(ax: Axes, label: str, scores: Sequence[Scores]) -> None:
    """Histograms pooled over seeds; a bar that is cut off has its height written beside it."""
    bins = np.linspace(0.0, np.log(10), 24)
    for name, set_label in {"test": "test digits", **UNFAMILIAR}.items():
        values = np.concatenate([each.entropy[name] for each in scores])
        share = np.histogram(values, bins=bins)[0] / len(values)
        color, familiar = SET_COLORS[name], name == "test"
        style: dict[str, Any] = {"fill": True, "alpha": 0.35} if familiar else {"linewidth": 1.6}
        ax.stairs(share, bins, color=color, label=set_label, **style)
        if familiar and share[0] > TALLEST:
            ax.annotate(f"↑ {share[0]:.2f}", (bins[1] + 0.04, 0.92 * TALLEST), color=color)
    ax.set_title(label, fontsize=10)


def draw_auroc(ax: Axes, results: Results, label: str) -> None:
    """AUROC of the entropy (filled) and of the mutual information (open), a row per method."""
    rows = dict(zip(results, range(len(results))[::-1], strict=True))
    for name in UNFAMILIAR:
        style = {"color": SET_COLORS[name], "fmt": "o", "markersize": 6, "elinewidth": 1.2}
        for method, scores in results.items():
            mean, error = mean_and_error([each.detection(name).auroc for each in scores])
            ax.errorbar(mean, rows[method] + 0.12, xerr=error, **style)
            if METHODS[method].samples != 1:
                mean, error = mean_and_error([each.information_auroc(name) for each in scores])
                ax.errorbar(mean, rows[method] - 0.12, xerr=error, markerfacecolor="white", **style)
    ax.set_yticks(list(rows.values()), [METHODS[method].label for method in rows], fontsize=9)
    ax.grid(axis="y", linewidth=0.4)
    ax.set_xlabel(f"{label}\nfilled: entropy, open: mutual information", fontsize=9)
    ax.set_ylim(-0.5, len(rows) - 0.5)
    ax.margins(x=0.12)
    ax.set_title("Telling digits from the unfamiliar", fontsize=10)


# --- Tuning ---------------------------------------------------------------------------------------


def tune(args: Namespace, data: ImageData, run: Run) -> None:
    """Prints every method's grid with its validation results, the choice marked."""
    for method in args.methods:
        total = len(grid(method)) * args.seeds
        with tqdm(total=total, unit="run", desc=METHODS[method].label) as bar:
            tried = try_settings(method, data, run, args.seeds, bar.update)
        print(f"\n{METHODS[method].label}: {len(tried)} settings\n{format_tried(tried)}")
        if names := edges(method, select(tried).values):
            print(f"  chosen at the edge of the grid: {', '.join(names)}")
    print()


if __name__ == "__main__":
    sys.exit(main())
