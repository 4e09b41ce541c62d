"""Why samples tell questions from film reviews worse than the mean does.

    python benchmarks/evidence/finetuning/questions.py --data DIR

A network that is fine-tuned by IVON to tell good film reviews from bad ones is asked about 500
reviews, about questions and about reviews of products. Its margin, the difference of its two
logits, is looked at in the mean and in twenty posterior samples: how large it is, and how much it
varies over the samples. On two cores a seed takes three minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks._shared.methods import auroc, average
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import NUM_UNFAMILIAR, load_task, load_unfamiliar
from examples._shared.reporting import cell, format_table
from ivon_jax import metrics, predict_at_mean, predict_samples

SAMPLES = 20
SMALL, LARGE = 1.0, 3.0  # margins


Margins = tuple[np.ndarray, np.ndarray]  # at the mean (n,) and at samples (S, n)


@dataclass
class Options:
    """The command line."""

    data: Path
    """Folder of the sentences."""
    labels: int = 1000
    seeds: int = 2


def margins(fitted: Any, base: Any, key: Any, tokens: np.ndarray) -> Margins:
    """At the mean and at samples."""
    point = methods.in_batches(partial(_at_mean, fitted, base), tokens)
    drawn = methods.in_batches(partial(_at_samples, key, fitted, base), tokens, axis=1)
    return point[..., 1] - point[..., 0], drawn[..., 1] - drawn[..., 0]


@jax.jit
def _at_mean(fitted: Any, base: Any, tokens: Any) -> Any:
    return predict_at_mean(partial(methods.logits, 2))(fitted, base, tokens)


@jax.jit
def _at_samples(key: Any, fitted: Any, base: Any, tokens: Any) -> Any:
    return predict_samples(partial(methods.logits, 2), SAMPLES)(key, fitted, base, tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, and prints both tables."""
    options = parse(Options, __doc__, argv)
    task = load_task(options.data, "sst2", options.labels)
    others = load_unfamiliar(options.data, "sst2")
    sets = {"reviews": task.test.tokens[:NUM_UNFAMILIAR], **others}
    found: list[dict[str, Margins]] = []
    for seed in range(options.seeds):
        init_key, fit_key, key = jax.random.split(jax.random.key(seed), 3)
        scope = methods.make_scope("full", 2, init_key)
        fitted = methods.fit("ivon", 2, scope, task.train, fit_key, methods.CHOSEN)
        found.append({k: margins(fitted, scope.base, key, x) for k, x in sets.items()})
    for measure in (spreads, detections):
        print("\n" + format_table(rows_of([measure(x) for x in found])))


def rows_of(tables: list[dict[str, dict[str, float]]]) -> list[list[str]]:
    """Mean and standard error of tables by seed, which are given row by row."""
    first = tables[0]
    rows = [["", *next(iter(first.values()))]]
    for name, row in first.items():
        values = ([table[name][k] for table in tables] for k in row)
        rows.append([name, *("" if np.isnan(x).any() else cell(x, 3) for x in values)])
    return rows


def spreads(found: dict[str, Margins]) -> dict[str, dict[str, float]]:
    """How large margins are, and how much samples differ in them."""
    rows = {}
    for name, (point, drawn) in found.items():
        std, size = drawn.std(0), np.abs(point)
        small, large = size < SMALL, size > LARGE
        rows[f"margin of {name}"] = {
            "at the mean": size.mean(),
            "samples' average": np.abs(drawn.mean(0)).mean(),
            "std over samples": std.mean(),
            f"where below {SMALL:g}": std[small].mean() if small.any() else np.nan,
            f"where above {LARGE:g}": std[large].mean() if large.any() else np.nan,
        }
    return rows


def detections(found: dict[str, Margins]) -> dict[str, dict[str, float]]:
    """Areas under the ROC of scores that tell the other sentences from reviews."""

    def log_probs(margin: np.ndarray) -> Any:
        return jax.nn.log_softmax(np.stack([np.zeros_like(margin), margin], axis=-1))

    scores = {
        "entropy at the mean": lambda x: metrics.predictive_entropy(log_probs(x[0])),
        "entropy of one sample": lambda x: metrics.predictive_entropy(log_probs(x[1][0])),
        f"entropy of {SAMPLES} samples": lambda x: metrics.predictive_entropy(
            average(log_probs(x[1]))
        ),
        "disagreement": lambda x: metrics.mutual_information(log_probs(x[1])),
    }
    others = {name: x for name, x in found.items() if name != "reviews"}
    return {
        f"AUROC, {title}": {k: auroc(score(found["reviews"]), score(x)) for k, x in others.items()}
        for title, score in scores.items()
    }


if __name__ == "__main__":
    main()
