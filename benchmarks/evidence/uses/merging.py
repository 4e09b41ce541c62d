"""Merging by IVON's precisions against Fisher information by squared gradients.

`python benchmarks/evidence/uses/merging.py` trains the networks of examples/model_merging.py and
merges them by more rules. Fisher informations take another pass over the data of every network,
also over the base's; IVON's precisions come with training. Every rule has one weight, what the
differences to the base are multiplied with, chosen on held-out images from the same nine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import parse
from benchmarks.evidence.uses.fisher import diagonal_fisher
from examples._shared.reporting import cell, format_table
from examples.model_merging import (
    ANGLES,
    NETWORK,
    NUM_TRAIN,
    WEIGHTS,
    Data,
    Models,
    by_arithmetic,
    by_precision,
    make_data,
    train_models,
)
from ivon_jax import Posterior, merge, task_arithmetic

FISHER_FLOOR = 1e-4  # per example of the base, as a weight decay
Tree = Any


@dataclass
class Options:
    """The command line."""

    seeds: int = 5
    epochs: int = 120
    """Of each network."""


def without_base(models: Models, weight: Any) -> Tree:
    """The precision-weighted average, whose way from the base is multiplied by the weight."""
    return task_arithmetic([merge(models.tasks).mean], models.base.mean, weights=[weight])


def own_information(models: Models, weight: Any) -> Tree:
    """As `without_base`, with the precisions of the tasks' own data: Fisher-weighted averaging."""

    def own(q: Posterior) -> Posterior:
        less = jax.tree.map(
            lambda p, p0: p - p0 + FISHER_FLOOR * NUM_TRAIN, q.precision, models.base.precision
        )
        return Posterior(q.mean, less)

    return without_base(models._replace(tasks=[own(q) for q in models.tasks]), weight)


class Rule(NamedTuple):
    """A way to merge with one weight; `fisher`: by precisions from Fisher informations."""

    merge: Callable[[Models, Any], Tree]
    fisher: bool = False


RULES = {
    "task arithmetic": Rule(by_arithmetic),
    "Fisher averaging": Rule(own_information, fisher=True),
    "Fisher, base counted once": Rule(by_precision, fisher=True),
    "IVON's precisions": Rule(without_base),
    "IVON's, base counted once": Rule(by_precision),
}
OURS = "IVON's, base counted once"


def with_fisher(models: Models, data: Data) -> Models:
    """The same means, with precisions H₀ = n(F₀ + floor) and P_t = H₀ + nF_t (one seed)."""

    def information(q: Posterior, kind: int) -> Tree:
        fisher = diagonal_fisher(NETWORK.apply, q.mean, data.train[0][kind])
        return jax.tree.map(lambda f: NUM_TRAIN * f, fisher)

    h0 = jax.tree.map(lambda f: f + FISHER_FLOOR * NUM_TRAIN, information(models.base, 0))
    tasks = [
        Posterior(q.mean, jax.tree.map(jnp.add, h0, information(q, kind)))
        for kind, q in enumerate(models.tasks, start=1)
    ]
    return Models(Posterior(models.base.mean, h0), tasks, models.joint)


def accuracies(params: Tree, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Accuracy in % on every kind of image; NaN for weights that are NaN."""
    logits: Any = jax.vmap(NETWORK.apply, (None, 0))(params, images)
    right = 100 * jnp.mean(logits.argmax(-1) == labels, axis=-1)
    return jnp.where(jnp.isfinite(logits).all(axis=(1, 2)), right, jnp.nan)


def evaluate(models: Models, data: Data) -> tuple[dict[str, Any], dict[str, Any]]:
    """Test accuracies of one seed's models, and of every rule at every weight.

    Returns:
      By name, arrays (kinds,) and (weights, validation or test, kinds).
    """
    by_fisher = with_fisher(models, data)
    points = {
        "base": models.base.mean,
        **{f"fine-tuned on {n}": q.mean for n, q in zip([*ANGLES][1:], models.tasks, strict=True)},
        "average": by_arithmetic(models, 1 / len(models.tasks)),
        "joint training": models.joint.mean,
    }

    def both(params: Tree) -> jax.Array:
        return jnp.stack([accuracies(params, *part) for part in (data.valid, data.test)])

    def sweep(rule: Rule) -> jax.Array:
        chosen = by_fisher if rule.fisher else models
        return jax.lax.map(lambda w: both(rule.merge(chosen, w)), jnp.asarray(WEIGHTS))

    tested = {name: accuracies(params, *data.test) for name, params in points.items()}
    return tested, {name: sweep(rule) for name, rule in RULES.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, merges and prints the table."""
    options = parse(Options, __doc__, argv)
    data = make_data(options.seeds)
    models = train_models(data, options.epochs)
    points, sweeps = jax.device_get(jax.jit(jax.vmap(evaluate))(models, data))
    print(f"\n{table(points, sweeps)}")
    print(
        f"""
Test accuracy in %. The mean over the three kinds of images is what to compare. Weight: the best on
held-out images; mean at 1: without that choice (nan: the merged precision is not positive). Last
column: the mean minus that of '{OURS}', seed by seed."""
    )


def table(points: dict[str, np.ndarray], sweeps: dict[str, np.ndarray]) -> str:
    """Accuracies by kind of image: of the single networks, of every rule, of the joint network."""

    def best(name: str) -> int:
        validation = np.nan_to_num(sweeps[name][:, :, 0].mean(axis=(0, -1)))
        return int(validation.argmax())

    def of_rule(name: str, index: int) -> np.ndarray:
        return sweeps[name][:, index, 1]

    reference = of_rule(OURS, best(OURS)).mean(axis=-1)

    def row(label: str, found: np.ndarray, weight: str = "-", at_one: str = "-") -> list[str]:
        mean = found.mean(axis=-1)
        kinds = [cell(kind, 1) for kind in found.T]
        return [label, *kinds, cell(mean, 1), weight, at_one, cell(mean - reference, 1)]

    one = int(np.flatnonzero(WEIGHTS == 1.0)[0])
    joint = "joint training"
    rows = [["", *ANGLES, "mean", "weight", "mean at 1", "minus IVON's"]]
    singles = ["base", *(name for name in points if "fine-tuned" in name), "average"]
    rows += [row(name, points[name]) for name in singles]
    for name in RULES:
        index = best(name)
        at_one = cell(of_rule(name, one).mean(axis=-1), 1)
        rows.append(row(name, of_rule(name, index), f"{WEIGHTS[index]:g}", at_one))
    rows.append(row(joint, points[joint]))
    return format_table(rows)


if __name__ == "__main__":
    main()
