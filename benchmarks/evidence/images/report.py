"""Tables, verdicts and figure of the image benchmarks, made from their journal."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._shared.journal import Journal, write_tables
from benchmarks._shared.methods import Values
from benchmarks._shared.tuning import described
from benchmarks.evidence.images.claims import (
    BySeed,
    Read,
    Results,
    Runs,
    at_mean,
    at_samples,
    claims,
    column,
    paired,
    reported,
    rises,
)
from benchmarks.evidence.images.methods import METHODS, VARIATIONAL
from benchmarks.evidence.images.tuning import CHOSEN, overlong_values
from examples._shared.reporting import cell, mean_and_error, save_figure

DIVERGED = 10.0  # a test NLL that no network of use has
NETWORKS = {"mlp": "perceptron", "resnet": "ResNet with filter response normalisation"}
METRICS = {  # label, factor, decimals
    "accuracy": ("accuracy, %", 100, 2),
    "nll": ("NLL", 1, 4),
    "ece": ("ECE, %", 100, 2),
    "brier": ("Brier", 1, 4),
    "auroc_letters": ("AUROC letters", 1, 3),
    "auroc_patches": ("AUROC patches", 1, 3),
}
CURVE = ("accuracy", "nll", "ece")  # against the number of samples
COLORS = {
    "sgd": "#0072B2",
    "adamw": "#E69F00",
    "ensemble": "#444444",
    "ivon": "#00785A",
    "ivon_bayes": "#D55E00",
}
NOTES = (
    "{train:,} training and {test:,} test images; {epochs} epochs in batches of {batch_size}; "
    "mean ± standard error over {seeds} seeds. MC-dropout, SWAG and IVON average 64 samples where "
    "no number is given; the ensemble spends five times the gradients. AUROC: how well the entropy "
    "of the prediction tells test images from letters and from patches of photographs. IVON was "
    "tuned with a temperature (ess = N / temperature), or, as ess = N, without; all settings were "
    "chosen on held-out training images. Numbers of samples: the mean over all disjoint groups of "
    "so many. Differences are paired by seed; one counts beyond two standard errors. A claim is "
    "reproduced if each of its statements holds, reversed if the opposite of the first does, and "
    "otherwise not reproduced. In over-long training IVON's b2 moves towards 1 with the length of "
    "the run (b2 to the power 1/factor); rows 'b2 kept' show what happens without, 'guard' what "
    "precision_floor=0.1 does about it."
)
Rows = list[Sequence[str]]


def write_report(journal: Journal, identity: Mapping[str, Any], factor: int) -> None:
    """Makes the tables and the figure of the runs that a command asks for."""
    usual = collect(journal, lambda values: values, task="compare", **identity)
    if not usual:
        raise SystemExit(f"{journal.path} has no results of {identity}")
    ivons = {method: METHODS[method] for method in VARIATIONAL if method in usual}
    tables: dict[str, Rows] = {"Test images and unfamiliar ones": quality_rows(usual)}
    for ivon, label in ivons.items():
        tables[f"Number of posterior samples: {label}"] = sample_rows(usual[ivon])
    overlong: Results = {}
    if factor:
        rows: Rows = [OVERLONG]
        for suffix in ("", ", b2 kept", ", b2 kept, guard"):
            values_of = partial(overlong_settings, factor, suffix)
            longer = collect(journal, values_of, task="overlong", factor=factor, **identity)
            rows += overlong_rows(usual, longer, suffix)
            overlong = overlong or longer
        tables[f"Over-long training: {factor} times the epochs"] = rows
    found = [each for ivon, label in ivons.items() for each in claims(usual, overlong, ivon, label)]
    tables["The authors' claims"] = [("claim", "verdict"), *((x.name, x.verdict) for x in found)]
    for claim in found:
        header = ("statement", "difference", "in errors", "holds")
        tables[claim.name] = [header, *(statement.row() for statement in claim.statements)]
    chosen = CHOSEN[identity["model"], identity["dataset"]]
    tables["Settings"] = [("", "settings"), *((METHODS[m], described(chosen[m])) for m in usual)]
    title = f"Image classification: {identity['dataset']}, {NETWORKS[identity['model']]}"
    seeds = max(map(len, usual.values()))
    run = journal.select(task="compare", **identity)[0][0]
    notes = f"`{command(**identity)} --seeds {seeds}`\n\n{NOTES.format(seeds=seeds, **run)}"
    path = journal.path.with_suffix(".png")
    write_tables(journal, title, tables, f"{notes}\n\n![Figure]({path.name})")
    save_figure(draw(usual, overlong), path)


def command(model: str, dataset: str, **_: Any) -> str:
    """The command line of a comparison."""
    data = "" if dataset == "digits" else f" --dataset {dataset} --data-dir DIR"
    network = "" if model == "mlp" else f" --model {model}"
    return f"python benchmarks/evidence/images/main.py{data}{network}"


def overlong_settings(factor: int, suffix: str, values: Values) -> Values | None:
    """Those of the over-long runs whose rows end so, if there are any."""
    return overlong_values(values, factor).get(suffix)


def collect(
    journal: Journal, values_of: Callable[[Values], Values | None], **fields: Any
) -> Results:
    """Results at settings made from the chosen ones."""
    chosen = CHOSEN[fields["model"], fields["dataset"]]
    found = {}
    for method in METHODS:
        values = values_of(chosen[method]) if method in chosen else None
        if values and (runs := journal.select(method=method, values=values, **fields)):
            found[method] = {run["seed"]: result for run, result in runs}
    return found


# --- Tables ---------------------------------------------------------------------------------------


def ways(method: str) -> dict[str, Callable[[str], Read]]:
    """What reads the metrics of each way to predict with a method."""
    label = METHODS[method]
    if method not in VARIATIONAL:
        return {label: reported}
    return {f"{label}: mean": at_mean, f"{label}: 64 samples": reported}


def shown(name: str, found: BySeed) -> str:
    """A metric, or differences of it, in its unit."""
    _, factor, decimals = METRICS[name]
    return cell(np.multiply(factor, list(found.values())), decimals)


def quality_rows(usual: Results) -> Rows:
    """A row per way of predicting."""
    rows: Rows = [["", *(label for label, _, _ in METRICS.values()), "seconds"]]
    for method, runs in usual.items():
        seconds = f"{np.mean([result['seconds'] for result in runs.values()]):.1f}"
        for label, read in ways(method).items():
            cells = (shown(name, column(runs, read(name))) for name in METRICS)
            rows.append([label, *cells, seconds])
    return rows


def sample_rows(ivon: Runs) -> Rows:
    """IVON's metrics against the number of samples, and differences from the mean."""
    counts = next(iter(ivon.values()))["curve"]["samples"]
    reads = {str(count): partial(at_samples, count=count) for count in counts}
    rows: Rows = [["samples", *(METRICS[name][0] for name in CURVE)]]
    rows[0] = [*rows[0], "accuracy - mean's", "NLL - mean's"]
    for label, read in {"mean": at_mean, **reads}.items():
        found = {name: column(ivon, read(name)) for name in CURVE}
        leads = (
            "" if read is at_mean else shown(name, paired(found[name], column(ivon, at_mean(name))))
            for name in ("accuracy", "nll")
        )
        rows.append([label, *(shown(name, each) for name, each in found.items()), *leads])
    return rows


