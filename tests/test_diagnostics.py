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
    kl_divergence,
    learning_status,
    posterior,
    prior_of,
    sample_params,
)
from ivon_jax._uses import monitoring

SETTINGS = {"learning_rate": 0.2, "ess": 50.0, "hess_init": 0.5, "weight_decay": 0.2, "b2": 0.9}
PARAMS = {"b": jnp.array([0.5]), "w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}


def trained(settings, steps=3, params=PARAMS, scale=1.0):
    tx = ivon(**settings)
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: scale * jnp.cos(p + i), params)
        hess = jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 1)), params)
        _, state = tx.update(grads, state, hess=hess)
    return state


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)


def quantile(values, p):
    return np.sort(values)[(len(values) - 1) * p // 100]


def test_every_number_is_what_it_says():
    state = trained(SETTINGS)
    numbers = jax.jit(lambda s: diagnostics(s, SETTINGS, num_examples=25, loss=2.0))(state)
    h, q = flat(state.hess), posterior(state)
    sigma, ratio = flat(q.precision) ** -0.5, np.abs(flat(q.mean)) * flat(q.precision) ** 0.5
    for p in (1, 25, 50, 75, 99):
        np.testing.assert_allclose(numbers[f"hess/p{p}"], quantile(h, p), rtol=1e-6)
        # Ranks are counted from the top of the precision: (n−1) − ⌊(n−1)p/100⌋.
        np.testing.assert_allclose(numbers[f"sigma/p{p}"], quantile(sigma, p), rtol=1e-6)
        np.testing.assert_allclose(numbers[f"signal_to_noise/p{p}"], quantile(ratio, p), rtol=1e-6)
    assert numbers["step"] == 3 and numbers["num_parameters"] == 5 and numbers["ess"] == 50
    np.testing.assert_allclose(numbers["hess/negative"], np.mean(h < 0))
    np.testing.assert_allclose(numbers["hess/moved"], np.mean(np.abs(h - 0.5) > 0.05))
    np.testing.assert_allclose(numbers["temperature"], 0.5)
    np.testing.assert_allclose(numbers["kl"], kl_divergence(q, prior_of(state)), rtol=1e-6)
    np.testing.assert_allclose(numbers["elbo"], -50 * 2.0 - numbers["kl"], rtol=1e-6)
    np.testing.assert_allclose(numbers["elbo/per_example"], numbers["elbo"] / 50, rtol=1e-6)
    assert numbers["kl/flat"] == 0 and numbers["update/clipped"] == 0
    assert {x.dtype for x in numbers.values()} == {jnp.dtype(jnp.float32)}
    assert {x.shape for x in numbers.values()} == {()}


@pytest.mark.parametrize("debias", [True, False])
def test_the_share_of_clipped_elements_is_that_of_the_next_step_at_this_momentum(debias):
    settings = {**SETTINGS, "clip_radius": 1.0, "debias": debias}
    state = trained(settings)
    g = flat(state.momentum) / (1 - 0.9**3 if debias else 1)
    u = (g + 0.2 * flat(state.mean)) / (flat(state.hess) + 0.2)
    share = np.mean(np.abs(u) >= 1.0)
    assert 0 < share < 1
    np.testing.assert_allclose(diagnostics(state, settings)["update/clipped"], share, rtol=1e-6)


def test_kl_is_the_closed_form_and_the_monte_carlo_estimate():
    rng = np.random.default_rng(0)
    m, m0 = rng.standard_normal((2, 6))
    p, p0 = rng.uniform(0.5, 3, (2, 6))
    with jax.enable_x64(True):
        q, prior = (Posterior(jnp.asarray(a), jnp.asarray(b)) for a, b in ((m, p), (m0, p0)))
        got = float(kl_divergence(q, prior))
    theta = m + rng.standard_normal((200_000, 6)) / np.sqrt(p)
    log_ratio = 0.5 * (
        np.log(p / p0) - p * (theta - m) ** 2 + p0 * (theta - m0) ** 2
    ).sum(-1)  # fmt: skip
    assert abs(log_ratio.mean() - got) < 5 * log_ratio.std() / np.sqrt(len(theta))
    np.testing.assert_allclose(
        got, 0.5 * np.sum(p0 / p + p0 * (m - m0) ** 2 - 1 - np.log(p0 / p)), rtol=1e-12
    )


def test_flat_and_fixed_elements_are_left_out_of_the_kl():
    q = Posterior(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 1.0, jnp.inf, jnp.inf]))
    prior = Posterior(jnp.array([0.0, 0.0, 0.0, 4.0]), jnp.array([1.0, 0.0, 1.0, jnp.inf]))
    np.testing.assert_allclose(kl_divergence(q, prior), 0.5)
    only_prior_fixed = Posterior(jnp.zeros(4), jnp.array([jnp.inf, 0.0, 1.0, 1.0]))
    assert kl_divergence(q, only_prior_fixed) == jnp.inf
    state = ivon(0.1, 10, mask={"b": False, "w": True}).init(PARAMS)
    np.testing.assert_allclose(diagnostics(state, {})["kl/flat"], 0.2)
    with pytest.raises(ValueError, match=r"prior.mean holds dict at the root"):
        kl_divergence(q, Posterior({"w": jnp.zeros(4)}, {"w": jnp.ones(4)}))


