import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import Eigenbasis, auto_sample, ivon, posterior, posterior_mean, sample_params
from ivon_jax._core.optimizer import PRECISION_FLOOR

PARAMS = {"a": {"w": jnp.arange(6.0).reshape(3, 2) / 6.0}, "b": jnp.ones(2)}


def ones_like(tree, *leading, dtype=None):
    return jax.tree.map(lambda x: jnp.ones((*leading, *x.shape), dtype or x.dtype), tree)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, values in {
            "learning_rate": (-0.1, math.nan, math.inf),
            "ess": (0, -1.0, math.nan, math.inf, jnp.float32(0)),
            "hess_init": (0.0, -1.0, math.nan),
            "b1": (1.0, -0.1, math.nan),
            "b2": (1.0, 2, -0.1, math.nan, np.float32(1.0)),
            "weight_decay": (-1e-4, math.nan, math.inf),
            "clip_radius": (0.0, -1.0, math.nan),
            "precision_floor": (0.0, 1e-7, 1.0, math.nan),
        }.items()
        for value in values
    ],
)
def test_a_number_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be [<>]"):
        ivon(**{"learning_rate": 0.1, "ess": 10, name: value})


@pytest.mark.parametrize("value", ["0.1", None, True, 1j, jnp.array(True), [0.1]])
def test_a_value_that_is_not_a_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match="hess_init must be a real number"):
        ivon(0.1, 10, hess_init=value)


def test_a_vector_is_not_a_number():
    with pytest.raises(ValueError, match=r"ess must be a scalar; got an array of shape \(2,\)"):
        ivon(0.1, jnp.ones(2))


def test_only_the_learning_rate_may_be_a_schedule():
    ivon(optax.constant_schedule(0.1), 10)
    with pytest.raises(TypeError, match=r"ess .*inject_hyperparams"):
        ivon(0.1, optax.constant_schedule(10.0))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_hyperparameter_below_float32_is_refused_traced_or_not(dtype):
    with pytest.raises(TypeError, match=r"b2 is .*hyperparam_dtype=jnp\.float32"):
        ivon(0.1, 10, b2=jnp.array(0.5, dtype))
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        jax.jit(lambda b2: ivon(0.1, 10, b2=b2).init(PARAMS))(jnp.array(0.5, dtype))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.array(1.0)])
def test_a_momentum_dtype_must_be_floating(dtype):
    with pytest.raises(TypeError, match=r"momentum_dtype .*static_args"):
        ivon(0.1, 10, momentum_dtype=dtype)


def test_momentum_is_stored_in_its_dtype_and_statistics_stay_float32():
    tx = ivon(0.1, 10, momentum_dtype=jnp.bfloat16)
    state = tx.init(PARAMS)
    for _ in range(2):
        assert {x.dtype for x in jax.tree.leaves(state.momentum)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves((state.mean, state.hess))} == {
            jnp.dtype(jnp.float32)
        }
        _, state = tx.update(ones_like(PARAMS), state, PARAMS, noise=ones_like(PARAMS))


def test_the_mean_is_a_copy_of_at_least_float32():
    with jax.enable_x64(True):
        params = {
            "f16": jnp.ones(2, jnp.float16),
            "bf16": jnp.ones(2, jnp.bfloat16),
            "f32": jnp.ones(2, jnp.float32),
            "f64": jnp.ones(2, jnp.float64),
        }
        state = ivon(0.1, 10).init(params)
        wide = {"f16": "float32", "bf16": "float32", "f32": "float32", "f64": "float64"}
        for tree in (state.mean, state.hess, state.momentum):
            assert jax.tree.map(lambda x: str(x.dtype), tree) == wide
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
        assert len(set(pointers)) == len(pointers)


def test_leaves_that_are_not_floating_are_not_owned():
    params = {"w": jnp.ones(2), "n": jnp.arange(3), "flag": jnp.array(True), "none": None}
    tx = ivon(0.1, 10)
    state = tx.init(params)
    assert state.mean["n"] == state.mean["flag"] == optax.MaskedNode()
    grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2), allow_int=True)(params)
    sample, noise = sample_params(jax.random.key(0), state, params)
    updates, state = tx.update(grads, state, params, noise=noise)
    new = optax.apply_updates(params, updates)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    np.testing.assert_array_equal(new["n"], params["n"])
    np.testing.assert_array_equal(sample["n"], params["n"])
    np.testing.assert_array_equal(new["flag"], params["flag"])
    np.testing.assert_array_equal(new["w"], state.mean["w"])


