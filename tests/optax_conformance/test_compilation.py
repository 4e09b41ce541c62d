"""One compilation for a whole run, and a state whose types never change."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import auto_sample, ivon, mc_value_and_grad, sample_params

PARAMS = {"b": jnp.array([0.5, -1.0]), "w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
BATCHES = [np.full((4, 2), i, np.float32) for i in range(5)]


def loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(batch @ params["w"] + params["b"][None]))


def _explicit_step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    def step(params, state, key, batch):
        sample, noise = sample_params(key, state, params)
        grads = jax.grad(loss)(sample, batch)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    return step


def _stacked_step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    def step(params, state, key, batch):
        keys = jax.random.split(key, 2)
        samples, noise = jax.vmap(sample_params, (0, None))(keys, state)
        grads = jax.vmap(jax.grad(loss), (0, None))(samples, batch)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    return step


def _estimated_step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    estimate = mc_value_and_grad(loss, 2, antithetic=True)

    def step(params, state, key, batch):
        _, grads, hess = estimate(key, state, batch)
        updates, state = tx.update(grads, state, params, hess=hess)
        return optax.apply_updates(params, updates), state

    return step


def _plain_step(tx: optax.GradientTransformationExtraArgs) -> Callable[..., Any]:
    def step(params, state, key, batch):
        del key
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


class Run(NamedTuple):
    """A transformation, and the step of the loop that trains with it."""

    build: Callable[[], optax.GradientTransformationExtraArgs]
    make_step: Callable[..., Callable[..., Any]]


def _injected() -> optax.GradientTransformationExtraArgs:
    def warmup(count):
        return 0.1 * jnp.minimum(jnp.asarray(count, jnp.float32), 1.0)

    return optax.inject_hyperparams(ivon)(warmup, ess=100.0, weight_decay=0.01)


RUNS = {
    "explicit": Run(lambda: ivon(optax.constant_schedule(0.1), ess=100), _explicit_step),
    "stacked": Run(lambda: optax.chain(ivon(0.1, ess=100)), _stacked_step),
    "hess": Run(lambda: ivon(0.1, ess=100, momentum_dtype=jnp.bfloat16), _estimated_step),
    "injected": Run(_injected, _explicit_step),
    "masked_decay": Run(lambda: ivon(0.1, 100, mask={"b": False, "w": True}), _explicit_step),
    "auto": Run(
        lambda: auto_sample(optax.chain(optax.clip_by_global_norm(1.0), ivon(0.1, 100)), 0),
        _plain_step,
    ),
    "auto_window": Run(lambda: auto_sample(ivon(0.1, 100), 0, num_samples=3), _plain_step),
    "auto_injected": Run(lambda: auto_sample(_injected(), 0), _plain_step),
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)

_COMPILED: list[str] = []


def _record_compilation(event: str, duration: float, **kwargs: Any) -> None:
    del duration, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_record_compilation)


def avals(tree: Any) -> list[tuple[Any, ...]]:
    """Path, shape, dtype and weakness of the type of each leaf."""
    return [
        (jax.tree_util.keystr(path), x.shape, x.dtype, x.aval.weak_type)
        for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


@every_run
def test_a_run_compiles_once_and_never_changes_the_types_of_its_state(run):
    tx = run.build()
    step = jax.jit(run.make_step(tx))
    params, state = PARAMS, tx.init(PARAMS)
    fresh, structure = avals((params, state)), jax.tree.structure((params, state))
    keys = list(jax.random.split(jax.random.key(0), len(BATCHES)))
    _COMPILED.clear()
    params, state = step(params, state, keys[0], BATCHES[0])
    assert _COMPILED  # The listener does hear of compilations.
    _COMPILED.clear()
    for key, batch in zip(keys[1:], BATCHES[1:], strict=True):
        params, state = step(params, state, key, batch)
        assert avals((params, state)) == fresh
        assert jax.tree.structure((params, state)) == structure
    assert not _COMPILED
    assert step._cache_size() == 1


@every_run
def test_the_state_holds_arrays_only_and_no_weak_types(run):
    state = run.build().init(PARAMS)
    leaves = jax.tree.leaves(state, is_leaf=lambda x: x is None)
    assert all(isinstance(x, jax.Array) for x in leaves)
    # An array of a weak type would become a strong one in a checkpoint, and compile again.
    assert not [path for path, _, _, weak in avals(state) if weak]


@every_run
def test_an_eager_update_keeps_the_types_of_the_state(run):
    tx = run.build()
    state = tx.init(PARAMS)
    _, new_state = run.make_step(tx)(PARAMS, state, jax.random.key(0), BATCHES[1])
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    assert avals(new_state) == avals(state)


def test_a_weakly_typed_number_of_examples_compiles_once():
    # optax.inject_hyperparams keeps an integer as a weakly typed array.
    tx = optax.inject_hyperparams(ivon)(0.1, ess=100)
    state = tx.init(PARAMS)
    step = jax.jit(_explicit_step(tx))
    params = PARAMS
    for key in jax.random.split(jax.random.key(0), 3):
        params, state = step(params, state, key, BATCHES[0])
        assert not state.inner_state.ess.aval.weak_type
    assert step._cache_size() == 1


@pytest.mark.parametrize("leaf", [np.float32(0.5), jnp.asarray(0.5)], ids=["numpy", "weak"])
def test_the_mean_of_a_weak_or_numpy_leaf_is_strongly_typed(leaf):
    state = ivon(0.1, ess=100).init({"scale": leaf})
    assert {(dtype.name, weak) for _, _, dtype, weak in avals(state)} == {
        ("int32", False),
        ("float32", False),
    }


def test_the_step_count_saturates_instead_of_overflowing():
    tx = ivon(0.1, ess=100)
    top = jnp.iinfo(jnp.int32).max
    state = tx.init(PARAMS)._replace(count=jnp.array(top))
    noise = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, state = tx.update(PARAMS, state, PARAMS, noise=noise)
    assert int(state.count) == top
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))


def test_two_transformations_share_no_python_state():
    # A loop that is compiled for one transformation must not see the settings of another.
    slow, fast = ivon(0.1, ess=100), ivon(1.0, ess=100)
    state = slow.init(PARAMS)
    noise = jax.tree.map(jnp.zeros_like, PARAMS)
    small, _ = jax.jit(slow.update)(PARAMS, state, PARAMS, noise=noise)
    large, _ = jax.jit(fast.update)(PARAMS, state, PARAMS, noise=noise)
    np.testing.assert_allclose(large["w"], 10 * small["w"], rtol=1e-5)
