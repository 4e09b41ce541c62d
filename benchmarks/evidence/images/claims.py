"""The authors' three claims about IVON, as paired differences over seeds, and what became of them.

A claim is *reproduced* if each of its statements holds beyond two standard errors, *reversed* if
the opposite of the first statement does, and otherwise *not reproduced*.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from examples._shared.reporting import mean_and_error

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # by method and seed
Read = Callable[[Mapping[str, Any]], float]
ERRORS = 2.0  # standard errors that make a difference


class Statement(NamedTuple):
    """That a difference is positive; or, if `none`, that it is not."""

    text: str
    differences: Sequence[float]
    none: bool = False

    @property
    def score(self) -> float:
        """The mean difference in standard errors; NaN for fewer than two seeds."""
        mean, error = mean_and_error(self.differences)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(mean / error) if mean or len(self.differences) < 2 else 0.0

    @property
    def holds(self) -> bool:
        """Whether it is so beyond two standard errors."""
        return self.score <= ERRORS if self.none else self.score > ERRORS

    def row(self) -> list[str]:
        """Text, mean with standard error, ratio, and whether it holds."""
        mean, error = mean_and_error(self.differences)
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


def at_samples(name: str, count: int) -> Read:
    """Reads a metric of IVON's curve at a number of samples."""
    return lambda result: result["curve"][name][result["curve"]["samples"].index(count)]


def at_mean(name: str) -> Read:
    """Reads a metric at the posterior mean."""
    return lambda result: result["mean"][name]


def reported(name: str) -> Read:
    """Reads a metric of the prediction that a method reports."""
    return lambda result: result["metrics"][name]


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """Differences one - other over the seeds that both have."""
    return [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def column(results: Results, method: str, read: Read) -> dict[int, float]:
    """A metric of a method by seed."""
    return {seed: read(result) for seed, result in results.get(method, {}).items()}


def rises(usual: Results, overlong: Results, method: str, read: Read) -> dict[int, float]:
    """By how much a metric grows from the usual to the over-long run, by seed."""
    long = column(overlong, method, lambda result: read(result["final"]))
    short = column(usual, method, read)
    return {seed: long[seed] - short[seed] for seed in sorted(long.keys() & short.keys())}


def claims(usual: Results, overlong: Results, ivon: str, label: str) -> list[Claim]:
    """All claims that the results can answer for one kind of IVON."""
    found = []
    if all(results.get(method) for results in (usual, overlong) for method in (ivon, "adamw")):
        for way, read in {"": reported("nll"), " at the mean": at_mean("nll")}.items():
            found.append(overfitting_claim(usual, overlong, ivon, label + way, read))
    if usual.get(ivon):
        for name, text, sign in (("nll", "NLL", 1), ("accuracy", "accuracy", -1)):
            found.append(samples_claim(usual, ivon, label, name, text, sign))
        for name, text in (("ece", "ECE"), ("nll", "NLL")) if usual.get("sgd") else ():
            found.append(averaging_claim(usual, ivon, label, name, text))
    return found


def overfitting_claim(
    usual: Results, overlong: Results, ivon: str, label: str, read: Read
) -> Claim:
    """(a): over-long training; `read` takes IVON's average or its mean."""
    adamw = rises(usual, overlong, "adamw", reported("nll"))
    ours = rises(usual, overlong, ivon, read)
    statements = [
        Statement("AdamW's NLL rises more than IVON's", paired(adamw, ours)),
        Statement("AdamW's NLL rises", list(adamw.values())),
        Statement("IVON's NLL does not rise", list(ours.values()), none=True),
    ]
    name = f"(a) {label} does not overfit in over-long training where AdamW does: test NLL"
    return Claim(name, statements)


def samples_claim(usual: Results, ivon: str, label: str, name: str, text: str, sign: int) -> Claim:
    """(b): one sample and many; `sign` is 1 for a metric that is better when lower."""
    mean = column(usual, ivon, at_mean(name))
    counts = next(iter(usual[ivon].values()))["curve"]["samples"]

    def gains(count: int) -> list[float]:
        return [sign * x for x in paired(mean, column(usual, ivon, at_samples(name, count)))]

    many = [count for count in counts if count in (16, 64, 256)] or [counts[-1]]
    statements = [
        Statement(f"{count} samples better than the mean", gains(count)) for count in many
    ]
    statements.append(Statement("one sample worse than the mean", [-x for x in gains(1)]))
    title = f"(b) {label}: one sample is worse than the mean, 16 or more are better: {text}"
    return Claim(title, statements)


def averaging_claim(usual: Results, ivon: str, label: str, name: str, text: str) -> Claim:
    """(c): what averaging adds to what the mean has over SGD."""
    drawn, mean = column(usual, ivon, reported(name)), column(usual, ivon, at_mean(name))
    sgd = column(usual, "sgd", reported(name))
    averaging = dict(zip(sorted(mean), paired(mean, drawn), strict=True))
    of_mean = dict(zip(sorted(mean.keys() & sgd.keys()), paired(sgd, mean), strict=True))
    more = "averaging lowers it by more than going from SGD to the mean"
    statements = [
        Statement("averaging lowers it below the mean's", list(averaging.values())),
        Statement("the average is below SGD's", paired(sgd, drawn)),
        Statement(more, paired(averaging, of_mean)),
    ]
    title = f"(c) {label}: averaging over the posterior buys most of the calibration: {text}"
    return Claim(title, statements)