def test_complex_parameters_and_other_objects_are_refused_with_their_path():
    with pytest.raises(TypeError, match=r"complex64.*\['a'\]\['z'\]"):
        ivon(0.1, 10).init({"a": {"z": jnp.ones(2, jnp.complex64)}})
    with pytest.raises(TypeError, match=r"params hold str at \['name'\].*filter"):
        ivon(0.1, 10).init({"name": "layer"})


@pytest.mark.parametrize("extra", [{}, {"noise": PARAMS, "hess": PARAMS}])
def test_update_needs_exactly_one_of_noise_and_hess(extra):
    tx = ivon(0.1, 10)
    with pytest.raises(ValueError, match=r"sample_params.*auto_sample"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)


BAD_TREES = {
    "a missing leaf": ({"a": {"w": PARAMS["a"]["w"]}}, r"lacks \['b'\]"),
    "an unknown leaf": ({**PARAMS, "c": jnp.ones(1)}, r"unknown \['c'\]"),
    "another container": ({"a": [PARAMS["a"]["w"]], "b": PARAMS["b"]}, r"\['a'\]\['w'\]"),
    "another shape": ({"a": {"w": jnp.ones((2, 3))}, "b": PARAMS["b"]}, r"\['a'\]\['w'\]"),
    "None": ({"a": {"w": None}, "b": PARAMS["b"]}, r"NoneType at \['a'\]\['w'\]"),
    "a Python number": ({"a": {"w": 1.0}, "b": PARAMS["b"]}, r"\(\) at \['a'\]\['w'\]"),
}


@pytest.mark.parametrize("which", ["grads", "noise", "hess", "params"])
@pytest.mark.parametrize("bad", BAD_TREES)
def test_a_tree_that_does_not_fit_is_refused_with_the_path_of_the_leaf(which, bad):
    tx = ivon(0.1, 10)
    trees = {"grads": PARAMS, "params": PARAMS, "hess" if which == "hess" else "noise": PARAMS}
    trees[which], message = BAD_TREES[bad]
    with pytest.raises(ValueError, match=rf"(?s){which}.*{message}"):
        tx.update(state=tx.init(PARAMS), **trees)


@pytest.mark.parametrize("which", ["grads", "noise", "hess", "params"])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_a_leaf_that_is_not_real_is_refused_with_its_path(which, dtype):
    tx = ivon(0.1, 10)
    trees = {"grads": PARAMS, "params": PARAMS, "hess" if which == "hess" else "noise": PARAMS}
    trees[which] = {**PARAMS, "b": PARAMS["b"].astype(dtype)}
    with pytest.raises(TypeError, match=rf"{which} must be real and floating; .*\['b'\]"):
        tx.update(state=tx.init(PARAMS), **trees)


MONTE_CARLO_MISFITS = {
    "averaged gradients, stacked noise": (ones_like(PARAMS), ones_like(PARAMS, 4)),
    "stacked gradients, one noise": (ones_like(PARAMS, 4), ones_like(PARAMS)),
    "different numbers": (ones_like(PARAMS, 4), ones_like(PARAMS, 3)),
    "no samples": (ones_like(PARAMS, 0), ones_like(PARAMS, 0)),
    "one leaf averaged": (
        {"a": ones_like(PARAMS["a"], 4), "b": jnp.ones(2)},
        ones_like(PARAMS, 4),
    ),
    "two sample axes": (ones_like(PARAMS, 2, 2), ones_like(PARAMS, 2, 2)),
}


@pytest.mark.parametrize("case", MONTE_CARLO_MISFITS)
@pytest.mark.parametrize("kind", ["noise", "hess"])
def test_monte_carlo_axes_that_do_not_agree_are_refused_with_a_path(case, kind):
    grads, other = MONTE_CARLO_MISFITS[case]
    tx = ivon(0.1, 10)
    with pytest.raises(ValueError, match=r"\['(a|b)'\]"):
        tx.update(grads, tx.init(PARAMS), PARAMS, **{kind: other})


