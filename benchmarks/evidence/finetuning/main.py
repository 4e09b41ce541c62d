"""Fine-tuning a pretrained transformer on sentences: AdamW and IVON.

    python benchmarks/evidence/finetuning/main.py --data DIR             # SST-2, 1,000 labels
    python benchmarks/evidence/finetuning/main.py --report               # tables

DIR holds the files named in `data.FILES`. MiniLM-L6 (22.7M parameters, `_shared/minilm.py` says how
to install it) is trained for four epochs with a head on its mean token. Every method tries the nine
settings of `methods.GRIDS` with the first seed, takes that with the lowest NLL on 500 validation
sentences (IVON's of five posterior samples), and is tested once with each seed. On two cores a
setting takes some three minutes, a seed eight.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, command, write_tables
from benchmarks._shared.tuning import at_edges, described, settings
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import Sentences, load_task, load_unfamiliar
from examples._shared.reporting import cell
from ivon_jax import metrics

LABELS = {"adamw": "AdamW", "ivon, point": "IVON at the mean", "ivon": "IVON, 10 samples"}
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
    methods: tuple[Literal["adamw", "ivon"], ...] = ("adamw", "ivon")
    seeds: int = 5

    @property
    def identity(self) -> dict[str, Any]:
        """What all runs of a command have in common."""
        return {"task": self.task, "labels": self.labels, "scope": self.scope}


class Study:
    """A task and the networks for it."""

    def __init__(self, options: Options, folder: Path):
        self.task = load_task(folder, options.task, options.labels)
        self.options, self.folder = options, folder
        scope = methods.make_scope(options.scope, self.task.num_classes, jax.random.key(0))
        self.build = scope.build
        apply = methods.make_apply(self.task.num_classes, scope.build)
        self.predict = {k: methods.Predictor(apply, number) for k, number in SAMPLES.items()}

    @cached_property
    def unfamiliar(self) -> dict[str, np.ndarray]:
        """Other sentences than those of the task."""
        return load_unfamiliar(self.folder)

    def fitted(self, method: str, seed: int, values: dict[str, float]) -> tuple[Any, jax.Array]:
        """A trained network, and the key to predict with."""
        init_key, fit_key, predict_key = jax.random.split(jax.random.key(seed), 3)
        start = methods.make_scope(self.options.scope, self.task.num_classes, init_key).start
        train = self.task.train
        steps = methods.EPOCHS * (len(train.labels) // methods.BATCH_SIZE)
        data = (jnp.asarray(train.tokens), jnp.asarray(train.labels))
        sizes = self.task.num_classes, steps
        fit = methods.fit(method, self.build, *sizes, start, data, fit_key, values)
        return fit, predict_key

    def validated(self, method: str, values: dict[str, float]) -> dict[str, float]:
        """Scores of a setting on validation data."""
        fitted, key = self.fitted(method, 0, values)
        data = self.task.validation
        return scores(self.predict["validation"](fitted, key, data.tokens), data)

    def tested(self, method: str, seed: int, values: dict[str, float]) -> dict[str, Any]:
        """Scores on test data, and the detection of unfamiliar sentences."""
        fitted, key = self.fitted(method, seed, values)
        predict = self.predict["test"]
        familiar = predict(fitted, key, self.task.test.tokens)
        found: dict[str, Any] = scores(familiar, self.task.test)
        if self.options.task == "sst2":
            for name, tokens in self.unfamiliar.items():
                out = predict(fitted, key, tokens)
                for measure, f in uncertainties(familiar).items():
                    detected = metrics.detection(f(familiar), f(out))
                    found[f"auroc {name}, {measure}"] = detected.auroc
        return found


def averaged(log_probs: dict[str, np.ndarray]) -> np.ndarray:
    """Probabilities averaged over samples, where there are several."""
    if "samples" not in log_probs:
        return log_probs["point"]
    samples = log_probs["samples"]
    return np.asarray(jax.nn.logsumexp(samples, axis=0) - np.log(len(samples)))


def uncertainties(log_probs: dict[str, np.ndarray]) -> dict[str, Any]:
    """How unsure a prediction is: by its entropy, and by what samples disagree about."""
    entropy = {"entropy": lambda x: metrics.predictive_entropy(jnp.asarray(averaged(x)))}
    if "samples" not in log_probs:
        return entropy
    return entropy | {
        "entropy, point": lambda x: metrics.predictive_entropy(jnp.asarray(x["point"])),
        "disagreement": lambda x: metrics.mutual_information(jnp.asarray(x["samples"])),
    }


def scores(log_probs: dict[str, np.ndarray], data: Sentences) -> dict[str, float]:
    """Every metric, of the average and (with `, point`) at the mean."""
    found = {}
    variants = {"": averaged(log_probs)}
    if "samples" in log_probs:
        variants[", point"] = log_probs["point"]
    for suffix, x in variants.items():
        labels = jnp.asarray(data.labels)
        for name in ("accuracy", "nll", "ece", "brier"):
            found[name + suffix] = float(getattr(metrics, name)(jnp.asarray(x), labels))
        coverage, risk = map(np.asarray, metrics.risk_coverage(jnp.asarray(x), labels))
        found["risk area" + suffix] = float(risk.mean())
        for limit in RISKS:
            within = coverage[risk <= limit]
            found[f"coverage at {limit:g}{suffix}"] = float(within.max(initial=0))
    return found


def compute(options: Options) -> None:
    """Chooses settings, and tests them."""
    if options.data is None:
        raise SystemExit("name the folder of the sentences with --data DIR")
    study = Study(options, options.data)
    total = sum(9 + options.seeds for _ in options.methods)
    journal = Journal(options.results, total=total)
    for method in options.methods:
        best: tuple[float, dict[str, float]] = (np.inf, {})
        for values in settings(methods.GRIDS[method]):
            run = {"stage": "validation", **options.identity, "method": method, "values": values}
            nll = journal.compute(run, lambda v=values, m=method: study.validated(m, v))["nll"]
            if nll < best[0]:  # not NaN
                best = nll, values
        if not best[1]:
            raise SystemExit(f"every setting of {method} diverged")
        for seed in range(options.seeds):
            run = {"stage": "test", **options.identity, "method": method, "values": best[1]}
            run["seed"] = seed
            journal.compute(run, lambda v=best[1], m=method, s=seed: study.tested(m, s, v))


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
            tables[name] = test_rows(tested)
        tables[f"{name}: settings on validation data"] = setting_rows(
            journal.select(stage="validation", **found)
        )
    notes = (
        "Mean ± standard error over seeds. `risk area` is the area under the risk-coverage curve; "
        "`coverage at 0.01` the share of sentences that can be answered with at most 1 % errors "
        "among them. AUROC: telling other sentences from the task's."
    )
    write_tables(journal, "Fine-tuning MiniLM-L6", tables, notes)


def test_rows(runs: Any) -> Sequence[Sequence[str]]:
    """A row for each metric, a column for each way to predict."""
    columns = {}
    for label, title in LABELS.items():
        method, _, suffix = label.partition(", ")
        results = [result for run, result in runs if run["method"] == method]
        if results:
            columns[title] = (results, f", {suffix}" if suffix else "")
    seeds = {len(results) for results, _ in columns.values()}
    rows = [[f"{'/'.join(map(str, sorted(seeds)))} seeds", *columns]]
    names = dict.fromkeys(name for _, result in runs for name in result)
    for name in (name for name in names if not name.endswith(", point")):
        values = [
            [result[name + suffix] for result in results if name + suffix in result]
            for results, suffix in columns.values()
        ]
        rows.append([name, *(cell(x, 4) if x else "" for x in values)])
    return rows


def setting_rows(runs: Any) -> Sequence[Sequence[str]]:
    """Validation scores of every setting; the chosen one is marked, and an edge of three values."""
    rows = [["setting", "accuracy", "NLL", "ECE", "NLL at the mean"]]
    grids = {m: {k: v for k, v in g.items() if len(v) > 2} for m, g in methods.GRIDS.items()}
    for method in dict.fromkeys(run["method"] for run, _ in runs):
        mine = [(run, result) for run, result in runs if run["method"] == method]
        chosen = min(mine, key=lambda x: np.nan_to_num(x[1]["nll"], nan=np.inf))[0]["values"]
        for run, result in mine:
            edges = at_edges(grids[method], run["values"])
            mark = f" (chosen{', at an edge' if edges else ''})" if run["values"] == chosen else ""
            point = f"{result['nll, point']:.4f}" if "nll, point" in result else ""
            scored = [f"{result[name]:.4f}" for name in ("accuracy", "nll", "ece")]
            rows.append([f"{method}, {described(run['values'])}{mark}", *scored, point])
    return rows


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