OVERLONG = ["", "NLL, usual", "NLL, over-long", "rise"]
OVERLONG += ["lowest on the way", "train NLL", "accuracy, %"]


def overlong_rows(usual: Results, overlong: Results, suffix: str) -> Rows:
    """NLL and accuracy after usual and over-long training."""
    rows: Rows = []
    for method, runs in overlong.items():
        final = {seed: result["final"] for seed, result in runs.items()}
        train = {seed: result["train_nll"][-1] for seed, result in runs.items()}
        for label, read in ways(method).items():
            path = "mean_test_nll" if read is at_mean else "test_nll"
            nlls, lowest = column(final, read("nll")), {s: min(x[path]) for s, x in runs.items()}
            found = (nlls, rises(usual[method], runs, read("nll")), lowest, train)
            cells = [shown("nll", each) for each in found]
            if diverged := sum(not each < DIVERGED for each in nlls.values()):
                cells = [f"diverged ({diverged} of {len(nlls)} seeds)", "", "", ""]
            before = shown("nll", column(usual[method], read("nll")))
            accuracy = shown("accuracy", column(final, read("accuracy")))
            rows.append([label + suffix, before, *cells, accuracy])
    return rows


# --- Figure ---------------------------------------------------------------------------------------


def draw(usual: Results, overlong: Results) -> Figure:
    """The NLL against the number of samples, and in over-long training."""
    panels = 2 if overlong else 1
    figure = Figure(figsize=(6.5 * panels, 4.5), layout="constrained")
    axes = np.ravel(figure.subplots(1, panels))
    draw_samples(axes[0], usual)
    for method, runs in overlong.items():
        epoch = next(iter(runs.values()))["epoch"]
        draw_curve(axes[1], method, epoch, [result["test_nll"] for result in runs.values()])
        axes[1].set(title="Over-long training", xlabel="epoch")
    for ax in axes:
        ax.set_ylabel("test NLL")
        ax.legend(fontsize=8)
    return figure


def draw_samples(ax: Axes, usual: Results) -> None:
    """IVON's curves with its mean (dashed), SGD and the ensemble (dotted)."""
    for method in (each for each in VARIATIONAL if each in usual):
        results = usual[method].values()
        counts = next(iter(results))["curve"]["samples"]
        draw_curve(ax, method, counts, [result["curve"]["nll"] for result in results])
        level = float(np.mean([result["mean"]["nll"] for result in results]))
        ax.axhline(level, color=COLORS[method], ls="--", lw=1.2, label=f"{METHODS[method]}: mean")
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, counts)
    for method in (each for each in ("sgd", "ensemble") if each in usual):
        level = float(np.mean([result["metrics"]["nll"] for result in usual[method].values()]))
        ax.axhline(level, color=COLORS[method], ls=":", lw=1.6, label=METHODS[method])
    ax.set(title="Number of posterior samples", xlabel="samples")


def draw_curve(ax: Axes, method: str, x: Sequence[float], nlls: Sequence[Sequence[float]]) -> None:
    """Mean and standard error over seeds."""
    mean, error = mean_and_error(np.asarray(nlls))
    label, color = METHODS[method], COLORS[method]
    ax.errorbar(x, mean, np.nan_to_num(error), label=label, color=color, marker="o", ms=4)
