"""Every state survives a checkpoint, and training goes on as if it had not been interrupted."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import Eigenbasis, Posterior, auto_sample, ivon, posterior, sample_params

# Not installed where the oldest supported versions are tested.
serialization = pytest.importorskip("flax.serialization")
ocp = pytest.importorskip("orbax.checkpoint")

PARAMS = {"b": jnp.array([0.5, -1.0]), "w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
STEPS_BEFORE, STEPS_AFTER = 4, 3


class Run(NamedTuple):
    """A transformation, given the seed of its own randomness, and who draws the sample."""

    build: Callable[[int], optax.GradientTransformationExtraArgs]
    explicit: bool


def _cooling(count: jax.Array) -> jax.Array:
    return 0.2 / (1.0 + jnp.asarray(count, jnp.float32))


def _injected(seed: int) -> optax.GradientTransformationExtraArgs:
    del seed
    inject = optax.inject_hyperparams(ivon)
    return optax.chain(optax.clip_by_global_norm(1.0), inject(_cooling, ess=50.0))


def _partitioned(seed: int) -> optax.GradientTransformationExtraArgs:
    del seed
    labels = {"b": "plain", "w": "bayes"}
    bayes = ivon(0.1, ess=50.0, mask={"b": False, "w": True})
    return optax.partition({"plain": optax.sgd(0.1, momentum=0.9), "bayes": bayes}, labels)


RUNS = {
    "explicit": Run(lambda _: ivon(0.1, ess=50.0, momentum_dtype=jnp.bfloat16), explicit=True),
    "injected": Run(_injected, explicit=True),
    "masked_decay": Run(
        lambda _: ivon(_cooling, ess=50.0, mask={"b": False, "w": True}), explicit=True
    ),
    "eigenbasis": Run(lambda _: ivon(0.1, ess=50.0, basis=Eigenbasis(2)), explicit=True),
    "partition": Run(_partitioned, explicit=True),
    "prior": Run(
        lambda _: ivon(0.1, ess=50.0, prior=Posterior(PARAMS, jax.tree.map(jnp.abs, PARAMS))),
        explicit=True,
    ),
    "auto": Run(lambda seed: auto_sample(_injected(0), seed), explicit=False),
    # Four steps of a window of three: the checkpoint falls into the middle of a window.
    "auto_window": Run(
        lambda seed: auto_sample(ivon(0.1, ess=50.0), seed, num_samples=3), explicit=False
    ),
}


def loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(batch @ params["w"] + params["b"][None]))


@functools.cache
def jitted_step(name: str) -> Callable[..., Any]:
    run = RUNS[name]
    tx = run.build(0)

    @jax.jit
    def step(params, state, t):
        batch = jnp.cos(jnp.arange(8, dtype=jnp.float32) + t).reshape(4, 2)
        if run.explicit:
            key = jax.random.fold_in(jax.random.key(0), t)
            sample, noise = sample_params(key, state, params)
            grads = jax.grad(loss)(sample, batch)
            updates, state = tx.update(grads, state, params, noise=noise)
        else:
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(name: str, params: Any, state: Any, start: int, stop: int) -> tuple[Any, Any]:
    for t in range(start, stop):
        params, state = jitted_step(name)(params, state, np.float32(t))
    return params, state


@functools.cache
def uninterrupted(name: str) -> tuple[Any, Any]:
    """Parameters and state at the checkpoint, and at the end."""
    at_checkpoint = train(name, PARAMS, RUNS[name].build(0).init(PARAMS), 0, STEPS_BEFORE)
    return at_checkpoint, train(name, *at_checkpoint, STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER)


def fresh_template(name: str) -> Any:
    """What a new process has at hand: other parameters, another seed, no training."""
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    return params, RUNS[name].build(1).init(params)


def through_bytes(path: Path, saved: Any, template: Any) -> Any:
    file = path / "checkpoint.msgpack"
    file.write_bytes(serialization.to_bytes(saved))
    return serialization.from_bytes(template, file.read_bytes())


def through_state_dict(path: Path, saved: Any, template: Any) -> Any:
    del path
    state_dict = jax.tree.map(np.asarray, serialization.to_state_dict(saved))
    return serialization.from_state_dict(template, state_dict)


def through_orbax(path: Path, saved: Any, template: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", template)


def through_abstract_orbax(path: Path, saved: Any, template: Any) -> Any:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    return through_orbax(path, saved, abstract)


def through_manager(path: Path, saved: Any, template: Any) -> Any:
    with ocp.CheckpointManager(path / "run") as manager:
        manager.save(STEPS_BEFORE, args=ocp.args.StandardSave(saved))
        manager.wait_until_finished()
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(template))


FORMATS = [
    through_bytes,
    through_state_dict,
    through_orbax,
    through_abstract_orbax,
    through_manager,
]


@pytest.mark.parametrize("through", FORMATS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", RUNS)
def test_training_continues_bitwise_from_a_checkpoint(name, through, tmp_path):
    saved, expected = uninterrupted(name)
    restored = through(tmp_path, saved, fresh_template(name))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, saved)
    chex.assert_trees_all_equal(restored, saved)
    last = STEPS_BEFORE + STEPS_AFTER
    chex.assert_trees_all_equal(train(name, *restored, STEPS_BEFORE, last), expected, strict=True)


@pytest.mark.parametrize("name", RUNS)
def test_a_restored_state_of_numpy_arrays_works_eagerly(name, tmp_path):
    (params, state), _ = uninterrupted(name)
    _, restored = through_bytes(tmp_path, (params, state), fresh_template(name))
    assert {type(x) for x in jax.tree.leaves(restored)} == {np.ndarray}
    key = jax.random.key(2)
    chex.assert_trees_all_equal(
        sample_params(key, restored, params), sample_params(key, state, params), strict=True
    )
    chex.assert_trees_all_equal(posterior(restored), posterior(state), strict=True)
    tx = RUNS[name].build(1)
    extra = {"noise": sample_params(key, state, params)[1]} if RUNS[name].explicit else {}
    chex.assert_trees_all_equal(
        tx.update(params, restored, params, **extra),
        tx.update(params, state, params, **extra),
        strict=True,
    )


@pytest.mark.parametrize("name", ["explicit", "masked_decay", "auto_window"])
def test_a_state_dict_names_its_fields(name):
    (_, state), _ = uninterrupted(name)
    names = set()

    def visit(node):
        if isinstance(node, dict):
            names.update(node)
            for child in node.values():
                visit(child)

    visit(serialization.to_state_dict(state))
    assert {"count", "mean", "hess", "momentum", "ess", "weight_decay"} <= names


def test_a_posterior_survives_a_checkpoint(tmp_path):
    (_, state), _ = uninterrupted("auto")
    q = posterior(state)
    template = jax.tree.map(jnp.zeros_like, q)
    for through in (through_bytes, through_orbax):
        chex.assert_trees_all_equal(through(tmp_path, q, template), q, strict=True)


def test_the_seed_of_the_new_process_does_not_matter(tmp_path):
    # The stream is part of the state: two restores with different seeds go on alike.
    saved, expected = uninterrupted("auto")
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    for seed in (5, 6):
        template = (params, RUNS["auto"].build(seed).init(params))
        restored = through_bytes(tmp_path, saved, template)
        last = STEPS_BEFORE + STEPS_AFTER
        chex.assert_trees_all_equal(
            train("auto", *restored, STEPS_BEFORE, last), expected, strict=True
        )
