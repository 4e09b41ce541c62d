import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    AutoSampleState,
    auto_sample,
    ivon,
    posterior,
    posterior_mean,
    reseed,
    sample_params,
    with_mean,
)

PARAMS = {"a": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(0.25)}
TARGET = {"a": jnp.array([1.0, 1.0, 1.0]), "b": jnp.array(-1.0)}
SETTINGS = {"ess": 50.0, "hess_init": 0.5, "b2": 0.9, "weight_decay": 0.1}
# m, h and θ are of order one, so that θ − m carries a rounding error of 1e-7 relative to σ ~ 0.2.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def gradient(params):
    return jax.tree.map(lambda p, t: 3.0 * (p - t.astype(p.dtype)), params, TARGET)


def draw_of(state):
    """The sample and noise that `auto_sample` has last drawn, through the public API."""
    return sample_params(state.draw_key, state)


def run(tx, steps, params=PARAMS, state=None):
    state = tx.init(params) if state is None else state
    history = []
    for _ in range(steps):
        updates, state = jax.jit(tx.update)(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, state))
    return history


def test_the_parameters_of_the_loop_are_always_a_posterior_sample():
    for params, state in run(auto_sample(ivon(0.1, **SETTINGS), 0), 5):
        sample, noise = draw_of(state)
        chex.assert_trees_all_close(params, sample, **CLOSE)
        chex.assert_trees_all_close(
            sample, jax.tree.map(jnp.add, posterior_mean(state), noise), **CLOSE
        )


def test_it_takes_the_steps_of_the_explicit_loop_after_a_first_one_at_the_mean():
    tx = ivon(0.1, **SETTINGS)
    state = tx.init(PARAMS)
    sample, noise = PARAMS, None
    for _, auto_state in run(auto_sample(tx, 7), 6):
        if noise is None:  # ĥ = h moves nothing
            _, state = tx.update(gradient(sample), state, hess=state.hess)
        else:
            _, state = tx.update(gradient(sample), state, noise=noise)
        chex.assert_trees_all_close(auto_state.inner_state._replace(window=()), state, **CLOSE)
        sample, noise = draw_of(auto_state)


def test_the_first_gradient_moves_the_mean_but_not_the_hessian():
    ((_, state),) = run(auto_sample(ivon(0.1, **SETTINGS), 0), 1)
    inner = state.inner_state
    chex.assert_trees_all_close(
        inner.hess, jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS), rtol=0
    )
    assert all(np.all(m != p) for m, p in zip(inner.mean.values(), PARAMS.values(), strict=True))


