"""Why samples tell questions from film reviews worse than the mean does.

    python benchmarks/evidence/finetuning/questions.py --data DIR

A network that is fine-tuned by IVON to tell good film reviews from bad ones is asked about 500
reviews, about questions and about reviews of products. Its margin, the difference of its two
logits, is looked at in the mean and in twenty posterior samples: how large it is, and how much it
varies over the samples. Four minutes on two cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import NUM_UNFAMILIAR, load_task, load_unfamiliar
from examples._shared.reporting import format_table
from ivon_jax import metrics, predict_at_mean, predict_samples

SAMPLES = 20
SMALL, LARGE = 1.0, 3.0  # margins


@dataclass
class Options:
    """The command line."""

    data: Path
    """Folder of the sentences."""
    labels: int = 1000
    seed: int = 0


def margins(fitted: Any, base: Any, key: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At the mean (n,) and at samples (S, n)."""
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
    init_key, fit_key, key = jax.random.split(jax.random.key(options.seed), 3)
    scope = methods.make_scope("full", 2, init_key)
    fitted = methods.fit("ivon", 2, scope, task.train, fit_key, methods.CHOSEN)
    others = load_unfamiliar(options.data, "sst2")
    sets = {"reviews": task.test.tokens[:NUM_UNFAMILIAR], **others}
    found = {name: margins(fitted, scope.base, key, tokens) for name, tokens in sets.items()}
    print("\n" + format_table(spread_rows(found)) + "\n\n" + format_table(detection_rows(found)))


def spread_rows(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[list[str]]:
    """How large margins are, and how much samples differ in them."""
    names = ("size at the mean", "size of the samples' mean", "std over samples")
    rows = [["margin", *names, f"where below {SMALL:g}", f"where above {LARGE:g}"]]
    for name, (point, drawn) in found.items():
        std, size = drawn.std(0), np.abs(point)
        values = size.mean(), np.abs(drawn.mean(0)).mean(), std.mean()
        parts = (
            std[rows].mean() if rows.any() else np.nan for rows in (size < SMALL, size > LARGE)
        )
        rows.append([name, *(f"{x:.2f}" for x in (*values, *parts))])
    return rows


def detection_rows(found: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[list[str]]:
    """Areas under the ROC of scores that tell the other sentences from reviews."""
    rows = [["AUROC", *(name for name in found if name != "reviews")]]

    def log_probs(margin: np.ndarray) -> Any:
        return jax.nn.log_softmax(np.stack([np.zeros_like(margin), margin], axis=-1))

    def averaged(x: tuple[np.ndarray, np.ndarray]) -> Any:
        each = log_probs(x[1])
        return jax.nn.logsumexp(each, axis=0) - np.log(len(each))

    scores = {
        "entropy at the mean": lambda x: metrics.predictive_entropy(log_probs(x[0])),
        "entropy of one sample": lambda x: metrics.predictive_entropy(log_probs(x[1][0])),
        f"entropy of {SAMPLES} samples": lambda x: metrics.predictive_entropy(averaged(x)),
        "disagreement": lambda x: metrics.mutual_information(log_probs(x[1])),
    }
    for title, score in scores.items():
        familiar = score(found["reviews"])
        aurocs = (
            metrics.detection(familiar, score(x)).auroc for k, x in found.items() if k != "reviews"
        )
        rows.append([title, *(f"{float(x):.3f}" for x in aurocs)])
    return rows


if __name__ == "__main__":
    main()
