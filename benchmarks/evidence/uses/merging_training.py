"""Data, training and merge rules for `model_merging.py`.

Everything is a pure function of one seed's `Data`, to be mapped over seeds and compiled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import rotate

from benchmarks.evidence.uses.continual_training import (
    Net,
    Task,
    Values,
    batch_rows,
    first_prior,
    learn_adamw,
    learn_ivon,
)
from benchmarks.evidence.uses.merging_fisher import diagonal_fisher
from examples._shared.datasets import load_small_digits, stratified_split
from ivon_jax import Posterior, merge, task_arithmetic

ANGLES = {"upright": 0, "left": 30, "right": -30}  # degrees; the first is what the base learns
VALIDATION_SIZE = 190
TASK_SIZE = 270
FISHER_FLOOR = 1e-4  # per example of the base, as a weight decay
NET = Net(10)

Array = jax.Array
Params = jax.Array  # all weights as one vector


class Data(NamedTuple):
    """Images of one seed: different ones for every domain, each turned by the domain's angle."""

    images: Array  # (domains, n, 64)
    labels: Array  # (domains, n)
    validation: tuple[Array, Array]  # the same images in every domain, turned
    test: tuple[Array, Array]
    rows: Array  # (domains, steps, batch)
    joint_rows: Array  # (domains · steps, batch), of the images of all domains together
    seed: Array


def turn(images: np.ndarray, degrees: float) -> np.ndarray:
    """Turns images (n, 8, 8, 1) about their centre; returns (n, 64)."""
    turned = rotate(images, degrees, axes=(2, 1), reshape=False, order=1) if degrees else images
    return np.clip(turned, 0.0, 1.0).reshape(len(images), -1)


def make_data(seeds: int, steps: int, first_seed: int = 0) -> Data:
    """The data of every seed, stacked on a first axis; seeds differ in the split as well."""
    digits = load_small_digits()
    stacked = []
    for seed in range(first_seed, first_seed + seeds):
        images, labels, *validation = stratified_split(
            digits.train_images, digits.train_labels, VALIDATION_SIZE, seed
        )
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(labels))[: len(ANGLES) * TASK_SIZE].reshape(len(ANGLES), -1)
        own = [turn(images[rows], a) for rows, a in zip(order, ANGLES.values(), strict=True)]

        def every_angle(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            turned = [turn(images, angle) for angle in ANGLES.values()]
            return np.stack(turned), np.tile(labels, (len(ANGLES), 1))

        rows = np.stack([batch_rows(rng, TASK_SIZE, steps) for _ in ANGLES])
        joint_rows = batch_rows(rng, order.size, len(ANGLES) * steps)
        test = every_angle(digits.test_images, digits.test_labels)
        parts = (np.stack(own), labels[order], every_angle(*validation), test, rows, joint_rows)
        stacked.append((*parts, np.uint32(seed)))
    return Data(*jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *stacked))


# --- Training -------------------------------------------------------------------------------------


class Models(NamedTuple):
    """The base, the fine-tuned models (stacked on axis 0) and the jointly trained one."""

    base: Posterior
    tasks: Posterior
    joint: Posterior

    def each(self) -> list[Posterior]:
        """The fine-tuned models one by one."""
        return [Posterior(*pair) for pair in zip(*self.tasks, strict=True)]


def train_models(
    data: Data,
    learn_base: Callable[[Task], Posterior],
    learn_more: Callable[[Task, Posterior], Posterior],
    learn_joint: Callable[[Task, Task, Posterior], Posterior],
) -> Models:
    """Trains the base on the first domain and from there one model on each of the others.

    The joint model gets the images of all other domains after the base, or all images from the
    initial weights, whichever of the two `learn_joint` takes.
    """
    images, labels, rows = data.images, data.labels, data.rows
    init_key, base_key, joint_key, key = jax.random.split(jax.random.key(data.seed), 4)
    keys = jax.random.split(key, len(ANGLES) - 1)
    start = NET.init(init_key)
    base = learn_base(Task(NET, images[0], labels[0], rows[0], base_key, start))

    def fine_tune(images: Array, labels: Array, rows: Array, key: Array) -> Posterior:
        return learn_more(Task(NET, images, labels, rows, key, base.mean), base)

    tasks = jax.vmap(fine_tune)(images[1:], labels[1:], rows[1:], keys)

    def together(first: int, start: Params) -> Task:
        flat = images[first:].reshape(-1, images.shape[-1]), labels[first:].ravel()
        joint_rows = data.joint_rows % len(flat[1])
        return Task(NET, *flat, joint_rows, joint_key, start)

    return Models(base, tasks, learn_joint(together(0, start), together(1, base.mean), base))


def train_adamw(values: Values, data: Data) -> Models:
    """AdamW; the joint model learns all images from the initial weights.

    The precisions are zero: `with_fisher` makes some.
    """

    def learn(task: Task) -> Posterior:
        return learn_adamw(values, task, Posterior(task.start, jnp.zeros_like(task.start)))

    return train_models(data, learn, lambda task, _: learn(task), lambda every, *_: learn(every))


def train_ivon(values: Values, data: Data) -> Models:
    """IVON; the posterior of the base is the prior of all that follows, the joint model too."""

    def learn_base(task: Task) -> Posterior:
        return learn_ivon(values, task, first_prior(values, task, task.start))

    learn_more = partial(learn_ivon, values)
    return train_models(data, learn_base, learn_more, lambda _, more, base: learn_more(more, base))


