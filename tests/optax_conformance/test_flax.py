"""IVON in the training loops of Flax and Equinox, which pass nothing to the optimizer."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    auto_sample,
    ivon,
    mc_value_and_grad,
    posterior,
    posterior_mean,
    reseed,
    sample_params,
    with_mean,
)

# Not installed where the oldest supported versions are tested.
nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
TrainState = pytest.importorskip("flax.training.train_state").TrainState
eqx = pytest.importorskip("equinox")

KEY = jax.random.key(5)
X = np.array([[1.0, 0.5], [-1.0, 2.0], [0.3, -0.7], [0.0, 1.0]], np.float32)
Y = X @ np.array([[1.0], [-2.0]], np.float32)


# Cached, so that tests with the same model share one compilation.
@functools.cache
def explicit() -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.clip_by_global_norm(1.0), ivon(0.1, ess=100.0, b2=0.99))


@functools.cache
def automatic(num_samples: int = 1) -> optax.GradientTransformationExtraArgs:
    return auto_sample(explicit(), 0, num_samples=num_samples)


leaves = jax.tree.leaves  # the state of nnx and of optax keep the same leaves in other containers


def assert_leaves_differ(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert np.all(np.asarray(x) != np.asarray(y))


WRAPPERS = {
    "alone": lambda tx: tx,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_state_of_nnx_parameters_keeps_its_structure(wrap):
    tx: Any = WRAPPERS[wrap](automatic())
    params = nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Param)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps needs it
        (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=4)
    assert all(np.isfinite(x).all() for x in leaves(posterior_mean(state)))


# Flax linen


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(x)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_linen_train_state_trains_with_auto_sample(num_samples):
    model = Linen()
    params = model.init(jax.random.key(0), X)
    train = TrainState.create(apply_fn=model.apply, params=params, tx=automatic(num_samples))

    def loss(params):
        return jnp.mean(jnp.square(train.apply_fn(params, X) - Y))

    @jax.jit
    def step(train):
        return train.apply_gradients(grads=jax.grad(loss)(train.params))

    before = loss(params)
    for _ in range(20):
        train = step(train)
    assert int(train.step) == 20
    mean = posterior_mean(train.opt_state)
    assert jax.tree.structure(mean) == jax.tree.structure(params)
    assert loss(mean) < before
    # The loop's parameters are a sample, and the accessors read the mean from the state.
    assert_leaves_differ(train.params, mean)
    chex.assert_trees_all_equal(posterior(train.opt_state).mean, mean)
    sample, noise = sample_params(KEY, train.opt_state, train.params)
    chex.assert_trees_all_equal(sample, jax.tree.map(jnp.add, mean, noise))
    model.apply(sample, X)
    # The whole TrainState may be searched.
    chex.assert_trees_all_equal(posterior_mean(train), mean)


def test_linen_train_state_continues_from_edited_parameters():
    model = Linen()
    params = model.init(jax.random.key(0), X)
    train = TrainState.create(apply_fn=model.apply, params=params, tx=automatic())
    train = train.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    edited = jax.tree.map(lambda x: x + 1.0, params)
    train = train.replace(params=edited, opt_state=with_mean(train.opt_state, edited))
    chex.assert_trees_all_equal(posterior_mean(train.opt_state), edited)
    train = train.apply_gradients(grads=jax.tree.map(jnp.zeros_like, params))
    jump = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), posterior_mean(train), edited)
    assert max(jax.tree.leaves(jump)) < 0.2


# Flax nnx


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.out = nnx.Linear(2, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0, jnp.int32))  # A variable that is no parameter.

    def __call__(self, x):
        return self.out(x)


def nnx_loss(model: Nnx) -> jax.Array:
    return jnp.mean(jnp.square(model(X) - Y))


@nnx.jit
def nnx_step(model: Nnx, optimizer: nnx.Optimizer) -> None:
    optimizer.update(model, nnx.grad(nnx_loss)(model))


def nnx_model(tx: optax.GradientTransformation) -> tuple[Nnx, nnx.Optimizer]:
    model = Nnx(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_nnx_optimizer_trains_with_auto_sample(num_samples):
    model, optimizer = nnx_model(automatic(num_samples))
    before = nnx_loss(model)
    for _ in range(20):
        nnx_step(model, optimizer)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    mean = posterior_mean(optimizer.opt_state, params)
    assert_leaves_differ(params, mean)
    assert nnx_loss(nnx.merge(graphdef, mean, rest)) < before
    assert int(optimizer.step[...]) == 20


def test_nnx_training_equals_the_bare_optax_loop():
    model, optimizer = nnx_model(automatic())
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    pure = nnx.to_pure_dict(params)
    tx = automatic()
    state = tx.init(pure)

    @jax.jit
    def step(pure, state):
        def loss(pure):
            loaded = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(pure))
            return nnx_loss(nnx.merge(graphdef, loaded, rest))

        updates, state = tx.update(jax.grad(loss)(pure), state, pure)
        return optax.apply_updates(pure, updates), state

    for _ in range(3):
        nnx_step(model, optimizer)
        pure, state = step(pure, state)
    for a, b in zip(
        jax.tree.leaves((nnx.state(model, nnx.Param), posterior(optimizer.opt_state))),
        jax.tree.leaves((pure, posterior(state))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@nnx.jit
def nnx_explicit_step(model: Nnx, optimizer: nnx.Optimizer, key: jax.Array) -> None:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    sample, noise = sample_params(key, optimizer.opt_state, params)
    grads = nnx.grad(nnx_loss)(nnx.merge(graphdef, sample, rest))
    optimizer.update(model, grads, noise=noise)


def test_nnx_optimizer_takes_explicit_noise_through_its_keywords():
    model, optimizer = nnx_model(explicit())
    before = nnx_loss(model)
    for key in jax.random.split(KEY, 20):
        nnx_explicit_step(model, optimizer, key)
    params = nnx.state(model, nnx.Param)
    # Updates land on the mean.
    chex.assert_trees_all_equal(leaves(params), leaves(posterior_mean(optimizer.opt_state)))
    assert nnx_loss(model) < before


def test_nnx_optimizer_without_noise_says_what_to_do():
    model, optimizer = nnx_model(explicit())
    with pytest.raises(ValueError, match="auto_sample"):
        optimizer.update(model, nnx.grad(nnx_loss)(model))


def test_nnx_optimizer_takes_the_estimates_of_the_library():
    model, optimizer = nnx_model(explicit())
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    before = jax.tree.map(jnp.copy, params)  # The Variables of params are those of the model.

    def loss(params):
        return nnx_loss(nnx.merge(graphdef, params, rest))

    estimate = mc_value_and_grad(loss, 2, antithetic=True)
    _, grads, hess = estimate(KEY, optimizer.opt_state, params=params)
    optimizer.update(model, grads, hess=hess)
    chex.assert_trees_all_equal(
        leaves(nnx.state(model, nnx.Param)), leaves(posterior_mean(optimizer.opt_state))
    )
    assert_leaves_differ(nnx.state(model, nnx.Param), before)


def test_sampling_leaves_an_nnx_model_untouched_and_merges_into_a_new_one():
    model, optimizer = nnx_model(explicit())
    before = jax.tree.map(jnp.copy, nnx.state(model))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    sample, noise = sample_params(KEY, optimizer.opt_state, params)
    assert jax.tree.structure(sample) == jax.tree.structure(params)
    sampled_model = nnx.merge(graphdef, sample, rest)
    sampled_model(X)
    assert_leaves_differ(nnx.state(sampled_model, nnx.Param), params)
    chex.assert_trees_all_equal(nnx.state(model), before)
    moved = [m + n for m, n in zip(leaves(params), leaves(noise), strict=True)]
    chex.assert_trees_all_equal(leaves(sample), moved)


# Both forms in which an nnx training state is at hand.
NNX_STATES = {
    "opt_state": lambda optimizer: optimizer.opt_state,
    "nnx.state(optimizer)": nnx.state,
    "nnx.state(optimizer)['opt_state']": lambda optimizer: nnx.state(optimizer)["opt_state"],
}
every_nnx_state = pytest.mark.parametrize("find", NNX_STATES.values(), ids=NNX_STATES)


@pytest.fixture(scope="module")
def trained() -> tuple[Nnx, nnx.Optimizer]:
    """An nnx model after a few steps; not to be trained further."""
    model, optimizer = nnx_model(automatic())
    for _ in range(3):
        nnx_step(model, optimizer)
    return model, optimizer


@every_nnx_state
def test_accessors_read_nnx_states_without_parameters(trained, find):
    _, optimizer = trained
    state = find(optimizer)
    mean = posterior_mean(state)
    chex.assert_trees_all_equal(mean, posterior_mean(nnx.to_pure_dict(nnx.state(optimizer))))
    q = posterior(state)
    chex.assert_trees_all_equal(q.mean, mean)
    assert all(np.all(p > 0) for p in jax.tree.leaves(q.precision))
    sample, noise = sample_params(KEY, state)
    chex.assert_trees_all_equal(sample, jax.tree.map(jnp.add, mean, noise))


@every_nnx_state
def test_accessors_return_the_structure_of_the_nnx_parameters(trained, find):
    model, optimizer = trained
    params = nnx.state(model, nnx.Param)
    state = find(optimizer)
    sample, noise = sample_params(KEY, state, params)
    q = posterior(state, params)
    for tree in (sample, noise, posterior_mean(state, params), q.mean, q.precision):
        assert jax.tree.structure(tree) == jax.tree.structure(params)
    chex.assert_trees_all_equal(leaves(sample), leaves(sample_params(KEY, optimizer.opt_state)[0]))


@every_nnx_state
def test_a_sample_of_an_nnx_state_merges_into_the_model(trained, find):
    model, optimizer = trained
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    sampled_model = nnx.merge(graphdef, sample_params(KEY, find(optimizer), params)[0], rest)
    assert np.all(np.isfinite(sampled_model(X)))
    # The sample alone has the names of the parameters, and updates a model in place.
    copy = nnx.merge(graphdef, jax.tree.map(jnp.copy, params), rest)
    nnx.update(copy, sample_params(KEY, find(optimizer))[0])
    np.testing.assert_array_equal(copy(X), sampled_model(X))


@every_nnx_state
def test_noise_drawn_from_any_nnx_state_is_accepted_by_update(find):
    model, optimizer = nnx_model(explicit())
    _, noise = sample_params(KEY, find(optimizer))
    optimizer.update(model, nnx.grad(nnx_loss)(model), noise=noise)
    chex.assert_trees_all_equal(
        leaves(nnx.state(model, nnx.Param)), leaves(posterior_mean(optimizer.opt_state))
    )


def named_leaves(state: Any) -> dict[str, np.ndarray]:
    """Each array of a state under the name of its field or key."""
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
    }


@every_nnx_state
def test_with_mean_moves_the_mean_of_an_nnx_state(trained, find):
    model, optimizer = trained
    params = jax.tree.map(lambda x: x + 1.0, nnx.state(model, nnx.Param))
    state = find(optimizer)
    moved = with_mean(state, params)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    chex.assert_trees_all_equal(leaves(posterior_mean(moved)), leaves(params))
    # auto_sample continues as from the mean.
    assert [bool(x) for name, x in named_leaves(moved).items() if "at_mean" in name] == [True]


def test_an_nnx_optimizer_continues_from_a_moved_mean():
    model, optimizer = nnx_model(automatic())
    nnx_step(model, optimizer)
    edited = jax.tree.map(lambda x: x + 1.0, nnx.state(model, nnx.Param))
    nnx.update(model, edited)
    nnx.update(optimizer.opt_state, nnx.state(with_mean(optimizer.opt_state, edited)))
    nnx_step(model, optimizer)
    for mean, start in zip(
        jax.tree.leaves(posterior_mean(optimizer.opt_state)), jax.tree.leaves(edited), strict=True
    ):
        assert np.all(np.abs(mean - start) < 0.3)
        assert np.any(mean != start)


def test_reseed_changes_the_stream_of_an_nnx_optimizer_and_nothing_else(trained):
    _, optimizer = trained
    state = optimizer.opt_state
    reseeded = reseed(state, 9)
    assert jax.tree.structure(reseeded) == jax.tree.structure(state)
    before, after = named_leaves(state), named_leaves(reseeded)
    changed = [name for name in before if np.any(before[name] != after[name])]
    assert len(changed) == 1
    assert "key" in changed[0]


# Equinox


class Equinox(eqx.Module):
    out: eqx.nn.Linear
    activation: Any
    steps: jax.Array

    def __init__(self, key: jax.Array):
        self.out = eqx.nn.Linear(2, 1, key=key)
        self.activation = jnp.asarray
        self.steps = jnp.array(0, jnp.int32)

    def __call__(self, x):
        return self.activation(self.out(x))


def eqx_loss(model: Equinox) -> jax.Array:
    return jnp.mean(jnp.square(jax.vmap(model)(X) - Y))


def test_equinox_trains_with_auto_sample():
    model = Equinox(jax.random.key(0))
    tx = automatic()
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(eqx_loss)(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    before = eqx_loss(model)
    for _ in range(20):
        model, state = step(model, state)
    mean = eqx.combine(posterior_mean(state), model)
    assert isinstance(mean, Equinox)
    assert eqx_loss(mean) < before
    assert_leaves_differ(
        eqx.filter(model, eqx.is_inexact_array), eqx.filter(mean, eqx.is_inexact_array)
    )


def test_equinox_trains_explicitly():
    model = Equinox(jax.random.key(0))
    tx = explicit()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state = tx.init(params)

    @eqx.filter_jit
    def step(key, model, state):
        sample, noise = sample_params(key, state)
        grads = eqx.filter_grad(eqx_loss)(eqx.combine(sample, static))
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, noise=noise)
        return eqx.apply_updates(model, updates), state

    before = eqx_loss(model)
    for key in jax.random.split(KEY, 20):
        model, state = step(key, model, state)
    assert eqx_loss(model) < before
    chex.assert_trees_all_equal(eqx.filter(model, eqx.is_inexact_array), posterior_mean(state))
    assert int(model.steps) == 0


def test_an_unfiltered_equinox_model_is_refused_with_the_filter_to_use():
    with pytest.raises(TypeError, match=r"equinox\.filter") as caught:
        explicit().init(Equinox(jax.random.key(0)))
    assert "activation" in str(caught.value)
