"""Which sentences to label next: by the posterior's disagreement, by entropy, or at random.

    python benchmarks/evidence/finetuning/choosing.py --data DIR

MiniLM-L6 is fine-tuned by IVON on 100 film reviews; of 1,000 other ones those are labelled next
that a criterion chooses, the network is fine-tuned from the start on all labels, and so on up to
1,000. The criteria are BALD (Houlsby et al. 2011), the mutual information between label and
weights, the entropy of the averaged prediction, and chance; all begin with the same 100 labels.
Those of the highest scores are taken together, not, as Houlsby et al. do, one at a time. For each
seed a criterion takes 25 minutes on one core.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.comparing import averaged
from benchmarks._shared.journal import Evidence, Journal, command, grouped, write_tables
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import Sentences, load_task
from examples._shared.reporting import cell
from ivon_jax import metrics

SIZES = (100, 200, 400, 700, 1000)
CANDIDATES = 1000  # looked at before each choice
TEST = 600
SAMPLES = 10
MIN_STEPS = 100
Score = Callable[[np.ndarray, np.random.Generator], Any]
CRITERIA: dict[str, Score] = {
    "random": lambda log_probs, rng: rng.random(log_probs.shape[1]),
    "entropy": lambda log_probs, rng: metrics.predictive_entropy(jnp.asarray(averaged(log_probs))),
    "BALD": lambda log_probs, rng: metrics.mutual_information(jnp.asarray(log_probs)),
}


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("finetuning_choosing.jsonl")
    data: Path | None = None
    """Folder of the sentences."""
    seeds: int = 3


class Learner:
    """The pool, and the fit to what is labelled."""

    def __init__(self, folder: Path):
        self.task = load_task(folder, "sst2", None)
        self.predict = methods.Predictor(2, SAMPLES)

    def run(self, criterion: str, seed: int) -> dict[str, Any]:
        """Test accuracy and NLL at every size."""
        rng = np.random.default_rng(seed)
        pool, test = self.task.train, Sentences(*(x[:TEST] for x in self.task.test))
        order = rng.permutation(len(pool.labels))
        chosen, rest = order[: SIZES[0]], order[SIZES[0] :]
        found: dict[str, Any] = {"accuracy": [], "nll": []}
        for size, following in zip(SIZES, (*SIZES[1:], None), strict=True):
            predict = self.fitted(Sentences(*(x[chosen] for x in pool)), seed)
            log_probs = jnp.asarray(averaged(predict(test.tokens)))
            for name in found:
                score = getattr(metrics, name)(log_probs, jnp.asarray(test.labels))
                found[name].append(float(score))
            if following is not None:
                seen = rng.choice(rest, min(CANDIDATES, len(rest)), replace=False)
                score = CRITERIA[criterion](predict(pool.tokens[seen]), rng)
                new = seen[np.argsort(-np.asarray(score))[: following - size]]
                chosen, rest = np.concatenate([chosen, new]), np.setdiff1d(rest, new)
        return found

    def fitted(self, data: Sentences, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        """Log-probabilities of samples (S, n, classes) of a network that is fitted to the data."""
        init_key, fit_key, key = jax.random.split(jax.random.key(seed), 3)
        scope = methods.make_scope("full", 2, init_key)
        epochs = max(methods.EPOCHS, -(-MIN_STEPS // (len(data.labels) // methods.BATCH_SIZE)))
        q = methods.fit("ivon", 2, scope, data, fit_key, methods.CHOSEN, epochs)
        return lambda tokens: self.predict("ivon", q, scope.base, key, tokens)["samples"]


def compute(options: Options) -> None:
    """Every criterion from every seed."""
    if options.data is None:
        raise SystemExit("name the folder of the sentences with --data DIR")
    learner = Learner(options.data)
    journal = Journal(options.results, total=options.seeds * len(CRITERIA))
    for seed in range(options.seeds):
        for criterion in CRITERIA:
            run = {"criterion": criterion, "seed": seed, **methods.CHOSEN}
            journal.compute(run, partial(learner.run, criterion, seed))


def report(journal: Journal) -> None:
    """Accuracy and NLL against the number of labels."""
    seeds = len({run["seed"] for run, _ in journal.select()})
    tables = {}
    for name, key, factor, decimals in (("accuracy, %", "accuracy", 100, 1), ("NLL", "nll", 1, 3)):
        rows = [["labels", *map(str, SIZES)]]
        for (criterion,), group in grouped(journal.select(), "criterion").items():
            values = factor * np.array([x[key] for _, x in group])
            rows.append([criterion, *(cell(x, decimals) for x in values.T)])
        tables[f"Test {name}"] = rows
    notes = (
        f"Of the average over {SAMPLES} samples, on {TEST} sentences: mean ± standard error over "
        f"{seeds} seeds, for as many labels as the column says."
    )
    write_tables(journal, "Choosing what to label with MiniLM-L6", tables, notes)


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
