"""Merging fine-tuned copies of a pretrained transformer, without their data.

    python benchmarks/evidence/finetuning/merging.py --data DIR

MiniLM-L6 learns from 1,000 film reviews what a good opinion is; copies of it learn from reviews of
products and of restaurants, under the posterior of the first as their prior. Their parameters are
merged by task arithmetic, by the squared gradients of 300 sentences of each (Fisher information)
and by IVON's precisions (Daheim et al., arXiv:2310.12808), each with one weight for what the copies
have learned, chosen on held-out sentences of all three kinds. Joint training is on the sentences of
products and restaurants together. A seed takes 20 minutes on one core.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, command, write_tables
from benchmarks.evidence.finetuning import methods
from benchmarks.evidence.finetuning.data import Sentences, read
from benchmarks.evidence.uses.fisher import diagonal_fisher
from examples._shared.reporting import cell
from ivon_jax import Posterior, merge, task_arithmetic

# Files, sentences to train on, to choose the weight with, and at most so many to test on.
KINDS = {
    "films": (("stsa.binary.train", "stsa.binary.test"), 1000, 200, 600),
    "products": (("custrev.all",), 1000, 200, 600),
    "restaurants": (("yelp_labelled.txt",), 500, 150, 350),
}
WEIGHTS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
LEFT_OVER = np.exp(-2) / methods.CHOSEN["sigma"] ** 2  # e⁻²λh₀
FISHER_SENTENCES, FISHER_FLOOR = 300, 1e-5


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("finetuning_merging.jsonl")
    data: Path | None = None
    """Folder of the sentences."""
    seeds: int = 3


class Kind:
    """The sentences of one kind, in the order of a seed."""

    def __init__(self, folder: Path, name: str, seed: int):
        files, train, valid, test = KINDS[name]
        everything = [read(folder / file) for file in files]
        order = np.random.default_rng(seed).permutation(len(everything[0].labels))
        parts = np.split(order, [train, train + valid])
        self.train, self.valid, rest = (Sentences(*(x[i] for x in everything[0])) for i in parts)
        self.test = Sentences(*(x[:test] for x in (everything[1] if len(files) == 2 else rest)))


class Models:
    """What is trained from one seed."""

    def __init__(self, folder: Path, seed: int):
        self.kinds = {name: Kind(folder, name, seed) for name in KINDS}
        self.keys = jax.random.split(jax.random.key(seed), 5)
        self.scope = methods.make_scope("full", 2, self.keys[0])

    def fitted(self, data: Sentences, start: Any, key: jax.Array, prior: Any = None) -> Posterior:
        """One fine-tuning by IVON."""
        scope = methods.Scope(start, self.scope.base)
        return methods.fit("ivon", 2, scope, data, key, methods.CHOSEN, prior=prior)

    @cached_property
    def base(self) -> Posterior:
        """Of films."""
        return self.fitted(self.kinds["films"].train, self.scope.start, self.keys[1])

    @cached_property
    def tasks(self) -> list[Posterior]:
        """Of products and of restaurants."""
        return [
            self.fitted(self.kinds[name].train, self.base.mean, key, self.base)
            for name, key in (("products", self.keys[2]), ("restaurants", self.keys[3]))
        ]

    @cached_property
    def joint(self) -> Posterior:
        """Of products and restaurants together."""
        parts = [self.kinds[name].train for name in ("products", "restaurants")]
        both = Sentences(*(np.concatenate(x) for x in zip(*parts, strict=True)))
        return self.fitted(both, self.base.mean, self.keys[4], self.base)

    def with_fisher(self) -> tuple[Posterior, list[Posterior]]:
        """The same means, with precisions H₀ = n(F₀ + floor) and H₀ + nF_t."""

        def information(q: Posterior, name: str) -> Any:
            tokens = self.kinds[name].train.tokens[:FISHER_SENTENCES]
            fisher = _fisher(q.mean, self.scope.base, tokens)
            return jax.tree.map(lambda f: len(self.kinds[name].train.labels) * f, fisher)

        floor = FISHER_FLOOR * len(self.kinds["films"].train.labels)
        h0 = jax.tree.map(lambda f: f + floor, information(self.base, "films"))
        tasks = [
            Posterior(q.mean, jax.tree.map(jnp.add, h0, information(q, name)))
            for name, q in zip(("products", "restaurants"), self.tasks, strict=True)
        ]
        return Posterior(self.base.mean, h0), tasks

    def rules(self) -> dict[str, Callable[[float], Any]]:
        """Parameters that are merged by each rule with a weight."""
        fisher_base, fisher_tasks = self.with_fisher()

        def by_precision(base: Posterior, tasks: list[Posterior], weight: float) -> Any:
            return merge(tasks, base=base, weights=[weight, weight]).mean

        means = [q.mean for q in self.tasks]

        def learned(left_over: float = 0.0) -> list[Posterior]:
            # A precision below that of the prior is noise in the estimate of the curvature.
            def floored(p: Any, prior: Any) -> Any:
                return jnp.maximum(p - left_over, prior)

            return [
                Posterior(q.mean, jax.tree.map(floored, q.precision, self.base.precision))
                for q in self.tasks
            ]

        return {
            "task arithmetic": lambda w: task_arithmetic(means, self.base.mean, weights=[w, w]),
            "Fisher information": partial(by_precision, fisher_base, fisher_tasks),
            "IVON's precisions": partial(by_precision, self.base, learned()),
            # e⁻² of h₀ is left at the end of a run, of every task alike.
            "the same without h₀": partial(by_precision, self.base, learned(LEFT_OVER)),
        }


@jax.jit
def _fisher(params: Any, base: Any, tokens: jax.Array) -> Any:
    return diagonal_fisher(lambda p, x: methods.logits(2, p, base, x), params, tokens)


@jax.jit
def _logits(params: Any, base: Any, tokens: jax.Array) -> Any:
    return methods.logits(2, params, base, tokens)


def accuracies(models: Models, params: Any, part: str) -> list[float]:
    """Of every kind, in %."""
    found = []
    for kind in models.kinds.values():
        data = getattr(kind, part)
        logits = methods.in_batches(partial(_logits, params, models.scope.base), data.tokens)
        found.append(100 * float(np.mean(logits.argmax(-1) == data.labels)))
    return found


def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Test accuracies of everything, and the validation curve of every rule."""
    models = Models(folder, seed)
    test = partial(accuracies, models, part="test")
    found: dict[str, Any] = {"films alone": {"test": test(models.base.mean)}}
    for name, q in zip(("products", "restaurants"), models.tasks, strict=True):
        found[f"then {name}"] = {"test": test(q.mean)}
    for name, rule in models.rules().items():
        curve = [float(np.mean(accuracies(models, rule(w), "valid"))) for w in WEIGHTS]
        best = WEIGHTS[int(np.argmax(curve))]
        found[name] = {"test": test(rule(best)), "weight": best, "curve": curve}
        found[f"{name}, weight 1"] = {"test": test(rule(1.0))}
        if name == "task arithmetic":
            found["average"] = {"test": test(rule(0.5))}
    found["joint training"] = {"test": test(models.joint.mean)}
    return found