@pytest.mark.parametrize("kind", ["noise", "hess"])
def test_a_sample_axis_of_one_is_the_same_as_none(kind):
    tx = ivon(0.1, 10)
    state = tx.init(PARAMS)
    one = tx.update(PARAMS, state, PARAMS, **{kind: PARAMS})
    stack = jax.tree.map(lambda x: x[None], PARAMS)
    chex.assert_trees_all_equal(one, tx.update(stack, state, PARAMS, **{kind: stack}))


def test_stacked_samples_give_the_mean_of_products_not_the_product_of_means():
    tx = ivon(0.1, ess=7.0, hess_init=0.5, b2=0.0, weight_decay=0.25)
    state = tx.init(jnp.zeros(1))
    noise = jnp.array([[1.0], [-1.0], [2.0]])
    grads = jnp.array([[3.0], [-1.0], [0.5]])
    _, new = tx.update(grads, state, noise=noise)
    product = 7.0 * 0.75 * np.mean([3.0, 1.0, 1.0])
    d = product - 0.5
    np.testing.assert_allclose(new.hess, [0.5 + d + 0.5 * d**2 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(new.momentum, 0.1 * np.mean([3.0, -1.0, 0.5]), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("offset", [0.0, 3.0, -100.0])
def test_apply_updates_lands_on_the_new_mean_whatever_params_was(dtype, offset):
    with jax.enable_x64(True):
        tx = ivon(0.1, 10)
        params = jnp.linspace(-2, 2, 101, dtype=dtype)
        state = tx.init(params)
        noise = jnp.full_like(state.mean, 0.1)
        moved = params + jnp.array(offset, dtype)
        updates, state = tx.update(params, state, moved, noise=noise)
        assert updates.dtype == dtype
        landed = np.asarray(optax.apply_updates(moved, updates), np.float64)
        # Both operands of the sum are at most |params| + |mean|: one rounding each.
        scale = np.abs(np.asarray(moved, np.float64)) + np.abs(np.asarray(state.mean, np.float64))
        error = np.abs(landed - np.asarray(state.mean, np.float64))
        assert np.all(error <= scale * float(jnp.finfo(dtype).eps))


def test_without_params_the_update_is_the_move_of_the_mean():
    tx = ivon(0.1, 10)
    state = tx.init(PARAMS)
    updates, new = tx.update(PARAMS, state, noise=PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.subtract, new.mean, state.mean))


def test_an_averaged_gradient_with_a_hess_estimate_is_the_product_formed_outside():
    tx = ivon(0.1, ess=20.0, weight_decay=0.1)
    state = tx.init(PARAMS)
    noise = jax.tree.map(lambda x: 0.1 * jnp.cos(x), PARAMS)
    grads = jax.tree.map(jnp.sin, PARAMS)
    hess = jax.tree.map(lambda h, n, g: 20.0 * (h + 0.1) * n * g, state.hess, noise, grads)
    by_noise = tx.update(grads, state, PARAMS, noise=noise)
    by_hess = tx.update(grads, state, PARAMS, hess=hess)
    chex.assert_trees_all_close(by_noise, by_hess, rtol=1e-6)


def test_the_largest_move_is_bounded_by_rate_times_precision_times_radius():
    tx = ivon(0.5, ess=10, hess_init=0.3, weight_decay=0.1, clip_radius=0.01)
    state = tx.init(PARAMS)
    huge = jax.tree.map(lambda x: 1e6 * (x - 0.4), PARAMS)
    updates, _ = tx.update(huge, state, PARAMS, noise=jax.tree.map(jnp.zeros_like, PARAMS))
    moves = jnp.concatenate([jnp.abs(u).ravel() for u in jax.tree.leaves(updates)])
    # The update is a difference of numbers near one: a rounding of eps each.
    np.testing.assert_allclose(moves, 0.5 * 0.4 * 0.01, atol=2e-7)


def test_the_precision_floor_bounds_the_length_of_steps_and_the_width_of_the_posterior():
    settings = {"hess_init": 0.5, "weight_decay": 0.0, "b2": 0.9, "debias": False}
    hess, grads = jnp.array([0.5, 0.1, 1e-4]), jnp.full(3, 1e-3)
    for floor, gains in ((1e-6, [1, 5, 5000]), (0.1, [1, 5, 10]), (0.25, [1, 4, 4])):
        tx = ivon(0.1, 10, precision_floor=floor, **settings)
        state = tx.init(jnp.zeros(3))._replace(hess=hess)
        updates, state = tx.update(grads, state, hess=state.hess)
        np.testing.assert_allclose(updates / updates[0], gains, rtol=1e-4)
        np.testing.assert_allclose(state.hess, 0.5 / np.array(gains), rtol=1e-5)


def test_a_falling_weight_decay_cannot_make_the_precision_zero():
    h0, old, new = 0.5, 1.0, 1e-3
    tx = ivon(0.1, 10, hess_init=h0, b2=0.0, weight_decay=old)
    state = tx.init(jnp.zeros(3))
    # d = −(h+δ) halves the precision; from δ = 1 h falls to −0.25.
    _, state = tx.update(jnp.zeros(3), state, hess=jnp.full(3, -1.0))
    assert float(state.hess[0] + old) == pytest.approx(0.75)
    assert float(state.hess[0]) < -new
    _, state = ivon(0.1, 10, hess_init=h0, b2=0.9, weight_decay=new).update(
        jnp.zeros(3), state, hess=state.hess
    )
    np.testing.assert_allclose(state.hess + new, PRECISION_FLOOR * (h0 + new), rtol=0.05)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_without_apply_if_finite_a_bad_gradient_shows_in_the_mean(bad):
    tx = ivon(0.1, 10)
    state = tx.init(PARAMS)
    grads = {**PARAMS, "b": PARAMS["b"].at[0].set(bad)}
    _, state = tx.update(grads, state, PARAMS, noise=PARAMS)
    assert not np.isfinite(state.mean["b"][0])
    assert np.all(np.isfinite(state.mean["a"]["w"])) and np.isfinite(state.mean["b"][1])


MASKS = {
    "tree": {"a": {"w": True}, "b": False},
    "prefix": {"a": True, "b": False},
    "function": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    "function of a prefix": lambda params: {"a": True, "b": False},
}


@pytest.mark.parametrize("mask", MASKS)
def test_masked_leaves_have_no_weight_decay(mask):
    tx = ivon(0.1, 10, weight_decay=0.3, mask=MASKS[mask])
    state = tx.init(PARAMS)
    np.testing.assert_array_equal(state.weight_decay, np.float32([0.3, 0.0]))
    assert state.weight_decay.dtype == jnp.float32
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    _, new = jax.jit(tx.update)(zero, state, PARAMS, hess=state.hess)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    np.testing.assert_array_equal(new.mean["b"], state.mean["b"])
    decayed = state.mean["a"]["w"] * (1 - 0.1 * 0.3)  # α(h₀+δ) · δm/(h₀+δ)
    np.testing.assert_allclose(new.mean["a"]["w"], decayed, rtol=1e-6)


def test_a_mask_that_spells_out_a_subtree_works_inside_optax_masked():
    inner = ivon(0.1, 10, weight_decay=0.3, mask={"a": {"w": True}, "b": True})
    state = optax.masked(inner, {"a": False, "b": True}).init(PARAMS)
    np.testing.assert_array_equal(state.inner_state.weight_decay, np.float32([0.3]))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (True, ValueError, "static_args"),
        (np.array(False), ValueError, "static_args"),
        ({"a": 1, "b": 0}, TypeError, "Python bools"),
        ({"a": True}, ValueError, "mask"),
        ({"a": {"w": {"x": True}}, "b": True}, ValueError, "mask"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        ivon(0.1, 10, mask=mask).init(PARAMS)


def test_hyperparameters_in_the_state_are_strong_float32_scalars():
    for ess in (10, 10.0, np.float64(10), jnp.array(10)):
        state = ivon(0.1, ess).init(PARAMS)
        for x in (state.ess, state.weight_decay):
            assert x.dtype == jnp.float32 and x.shape == () and not x.weak_type


def test_a_weight_decay_leaves_the_prior_of_the_state_empty():
    assert ivon(0.1, 10).init(PARAMS).prior == ()


def test_other_extra_arguments_are_ignored():
    tx = ivon(0.1, 10)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, noise=PARAMS, value=1.0, loss_fn=print)


def test_trees_without_an_owned_leaf_are_allowed():
    for params in ({}, {"n": jnp.arange(2)}, [None]):
        tx = ivon(0.1, 10)
        state = tx.init(params)
        updates, state = tx.update(params, state, params, noise=state.mean)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert int(state.count) == 1


def test_the_explicit_loop_trains_to_the_mean():
    target = jnp.array([1.0, -2.0])
    tx = optax.chain(optax.clip_by_global_norm(10.0), ivon(0.3, ess=1000, weight_decay=0.0))
    params = jnp.zeros(2)

    @jax.jit
    def step(carry, key):
        params, state = carry
        sample, noise = sample_params(key, state)
        grads = jax.grad(lambda p: 0.5 * jnp.sum((p - target) ** 2))(sample)
        updates, state = tx.update(grads, state, params, noise=noise)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 200)
    (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
    np.testing.assert_array_equal(params, posterior_mean(state))
    # The stationary spread of the mean is below σ = 1/√1000 for a rate below one.
    np.testing.assert_allclose(params, target, atol=4 / math.sqrt(1000))


@pytest.mark.parametrize("clip_radius", [math.inf, 0.1])
@pytest.mark.parametrize("grad", [jnp.inf, 1e25])
def test_statistics_that_overflow_show_in_the_mean_even_when_clipped(grad, clip_radius):
    tx = ivon(0.1, 10, b2=0.5, clip_radius=clip_radius)
    state = tx.init(jnp.ones(2))
    _, state = tx.update(jnp.array([grad, 1.0]), state, noise=jnp.ones(2))
    assert np.isnan(state.mean[0]) and np.isfinite(state.mean[1])


@pytest.mark.parametrize("ess", [1e-50, 1e40])
def test_a_number_that_becomes_zero_or_infinity_in_float32_is_refused(ess):
    with pytest.raises(ValueError, match=r"ess must be > 0 and finite in float32"):
        ivon(0.1, ess)


def test_a_stack_of_states_is_refused_outside_vmap():
    tx = ivon(0.1, 10)
    states = jax.vmap(tx.init)(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"stack of states.*vmap"):
        sample_params(jax.random.key(0), states)
    with pytest.raises(ValueError, match=r"stack of states.*vmap"):
        tx.update(jnp.ones((2, 3)), states, noise=jnp.ones((2, 3)))


def test_the_state_of_another_transformation_is_refused():
    tx = ivon(0.1, 10)
    with pytest.raises(TypeError, match=r"expected the state of ivon\(\), got tuple"):
        tx.update(PARAMS, (tx.init(PARAMS),), noise=PARAMS)


def test_a_schedule_must_return_a_scalar():
    tx = ivon(lambda count: jnp.ones(3), 10)
    with pytest.raises(ValueError, match=r"learning rate .* scalar; .*\(3,\)"):
        tx.update(PARAMS, tx.init(PARAMS), noise=PARAMS)


def test_a_callable_mask_is_given_the_parameters_with_their_dtypes():
    params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2), "n": jnp.arange(2)}
    tx = ivon(0.1, 10, mask=lambda p: jax.tree.map(lambda x: x.dtype == jnp.bfloat16, p))
    state = tx.init(params)
    expected = np.float32([0.0, 1e-4])  # b, w; n is not owned
    np.testing.assert_array_equal(state.weight_decay, expected)
    _, state = tx.update(params, state, params, noise=state.mean)
    np.testing.assert_array_equal(state.weight_decay, expected)


