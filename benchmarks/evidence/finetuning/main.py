"""Fine-tuning a pretrained transformer on sentences: AdamW, its ensembles, dropout, and IVON.

    python benchmarks/evidence/finetuning/main.py --data DIR             # SST-2, 1,000 labels
    python benchmarks/evidence/finetuning/main.py --report               # tables

DIR holds the files named in `data.FILES`. MiniLM-L6 (22.7M parameters, `_shared/minilm.py` says how
to install it) is trained for four epochs with a head on its mean token. Every method tries the nine
settings of `methods.grid` with the first seed, takes that with the lowest NLL on 500 validation
sentences (of five samples, where it has samples), and is tested once with each seed, with ten
samples. The ensemble and the mixture average the probabilities of all seeds' runs. On two cores and
with 1,000 labels a setting takes a minute, a seed of IVON four.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.comparing import (
    average_of_files,
    averaged,
    best_of,
    chosen_by,
    setting_rows,
    way_rows,
)
from benchmarks._shared.journal import Evidence, Journal, command, file_of, grouped, write_tables
from benchmarks._shared.methods import auroc
from benchmarks._shared.tuning import settings
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import Sentences, load_task, load_unfamiliar
from benchmarks.evidence.finetuning.laplace import (
    PRECISIONS,
    choose_precision,
    fit_last_layer,
)
from ivon_jax import metrics

NAMES = {"adamw": "AdamW", "dropout": "AdamW with dropout", "ivon": "IVON"}
WAYS = {  # to predict: rows of the table, by method and by key of a result
    ("adamw", "point"): "AdamW",
    ("adamw", "laplace"): "last-layer Laplace",
    ("adamw", "together"): "AdamW, ensemble",
    ("dropout", "point"): "AdamW with dropout",
    ("dropout", "samples"): "MC-dropout",
    ("ivon", "point"): "IVON at the mean",
    ("ivon", "samples"): "IVON",
    ("ivon", "together"): "IVON, mixture",
}
RISKS = (0.01, 0.05)
SAMPLES = {"validation": 5, "test": 10}


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("finetuning.jsonl")
    data: Path | None = None
    """Folder of the sentences."""
    task: Literal["sst2", "trec"] = "sst2"
    labels: int = 1000
    """Sentences to train on."""
    scope: Literal["full", "lora", "head"] = "full"
    """What is trained: all but the embeddings, adapters, or gains and head."""
    methods: tuple[Literal["adamw", "dropout", "ivon"], ...] = ("adamw", "dropout", "ivon")
    seeds: int = 5

    @property
    def identity(self) -> dict[str, Any]:
        """What all runs of a command have in common."""
        return {"task": self.task, "labels": self.labels, "scope": self.scope}

    def run(self, stage: str, method: str, values: dict[str, float], **more: Any) -> dict[str, Any]:
        """What identifies a run."""
        return {"stage": stage, **self.identity, "method": method, "values": values, **more}

    def predictions(self, method: str, seed: int, values: dict[str, float]) -> Path:
        """Where a tested run leaves its log-probabilities, for ensembles."""
        folder = self.results.with_suffix("")
        folder.mkdir(exist_ok=True)
        return file_of(folder, self.run("test", method, values, seed=seed))


class Study:
    """A task and the networks for it."""

    def __init__(self, options: Options, folder: Path):
        self.task = load_task(folder, options.task, options.labels)
        self.options = options
        self.predict = {k: methods.Predictor(self.task.num_classes, n) for k, n in SAMPLES.items()}
        self.others = load_unfamiliar(folder, options.task)

    def fitted(
        self, method: str, seed: int, values: dict[str, float]
    ) -> tuple[Any, Any, jax.Array]:
        """A trained network, what it adapts, and the key to predict with."""
        init_key, fit_key, predict_key = jax.random.split(jax.random.key(seed), 3)
        scope = methods.make_scope(self.options.scope, self.task.num_classes, init_key)
        fitted = methods.fit(method, self.task.num_classes, scope, self.task.train, fit_key, values)
        return fitted, scope.base, predict_key

    def validated(self, method: str, values: dict[str, float]) -> dict[str, Any]:
        """Scores of a setting on validation data."""
        fitted, base, key = self.fitted(method, 0, values)
        data = self.task.validation
        predicted = self.predict["validation"](method, fitted, base, key, data.tokens)
        return {way: scores(x, data) for way, x in predicted.items()}

    def tested(self, method: str, seed: int, values: dict[str, float]) -> dict[str, Any]:
        """Scores on test data, and the detection of unfamiliar sentences."""
        fitted, base, key = self.fitted(method, seed, values)
        predict = partial(self.predict["test"], method, fitted, base, key)
        inputs = {"": self.task.test.tokens, **self.others}
        predicted = {name: predict(tokens) for name, tokens in inputs.items()}
        extra = {}
        if method == "adamw":
            head, extra["precision"] = self.laplace(fitted, base)
            for name, tokens in inputs.items():
                predicted[name]["laplace"] = head(predicted[name]["point"], tokens)
        kept: Any = {name: averaged(x.get("samples", x["point"])) for name, x in predicted.items()}
        np.savez(self.options.predictions(method, seed, values), **kept)
        ways = predicted[""]
        found = {way: self.scored({k: x[way] for k, x in predicted.items()}) for way in ways}
        return {**found, **extra}

    def laplace(self, fitted: Any, base: Any) -> tuple[Callable[..., np.ndarray], float]:
        """Predictions by a posterior of the last layer from those at the point; its prior."""
        train, validation = self.task.train, self.task.validation
        key = jax.random.key(0)  # not used at a point

        def point(tokens: np.ndarray) -> np.ndarray:
            return self.predict["test"]("adamw", fitted, base, key, tokens)["point"]

        def features(tokens: np.ndarray) -> np.ndarray:
            return methods.in_batches(partial(methods.features, fitted, base), tokens)

        last = fit_last_layer(point(train.tokens), features(train.tokens))
        held = point(validation.tokens), features(validation.tokens)
        precision = choose_precision(last, *held, validation.labels)

        def predict(log_probs: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            return last.predict(log_probs, features(tokens), precision)

        return predict, precision

    def together(self, method: str, values: dict[str, float]) -> dict[str, Any]:
        """Scores of the average of all seeds' probabilities."""
        files = [self.options.predictions(method, k, values) for k in range(self.options.seeds)]
        return {"together": self.scored(average_of_files(files))}

    def scored(self, log_probs: dict[str, np.ndarray]) -> dict[str, float]:
        """Scores on test data, named "", and how well other sentences are told from them."""
        found = scores(log_probs[""], self.task.test)
        for name in self.others:
            for measure, score in UNCERTAINTIES.items():
                if measure == "entropy" or log_probs[""].ndim == 3:
                    found[f"{name}, {measure}"] = auroc(
                        *map(score, (log_probs[""], log_probs[name]))
                    )
        return found


