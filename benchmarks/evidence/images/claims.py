"""The authors' three claims about IVON, as paired differences over seeds, and what became of them.

A claim is *reproduced* if each of its statements holds beyond two standard errors, *reversed* if
the opposite of the first statement does, and otherwise *not reproduced*.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples._shared.reporting import mean_and_error

BySeed = dict[int, float]
Runs = Mapping[int, Mapping[str, Any]]  # results of a method by seed
Results = Mapping[str, Runs]  # by method
Read = Callable[[Mapping[str, Any]], float]
ERRORS = 2.0  # standard errors that make a difference


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


# --- The claims -----------------------------------------------------------------------------------


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
