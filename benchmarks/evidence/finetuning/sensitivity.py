"""Which labels of a fine-tuned transformer are wrong, and when to stop, from the posterior.

    python benchmarks/evidence/finetuning/sensitivity.py --data DIR

MiniLM-L6 is fine-tuned by IVON on 1,000 film reviews of which 0, 5, 10 or 20 % have the wrong
label. Scores of the training sentences are compared by their area under the ROC: sensitivity, the
loss, which orders two classes as the size of the error does, and the variance of the output, the
other factor of sensitivity. Then runs of one to eight epochs, without wrong labels, are compared by
the leave-one-out estimate of their loss, from the training sentences alone, and by the loss on the
test set. A seed is estimated to take 25 minutes on two cores.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks._shared.journal import Evidence, Journal, Runs, command, grouped, write_tables
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import Sentences, load_task
from examples._shared.reporting import cell
from ivon_jax import Posterior, leave_one_out, metrics, sensitivity

SHARES = (0.0, 0.05, 0.1, 0.2)
EPOCHS = (1, 2, 3, 4, 6, 8)
SCORES = ("sensitivity", "loss", "variance")
SHOWN = 10  # sentences
LOSS = optax.softmax_cross_entropy_with_integer_labels


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("finetuning_sensitivity.jsonl")
    data: Path | None = None
    """Folder of the sentences."""
    labels: int = 1000
    seeds: int = 3


class Study:
    """The sentences, with those of a share of the labels turned round."""

    def __init__(self, folder: Path, labels: int):
        self.task = load_task(folder, "sst2", labels)
        self.texts = self.task.train.texts

    def fitted(self, seed: int, data: Sentences, epochs: int) -> tuple[Posterior, Any]:
        """The posterior, and what it adapts."""
        init_key, key = jax.random.split(jax.random.key(seed))
        scope = methods.make_scope("full", 2, init_key)
        return methods.fit("ivon", 2, scope, data, key, methods.CHOSEN, epochs), scope.base

    def wrong_labels(self, seed: int, share: float) -> dict[str, Any]:
        """How well every score finds the labels that were turned round."""
        train = self.task.train
        number = round(share * len(train.labels))
        flipped = np.random.default_rng(seed).permutation(len(train.labels))[:number]
        labels = train.labels.copy()
        labels[flipped] = 1 - labels[flipped]
        q, base = self.fitted(seed, train._replace(labels=labels), methods.EPOCHS)
        found = _scores(q, base, train.tokens, labels)
        if not number:
            worst = np.argsort(-found["sensitivity"])[:SHOWN]
            return {"shown": [[int(labels[i]), self.texts[i]] for i in worst]}
        right = np.delete(np.arange(len(labels)), flipped)
        return {
            name: float(metrics.detection(x[right], x[flipped]).auroc) for name, x in found.items()
        }

    def lengths(self, seed: int, epochs: int) -> dict[str, float]:
        """Estimates of the test loss of a run of so many epochs, and that loss."""
        q, base = self.fitted(seed, self.task.train, epochs)
        train, test = self.task.train, self.task.test
        at_test = methods.in_batches(partial(_log_probs, q.mean, base), test.tokens)
        at_train = methods.in_batches(partial(_log_probs, q.mean, base), train.tokens)
        wider = 1 / (methods.CHOSEN["sigma"] ** 2 * methods.HESS_INIT) / len(train.labels)  # ess/N
        as_if_n = Posterior(q.mean, jax.tree.map(lambda p: p / wider, q.precision))
        found = {
            "training": -at_train[np.arange(len(train.labels)), train.labels].mean(),
            "test": -at_test[np.arange(len(test.labels)), test.labels].mean(),
            "test error": (at_test.argmax(-1) != test.labels).mean(),
        }
        for name, each in (("leave-one-out, own ess", q), ("leave-one-out, ess = N", as_if_n)):
            found[name] = _left_out(each, base, train.tokens, train.labels)
        return {name: float(x) for name, x in found.items()}


@jax.jit
def _log_probs(params: Any, base: Any, tokens: Any) -> Any:
    return jax.nn.log_softmax(methods.logits(2, params, base, tokens))


def _scores(q: Posterior, base: Any, tokens: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    found = _sensitivity(q, base, tokens, labels)
    log_probs = methods.in_batches(partial(_log_probs, q.mean, base), tokens)
    loss = -log_probs[np.arange(len(labels)), labels]
    values = found.score, loss, np.asarray(found.variance).sum(1)
    return dict(zip(SCORES, map(np.asarray, values), strict=True))


@jax.jit
def _sensitivity(q: Posterior, base: Any, tokens: Any, labels: Any) -> Any:
    return sensitivity(lambda p, x: methods.logits(2, p, base, x), LOSS)(q, tokens, targets=labels)


@jax.jit
def _left_out(q: Posterior, base: Any, tokens: Any, labels: Any) -> Any:
    apply = lambda p, x: methods.logits(2, p, base, x)  # noqa: E731
    return leave_one_out(apply, LOSS)(q, tokens, targets=labels).loss.mean()


def compute(options: Options) -> None:
    """All shares and all lengths of every seed."""
    if options.data is None:
        raise SystemExit("name the folder of the sentences with --data DIR")
    study = Study(options.data, options.labels)
    total = options.seeds * (len(SHARES) + len(EPOCHS))
    journal = Journal(options.results, total=total)
    for seed in range(options.seeds):
        for share in SHARES:
            run = {"labels": options.labels, "share": share, "seed": seed}
            journal.compute(run, partial(study.wrong_labels, seed, share))
        for epochs in EPOCHS:
            run = {"labels": options.labels, "epochs": epochs, "seed": seed}
            journal.compute(run, partial(study.lengths, seed, epochs))


def report(journal: Journal) -> None:
    """Areas under the ROC, losses by length, and the most sensitive sentences."""
    runs = journal.select()
    shares = [(run, x) for run, x in runs if run.get("share")]
    lengths = [(run, x) for run, x in runs if "epochs" in run]
    tables = {"Wrong labels: area under the ROC": _by(shares, "share", list(SCORES), 3)}
    if lengths:
        tables["Epochs: NLL and error at the mean"] = _by(lengths, "epochs", list(lengths[0][1]), 3)
    shown = [x["shown"] for run, x in runs if run.get("share") == 0.0]
    if shown:
        rows = [["label", "most sensitive sentences of the first seed, labels as published"]]
        tables["Suspicious"] = rows + [[str(label), text[:90]] for label, text in shown[0]]
    seeds = len({run["seed"] for run, _ in runs})
    notes = (
        f"{seeds} seed{'s' * (seeds > 1)}; lengths of training that are missing below had not been "
        "reached. `share`: of the training labels that are turned round. Scores: sensitivity by "
        "the posterior as it was trained, the loss of each sentence, and the variance of its "
        "logits. `own ess`: leave-one-out by that posterior; `ess = N`: by one as wide as Bayes "
        "would have it, which was not trained."
    )
    write_tables(journal, "Sensitivity of MiniLM-L6 to its training sentences", tables, notes)


def _by(runs: Runs, field: str, names: list[str], decimals: int) -> list[list[str]]:
    rows = [[field, *names]]
    for (value,), group in grouped(runs, field).items():
        cells = [cell([x[name] for _, x in group], decimals) for name in names]
        rows.append([f"{value:g}", *cells])
    return rows


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
