import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    Posterior,
    auto_sample,
    ivon,
    kl_divergence,
    marginals,
    merge,
    posterior,
    posterior_mean,
    prior_of,
    prune,
    sample_params,
    signal_to_noise,
    with_mean,
)

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
MIXED = {**PARAMS, "n": jnp.arange(2), "other": jnp.ones(2, jnp.bfloat16)}
MASK = {"w": True, "b": True, "n": False, "other": False}


def trained(tx, params):
    """A state after one step, with a different curvature in every element."""
    state = tx.init(params)
    hess = jax.tree.map(lambda p: 0.1 * jnp.abs(p).astype(jnp.float32), params)
    grads = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    return tx.update(grads, state, params, hess=hess)[1]


SETTINGS = {"ess": 40.0, "hess_init": 0.5, "b2": 0.5, "weight_decay": 0.25}


def test_the_precision_is_ess_times_hess_plus_weight_decay():
    state = trained(ivon(0.1, **SETTINGS), PARAMS)
    q = posterior(state)
    assert isinstance(q, Posterior)
    for name in PARAMS:
        np.testing.assert_allclose(q.precision[name], 40.0 * (state.hess[name] + 0.25), rtol=1e-6)
        np.testing.assert_array_equal(q.mean[name], state.mean[name])


def test_the_temperature_divides_the_precision():
    state = trained(ivon(0.1, **SETTINGS), PARAMS)
    warm, cold = posterior(state, temperature=2.0), posterior(state, temperature=0.5)
    chex.assert_trees_all_close(
        jax.tree.map(lambda w: 4.0 * w, warm.precision), cold.precision, rtol=1e-6
    )
    jitted = jax.jit(lambda t: posterior(state, temperature=t))(2.0)
    chex.assert_trees_all_close(jitted, warm, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be > 0"):
        posterior(ivon(0.1, 10).init(PARAMS), temperature=temperature)


def test_masked_weight_decay_enters_leaf_by_leaf():
    tx = ivon(0.1, **SETTINGS, mask={"w": True, "b": False})
    state = tx.init(PARAMS)
    q = posterior(state)
    np.testing.assert_allclose(q.precision["w"], 40.0 * 0.75, rtol=1e-6)
    np.testing.assert_allclose(q.precision["b"], 40.0 * 0.5, rtol=1e-6)
    prior = prior_of(state)
    np.testing.assert_allclose(prior.precision["w"], 40.0 * 0.25, rtol=1e-6)
    np.testing.assert_array_equal(prior.precision["b"], 0.0)
    assert not any(np.any(m) for m in jax.tree.leaves(prior.mean))


def test_posterior_and_mean_are_copies_that_survive_donation():
    tx = ivon(0.1, **SETTINGS)
    state = tx.init(PARAMS)
    q, m = posterior(state), posterior_mean(state)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((q, m, state, PARAMS))]
    assert len(set(pointers)) == len(pointers)
    jax.jit(tx.update, donate_argnums=1)(PARAMS, state, PARAMS, noise=PARAMS)
    assert state.mean["w"].is_deleted()
    np.testing.assert_array_equal(m["w"], PARAMS["w"])
    assert np.all(np.isfinite(q.precision["w"]))


def test_leaves_that_are_not_owned_are_fixed_at_the_parameters():
    state = optax.masked(ivon(0.1, **SETTINGS), MASK).init(MIXED)
    q = posterior(state, MIXED)
    assert jax.tree.structure(q.mean) == jax.tree.structure(MIXED)
    for name in ("n", "other"):
        np.testing.assert_array_equal(q.mean[name], MIXED[name])
        assert q.mean[name].dtype == MIXED[name].dtype
        assert np.all(np.isposinf(np.asarray(q.precision[name], np.float32)))
    sample, noise = sample_params(jax.random.key(0), q)
    for name in ("n", "other"):
        np.testing.assert_array_equal(sample[name], MIXED[name])
        assert not np.any(noise[name])
    chex.assert_trees_all_equal(posterior_mean(state, MIXED), q.mean)
    without = posterior(state)
    assert without.mean["n"] == without.precision["n"] == optax.MaskedNode()