def with_fisher(models: Models, data: Data) -> Models:
    """The same means, with the precisions that Fisher informations at them give.

    H₀ = n(F₀ + floor) and P_t = H₀ + nF_t for the n images of a domain: Laplace approximations.
    """

    def information(params: Params, images: Array) -> Params:
        return len(images) * diagonal_fisher(NET.apply, params, images)

    h0 = information(models.base.mean, data.images[0]) + FISHER_FLOOR * TASK_SIZE
    precision = h0[None] + jax.vmap(information)(models.tasks.mean, data.images[1:])
    return Models(
        Posterior(models.base.mean, h0), Posterior(models.tasks.mean, precision), models.joint
    )


# --- Merging --------------------------------------------------------------------------------------


def by_arithmetic(models: Models, weight: Any) -> Params:
    """Task arithmetic; at weight 1/T it is the plain average."""
    means = [q.mean for q in models.each()]
    return task_arithmetic(means, models.base.mean, weights=[weight] * len(means))


def without_base(models: Models, weight: Any) -> Params:
    """The precision-weighted average, whose way from the base is multiplied by the weight."""
    return task_arithmetic([merge(models.each()).mean], models.base.mean, weights=[weight])


def own_information(models: Models, weight: Any) -> Params:
    """As `without_base`, with the precisions of the tasks' own data: Fisher-weighted averaging."""
    own = models.tasks.precision - models.base.precision[None] + FISHER_FLOOR * TASK_SIZE
    return without_base(models._replace(tasks=models.tasks._replace(precision=own)), weight)


def with_base(models: Models, weight: Any) -> Params:
    """The general merge, in which the base counts once."""
    tasks = models.each()
    return merge(tasks, base=models.base, weights=[weight] * len(tasks)).mean


def removed(whole: Posterior, task: Posterior, base: Posterior) -> Params:
    """The mean after one task has been taken out of a model that has learned several.

    A task has no more precision than the whole that contains it, but estimates of both are noisy:
    where it seems to have more, it is given as much, so that the base's precision remains.
    """
    most = jnp.minimum(task.precision, whole.precision)
    return merge([whole, Posterior(task.mean, most)], weights=[1, -1], base=base).mean


class Rule(NamedTuple):
    """A way to merge with one weight; `fisher`: by precisions from Fisher informations."""

    label: str
    merge: Callable[[Models, Any], Params]
    fisher: bool = False


COMMON_RULES = (
    Rule("task arithmetic", by_arithmetic),
    Rule("Fisher averaging", own_information, fisher=True),
    Rule("Fisher, base counted once", with_base, fisher=True),
)
RULES = {
    "adamw": COMMON_RULES,
    "ivon": (
        *COMMON_RULES,
        Rule("IVON's precisions", without_base),
        Rule("IVON's, base counted once", with_base),
    ),
}
TRAIN = {"adamw": train_adamw, "ivon": train_ivon}
WEIGHTS = (0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


# --- Evaluation -----------------------------------------------------------------------------------


def accuracies(params: Params, images: Array, labels: Array) -> Array:
    """Accuracy on every domain; NaN for weights that are NaN."""

    def one_domain(images: Array, labels: Array) -> Array:
        logits = NET.apply(params, images)
        right = jnp.mean(jnp.argmax(logits, axis=-1) == labels)
        return jnp.where(jnp.all(jnp.isfinite(logits)), right, jnp.nan)

    return jax.vmap(one_domain)(images, labels)


class Results(NamedTuple):
    """Accuracies by domain: of models and removals on test images, of sweeps on validation too.

    With an axis of seeds in front after `make_runner`.
    """

    models: dict[str, Any]  # (domains,)
    sweeps: dict[str, Any]  # (validation or test, weights, domains)


def evaluate(method: str, values: Values, data: Data) -> Results:
    """Trains base, fine-tuned and joint models of one seed, merges them and tests everything."""
    models = TRAIN[method](values, data)
    by_fisher = with_fisher(models, data)

    tasks = models.each()
    points = {"base": models.base.mean, "joint": models.joint.mean}
    for name, q in zip(list(ANGLES)[1:], tasks, strict=True):
        points[f"fine-tuned on {name}"] = q.mean
    points["average"] = by_arithmetic(models, 1 / len(tasks))
    if method == "ivon":
        merged = merge(tasks, base=models.base)
        points["merged"] = merged.mean
        points["merged, removed"] = removed(merged, tasks[0], models.base)
        points["joint, removed"] = removed(models.joint, tasks[0], models.base)
    tested = jax.vmap(lambda params: accuracies(params, *data.test))(jnp.stack([*points.values()]))
    rules = RULES[method]

    def at(weight: Array) -> Array:
        merged = [rule.merge(by_fisher if rule.fisher else models, weight) for rule in rules]
        sets = (data.validation, data.test)
        # All rules at once: one network to compile instead of one for each.
        each = jax.vmap(lambda params: jnp.stack([accuracies(params, *part) for part in sets]))
        return each(jnp.stack(merged))

    sweeps = jnp.moveaxis(jax.lax.map(at, jnp.asarray(WEIGHTS)), 0, 2)
    return Results(
        dict(zip(points, tested, strict=True)),
        {rule.label: sweep for rule, sweep in zip(rules, sweeps, strict=True)},
    )


def make_runner(method: str) -> Callable[[Values, Data], Results]:
    """Compiles `evaluate` once for all seeds and hyperparameters."""
    return jax.jit(jax.vmap(partial(evaluate, method), (None, 0)))
