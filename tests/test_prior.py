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
    mc_value_and_grad,
    posterior,
    posterior_mean,
    prior_of,
    recipes,
    sample_params,
    with_ess,
    with_mean,
)

PARAMS = {"b": jnp.array([0.5]), "w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 2)), jnp.float32)
SETTINGS = {"learning_rate": 0.2, "ess": 20.0, "hess_init": 0.5, "b2": 0.9}


def loss(params, x=X):
    return jnp.mean((x @ params["w"] + params["b"][None] - 1.0) ** 2)


def normal(mean, precision):
    return Posterior(
        jax.tree.map(lambda p: jnp.full_like(p, mean), PARAMS),
        jax.tree.map(lambda p: jnp.full_like(p, precision), PARAMS),
    )


def train(tx, params=PARAMS, steps=8):
    @jax.jit
    def step(key, params, state):
        sample, noise = sample_params(key, state, params)
        updates, state = tx.update(jax.grad(loss)(sample), state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for key in jax.random.split(jax.random.key(0), steps):
        params, state = step(key, params, state)
    return params, state


def test_a_prior_of_mean_zero_is_a_weight_decay_step_by_step():
    """Equal but for the rounding of δ = s₀/λ, which float32 steps carry on."""
    decayed = train(ivon(**SETTINGS, weight_decay=0.1))
    general = train(ivon(**SETTINGS, prior=normal(0.0, 0.1 * 20)))
    chex.assert_trees_all_close(general[0], decayed[0], rtol=2e-5)
    chex.assert_trees_all_close(general[1].hess, decayed[1].hess, rtol=2e-5, atol=1e-5)


def test_a_prior_by_leaf_is_a_mask():
    decayed = train(ivon(**SETTINGS, weight_decay=0.1, mask={"b": False, "w": True}))
    prior = normal(0.0, 0.1 * 20)
    prior.precision["b"] = jnp.zeros(1)
    chex.assert_trees_all_close(train(ivon(**SETTINGS, prior=prior))[0], decayed[0], rtol=2e-5)


def test_the_prior_pulls_to_its_mean_element_by_element():
    """One step from h = h₀ with no gradient: m − α(h₀+δ_min)·δ(m−m₀)/(h₀+δ)."""
    s0 = jnp.array([0.0, 2.0, 10.0, 40.0])
    m0 = jnp.array([5.0, 5.0, 5.0, 5.0])
    tx = ivon(0.3, 10.0, hess_init=0.5, b1=0.0, prior=Posterior(m0, s0))
    state = tx.init(jnp.zeros(4))
    _, new = tx.update(jnp.zeros(4), state, hess=jnp.full(4, 0.5))
    delta = s0 / 10
    np.testing.assert_allclose(new.mean, 0.3 * 0.5 * delta * 5 / (0.5 + delta), rtol=1e-6)
    # The factor of the rate is h₀ plus the smallest δ.
    tx = ivon(0.3, 10.0, hess_init=0.5, b1=0.0, prior=Posterior(m0, s0 + 1))
    _, new = tx.update(jnp.zeros(4), tx.init(jnp.zeros(4)), hess=jnp.full(4, 0.5))
    delta = (s0 + 1) / 10
    np.testing.assert_allclose(new.mean, 0.3 * 0.6 * delta * 5 / (0.5 + delta), rtol=1e-6)


FIXED = jnp.array([[jnp.inf, 1.0], [1.0, jnp.inf]])


@pytest.mark.parametrize("way", ["noise", "hess", "gradsq", "auto", "window"])
def test_elements_of_infinite_precision_stay_at_the_priors_mean(way):
    prior = Posterior(
        {"b": jnp.array([7.0]), "w": jnp.full((2, 2), 9.0)},
        {"b": jnp.full(1, jnp.inf), "w": FIXED},
    )
    tx = ivon(**SETTINGS, prior=prior)
    if way == "noise":
        params, state = train(tx)
    elif way in ("auto", "window"):
        tx = auto_sample(tx, 0, num_samples=2 if way == "window" else 1)
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(6):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
    else:
        f = mc_value_and_grad(loss, 2, estimator="reparam" if way == "hess" else "gradsq")
        params, state = PARAMS, tx.init(PARAMS)
        for key in jax.random.split(jax.random.key(0), 4):
            _, grads, hess = f(key, state, X)
            updates, state = tx.update(grads, state, params, hess=hess)
            params = optax.apply_updates(params, updates)
    fixed = np.isinf(FIXED)
    q = posterior(state)
    for tree in (q.mean, params):
        np.testing.assert_array_equal(tree["b"], [7.0])
        np.testing.assert_array_equal(np.asarray(tree["w"])[fixed], 9.0)
    assert np.all(np.asarray(q.mean["w"])[~fixed] != np.asarray(PARAMS["w"])[~fixed])
    np.testing.assert_array_equal(np.isinf(q.precision["w"]), fixed)
    assert all(np.all(np.isfinite(h)) for h in jax.tree.leaves(posterior_mean(state)))
    sample, noise = sample_params(jax.random.key(1), state)
    np.testing.assert_array_equal(np.asarray(noise["w"])[fixed], 0.0)
    np.testing.assert_array_equal(sample["b"], [7.0])


def test_a_nan_gradient_of_a_fixed_element_is_ignored_and_that_of_a_free_one_is_not():
    prior = Posterior(jnp.zeros(2), jnp.array([jnp.inf, 1.0]))
    tx = ivon(0.1, 10, prior=prior)
    for grads, hess in ((jnp.array([jnp.nan, 1.0]), jnp.array([jnp.nan, 1.0])),):
        _, state = tx.update(grads, tx.init(jnp.ones(2)), hess=hess)
        assert np.all(np.isfinite(state.mean)) and np.all(np.isfinite(state.hess))
    _, state = tx.update(jnp.array([0.0, jnp.nan]), tx.init(jnp.ones(2)), hess=jnp.ones(2))
    assert np.isnan(state.mean[1])


def test_the_state_holds_copies_and_keeps_its_structure():
    prior = normal(1.0, 2.0)
    tx = ivon(**SETTINGS, prior=prior)
    state = tx.init(PARAMS)
    assert state.prior.mean.keys() == state.prior.precision.keys() == PARAMS.keys()
    assert state.weight_decay == ()
    chex.assert_trees_all_close(prior_of(state), prior, rtol=1e-7)
    donated = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state)
    jax.block_until_ready((donated, prior))
    chex.assert_trees_all_close(prior, normal(1.0, 2.0), rtol=1e-7)
    _, new = train(tx, steps=2)
    assert jax.eval_shape(tx.init, PARAMS) == jax.eval_shape(lambda: new)


def test_a_full_tree_is_accepted_of_which_only_the_owned_leaves_are_read():
    params = {**PARAMS, "n": jnp.arange(3)}
    tx = optax.partition(
        {"ivon": ivon(**SETTINGS), "none": optax.set_to_zero()},
        {"b": "none", "w": "ivon", "n": "none"},
    )
    q = posterior(tx.init(params), params)  # b and n are fixed
    again = optax.partition(
        {"ivon": ivon(**SETTINGS, prior=q), "none": optax.set_to_zero()},
        {"b": "none", "w": "ivon", "n": "none"},
    )
    state = again.init(params)
    chex.assert_trees_all_close(prior_of(state).precision["w"], q.precision["w"], rtol=1e-7)
    alone = ivon(**SETTINGS, prior=q).init(params)  # b is owned here, and fixed
    assert np.isinf(alone.prior.precision["b"]) and isinstance(
        alone.prior.mean["n"], optax.MaskedNode
    )


def test_priors_work_inside_transformations_and_for_low_precision():
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    inject = optax.inject_hyperparams(ivon, hyperparam_dtype=jnp.float32)
    tx = optax.chain(optax.clip_by_global_norm(1.0), inject(**SETTINGS, prior=normal(0.0, 3.0)))
    state = tx.init(narrow)
    sample, noise = sample_params(jax.random.key(0), state, narrow)
    grads = jax.tree.map(lambda x: 0.1 * x, sample)
    updates, state = jax.jit(tx.update)(grads, state, narrow, noise=noise)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert posterior(state).precision["w"].dtype == jnp.float32
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_nnx_states_find_the_prior():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))  # the model's own will be updated
    prior = Posterior(params, jax.tree.map(lambda x: jnp.full_like(x, 3.0), params))
    optimizer = nnx.Optimizer(model, auto_sample(ivon(**SETTINGS, prior=prior), 0), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(m(X) ** 2))(model))
    found = prior_of(nnx.state(optimizer))
    np.testing.assert_allclose(found.precision["kernel"], 3.0)
    chex.assert_trees_all_close(found.mean["kernel"], params["kernel"].get_value(), rtol=1e-7)
    q = posterior(nnx.state(with_ess_of(optimizer)))
    chex.assert_trees_all_close(
        q.precision["kernel"], posterior(nnx.state(optimizer)).precision["kernel"], rtol=1e-5
    )