# How unsure a prediction is: by its entropy, and by what samples disagree about.
UNCERTAINTIES: dict[str, Callable[[np.ndarray], jax.Array]] = {
    "entropy": lambda x: metrics.predictive_entropy(jnp.asarray(averaged(x))),
    "disagreement": lambda x: metrics.mutual_information(jnp.asarray(x)),
}


def scores(log_probs: np.ndarray, data: Sentences) -> dict[str, float]:
    """Every metric of log-probabilities (n, classes), or of the average of (S, n, classes)."""
    x, labels = jnp.asarray(averaged(log_probs)), jnp.asarray(data.labels)
    names = ("accuracy", "nll", "ece", "brier")
    found = {name: float(getattr(metrics, name)(x, labels)) for name in names}
    coverage, risk = map(np.asarray, metrics.risk_coverage(x, labels))
    found["risk area"] = float(risk.mean())
    for limit in RISKS:
        found[f"coverage at {limit:g}"] = float(coverage[risk <= limit].max(initial=0))
    return found


def compute(options: Options) -> None:
    """Chooses settings, and tests them."""
    if options.data is None:
        raise SystemExit("name the folder of the sentences with --data DIR")
    if options.labels < methods.BATCH_SIZE or options.seeds < 0:
        raise SystemExit(f"--labels is at least {methods.BATCH_SIZE}, and --seeds not negative")
    study = Study(options, options.data)
    together = options.seeds > 1
    total = sum(9 + options.seeds + (together and (m, "together") in WAYS) for m in options.methods)
    journal = Journal(options.results, total=total)
    for method in options.methods:
        tried = settings(methods.grid(method, options.scope))
        found = [
            journal.compute(
                options.run("validation", method, values), partial(study.validated, method, values)
            )
            for values in tried
        ]
        best = best_of(tried, [chosen_by(result) for result in found])
        for seed in range(options.seeds):
            run = options.run("test", method, best, seed=seed)
            journal.compute(run, partial(study.tested, method, seed, best))
        if together and (method, "together") in WAYS:
            run = options.run("together", method, best, runs=options.seeds)
            journal.compute(run, partial(study.together, method, best))


def report(journal: Journal) -> None:
    """Writes a table of test scores and one of all settings for each experiment."""
    tables: dict[str, Sequence[Sequence[str]]] = {}
    for (task, labels, scope), runs in grouped(journal.select(), "task", "labels", "scope").items():
        name = f"{task}, {labels:,} labels, {scope}"
        tried, tested, together = (
            [x for x in runs if x[0]["stage"] == stage]
            for stage in ("validation", "test", "together")
        )
        if tested:
            tables[name] = way_rows(WAYS, tested, together)
        if tried:
            tables[f"{name}: settings on validation data"] = setting_rows(
                tried, lambda run: methods.grid(run["method"], run["scope"]), NAMES
            )
    notes = (
        "Mean ± standard error over runs, in % but for NLL; `runs`: of these, or averaged by an "
        "ensemble or a mixture. The area under the risk-coverage curve "
        "is the error averaged over all shares of sentences that may be answered; the coverage at "
        "1 % is the share that can be answered with at most 1 % errors among them. The last "
        "columns are areas under the ROC: other sentences told from the task's by entropy or, "
        "where there are samples, by what these disagree about (mutual information)."
    )
    taus = sorted({x["precision"] for _, x in journal.select(method="adamw", stage="test")})
    if taus:
        chosen = ", ".join(f"{tau:g}" for tau in taus)
        notes += f" The last layer's prior precision was chosen from {PRECISIONS}: {chosen}."
    write_tables(journal, "Fine-tuning MiniLM-L6", tables, notes)


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