def test_diagnostics_use_a_general_prior():
    prior = posterior(trained(SETTINGS))
    settings = {k: v for k, v in SETTINGS.items() if k != "weight_decay"} | {"prior": prior}
    state = ivon(**settings).init(prior.mean)
    numbers = diagnostics(state, settings)
    np.testing.assert_allclose(numbers["kl"], kl_divergence(posterior(state), prior), rtol=1e-5)
    fixed = Posterior(prior.mean, jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), prior.mean))
    numbers = diagnostics(ivon(0.1, 10, prior=fixed).init(PARAMS), {"hess_init": 1.0})
    assert numbers["kl"] == 0 and numbers["update/clipped"] == 0 and numbers["fixed"] == 1


def test_several_states_are_counted_together():
    settings = {"ess": 10.0}
    tx = optax.partition(
        {"a": ivon(0.1, **settings), "b": ivon(0.2, **settings)}, {"b": "a", "w": "b"}
    )
    numbers = diagnostics(tx.init(PARAMS), settings)
    assert numbers["num_parameters"] == 5 and numbers["hess/p50"] == 1.0


def test_fixed_elements_are_not_counted():
    """97 fixed elements, and 3 whose h has moved."""
    precision = jnp.full(100, jnp.inf).at[:3].set(1.0)
    settings = {"learning_rate": 0.1, "ess": 10.0, "prior": Posterior(jnp.zeros(100), precision)}
    state = ivon(**settings).init(jnp.ones(100))
    state = state._replace(count=jnp.int32(5), hess=state.hess.at[:3].set(jnp.arange(3.0) + 4))
    state = state._replace(momentum=jnp.full(100, 1e-3))
    numbers = diagnostics(state, settings)
    np.testing.assert_allclose(numbers["fixed"], 0.97, rtol=1e-6)
    np.testing.assert_allclose([numbers["hess/p1"], numbers["hess/p99"]], [4.0, 5.0])
    np.testing.assert_allclose(numbers["sigma/p99"], 1 / np.sqrt(51.0), rtol=1e-6)
    assert numbers["hess/moved"] == 1 and np.isfinite(numbers["signal_to_noise/p99"])
    assert str(learning_status(state, settings)).startswith("yes")


def test_a_diverged_run_is_reported_and_does_not_raise():
    state = trained(SETTINGS)
    state = state._replace(hess={**state.hess, "b": jnp.array([jnp.nan])})
    for call in (diagnostics, jax.jit(lambda s, _: diagnostics(s, SETTINGS))):
        numbers = call(state, SETTINGS)
        np.testing.assert_allclose(numbers["nonfinite"], 0.2)
        assert np.isnan(numbers["kl"])


def test_zero_infinite_and_undefined_divergences_are_told_apart():
    q = Posterior(jnp.array([1.0]), jnp.array([jnp.inf]))
    assert kl_divergence(q, q) == 0
    assert kl_divergence(q, Posterior(jnp.array([2.0]), jnp.array([jnp.inf]))) == jnp.inf
    nan = Posterior(jnp.ones(2), jnp.array([1.0, jnp.nan]))
    good = Posterior(jnp.ones(2), jnp.ones(2))
    assert np.isnan(jax.jit(kl_divergence)(nan, good))
    assert np.isnan(jax.jit(kl_divergence)(good, nan))
    with pytest.raises(ValueError, match="precision must be >= 0"):
        kl_divergence(good, Posterior(jnp.ones(2), -jnp.ones(2)))


def test_float64_states_and_bad_losses():
    with jax.enable_x64(True):
        state = trained(SETTINGS, params={"w": jnp.ones(3, jnp.float64)})
        assert np.isfinite(diagnostics(state, SETTINGS, loss=1.0)["elbo"])
    with pytest.raises(ValueError, match="loss must be a scalar"):
        diagnostics(trained(SETTINGS), SETTINGS, loss=jnp.ones(2))


def test_settings_are_those_of_ivon():
    state = trained(SETTINGS)
    with pytest.raises(TypeError, match="unknown: beta1"):
        diagnostics(state, {"beta1": 0.9})
    with pytest.raises(ValueError, match="found no IVONState"):
        diagnostics(posterior(state), SETTINGS)
    two = [ivon(0.1, ess).init({str(ess): jnp.ones(2)}) for ess in (10.0, 20.0)]
    with pytest.raises(ValueError, match="several IVON states with different ess"):
        diagnostics(two, {})
    with pytest.raises(ValueError, match="num_examples must be > 0"):
        diagnostics(state, SETTINGS, num_examples=0)