def with_ess_of(optimizer):
    nnx = pytest.importorskip("flax.nnx")
    graph, state = nnx.split(optimizer)
    return nnx.merge(graph, with_ess(state, 5.0))


def test_what_the_prior_fixes_cannot_be_moved():
    prior = Posterior(jnp.array([5.0, 0.0]), jnp.array([jnp.inf, 1.0]))
    tx = ivon(0.1, 10, prior=prior)
    moved = with_mean(tx.init(jnp.zeros(2)), jnp.array([7.0, 7.0]))
    np.testing.assert_array_equal(moved.mean, [5.0, 7.0])
    edited = moved._replace(mean=jnp.array([7.0, 7.0]))
    _, state = tx.update(jnp.zeros(2), edited, hess=jnp.ones(2))
    assert state.mean[0] == 5.0


def test_the_prior_of_a_partitioned_optimizer_can_be_completed():
    tx = optax.partition(
        {"ivon": ivon(0.1, 10, weight_decay=0.5), "none": optax.set_to_zero()},
        {"b": "none", "w": "ivon"},
    )
    state = tx.init(PARAMS)
    full = prior_of(state, PARAMS)
    assert np.isinf(full.precision["b"]) and np.all(full.precision["w"] == 5.0)
    assert np.isfinite(kl_divergence(posterior(state, PARAMS), full))
    general = ivon(0.1, 3.0, prior=normal(0.1, 0.7)).init(PARAMS)
    chex.assert_trees_all_equal(prior_of(general), normal(0.1, 0.7))