def compute(options: Options) -> None:
    """Trains and merges from every seed."""
    if options.data is None:
        raise SystemExit("name the folder of the sentences with --data DIR")
    journal = Journal(options.results, total=options.seeds)
    for seed in range(options.seeds):
        journal.compute({"seed": seed, **methods.CHOSEN}, partial(one_seed, options.data, seed))


def report(journal: Journal) -> None:
    """The table, and the curves behind the weights."""
    results = [result for _, result in journal.select()]
    rows = [[f"{len(results)} seeds", "weight", *KINDS, "mean"]]
    curves = [["held-out accuracy at weight", *map(str, WEIGHTS)]]
    for name in results[0]:
        test = np.array([x[name]["test"] for x in results])
        weights = sorted({x[name].get("weight", 0) for x in results} - {0})
        chosen = " ".join(f"{w:g}" for w in weights)
        rows.append([name, chosen, *(cell(x, 1) for x in test.T), cell(test.mean(1), 1)])
        if weights:
            curve = np.array([x[name]["curve"] for x in results])
            curves.append([name, *(cell(x, 1) for x in curve.T)])
    notes = (
        "Test accuracies in % on three kinds of reviews, mean ± standard error over the seeds that "
        "are finished. `weight`: what multiplies the differences to `films alone`, chosen on "
        "held-out reviews for each seed."
    )
    write_tables(journal, "Merging MiniLM-L6", {"Test": rows, "Held out": curves}, notes)


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
