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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, Runs, command, write_tables
from benchmarks._shared.tuning import at_edges, described, settings
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import Sentences, load_task, load_unfamiliar
from benchmarks.evidence.finetuning.laplace import choose_precision, fit_last_layer
from examples._shared.reporting import cell
from ivon_jax import metrics

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

    def predictions(self, method: str, seed: int) -> Path:
        """Where a tested run leaves its log-probabilities, for ensembles."""
        folder = self.results.with_suffix("")
        folder.mkdir(exist_ok=True)
        return folder / f"{self.task}_{self.labels}_{self.scope}_{method}_{seed}.npz"


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
        if method == "adamw":
            head = self.laplace(fitted, base)
            for name, tokens in inputs.items():
                predicted[name]["laplace"] = head(predicted[name]["point"], tokens)
        best = "samples" if "samples" in predicted[""] else "point"
        kept: Any = {name: averaged(x[best]) for name, x in predicted.items()}
        np.savez(self.options.predictions(method, seed), **kept)
        ways = predicted[""]
        return {way: self.scored({k: x[way] for k, x in predicted.items()}) for way in ways}

    def laplace(self, fitted: Any, base: Any) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """Predicts by a posterior of the last layer, from log-probabilities at the point."""
        train, validation = self.task.train, self.task.validation
        key = jax.random.key(0)  # not used at a point

        def point(tokens: np.ndarray) -> np.ndarray:
            return self.predict["test"]("adamw", fitted, base, key, tokens)["point"]

        def features(tokens: np.ndarray) -> np.ndarray:
            return methods.in_batches(partial(methods.features, fitted, base), tokens)

        last = fit_last_layer(point(train.tokens), features(train.tokens))
        held = point(validation.tokens), features(validation.tokens)
        precision = choose_precision(last, *held, validation.labels)
        return lambda log_probs, tokens: last.predict(log_probs, features(tokens), precision)

    def together(self, method: str) -> dict[str, Any]:
        """Scores of the average of all seeds' probabilities."""
        runs = [np.load(self.options.predictions(method, k)) for k in range(self.options.seeds)]
        stacked = {name: np.stack([run[name] for run in runs]) for name in runs[0].files}
        return {"together": self.scored(stacked)}

    def scored(self, log_probs: dict[str, np.ndarray]) -> dict[str, float]:
        """Scores on test data, named "", and how well other sentences are told from them."""
        found = scores(log_probs[""], self.task.test)
        for name in self.others:
            for measure, score in UNCERTAINTIES.items():
                if measure == "entropy" or log_probs[""].ndim == 3:
                    detected = metrics.detection(score(log_probs[""]), score(log_probs[name]))
                    found[f"{name}, {measure}"] = float(detected.auroc)
        return found


def averaged(log_probs: np.ndarray) -> np.ndarray:
    """Probabilities (n, classes), averaged over samples where there are several."""
    if log_probs.ndim == 2:
        return log_probs
    return np.asarray(jax.nn.logsumexp(log_probs, axis=0) - np.log(len(log_probs)))


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


def chosen_by(result: Mapping[str, Any]) -> float:
    """The NLL that chooses: of samples, where there are samples."""
    return result.get("samples", result["point"])["nll"]


def compute(options: Options) -> None:
    """Chooses settings, and tests them."""
    if options.data is None:
        raise SystemExit("name the folder of the sentences with --data DIR")
    study = Study(options, options.data)
    journal = Journal(options.results, total=len(options.methods) * (9 + options.seeds))
    for method in options.methods:
        best: tuple[float, dict[str, float]] = (np.inf, {})
        for values in settings(methods.grid(method, options.scope)):
            run = {"stage": "validation", **options.identity, "method": method, "values": values}
            found = journal.compute(run, lambda v=values, m=method: study.validated(m, v))
            if chosen_by(found) < best[0]:  # not NaN
                best = chosen_by(found), values
        if not best[1]:
            raise SystemExit(f"every setting of {method} diverged")
        chosen = {"method": method, "values": best[1]}
        for seed in range(options.seeds):
            run = {"stage": "test", **options.identity, **chosen, "seed": seed}
            journal.compute(run, lambda v=best[1], m=method, s=seed: study.tested(m, s, v))
        if options.seeds > 1 and method != "dropout":
            run = {"stage": "together", **options.identity, **chosen, "runs": options.seeds}
            journal.compute(run, lambda m=method: study.together(m))


def report(journal: Journal) -> None:
    """Writes a table of test scores and one of all settings for each experiment."""
    tables = {}
    experiments = dict.fromkeys(
        (run["task"], run["labels"], run["scope"]) for run, _ in journal.select()
    )
    for task, labels, scope in experiments:
        name = f"{task}, {labels:,} labels, {scope}"
        found = {"task": task, "labels": labels, "scope": scope}
        tested = journal.select(stage="test", **found)
        if tested:
            tables[name] = test_rows(tested, journal.select(stage="together", **found))
        tables[f"{name}: settings on validation data"] = setting_rows(
            journal.select(stage="validation", **found)
        )
    notes = (
        "Mean ± standard error over runs, in % but for NLL. The area under the risk-coverage curve "
        "is the error averaged over all shares of sentences that may be answered; the coverage at "
        "1 % is the share that can be answered with at most 1 % errors among them. The last "
        "columns are areas under the ROC: other sentences told from the task's by entropy or, "
        "where there are samples, by what these disagree about (mutual information)."
    )
    write_tables(journal, "Fine-tuning MiniLM-L6", tables, notes)


def test_rows(tested: Runs, together: Runs) -> Sequence[Sequence[str]]:
    """A row for each way to predict, a column for each metric."""
    names = dict.fromkeys(n for _, found in tested + together for x in found.values() for n in x)
    names.pop("brier", None)
    rows = [["", "runs", *names]]
    for (method, way), title in WAYS.items():
        groups = [
            (run, x[way]) for run, x in tested + together if way in x and run["method"] == method
        ]
        if groups:
            runs = groups[0][0].get("runs", len(groups))
            values = {name: [x[name] for _, x in groups if name in x] for name in names}
            cells = [_cell(name, x) if x else "" for name, x in values.items()]
            rows.append([title, str(runs), *cells])
    return rows


def _cell(name: str, values: Sequence[float]) -> str:
    return cell(values, 3) if name == "nll" else cell(100 * np.asarray(values), 1)


def setting_rows(runs: Runs) -> Sequence[Sequence[str]]:
    """Validation scores of every setting; the chosen one is marked, and where it is an edge."""
    rows = [["setting", "accuracy", "NLL", "ECE", "NLL at the mean"]]
    for method in dict.fromkeys(run["method"] for run, _ in runs):
        mine = [(run, result) for run, result in runs if run["method"] == method]
        best = min(mine, key=lambda x: np.nan_to_num(chosen_by(x[1]), nan=np.inf))[0]
        edges = at_edges(methods.grid(method, best["scope"]), best["values"])
        for run, result in mine:
            mark = f" (chosen{', at an edge' if edges else ''})" if run is best else ""
            shown = result.get("samples", result["point"])
            point = f"{result['point']['nll']:.4f}" if "samples" in result else ""
            scored = [f"{shown[name]:.4f}" for name in ("accuracy", "nll", "ece")]
            rows.append([f"{method}, {described(run['values'])}{mark}", *scored, point])
    return rows


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