@pytest.mark.parametrize("clip", [False, True])
def test_num_samples_average_gradients_and_products_and_move_the_mean_every_kth_call(clip):
    k = 3
    tx = ivon(0.1, **SETTINGS)
    clipping = optax.clip_by_global_norm(0.5) if clip else optax.identity()
    reference = tx.init(PARAMS)
    params, noise, window = PARAMS, None, []
    for call, (new_params, state) in enumerate(
        run(auto_sample(optax.chain(clipping, tx), 3, num_samples=k), 9)
    ):
        grads, _ = clipping.update(gradient(params), optax.EmptyState())
        window.append((grads, noise))
        if (call + 1) % k == 0:
            drawn = [jax.tree.map(jnp.multiply, g, n) for g, n in window if n is not None]
            products = jax.tree.map(lambda *x: sum(x) / len(x), *drawn)
            hess = jax.tree.map(lambda h, x: 50.0 * (h + 0.1) * x, reference.hess, products)
            mean_grads = jax.tree.map(lambda *g: sum(g) / k, *[g for g, _ in window])
            _, reference = tx.update(mean_grads, reference, hess=hess)
            window = []
        inner = state.inner_state[1]._replace(window=())
        chex.assert_trees_all_close(inner, reference, **CLOSE)
        params, noise = new_params, draw_of(state)[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_below_float32_the_exact_noise_is_regenerated_and_not_the_rounded_one(dtype):
    # σ = 1/√(5e4·0.6) ~ 0.006 is near the spacing of bfloat16 at 1: rounding destroys θ − m.
    tx = ivon(0.1, **{**SETTINGS, "ess": 5e4})
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    grads = jax.tree.map(lambda p: 50.0 * jnp.ones_like(p), params)
    auto = auto_sample(tx, 0)
    state = auto.init(params)
    updates, state = auto.update(grads, state, params)
    sample = optax.apply_updates(params, updates)
    assert {x.dtype for x in jax.tree.leaves(sample)} == {jnp.dtype(dtype)}
    _, noise = draw_of(state)
    _, expected = tx.update(grads, state.inner_state, sample, noise=noise)
    rounded = jax.tree.map(lambda s, m: s.astype(jnp.float32) - m, sample, state.inner_state.mean)
    _, wrong = tx.update(grads, state.inner_state, sample, noise=rounded)
    _, state = auto.update(grads, state, sample)
    chex.assert_trees_all_close(state.inner_state.hess, expected.hess, rtol=1e-6)
    assert not np.allclose(state.inner_state.hess["a"], wrong.hess["a"], rtol=1e-3)


def test_the_next_sample_is_within_an_ulp_of_the_draw_in_bfloat16():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = auto_sample(ivon(0.1, **SETTINGS), 0)
    updates, state = tx.update(gradient_like(params), tx.init(params), params)
    landed = optax.apply_updates(params, updates)
    sample, _ = sample_params(state.draw_key, state)
    # One rounding of the update and one of the sum, relative to numbers up to 3.
    chex.assert_trees_all_close(to_f32(landed), sample, atol=2 * 3 * 2**-8)


def gradient_like(params):
    return jax.tree.map(jnp.ones_like, params)


def to_f32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def test_a_key_a_raw_key_and_a_seed_give_the_same_stream():
    keys = (5, jax.random.key(5), jax.random.PRNGKey(5))
    ends = [run(auto_sample(ivon(0.1, **SETTINGS), key), 3)[-1] for key in keys]
    for other in ends[1:]:
        chex.assert_trees_all_equal(ends[0], other)


def test_two_inits_share_no_buffer_and_can_both_be_donated():
    key = jax.random.PRNGKey(0)
    tx = auto_sample(ivon(0.1, **SETTINGS), key, num_samples=2)
    step = jax.jit(tx.update, donate_argnums=1)
    first, second = tx.init(PARAMS), tx.init(PARAMS)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((first, second, key, PARAMS))]
    assert len(set(pointers)) == len(pointers)
    one = step(gradient(PARAMS), first, PARAMS)
    assert first.key.is_deleted()
    two = step(gradient(PARAMS), second, PARAMS)
    chex.assert_trees_all_equal(one, two)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_reseed_changes_the_draws_to_come_but_not_the_noise_of_the_current_sample(dtype):
    start = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    tx = auto_sample(ivon(0.1, **SETTINGS), 0)
    updates, state = tx.update(gradient_like(start), tx.init(start), start)
    params = optax.apply_updates(start, updates)
    plain = tx.update(gradient_like(params), state, params)
    other = tx.update(gradient_like(params), reseed(state, 1), params)
    chex.assert_trees_all_equal(plain[1].inner_state, other[1].inner_state)
    assert not np.array_equal(plain[0]["a"], other[0]["a"])
    again = tx.update(gradient_like(params), reseed(state, jax.random.key(1)), params)
    chex.assert_trees_all_equal(other, again)


def test_reseed_gives_ensemble_members_their_own_streams():
    tx = auto_sample(ivon(0.1, **SETTINGS), 0)
    states = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(4))
    states = jax.vmap(reseed)(states, jax.random.split(jax.random.key(1), 4))
    params = jax.tree.map(lambda p: jnp.stack([p] * 4), PARAMS)
    updates, states = jax.jit(jax.vmap(tx.update))(jax.vmap(gradient)(params), states, params)
    means = jax.vmap(posterior_mean)(states)
    assert np.unique(np.asarray(means["b"])).size == 1
    assert np.unique(np.asarray(updates["b"])).size == 4