def test_with_ess_and_with_mean_compose_with_auto_sample():
    tx = auto_sample(ivon(**SETTINGS, weight_decay=0.3), 0)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    moved = with_ess(with_mean(state, PARAMS), 80.0)
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    chex.assert_trees_all_close(posterior(moved).precision, posterior(state).precision, rtol=1e-5)
    colder = auto_sample(ivon(**{**SETTINGS, "ess": 80.0}, weight_decay=0.3), 0)
    _, after = colder.update(jax.grad(loss)(PARAMS), moved, PARAMS)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(posterior(after)))
    with pytest.raises(ValueError, match="ess must be > 0"):
        with_ess(state, 0.0)
    with pytest.raises(ValueError, match="found no IVONState"):
        with_ess((), 1.0)


@pytest.mark.parametrize(
    "extra",
    [{"weight_decay": 0.1}, {"weight_decay": 0.0}, {"weight_decay": 1e-4}, {"mask": {"b": True}}],
)
def test_weight_decay_or_a_mask_beside_a_prior_is_refused(extra):
    with pytest.raises(ValueError, match="takes the place of weight_decay"):
        ivon(**SETTINGS, prior=normal(0.0, 1.0), **extra)


def test_bad_priors_are_refused():
    with pytest.raises(TypeError, match="prior must be a Posterior"):
        ivon(**SETTINGS, prior=PARAMS)
    with pytest.raises(
        ValueError, match=r"prior.precision must be >= 0 .*\['b'\] the smallest is -1"
    ):
        ivon(**SETTINGS, prior=normal(0.0, -1.0))
    with pytest.raises(ValueError, match=r"prior.precision must be >= 0"):
        ivon(**SETTINGS, prior=normal(0.0, np.nan))
    with pytest.raises(ValueError, match=r"prior.mean .* lacks \['b'\]"):
        ivon(**SETTINGS, prior=Posterior(*({"w": t["w"]} for t in normal(0.0, 1.0)[:2]))).init(
            PARAMS
        )
    with pytest.raises(ValueError, match=r"prior.mean has shape \(2, 2\)"):
        ivon(**SETTINGS, prior=normal(0.0, 1.0)).init({**PARAMS, "w": jnp.ones(2)})
    plain, general = ivon(**SETTINGS), ivon(**SETTINGS, prior=normal(0.0, 1.0))
    for tx, state in ((plain, general.init(PARAMS)), (general, plain.init(PARAMS))):
        with pytest.raises(ValueError, match="has a general prior"):
            tx.update(PARAMS, state, hess=PARAMS)


def test_a_stack_of_states_is_moved_member_by_member():
    tx = ivon(**SETTINGS, prior=normal(1.0, 2.0))
    stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)
    states = jax.vmap(tx.init)(stack)
    moved = with_mean(states, jax.tree.map(lambda x: -x, stack))
    chex.assert_trees_all_equal(moved.mean, jax.tree.map(lambda x: -x, stack))


def test_an_infinite_weight_decay_is_seen_and_fixes_nothing():
    def mean_after_a_step(decay):
        tx = ivon(0.1, 10.0, weight_decay=decay)
        state = tx.init(PARAMS)
        return tx.update(PARAMS, state, PARAMS, noise=PARAMS)[1].mean

    mean = jax.jit(mean_after_a_step)(jnp.float32(jnp.inf))
    assert all(np.all(np.isnan(m)) for m in jax.tree.leaves(mean))


def test_a_recipe_with_a_prior_leaves_its_own_weight_decay_out():
    tx = recipes.GPT2_125M.optimizer(10, ess=100.0, prior=normal(1.0, 2.0))
    assert isinstance(tx, optax.GradientTransformation)
    chex.assert_trees_all_close(prior_of(tx.init(PARAMS)), normal(1.0, 2.0))


def test_an_injected_weight_decay_has_to_be_named_to_be_changed():
    tx = optax.inject_hyperparams(ivon)(learning_rate=0.1, ess=10.0, weight_decay=0.1)
    state = tx.init(PARAMS)
    state.hyperparams["weight_decay"] = jnp.float32(0.5)
    _, state = tx.update(PARAMS, state, PARAMS, noise=PARAMS)
    assert state.inner_state.weight_decay == 0.5
    default = optax.inject_hyperparams(ivon)(learning_rate=0.1, ess=10.0).init(PARAMS)
    assert "weight_decay" not in default.hyperparams


def test_a_prior_whose_mean_is_nan_is_refused():
    nan = Posterior({"w": jnp.array([0.0, jnp.nan])}, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"prior.mean is NaN at \['w'\]"):
        ivon(0.1, 10, prior=nan)
