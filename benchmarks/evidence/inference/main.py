"""How close approximations come to the exact posterior, by what they predict.

`python benchmarks/evidence/inference/main.py` (needs `hmc`: `pip install -e ".[examples,hmc]"`)
draws from the posterior of three small problems by NUTS and compares, as the approximate-inference
competition of NeurIPS 2021 did: the share of test inputs on which the most probable class is the
same (agreement), the total variation distance between class probabilities, and for a regression the
Wasserstein distance W₂ between the distributions of the function, averaged over inputs. Every
method knows likelihood and prior and has the same number of gradients in all, which ensembles and
mixtures divide among their runs. Of sixteen settings each takes that with the best log-likelihood
on a quarter of the training data, but for methods with an objective that defines the approximation:
Laplace's takes that which comes nearest to the mode, IVON that with the lowest free energy, on the
training data alone (IVON is shown with the other choice too). "Eigenbasis" is
`basis=Eigenbasis(decay=0.99)`. Twenty-five minutes on two cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.comparing import best_of
from benchmarks._shared.journal import (
    Evidence,
    Journal,
    Runs,
    command,
    current,
    grouped,
    write_tables,
)
from benchmarks._shared.methods import average
from benchmarks._shared.tuning import at_edges, described, settings
from benchmarks.evidence.inference import methods
from benchmarks.evidence.inference.problems import (
    PROBLEMS,
    Problem,
    Reference,
    held_out,
    run_nuts,
)
from examples._shared.reporting import cell

Array = jax.Array
NAMES = {
    ("map", 1): "one network (MAP)",
    ("map", 2): "ensemble of 2",
    ("map", 4): "ensemble of 4",
    ("map", 8): "ensemble of 8",
    ("laplace", 1): "Laplace, full, linearised",
    ("dropout", 1): "MC-dropout",
    ("swag", 1): "SWAG",
    ("swag", 4): "SWAG, 4 runs",
    ("ivon", 1): "IVON",
    ("ivon", 2): "IVON, mixture of 2",
    ("ivon", 4): "IVON, mixture of 4",
    ("ivon", 8): "IVON, mixture of 8",
    ("ivon_basis", 1): "IVON, eigenbasis",
    ("ivon_basis", 4): "the same, mixture of 4",
    ("ivon_nll", 1): "IVON, chosen by NLL",
    ("ivon_nll", 2): "the same, mixture of 2",
    ("ivon_nll", 4): "the same, mixture of 4",
    ("ivon_nll", 8): "the same, mixture of 8",
}
QUANTILES = (np.arange(200) + 0.5) / 200


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("inference.jsonl")
    gradients: int = 16_000
    """Of 50 examples each, in all runs of a method together."""
    draws: int = 1000
    """Of each of four chains of NUTS."""
    seeds: int = 5
    problems: tuple[str, ...] = tuple(PROBLEMS)


def compute(options: Options) -> None:
    """The reference, the settings and the comparison of every problem."""
    unknown = set(options.problems) - set(PROBLEMS)
    if unknown:
        raise SystemExit(f"no problem {', '.join(unknown)}: choose from {', '.join(PROBLEMS)}")
    total = len(options.problems) * (1 + len(NAMES) * (16 + options.seeds))
    journal = Journal(options.results, total=total)
    for name in options.problems:
        study = Study(PROBLEMS[name](), options)
        journal.compute({"stage": "nuts", "problem": name, "draws": options.draws}, study.nuts)
        for method, runs in NAMES:
            common = {"problem": name, "method": method, "runs": runs}
            common["gradients"] = options.gradients
            tried = settings(methods.GRIDS[method])
            scores = [
                journal.compute(
                    {"stage": "tuning", **common, "values": values},
                    partial(study.tried, method, runs, values),
                )["score"]
                for values in tried
            ]
            best = best_of(tried, scores)
            for seed in range(options.seeds):
                run = {"stage": "compare", **common, "draws": options.draws}
                run |= {"values": best, "seed": seed}
                journal.compute(run, partial(study.tested, method, runs, best, seed))


class Study:
    """A problem; NUTS runs when it is first asked for."""

    def __init__(self, problem: Problem, options: Options):
        self.problem, self.part, self.options = problem, held_out(problem), options

    @cached_property
    def exact(self) -> Reference:
        """What NUTS predicts."""
        return run_nuts(self.problem, self.options.draws)

    def nuts(self) -> dict[str, float]:
        """Convergence and cost of NUTS, and what a second run predicts against the first."""
        params = self.problem.init(jax.random.key(0))
        again = run_nuts(self.problem, self.options.draws, seed=1)
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(params)),
            "rhat": self.exact.rhat,
            "ess": self.exact.ess,
            "gradients": self.exact.gradients,
            "divergences": self.exact.divergences,
            **compared(self.problem, again.outputs, self.exact.outputs),
        }

    def tried(self, method: str, runs: int, values: Any) -> dict[str, float]:
        """What chooses: the objective of Laplace's and of IVON, for others the held-out NLL."""
        key, budget = jax.random.key(0), self.options.gradients
        if method == "laplace":
            found = methods.objective_at_mode(self.part, budget, key, values)
            return {"score": float(found)}
        if method in ("ivon", "ivon_basis"):
            found = methods.free_energy(self.part, method, runs, budget, key, values)
            return {"score": float(found)}
        outputs = methods.predictions(self.part, method, runs, budget, key, values)
        return {"score": nll(self.part, outputs)}

    def tested(self, method: str, runs: int, values: Any, seed: int) -> dict[str, float]:
        """Distances from NUTS."""
        key, budget = jax.random.key(seed), self.options.gradients
        outputs = methods.predictions(self.problem, method, runs, budget, key, values)
        return compared(self.problem, outputs, self.exact.outputs)