def test_a_prefix_mask_inside_a_prefix_of_optax_masked():
    params = {"e": {"k": jnp.ones(2), "b": jnp.ones(2)}, "d": {"k": jnp.ones(2), "b": jnp.ones(2)}}
    inner = ivon(0.1, 10, mask={"e": {"k": True, "b": False}, "d": True})
    state = optax.masked(inner, {"e": False, "d": True}).init(params)
    np.testing.assert_array_equal(state.inner_state.weight_decay, np.float32([1e-4, 1e-4]))


OUT_OF_RANGE = {
    "ess": (0.0, -1.0, np.inf),
    "weight_decay": (-0.1,),
    "hess_init": (0.0, -1.0),
    "b1": (1.0, -0.1),
    "b2": (1.0, 1.5, -0.1),
    "learning_rate": (-0.1, np.inf),
    "clip_radius": (0.0, -1.0),
    "precision_floor": (1.0, 1.5, -0.1),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
)
def test_an_injected_number_that_leaves_its_range_shows_as_nan(name, value):
    numbers = {"learning_rate": 0.1, "ess": 10.0, "clip_radius": 1.0, "weight_decay": 0.1}
    numbers = {"hess_init": 0.5, "b1": 0.9, "b2": 0.9, "precision_floor": 0.1, **numbers}
    tx = optax.inject_hyperparams(ivon)(**numbers)
    state = tx.init(PARAMS)
    noise = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), PARAMS)
    for injected, broken in ((numbers[name], False), (value, True)):
        hyperparams = {**state.hyperparams, name: jnp.float32(injected)}
        changed = state._replace(hyperparams=hyperparams)
        _, new = jax.jit(tx.update)(PARAMS, changed, PARAMS, noise=noise)
        # The mean, or at the latest the posterior of the next step.
        seen = jax.tree.leaves(posterior(new))
        assert any(bool(jnp.any(jnp.isnan(x))) for x in seen) == broken


