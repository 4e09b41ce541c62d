"""Tables, verdicts and figure of the image benchmarks, made from their journal.

The verdicts are on the authors' three claims about IVON, as paired differences over seeds. A claim
is *reproduced* if each of its statements holds beyond two standard errors, *reversed* if the
opposite of the first statement does, and otherwise *not reproduced*.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._shared.journal import Journal, write_tables
from benchmarks._shared.methods import Values
from benchmarks._shared.tuning import described
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
BySeed = dict[int, float]
Runs = Mapping[int, Mapping[str, Any]]  # results of a method by seed
Results = Mapping[str, Runs]  # by method
Read = Callable[[Mapping[str, Any]], float]
ERRORS = 2.0  # standard errors that make a difference


def write_report(journal: Journal, identity: Mapping[str, Any], factor: int) -> None:
    """Makes the tables and the figure of the runs that a command asks for."""
    chosen = CHOSEN[identity["model"], identity["dataset"]]
    usual = collect(journal, chosen, task="compare", **identity)
    if not usual:
        raise SystemExit(f"{journal.path} has no results of {identity}")
    ivons = {method: METHODS[method] for method in VARIATIONAL if method in usual}
    tables: dict[str, Rows] = {"Test images and unfamiliar ones": quality_rows(usual)}
    for ivon, label in ivons.items():
        tables[f"Number of posterior samples: {label}"] = sample_rows(usual[ivon])
    overlong: Results = {}
    if factor:
        header = "NLL, usual", "NLL, over-long", "rise", "lowest on the way", "train NLL"
        rows: Rows = [["", *header, "accuracy, %"]]
        for suffix in ("", ", b2 kept", ", b2 kept, guard"):
            settings = {m: overlong_values(v, factor).get(suffix) for m, v in chosen.items()}
            longer = collect(journal, settings, task="overlong", factor=factor, **identity)
            rows += overlong_rows(usual, longer, suffix)
            overlong = overlong or longer
        tables[f"Over-long training: {factor} times the epochs"] = rows
    found = [each for ivon, label in ivons.items() for each in claims(usual, overlong, ivon, label)]
    tables["The authors' claims"] = [("claim", "verdict"), *((x.name, x.verdict) for x in found)]
    for claim in found:
        header = ("statement", "difference", "in errors", "holds")
        tables[claim.name] = [header, *(statement.row() for statement in claim.statements)]
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


def collect(
    journal: Journal, settings: Mapping[str, Values | None], **fields: Any
) -> dict[str, Runs]:
    """Results of each method at its settings, of those that have any."""
    found = {}
    for method, values in settings.items():
        if values and (runs := journal.select(method=method, values=values, **fields)):
            found[method] = {run["seed"]: result for run, result in runs}
    return found


# --- Metrics of a result, and differences by seed -------------------------------------------------


def at_samples(name: str, count: int) -> Read:
    """Reads a metric of IVON's curve at a number of samples."""
    return lambda result: result["curve"][name][result["curve"]["samples"].index(count)]


def at_mean(name: str) -> Read:
    """Reads a metric at the posterior mean."""
    return lambda result: result["mean"][name]


def reported(name: str) -> Read:
    """Reads a metric of the prediction that a method reports."""
    return lambda result: result["metrics"][name]


def column(runs: Runs, read: Read) -> BySeed:
    """A metric of a method by seed."""
    return {seed: read(result) for seed, result in runs.items()}