def test_the_mean_of_low_precision_parameters_is_the_float32_master():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = ivon(0.1, **SETTINGS).init(params)
    for tree in (posterior_mean(state), posterior_mean(state, params), posterior(state).mean):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(jnp.float32)}


def wrappers():
    tx = ivon(0.1, **SETTINGS)
    return {
        "chain": optax.chain(optax.clip(1.0), optax.chain(tx)),
        "named chain": optax.named_chain(("clip", optax.clip(1.0)), ("ivon", tx)),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "inject": optax.inject_hyperparams(ivon)(0.1, **SETTINGS),
        "auto_sample": auto_sample(optax.chain(optax.clip(1.0), tx), 0),
        "MultiSteps": optax.MultiSteps(auto_sample(tx, 0), 2).gradient_transformation(),
        "two of them": optax.partition(
            {"x": tx, "y": ivon(0.1, **{**SETTINGS, "ess": 40.0})}, {"w": "x", "b": "y"}
        ),
    }


@pytest.mark.parametrize("name", list(wrappers()))
def test_the_state_is_found_wherever_optax_puts_it(name):
    state = wrappers()[name].init(PARAMS)
    expected = posterior(ivon(0.1, **SETTINGS).init(PARAMS))
    chex.assert_trees_all_equal(posterior(state), expected)
    chex.assert_trees_all_equal(posterior_mean(state), expected.mean)
    assert jax.tree.structure(prior_of(state)) == jax.tree.structure(expected)
    moved = with_mean(state, jax.tree.map(jnp.zeros_like, PARAMS))
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert not any(np.any(x) for x in jax.tree.leaves(posterior_mean(moved)))


@pytest.mark.parametrize(
    "use",
    [
        posterior,
        posterior_mean,
        prior_of,
        lambda s: with_mean(s, PARAMS),
        lambda s: sample_params(jax.random.key(0), s),
    ],
)
@pytest.mark.parametrize("state", [optax.adam(1e-3).init(PARAMS), PARAMS, (), None])
def test_a_state_without_ivon_is_refused(use, state):
    with pytest.raises(ValueError, match=r"found no IVONState .*must contain ivon\(\)"):
        use(state)


def test_states_of_two_models_are_refused_and_not_mixed():
    tx = ivon(0.1, 10)
    states = {"first": tx.init(PARAMS), "second": tx.init(PARAMS)}
    for use in (posterior, prior_of, lambda s: with_mean(s, PARAMS)):
        with pytest.raises(ValueError, match="several IVON states"):
            use(states)


def test_with_mean_moves_the_mean_so_that_an_edit_is_not_undone():
    tx = ivon(0.1, **SETTINGS)
    state = trained(tx, PARAMS)
    edited = jax.tree.map(lambda p: p + 10.0, PARAMS)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    moved = with_mean(state, edited)
    chex.assert_trees_all_equal(moved.hess, state.hess)
    chex.assert_trees_all_equal(moved.momentum, state.momentum)
    updates, _ = tx.update(zero, moved, edited, noise=zero)
    assert all(np.all(np.abs(u) < 1) for u in jax.tree.leaves(updates))
    updates, _ = tx.update(zero, state, edited, noise=zero)
    assert all(np.all(u < -9) for u in jax.tree.leaves(updates))


def test_with_mean_copies_and_keeps_the_dtype_of_the_state():
    state = ivon(0.1, 10).init(PARAMS)
    moved = with_mean(state, jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS))
    assert {x.dtype for x in jax.tree.leaves(moved.mean)} == {jnp.dtype(jnp.float32)}
    moved = with_mean(state, PARAMS)
    assert moved.mean["w"].unsafe_buffer_pointer() != PARAMS["w"].unsafe_buffer_pointer()