def test_an_infinite_clip_radius_may_be_injected():
    tx = optax.inject_hyperparams(ivon)(0.1, ess=10.0, clip_radius=np.inf)
    _, new = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, hess=PARAMS)
    assert np.all(np.isfinite(posterior(new).mean["b"]))


def test_a_leaf_at_the_root_has_a_name():
    tx = ivon(0.1, 10)
    state = tx.init(jnp.ones(2))
    with pytest.raises(TypeError, match="got int32 at the root"):
        tx.update(jnp.ones(2, jnp.int32), state, hess=jnp.ones(2))
    with pytest.raises(TypeError, match=r"complex64.*at the root"):
        tx.init(jnp.ones(2, jnp.complex64))


def test_a_leaf_without_a_gradient_is_refused_with_both_remedies():
    state = ivon(0.1, 10).init(PARAMS)
    with pytest.raises(ValueError, match=r"trained part only.*optax.partition"):
        ivon(0.1, 10).update({**PARAMS, "b": None}, state, hess=PARAMS)


def test_a_schedule_that_goes_below_zero_is_refused_or_seen():
    tx = ivon(lambda step: -0.1, ess=10)
    w = jnp.ones(2)
    state = tx.init(w)
    with pytest.raises(ValueError, match=r"returned -0\.1: it must be >= 0"):
        tx.update(w, state, w, noise=w)
    _, state = jax.jit(tx.update)(w, state, w, noise=w)
    assert jnp.isnan(state.mean).all()


COMPILATIONS: list[str] = []


def _record_compilation(name, *_, **__):
    if "backend_compile" in name:
        COMPILATIONS.append(name)


jax.monitoring.register_event_duration_secs_listener(_record_compilation)


@pytest.mark.parametrize("basis", [None, Eigenbasis()], ids=["diagonal", "eigenbasis"])
def test_steps_without_jit_compile_nothing_after_the_first_ones(basis):
    tx = auto_sample(ivon(0.1, ess=10, basis=basis), 0)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = tx.init(params)
    for _ in range(3):
        COMPILATIONS.clear()
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert not COMPILATIONS


@pytest.mark.parametrize(
    "schedule", [optax.linear_schedule(300.0, 0.0, 1000), lambda t: 1 - t // 999]
)
def test_a_schedule_that_ends_a_rounding_below_zero_leaves_the_mean(schedule):
    tx = ivon(schedule, 1e10, hess_init=1e-3, clip_radius=1e-3)
    w = jnp.ones(3)
    state = tx.init(w)._replace(count=jnp.int32(1000))
    with jax.numpy_dtype_promotion("standard"):  # for optax's schedule
        _, state = jax.jit(tx.update)(w, state, w, noise=w)
    np.testing.assert_array_equal(state.mean, w)