def test_on_a_real_run_h_moves_and_the_elbo_rises():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 3)), jnp.float32)
    y = x @ jnp.array([1.0, -2.0, 0.5])
    loss = lambda w: 0.5 * jnp.mean((x @ w - y) ** 2)  # noqa: E731
    tx = ivon(**SETTINGS)

    @jax.jit
    def step(key, state):
        sample, noise = sample_params(key, state)
        value, grads = jax.value_and_grad(loss)(sample)
        elbo = diagnostics(state, SETTINGS, loss=value)["elbo"]
        return tx.update(grads, state, noise=noise)[1], elbo

    state, elbos = tx.init(jnp.zeros(3)), []
    for key in jax.random.split(jax.random.key(0), 60):
        state, elbo = step(key, state)
        elbos.append(float(elbo))
    assert np.mean(elbos[-10:]) > np.mean(elbos[:3]) + 10
    assert str(learning_status(state, SETTINGS)).startswith("yes")


def test_the_gain_and_the_risk_of_a_weight_that_has_lost_its_curvature():
    """Of 200 weights one has 1/500 of the initial precision and most have four times as much."""
    delta = 0.5 / 499  # so that h = 0 is that share
    settings = {"learning_rate": 0.3, "ess": 100.0, "hess_init": 0.5, "weight_decay": delta}
    state = ivon(**settings).init(jnp.ones(200))
    high = 4 * (0.5 + delta) - delta
    hess = state.hess.at[0].set(0.0).at[1:120].set(high)
    state = state._replace(count=jnp.int32(5), hess=hess)
    bound = 2 * 1.9 / 0.1 / 50 / (0.5 + delta)
    numbers = diagnostics(state, settings)
    np.testing.assert_allclose(numbers["update/gain"], 500, rtol=1e-4)
    np.testing.assert_allclose(numbers["update/risk"], 0.3 * 500 * 4 / bound, rtol=1e-4)
    assert str(learning_status(state, settings)).startswith("at risk: ")
    scheduled = {**settings, "learning_rate": lambda count: 0.01 * count.astype(float)}
    assert diagnostics(state, scheduled)["update/risk"] == pytest.approx(0.05 * 2000 / bound, 1e-4)
    guarded = {**settings, "precision_floor": 0.1}
    _, new = ivon(**guarded).update(jnp.zeros(200), state, hess=state.hess)
    np.testing.assert_allclose(diagnostics(new, guarded)["update/gain"], 10, rtol=1e-4)
    assert diagnostics(state, {**settings, "clip_radius": 1.0})["update/risk"] == 0
    del settings["learning_rate"]
    assert "update/risk" not in diagnostics(state, settings)


@pytest.mark.parametrize("rescale_lr", [True, False])
@pytest.mark.parametrize("curvature", [0.01, 1.0, 100.0])
def test_the_risk_is_its_margin_where_quadratics_begin_to_diverge(curvature, rescale_lr):
    """With h = c the step's factor is α(h₀+δ), or α, and the bound 2(1+β₁)/(1−β₁) = 38."""
    for factor, diverges in ((36.0, False), (40.0, True)):
        settings = {"ess": 1e6, "hess_init": curvature, "weight_decay": 0.0, "debias": False}
        rate = factor / curvature if rescale_lr else factor
        settings |= {"learning_rate": rate, "rescale_lr": rescale_lr}
        tx = ivon(**settings)
        step = jax.jit(lambda s, tx=tx: tx.update(curvature * s.mean, s, hess=s.hess)[1])
        state = tx.init(jnp.ones(1))
        for _ in range(300):
            state = step(state)
        assert (not abs(float(state.mean[0])) < 1) == diverges
        risk = float(diagnostics(state, settings)["update/risk"])
        assert risk == pytest.approx(50 * factor / 38, rel=1e-3)


def test_models_of_more_than_two_billion_parameters_are_counted():
    layers = [jax.ShapeDtypeStruct((30_000, 10_000), jnp.float32)] * 10
    state = jax.eval_shape(lambda p: ivon(0.1, ess=1e9).init(p), layers)
    assert jax.eval_shape(lambda s: diagnostics(s, {}), state)["num_parameters"].shape == ()


def test_it_is_compiled_once_for_a_structure():
    state = trained(SETTINGS)
    learning_status(state, SETTINGS)
    before = monitoring._compiled_numbers._cache_size()
    for steps in (2, 4):
        learning_status(trained(SETTINGS, steps), {**SETTINGS, "learning_rate": 0.1 * steps})
    assert monitoring._compiled_numbers._cache_size() == before


_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **__: _COMPILED.append(event) if "backend_compile" in event else None
)


def test_nothing_is_computed_leaf_by_leaf():
    """Outside of the compiled programs that would keep whole trees, and compile for each shape."""
    counts = []
    for sizes in ((2,), (3, 4, 5, 6)):
        params = [jnp.ones(size) for size in sizes]
        tx = auto_sample(ivon(0.1, ess=10.0), key=0)
        state = jax.jit(tx.init)(params)
        _COMPILED.clear()
        learning_status(state, {"learning_rate": 0.1}, params=params)
        counts.append(len(_COMPILED))
    assert 0 < counts[1] <= counts[0]
