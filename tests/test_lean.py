"""`auto_sample(store_mean=False)`: the mean is in the sample and its key alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    Posterior,
    auto_sample,
    diagnostics,
    ivon,
    learning_status,
    mc_value_and_grad,
    posterior,
    posterior_mean,
    predict_at_mean,
    prior_of,
    reseed,
    sample_params,
    with_ess,
    with_mean,
)

EPS = 2.0**-23
PARAMS = {"a": jnp.array([0.5, -1.0, 2.0]), "b": jnp.linspace(-1.0, 1.0, 20_000), "c": jnp.ones(2)}
SETTINGS = {"ess": 50.0, "hess_init": 0.5, "b2": 0.9, "weight_decay": 0.1}
# σ is 0.2 and means are of order one: a hundred units of rounding in ten steps.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def gradient(params):
    def loss(p):
        return sum(jnp.sum(jnp.sin(x) + 0.7 * x**2) for x in p.values())

    return jax.grad(loss)(params)


def chained(**settings):
    return optax.chain(optax.clip(1.5), ivon(0.1, **{**SETTINGS, **settings}))


def partitioned(**settings):
    labels = {"a": "mine", "b": "mine", "c": "other"}
    return optax.partition({"mine": chained(**settings), "other": optax.set_to_zero()}, labels)


def in_two(**settings):
    labels = {"a": "one", "b": "two", "c": "one"}
    return optax.partition({"one": chained(**settings), "two": chained(**settings)}, labels)


def fixed_element(**settings):
    del settings
    mean = {"a": jnp.zeros(3), "b": jnp.zeros(20_000), "c": jnp.zeros(2)}
    precision = {"a": jnp.array([5.0, jnp.inf, 0.0]), "b": jnp.ones(20_000), "c": jnp.ones(2)}
    return ivon(0.1, 50.0, hess_init=0.5, b2=0.9, prior=Posterior(mean, precision))


def run(tx, steps=10, params=PARAMS, state=None):
    params = jax.tree.map(jnp.array, params)
    state = tx.init(params) if state is None else state
    step = jax.jit(lambda p, s: tx.update(gradient(p), s, p))
    for _ in range(steps):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("options", [{}, {"num_samples": 3}, {"antithetic": True}], ids=str)
@pytest.mark.parametrize("build", [chained, partitioned, in_two, fixed_element])
def test_it_takes_the_steps_of_a_stored_mean(build, options):
    lean = run(auto_sample(build(), 0, store_mean=False, **options))
    full = run(auto_sample(build(), 0, **options))
    chex.assert_trees_all_close(lean[0], full[0], **CLOSE)
    chex.assert_trees_all_close(posterior(lean[1], lean[0]), posterior(full[1], full[0]), **CLOSE)


@pytest.mark.parametrize(
    "outer",
    [
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 2),
    ],
    ids=["MultiSteps", "apply_if_finite"],
)
def test_it_works_inside_wrappers_that_skip_steps(outer):
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps needs it
        lean = run(outer(auto_sample(chained(), 0, store_mean=False)))
        full = run(outer(auto_sample(chained(), 0)))
    chex.assert_trees_all_close(lean[0], full[0], **CLOSE)


def test_the_state_holds_hess_and_momentum_and_nothing_else_of_their_size():
    state = auto_sample(ivon(0.1, **SETTINGS), 0, store_mean=False).init(PARAMS)
    large = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32 and x.ndim]
    assert sum(x.nbytes for x in large) == 2 * sum(x.nbytes for x in PARAMS.values())
    assert jax.tree.leaves(state.inner_state.mean) == []


# Compiled well, for the many steps.
WELL = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


@functools.partial(jax.jit, static_argnums=1, compiler_options=WELL)
def drift(ess, steps):
    """The sum of what recovering adds to the mean, in units of the bound, and σ/rms|m|."""
    rng = np.random.default_rng(0)
    start = jnp.array(rng.normal(size=500), jnp.float32)
    phase = jnp.array(rng.uniform(0, 2 * np.pi, 500), jnp.float32)
    inner = ivon(0.01, ess, b2=0.9999999, weight_decay=0.0)

    # Keeps the mean of the last step in full, beside the state that does not.
    def update(grads, state, params, **extra_args):
        updates, new = inner.update(grads, state[0], params, **extra_args)
        return updates, (new, new.mean)

    def init(params):
        state = inner.init(params)
        return state, state.mean

    spy = optax.GradientTransformationExtraArgs(init, update)
    tx = auto_sample(spy, 0, store_mean=False)

    def body(carry, t):
        params, state, error = carry
        grads = 0.3 * jnp.sin(0.01 * t.astype(jnp.float32) + phase)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, error + (posterior_mean(state, params) - state.inner_state[1])), None

    carry = (start, tx.init(start), jnp.zeros(500))
    steps = jnp.arange(steps, dtype=jnp.int32)
    (params, state, error), _ = jax.lax.scan(body, carry, steps)
    q = posterior(state, params)
    rms = jnp.sqrt(jnp.mean(jnp.square(q.mean)))
    bound = 0.2 * np.float32(np.sqrt(steps.size) * EPS) * rms
    return error / bound, jnp.median(q.precision**-0.5) / rms


def test_a_recovered_mean_does_not_drift_in_many_steps():
    all_ess = jnp.array([1e8, 1e5, 1e2])
    errors, ratios = jax.vmap(lambda ess: drift(ess, 20_000))(all_ess)
    for error, ratio in zip(np.asarray(errors), ratios, strict=True):
        assert 5e-5 < ratio < 0.12
        assert np.sqrt(np.mean(error**2)) < 1  # the random walk of float32 updates
        assert abs(np.mean(error)) < 5 / np.sqrt(error.size)  # and a walk without a direction


def test_where_sigma_is_as_large_as_the_mean_the_sample_has_fewer_digits_of_it():
    error, ratio = drift(jnp.array(1.0), 10_000)
    assert 0.8 < ratio < 1.2
    assert 1 < np.sqrt(np.mean(np.square(error))) < 3


def test_what_needs_the_mean_takes_the_parameters_of_the_loop():
    params, state = run(auto_sample(chained(), 0, store_mean=False))
    _, full = run(auto_sample(chained(), 0))
    mean = posterior_mean(full, params)
    chex.assert_trees_all_close(posterior_mean(state, params), mean, **CLOSE)
    key = jax.random.key(1)
    draw = jax.jit(sample_params)
    chex.assert_trees_all_close(draw(key, state, params), draw(key, full, params), **CLOSE)

    def apply(p, x):
        return p["a"] * x

    x = jnp.ones(3)
    chex.assert_trees_all_close(predict_at_mean(apply)(state, x, params=params), mean["a"], **CLOSE)
    estimate = jax.jit(mc_value_and_grad(lambda p: jnp.sum(jnp.cos(p["a"])), 4))
    chex.assert_trees_all_close(
        estimate(key, state, params=params),
        estimate(key, full, params=params),
        rtol=1e-3,
        atol=1e-4,
    )
    numbers, expected = (
        diagnostics(state, SETTINGS, params=params),
        diagnostics(full, SETTINGS),
    )
    np.testing.assert_allclose(numbers["kl"], expected["kl"], rtol=1e-5)
    settings = {"learning_rate": 0.1, **SETTINGS}
    assert learning_status(state, settings, params=params) == learning_status(full, settings)
    chex.assert_trees_all_equal(prior_of(state), prior_of(full))


@pytest.mark.parametrize(
    "use",
    [
        posterior,
        posterior_mean,
        lambda state: sample_params(jax.random.key(0), state),
        lambda state: diagnostics(state, SETTINGS),
        lambda state: posterior(state.inner_state, PARAMS),
    ],
)
def test_without_the_parameters_the_error_says_what_to_pass(use):
    state = auto_sample(ivon(0.1, **SETTINGS), 0, store_mean=False).init(PARAMS)
    with pytest.raises(ValueError, match=r"does not store the mean .* posterior\(state, params\)"):
        use(state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_below_float32_are_refused_with_their_path(dtype):
    params = {**PARAMS, "b": PARAMS["b"].astype(dtype)}
    tx = auto_sample(ivon(0.1, **SETTINGS), 0, store_mean=False)
    with pytest.raises(TypeError, match=rf"{jnp.dtype(dtype)} at \['b'\].*store_mean=True"):
        tx.init(params)


def test_with_mean_restarts_at_new_parameters():
    tx = auto_sample(chained(), 0, store_mean=False)
    _, state = run(tx, 5)
    new = jax.tree.map(lambda x: x + 1, PARAMS)
    state = with_mean(state, new)
    chex.assert_trees_all_equal(posterior_mean(state, new), new)
    _, stepped = run(tx, 1, new, state)
    chex.assert_trees_all_equal(stepped.inner_state[1].hess, state.inner_state[1].hess)


def test_with_mean_refuses_parameters_that_do_not_fit():
    state = auto_sample(chained(), 0, store_mean=False).init(PARAMS)
    with pytest.raises(ValueError, match=r"params has shape \(4,\) at \['a'\]"):
        with_mean(state, {**PARAMS, "a": jnp.ones(4)})


def test_reseed_and_with_ess_keep_the_posterior():
    tx = auto_sample(chained(), 0, store_mean=False)
    params, state = run(tx, 5)
    before = posterior(state, params)
    chex.assert_trees_all_equal(posterior(reseed(state, 7), params), before)
    chex.assert_trees_all_close(posterior(with_ess(state, 25.0), params), before, **CLOSE)


def test_a_donated_run_compiles_once_and_keeps_its_types():
    tx = auto_sample(chained(), 0, store_mean=False)

    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    types = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    for _ in range(3):
        params, state = step(params, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state)) == types


def test_a_lean_state_is_not_continued_with_parameters_that_were_cast():
    tx = auto_sample(ivon(0.1, 10), 0, store_mean=False)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    for use in (lambda: tx.update(narrow, state, narrow), lambda: posterior_mean(state, narrow)):
        with pytest.raises(TypeError, match="these are bfloat16 at"):
            use()