def nll(problem: Problem, outputs: Array) -> float:
    """Minus the mean log-likelihood of the test set, averaged over samples."""
    if problem.noise is None:
        log_p = average(outputs)
        return -float(jnp.mean(jnp.take_along_axis(log_p, problem.test.y[:, None], 1)))
    log_p = average(-0.5 * ((outputs - problem.test.y) / problem.noise) ** 2)
    return -float(jnp.mean(log_p) - 0.5 * jnp.log(2 * jnp.pi * problem.noise**2))


def compared(problem: Problem, outputs: Array, exact: Array) -> dict[str, float]:
    """Distances from the predictions of NUTS."""
    found = {"nll": nll(problem, outputs)}
    if problem.noise is None:
        p, q = np.exp(average(outputs)), np.exp(average(exact))
        found["agreement"] = float(np.mean(p.argmax(-1) == q.argmax(-1)))
        found["total variation"] = float(0.5 * np.abs(p - q).sum(-1).mean())
        return found
    of, by = (
        np.quantile(np.asarray(x), QUANTILES, axis=0, method="inverted_cdf")
        for x in (outputs, exact)
    )
    found["W2"] = float(np.sqrt(((of - by) ** 2).mean(0)).mean())
    found["standard deviation"] = float(np.std(np.asarray(outputs), axis=0).mean())
    return found


def report(journal: Journal) -> None:
    """A table for each problem, and all settings."""
    tables: dict[str, Sequence[Sequence[str]]] = {}
    references = {run["problem"]: x for run, x in journal.select(stage="nuts")}
    for name, reference in references.items():
        runs = journal.select(stage="compare", problem=name)
        if runs:
            tables[f"{name}, {reference['parameters']} weights"] = rows_of(runs, reference)
    header = ["", "worst R-hat", "fewest effective draws", "gradients of all data", "divergences"]
    tables["NUTS"] = [header, *(convergence(name, x) for name, x in references.items())]
    tables["Settings chosen"] = [
        ["", *references],
        *(
            [title, *(chosen(journal, name, *key) for name in references)]
            for key, title in NAMES.items()
        ),
    ]
    notes = (
        "Mean ± standard error over seeds; agreement and total variation in %. The row of NUTS is "
        "a second run of it against the first; its gradients are counted after as many steps of "
        "adaptation. `*`: at an edge of the grid."
    )
    write_tables(journal, "How close to the exact posterior", tables, notes)


def convergence(problem: str, found: dict[str, Any]) -> list[str]:
    """A row for the reference of a problem."""
    cells = f"{found['rhat']:.3f}", f"{found['ess']:.0f}", f"{found['gradients']:,}"
    return [problem, *cells, str(found["divergences"])]


def rows_of(runs: Runs, reference: dict[str, Any]) -> Sequence[Sequence[str]]:
    """A row for each method, and one for a second run of NUTS."""
    names = list(runs[0][1])
    rows = [["", *names]]
    by_method = grouped(runs, "method", "runs")
    for key, title in NAMES.items():
        if key in by_method:
            results = [x for _, x in current(by_method[key])]
            rows.append([title, *(_cell(name, [x[name] for x in results]) for name in names)])
    rows.append(["NUTS", *(_cell(name, [reference[name]]) for name in names)])
    return rows


def chosen(journal: Journal, problem: str, method: str, runs: int) -> str:
    """The settings of a method for a problem."""
    found = journal.select(stage="compare", problem=problem, method=method, runs=runs)
    if not found:
        return ""
    values = found[-1][0]["values"]
    return described(values) + (" *" if at_edges(methods.GRIDS[method], values) else "")


def _cell(name: str, values: list[float]) -> str:
    if name in ("agreement", "total variation"):
        return cell(100 * np.asarray(values), 2)
    return cell(values, 4)


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