def test_with_mean_restarts_at_the_mean_and_drops_an_unfinished_window():
    tx = auto_sample(ivon(0.1, **SETTINGS), 0, num_samples=3)
    (*_, (_, state)) = run(tx, 5)
    assert int(state.calls) == 2
    moved = with_mean(state, TARGET)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert bool(moved.at_mean) and int(moved.calls) == 0
    assert all(not np.any(x) for x in jax.tree.leaves(moved.inner_state.window))
    chex.assert_trees_all_equal(moved.inner_state.mean, TARGET)
    chex.assert_trees_all_equal(moved.inner_state.hess, state.inner_state.hess)

    single = auto_sample(ivon(0.1, **SETTINGS), 0)
    (*_, (_, state)) = run(single, 3)
    ((_, after),) = run(single, 1, TARGET, with_mean(state, TARGET))
    chex.assert_trees_all_equal(after.inner_state.hess, state.inner_state.hess)


def test_a_state_of_an_unfinished_window_keeps_mean_hess_momentum_and_count():
    tx = auto_sample(ivon(0.1, **SETTINGS), 0, num_samples=4)
    states = [state for _, state in run(tx, 4)]
    for state in states[:3]:
        kept = state.inner_state._replace(window=())
        chex.assert_trees_all_equal(kept, tx.init(PARAMS).inner_state._replace(window=()))
    assert int(states[3].inner_state.count) == 1 and int(states[3].calls) == 0


def test_every_call_draws_anew_inside_a_window():
    tx = auto_sample(ivon(0.1, **SETTINGS), 0, num_samples=4)
    seen = [float(params["b"]) for params, _ in run(tx, 8)]
    assert len(set(seen)) == 8


def test_leaves_of_another_optimizer_get_its_update():
    labels = {"a": "ivon", "b": "sgd"}
    tx = auto_sample(
        optax.partition({"ivon": ivon(0.1, **SETTINGS), "sgd": optax.sgd(0.5)}, labels), 0
    )
    grads = gradient(PARAMS)
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["b"], -0.5 * grads["b"])
    sample, _ = sample_params(state.draw_key, state)
    np.testing.assert_allclose(PARAMS["a"] + updates["a"], sample["a"], **CLOSE)


def test_training_finds_the_mean_and_the_curvature_of_a_quadratic():
    tx = auto_sample(ivon(0.2, ess=1000.0, hess_init=1.0, b2=0.99, weight_decay=0.0), 0)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), (
            posterior_mean(state),
            state.inner_state.hess,
        )

    (_, state), (means, hessians) = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=4000)
    assert isinstance(state, AutoSampleState)
    # Averages of the second half: spread σ = 0.02 and, for h, 3·√2/√(2000·4 coordinates).
    tail = jax.tree.map(lambda x: x[2000:].mean(axis=0), (means, hessians))
    chex.assert_trees_all_close(tail[0], TARGET, atol=0.01)
    assert abs(float(jnp.mean(tail[1]["a"])) - 3.0) < 0.15


@pytest.mark.parametrize("key", [None, 1.0, "seed", True, jnp.ones(2)])
def test_a_key_of_the_wrong_kind_is_refused(key):
    with pytest.raises(TypeError, match="key must be a PRNG key"):
        auto_sample(ivon(0.1, 10), key)