@pytest.mark.parametrize("use", [posterior, posterior_mean, with_mean])
def test_parameters_that_do_not_fit_are_refused_with_their_path(use):
    state = ivon(0.1, 10).init(PARAMS)
    with pytest.raises(ValueError, match=r"params has shape \(3,\) at \['w'\]"):
        use(state, {**PARAMS, "w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"params .* lacks \['b'\]"):
        use(state, {"w": PARAMS["w"]})


def test_posteriors_and_samples_run_under_jit_and_vmap():
    tx = ivon(0.1, **SETTINGS)
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    states = jax.vmap(tx.init)(stacked)
    q = jax.jit(jax.vmap(posterior))(states)
    chex.assert_trees_all_equal(q.mean, stacked)
    samples, _ = jax.vmap(sample_params)(jax.random.split(jax.random.key(0), 2), states)
    assert samples["w"].shape == (2, 2)


@pytest.mark.parametrize("precision", [-1.0, np.nan])
def test_a_posterior_made_by_hand_needs_precisions_that_are_not_negative(precision):
    q = Posterior({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, precision])})
    for use in (posterior, lambda q: sample_params(jax.random.key(0), q)):
        with pytest.raises(ValueError, match=r"precision must be >= 0 .*\['w'\]"):
            use(q)


def test_mean_and_precision_of_other_shapes_or_trees_are_refused():
    for q in (
        Posterior(jnp.ones(2), jnp.ones((3, 1))),
        Posterior({"a": jnp.ones(2)}, {"b": jnp.ones(2)}),
    ):
        for use in (posterior, marginals, signal_to_noise, lambda q: prune(q, fraction=0.5)):
            with pytest.raises(ValueError, match="precision"):
                use(q)


def test_the_kl_of_precisions_far_apart():
    q = Posterior(jnp.zeros(1), jnp.full(1, 1e30))
    prior = Posterior(jnp.zeros(1), jnp.full(1, 1e-10))
    np.testing.assert_allclose(kl_divergence(q, prior), 0.5 * (40 * np.log(10) - 1), rtol=1e-6)
    partly_flat = jnp.array([0.0, 2.0])
    slope = jax.grad(
        lambda p: kl_divergence(Posterior(jnp.zeros(2), jnp.ones(2)), Posterior(jnp.zeros(2), p))
    )(partly_flat)
    np.testing.assert_allclose(slope, [0.0, 0.5 * (1 - 1 / 2)], rtol=1e-6)
    flat = Posterior(jnp.zeros(2), jnp.array([0.0, 1.0]))
    assert kl_divergence(flat, Posterior(jnp.zeros(2), jnp.ones(2))) == jnp.inf


def test_a_precision_narrower_than_its_mean_rounds_no_mean():
    mean = jnp.array([1.001, 1000.3])
    q = Posterior(mean, jnp.array([jnp.inf, 1e8], jnp.bfloat16))
    sample, noise = sample_params(jax.random.key(0), q)
    assert noise.dtype == jnp.float32 and sample[0] == mean[0]
    np.testing.assert_allclose(sample[1], mean[1], atol=1e-3)
    chex.assert_trees_all_equal(merge([q, q]).mean, mean)
    other = Posterior(mean.at[1].set(1000.0), q.precision)
    expected = 0.5 * float(q.precision[1]) * 0.3**2
    np.testing.assert_allclose(kl_divergence(other, q), expected, rtol=1e-3)


def test_precisions_of_16_bits_are_merged_without_overflow():
    precision = jnp.array([4e4], jnp.float16)
    a, b = (Posterior(jnp.array([m], jnp.float16), precision) for m in (1.0, 2.0))
    merged = merge([a, b])
    assert merged.mean == 1.5 and merged.precision == 2 * precision.astype(jnp.float32)


def test_integers_are_no_precision_and_an_integer_mean_is_fixed():
    with pytest.raises(TypeError, match=r"precision must be real and floating; got int32"):
        posterior(Posterior(jnp.array([0.5, 3.0]), jnp.array([4, 1])))
    with pytest.raises(TypeError, match=r"mean is int32 and can only be fixed"):
        posterior(Posterior(jnp.array([3, -1]), jnp.array([4.0, 1.0])))


def test_numbers_and_numpys_float64_are_leaves_as_jax_has_them(tmp_path):
    wide = {"a": 1.0, "b": np.array([2.0])}
    q = posterior(Posterior(wide, wide))
    assert {x.dtype for x in jax.tree.leaves(q)} == {jnp.dtype(jnp.float32)}
    assert signal_to_noise(Posterior(wide, wide))["a"] == 1.0