def paired(one: BySeed, other: BySeed) -> BySeed:
    """Differences one - other over the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


def rises(usual: Runs, overlong: Runs, read: Read) -> BySeed:
    """By how much a metric grows from the usual to the over-long run."""
    return paired(column(overlong, lambda result: read(result["final"])), column(usual, read))


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
    labels = (METRICS[name][0] for name in CURVE)
    rows: Rows = [["samples", *labels, "accuracy - mean's", "NLL - mean's"]]
    for label, read in {"mean": at_mean, **reads}.items():
        found = {name: column(ivon, read(name)) for name in CURVE}
        leads = (
            "" if read is at_mean else shown(name, paired(found[name], column(ivon, at_mean(name))))
            for name in ("accuracy", "nll")
        )
        rows.append([label, *(shown(name, each) for name, each in found.items()), *leads])
    return rows


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


# --- The claims -----------------------------------------------------------------------------------


class Statement(NamedTuple):
    """That a difference is positive; or, if `none`, that it is not."""

    text: str
    differences: BySeed
    none: bool = False

    @property
    def score(self) -> float:
        """The mean difference in standard errors; NaN for fewer than two seeds."""
        mean, error = mean_and_error(list(self.differences.values()))
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(mean / error) if mean or len(self.differences) < 2 else 0.0

    @property
    def holds(self) -> bool:
        """Whether it is so beyond two standard errors."""
        return self.score <= ERRORS if self.none else self.score > ERRORS

    def row(self) -> list[str]:
        """Text, mean with standard error, ratio, and whether it holds."""
        mean, error = mean_and_error(list(self.differences.values()))
        holds = "yes" if self.holds else "no"
        return [self.text, f"{mean:.5f} ± {error:.5f}", f"{self.score:.1f}", holds]


class Claim(NamedTuple):
    """Statements of which the first decides whether a failure is a reversal."""

    name: str
    statements: Sequence[Statement]

    @property
    def verdict(self) -> str:
        """One of the three outcomes, or that the seeds are too few for one."""
        if any(np.isnan(each.score) for each in self.statements):
            return "no verdict from fewer than two seeds"
        if all(each.holds for each in self.statements):
            return "reproduced"
        return "reversed" if self.statements[0].score < -ERRORS else "not reproduced"


def claims(usual: Results, overlong: Results, ivon: str, label: str) -> list[Claim]:
    """All claims that the results can answer for one kind of IVON."""
    found = []
    if all(method in overlong and method in usual for method in (ivon, "adamw")):
        for way, read in {"": reported, " at the mean": at_mean}.items():
            found.append(overfitting_claim(usual, overlong, ivon, label + way, read("nll")))
    found.append(samples_claim(usual[ivon], label, "nll", "NLL", 1))
    found.append(samples_claim(usual[ivon], label, "accuracy", "accuracy", -1))
    for name in ("ece", "nll") if "sgd" in usual else ():
        found.append(averaging_claim(usual[ivon], usual["sgd"], label, name))
    return found


def overfitting_claim(
    usual: Results, overlong: Results, ivon: str, label: str, read: Read
) -> Claim:
    """(a): over-long training; `read` takes IVON's average or its mean."""
    adamw = rises(usual["adamw"], overlong["adamw"], reported("nll"))
    ours = rises(usual[ivon], overlong[ivon], read)
    name = f"(a) {label} does not overfit in over-long training where AdamW does: test NLL"
    statements = [
        Statement("AdamW's NLL rises more than IVON's", paired(adamw, ours)),
        Statement("AdamW's NLL rises", adamw),
        Statement("IVON's NLL does not rise", ours, none=True),
    ]
    return Claim(name, statements)


def samples_claim(ivon: Runs, label: str, name: str, text: str, sign: int) -> Claim:
    """(b): one sample and many; `sign` is 1 for a metric that is better when lower."""

    def lead(count: int, sign: int) -> BySeed:
        found = paired(column(ivon, at_mean(name)), column(ivon, at_samples(name, count)))
        return {seed: sign * each for seed, each in found.items()}

    counts = next(iter(ivon.values()))["curve"]["samples"]
    many = [count for count in counts if count in (16, 64, 256)] or [counts[-1]]
    title = f"(b) {label}: one sample is worse than the mean, 16 or more are better: {text}"
    statements = [
        *(Statement(f"{n} samples better than the mean", lead(n, sign)) for n in many),
        Statement("one sample worse than the mean", lead(1, -sign)),
    ]
    return Claim(title, statements)


def averaging_claim(ivon: Runs, sgd: Runs, label: str, name: str) -> Claim:
    """(c): what averaging adds to what the mean has over SGD."""
    drawn, mean = column(ivon, reported(name)), column(ivon, at_mean(name))
    plain = column(sgd, reported(name))
    averaging = paired(mean, drawn)
    more = "averaging lowers it by more than going from SGD to the mean"
    title = f"(c) {label}: averaging over the posterior buys most of the calibration: "
    statements = [
        Statement("averaging lowers it below the mean's", averaging),
        Statement("the average is below SGD's", paired(plain, drawn)),
        Statement(more, paired(averaging, paired(plain, mean))),
    ]
    return Claim(title + name.upper(), statements)


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