def test_a_batch_of_keys_is_refused():
    with pytest.raises(ValueError, match=r"single key.*\(3,\)"):
        auto_sample(ivon(0.1, 10), jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize("num_samples", [0, -1, 1.5, True, None])
def test_num_samples_must_be_a_positive_integer(num_samples):
    with pytest.raises(ValueError, match="num_samples must be an integer >= 1"):
        auto_sample(ivon(0.1, 10), 0, num_samples=num_samples)


def test_a_transformation_without_ivon_is_refused_at_init():
    with pytest.raises(ValueError, match=r"must contain ivon\(\)"):
        auto_sample(optax.adam(1e-3), 0).init(PARAMS)


def test_noise_and_hess_cannot_be_passed_to_auto_sample():
    tx = auto_sample(ivon(0.1, 10), 0)
    for extra in ({"noise": PARAMS}, {"hess": PARAMS}):
        with pytest.raises(ValueError, match="auto_sample draws its own noise"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)


def test_reseed_needs_a_state_of_auto_sample():
    with pytest.raises(ValueError, match="found no AutoSampleState"):
        reseed(ivon(0.1, 10).init(PARAMS), 0)


def test_reseed_of_a_stack_of_states_needs_vmap():
    tx = auto_sample(ivon(0.1, 10), 0)
    states = jax.vmap(tx.init)(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"stack of states.*jax\.vmap\(reseed\)"):
        reseed(states, 1)


def test_numpy_integers_are_seeds_and_counts():
    tx = auto_sample(ivon(0.1, 10), np.int64(3), num_samples=np.int64(2))
    same = auto_sample(ivon(0.1, 10), 3, num_samples=2)
    chex.assert_trees_all_equal(tx.init(PARAMS), same.init(PARAMS))


# --- antithetic samples ----------------------------------------------------------------------


def standardized(params, state):
    """(θ − m)√precision: the draw behind the loop's parameters."""
    mean, precision, _ = posterior(state)
    return jax.tree.map(
        lambda p, m, s: (p.astype(m.dtype) - m) * jnp.sqrt(s), params, mean, precision
    )


@pytest.mark.parametrize(
    ("num_samples", "mirrors"),
    [
        # The first gradient is at the mean; -1: the draw is the one before with its sign changed.
        (1, [0, -1, 0, -1, 0, -1, 0, -1]),
        (2, [0, 0, -1, 0, -1, 0, -1, 0]),
        (3, [0, -1, 0, -1, 0, -1, 0, -1]),
        (4, [0, -1, 0, 0, -1, 0, -1, 0]),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_second_sample_mirrors_the_one_before(num_samples, mirrors, dtype):
    tx = auto_sample(ivon(0.1, **SETTINGS), 3, num_samples=num_samples, antithetic=True)
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    history = run(tx, len(mirrors), params)
    draws = [np.asarray(standardized(*x)["a"], np.float32) for x in history]
    # Each sample is rounded by up to a spacing, 2⁻⁶ between 2 and 4; σ is some seven of these.
    tolerance = 0.4 if dtype == jnp.bfloat16 else 1e-4
    for before, now, mirror in zip(draws, draws[1:], mirrors[1:], strict=False):
        assert (np.abs(before + now).max() < tolerance) == (mirror == -1)
        assert np.abs(before - now).max() > tolerance


def test_in_an_even_window_the_noise_of_a_linear_gradient_cancels():
    settings = {**SETTINGS, "b1": 0.0}  # the momentum is the window's average gradient
    history = run(auto_sample(ivon(0.1, **settings), 0, num_samples=2, antithetic=True), 4)
    mean = posterior_mean(history[1][1])
    averaged = history[3][1].inner_state.momentum
    chex.assert_trees_all_close(averaged, gradient(mean), rtol=1e-5, atol=1e-6)


def test_another_state_is_refused_by_name():
    state = ivon(0.1, 10).init(PARAMS)
    with pytest.raises(TypeError, match="expected the state of auto_sample; got IVONState"):
        auto_sample(ivon(0.1, 10), 0).update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("number", [1, 3])
def test_a_window_closes_whatever_number_of_samples_the_continued_run_uses(number):
    begun = auto_sample(ivon(0.1, **SETTINGS), 0, num_samples=4)
    params, state = run(begun, 7)[-1]
    assert state.inner_state.count == 1 and state.calls == 3
    _, state = run(auto_sample(ivon(0.1, **SETTINGS), 0, num_samples=number), 6, params, state)[-1]
    # The first call closes the window that was begun.
    assert state.inner_state.count == 1 + 1 + 5 // number and state.calls == 5 % number


CAST = "the state was cast. Cast the parameters only"


def test_a_state_that_was_cast_is_refused_with_the_reason():
    tx = auto_sample(ivon(0.1, **SETTINGS), 0)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tx.init(PARAMS))
    with pytest.raises(TypeError, match=f"the key .* is bfloat16, not uint32: {CAST}"):
        tx.update(PARAMS, narrow, PARAMS)
    inner = ivon(0.1, **SETTINGS).init(PARAMS)
    inner = inner._replace(hess=jax.tree.map(lambda x: x.astype(jnp.bfloat16), inner.hess))
    for use in (posterior, lambda state: ivon(0.1, 10).update(PARAMS, state, noise=PARAMS)):
        with pytest.raises(TypeError, match=f"hess .* is bfloat16, .*: {CAST}"):
            use(inner)


@pytest.mark.parametrize(
    ("begun", "continued", "said"),
    [
        ({}, {"antithetic": True}, "made by auto_sample with antithetic=False"),
        ({"antithetic": True}, {}, "made by auto_sample with antithetic=True"),
        ({}, {"store_mean": False}, "made by auto_sample with store_mean=True"),
        ({"store_mean": False}, {}, "made by auto_sample with store_mean=False"),
        ({}, {"num_samples": 4}, "no room for the sums over num_samples=4"),
    ],
)
def test_a_state_made_with_other_options_is_refused_with_the_remedy(begun, continued, said):
    state = auto_sample(ivon(0.1, **SETTINGS), 0, **begun).init(PARAMS)
    with pytest.raises(ValueError, match=said) as error:
        auto_sample(ivon(0.1, **SETTINGS), 0, **continued).update(PARAMS, state, PARAMS)
    remedy = "params = posterior_mean(state, params); state = tx.init(params)"
    assert remedy in str(error.value)
    tx = auto_sample(ivon(0.1, **SETTINGS), 0, **continued)
    tx.update(PARAMS, tx.init(posterior_mean(state, PARAMS)), PARAMS)


@pytest.mark.parametrize("options", [{}, {"store_mean": False}, {"num_samples": 2}])
def test_parameters_of_which_none_is_owned_are_let_pass(options):
    params = {"i": jnp.arange(3)}
    tx = auto_sample(ivon(0.1, **SETTINGS), 0, **options)
    grads = {"i": np.zeros(3, jax.dtypes.float0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["i"].shape == (3,)


@pytest.mark.parametrize("options", [{}, {"num_samples": 3, "antithetic": True}])
def test_abstract_parameters_give_the_abstract_state(options):
    tx = optax.chain(optax.clip(1.0), auto_sample(ivon(0.1, **SETTINGS), 0, **options))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    found, expected = tx.init(abstract), jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.leaves(found) == jax.tree.leaves(expected)
    assert ivon(0.1, 10).init(abstract).mean == jax.eval_shape(ivon(0.1, 10).init, PARAMS).mean


def test_keys_that_the_loop_splits_from_the_same_key_give_other_draws():
    key = jax.random.key(0)
    params, state = run(auto_sample(ivon(0.1, **SETTINGS), key), 1)[0]
    for used in [key, *jax.random.split(key, 2), *jax.random.split(key, 3)]:
        sample, _ = sample_params(used, state)
        assert np.abs(sample["a"] - params["a"]).max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"num_samples": 2}, {"antithetic": True}])
def test_a_loop_that_hands_over_no_params_takes_the_same_steps(options):
    tx = auto_sample(optax.chain(optax.clip(1.0), ivon(0.1, **SETTINGS)), 0, **options)
    expected, state = run(tx, 8)[-1]
    params, alone = PARAMS, tx.init(PARAMS)
    for _ in range(8):
        updates, alone = jax.jit(tx.update)(gradient(params), alone)
        params = optax.apply_updates(params, updates)
    # A rounding of the parameters per step.
    chex.assert_trees_all_close(params, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(posterior_mean(alone), posterior_mean(state), rtol=1e-5, atol=1e-5)


def test_params_are_asked_for_where_the_state_does_not_know_them():
    lean = auto_sample(ivon(0.1, 10), 0, store_mean=False)
    with pytest.raises(ValueError, match="recovers the mean from the sample: call"):
        lean.update(PARAMS, lean.init(PARAMS))
    tx = auto_sample(ivon(0.1, 10), 0)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    with pytest.raises(ValueError, match="in float32 or float64, and no others"):
        tx.update(narrow, tx.init(narrow))
    part = auto_sample(optax.masked(ivon(0.1, 10), {"a": True, "b": False}), 0)
    with pytest.raises(ValueError, match="knows leaves that ivon"):
        part.update(PARAMS, part.init(PARAMS))
