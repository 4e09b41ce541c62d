import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import auto_sample, ivon, posterior, recipes

ALL = {name: x for name, x in vars(recipes).items() if isinstance(x, recipes.Recipe)}


@pytest.mark.parametrize("name", ALL)
def test_every_recipe_is_a_set_of_keywords_of_ivon(name):
    recipe = ALL[name]
    params = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}
    tx = ivon(**recipe.settings)
    state = tx.init(params)
    _, new = tx.update(params, state, params, hess=params)
    assert new.ess == np.float32(recipe.settings["ess"])
    with pytest.raises(TypeError, match="does not support item assignment"):
        recipe.settings["ess"] = 1.0
    assert recipe.source and recipe.length and (recipe.batch_size is None or recipe.batch_size > 0)


def test_the_largest_step_of_gpt2_is_the_rate_that_adamw_uses():
    """α(h₀+δ)ξ, a published property of the three settings: 3e-4, 2e-4 and 1.5e-4."""
    for recipe, expected in (
        (recipes.GPT2_125M, 3e-4),
        (recipes.GPT2_355M, 2e-4),
        (recipes.GPT2_773M, 1.5e-4),
    ):
        s = recipe.settings
        step = s["learning_rate"] * (s["hess_init"] + s["weight_decay"]) * s["clip_radius"]
        np.testing.assert_allclose(step, expected, rtol=2e-3)
        state = ivon(**s).init({"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))})
        np.testing.assert_allclose(state.weight_decay, [0.0, 1e-6])


@pytest.mark.parametrize("name", ALL)
def test_schedules_start_low_reach_the_peak_and_end_at_zero(name):
    recipe = ALL[name]
    steps = max(1000, round(2 * recipe.warmup))
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        rate = np.array([recipe.schedule(steps)(t) for t in range(steps + 1)])
    peak = recipe.settings["learning_rate"]
    warmup = round(recipe.warmup * steps if recipe.warmup < 1 else recipe.warmup)
    np.testing.assert_allclose(rate[warmup], peak, rtol=1e-6)
    assert rate[0] == (0 if warmup else pytest.approx(peak))
    assert np.all(np.diff(rate[: warmup + 1]) > 0) and np.all(np.diff(rate[warmup:]) < 0)
    end = peak / np.sqrt(2) if recipe.decay == "inverse square root" else 0.0
    np.testing.assert_allclose(rate[-1], end, rtol=1e-6, atol=1e-6 * peak)
    with pytest.raises(ValueError, match="num_steps must be an integer"):
        recipe.schedule(0)


def test_the_mask_of_matrices_reads_any_tree():
    tree = {"a": [jnp.ones(()), jnp.ones((1, 1, 1))]}
    assert recipes.matrices(tree) == {"a": [False, True]}
    assert isinstance(optax.adamw(1e-3, mask=recipes.matrices), optax.GradientTransformation)


def test_the_suggested_hess_init_starts_the_noise_at_a_quarter_of_the_weights():
    rng = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(0.1 * rng.standard_normal((300, 200)), jnp.float32),
        "bias": jnp.full(1000, 50.0),  # vectors do not count
        "step": jnp.zeros((2, 2), jnp.int32),
    }
    for ess, noise in ((1e3, 0.25), (1e6, 0.25), (1e4, 0.1)):
        hess_init = recipes.hess_init_for(params, ess, noise=noise)
        sigma = 1 / np.sqrt(ess * hess_init)
        np.testing.assert_allclose(sigma, noise * 0.1, rtol=0.02)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params["kernel"])
    np.testing.assert_allclose(
        recipes.hess_init_for(half, 1e3), recipes.hess_init_for(params, 1e3), rtol=0.02
    )
    assert recipes.hess_init_for(jnp.full(3, 0.1), 10_000) == 0.16
    for bad in (0.0, jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match="finite weights other than zero"):
            recipes.hess_init_for(jnp.full((2, 2), bad), 10)
    with pytest.raises(TypeError, match="before jit"):
        jax.jit(lambda p: recipes.hess_init_for(p, 10))(jnp.ones((2, 2)))
    for bad in ({"ess": 0.0}, {"ess": 10, "noise": -1.0}):
        with pytest.raises(ValueError, match="must be > 0"):
            recipes.hess_init_for(params, **bad)


def test_the_suggested_b2_leaves_the_share_of_the_initial_curvature_that_published_runs_do():
    for steps in (2_000, 10**6):
        np.testing.assert_allclose(recipes.b2_for(steps) ** steps, np.exp(-2), rtol=2e-3)
    # 200 epochs of 50,000 / 50 steps, and of 1,281,167 / 1,024; 100,000 steps.
    for recipe, steps in ((recipes.CIFAR, 200_000), (recipes.IMAGENET, 250_228)):
        assert 1 <= (1 - recipe.settings["b2"]) * steps <= 2.001
    assert recipes.b2_for(1) == 0.9
    with pytest.raises(ValueError, match="num_steps must be an integer"):
        recipes.b2_for(0)


def test_start_gives_settings_that_train_and_their_closed_forms():
    params = {"bias": jnp.zeros(3), "kernel": jnp.full((3, 2), 0.1)}
    settings = recipes.start(params, num_examples=1000, num_steps=200, temperature=0.1)
    assert settings["ess"] == 10_000 and settings["b2"] == 0.99
    sigma = 1 / np.sqrt(settings["ess"] * settings["hess_init"])
    np.testing.assert_allclose(sigma, 0.25 * 0.1, rtol=0.01)
    with jax.numpy_dtype_promotion("standard"):
        rate = [float(settings["learning_rate"](t)) for t in (0, 10, 200)]
    np.testing.assert_allclose(rate, [0.0, 0.1, 0.0], atol=1e-7)
    assert ivon(**settings).init(params).ess == 10_000


def test_start_needs_values():
    with pytest.raises(TypeError, match="traced or abstract: the initial values are needed"):
        recipes.start(jax.eval_shape(lambda: jnp.ones((2, 2))), num_examples=10, num_steps=10)


@pytest.mark.parametrize("name", ["num_examples", "num_steps", "learning_rate", "temperature"])
def test_start_refuses_bad_numbers_by_name(name):
    given = {"num_examples": 10, "num_steps": 10, name: 0}
    with pytest.raises(ValueError, match=name):
        recipes.start({"kernel": jnp.ones((2, 2))}, **given)


@pytest.mark.parametrize("name", ALL)
def test_the_optimizer_of_a_recipe_clips_where_the_run_did(name):
    recipe = ALL[name]
    params = {"bias": jnp.ones(2), "kernel": jnp.ones((2, 2))}
    tx = auto_sample(recipe.optimizer(10_000, ess=123.0), 0)
    state = tx.init(params)
    assert posterior(state).mean.keys() == params.keys()
    large = jax.tree.map(lambda x: 1e3 * x, params)
    with jax.numpy_dtype_promotion("standard"):
        _, state = tx.update(large, state, params)
    inner = state.inner_state if recipe.clip_norm is None else state.inner_state[1]
    assert inner.ess == 123.0
    norm = optax.tree.norm(inner.momentum) / 0.1
    expected = optax.tree.norm(large) if recipe.clip_norm is None else recipe.clip_norm
    np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_the_rate_of_gpt2_is_that_of_adamw_over_the_longest_step():
    s = recipes.GPT2_125M.settings
    rate = recipes.rate_from_adamw(3e-4, s["hess_init"], s["clip_radius"], s["weight_decay"])
    np.testing.assert_allclose(rate, s["learning_rate"], rtol=2e-3)
    with pytest.raises(ValueError, match="clip_radius must be > 0 and finite"):
        recipes.rate_from_adamw(3e-4, 1e-3, float("inf"))


def test_the_ess_of_a_squared_error_gives_the_standard_deviation_of_the_exact_posterior():
    """The slope of y = wx + noise s under a flat prior has the variance s²/Σx²."""
    n, s = 500, 0.1
    x = jnp.asarray(np.random.default_rng(0).standard_normal(n), jnp.float32)
    y = 0.7 * x + s * jnp.asarray(np.random.default_rng(1).standard_normal(n), jnp.float32)
    exact = s / np.sqrt(np.sum(np.asarray(x) ** 2))
    found = {}
    for ess in (recipes.ess_for_squared_error(n, s), float(n)):
        tx = auto_sample(ivon(0.05, ess, hess_init=2.0, b2=0.999, weight_decay=0.0), 0)

        def step(carry, _, tx=tx):
            w, state = carry
            grads = jax.grad(lambda w: jnp.mean((y - w * x) ** 2))(w)
            updates, state = tx.update(grads, state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.float32(0.7)
        (_, state), _ = jax.jit(lambda start, step=step: jax.lax.scan(step, start, length=4000))(
            (w, tx.init(w))
        )
        found[ess] = float(posterior(state).precision) ** -0.5
    np.testing.assert_allclose(found[25_000.0], exact, rtol=0.05)
    # With λ = N it is that of s² = ½.
    np.testing.assert_allclose(found[500.0], exact * 0.5**0.5 / s, rtol=0.05)


@pytest.mark.parametrize("numbers", [(0, 1.0), (10, 0.0), (10, -1.0), (10, np.nan)])
def test_the_ess_of_a_squared_error_needs_positive_numbers(numbers):
    with pytest.raises(ValueError, match="must be > 0"):
        recipes.ess_for_squared_error(*numbers)


def test_fine_tuning_starts_with_noise_and_steps_in_proportion_to_the_weights_and_adamws_rate():
    params = {"kernel": 0.05 * jax.random.normal(jax.random.key(0), (64, 64)), "bias": jnp.ones(64)}
    settings = recipes.start_fine_tuning(params, num_steps=100, learning_rate=3e-5, noise=0.1)
    state = ivon(**settings).init(params)
    q = posterior(state)
    np.testing.assert_allclose(q.precision["kernel"] ** -0.5, 0.1 * 0.05, rtol=0.02)
    peak = settings["learning_rate"](5)
    longest = peak * (settings["hess_init"] + settings["weight_decay"]) * settings["clip_radius"]
    np.testing.assert_allclose(longest, 3e-5, rtol=1e-5)
    assert settings["learning_rate"](100) < 1e-6 * peak
    with pytest.raises(ValueError, match="noise"):
        recipes.start_fine_tuning(params, num_steps=100, learning_rate=3e-5, noise=0)
    with pytest.raises(ValueError, match="learning_rate"):
        recipes.start_fine_tuning(params, num_steps=100, learning_rate=-1.0)
    with pytest.raises(ValueError, match="finite weights"):
        recipes.start_fine_tuning({"b": jnp.zeros(2)}, num_steps=100, learning_rate=1e-4)


def test_a_schedule_that_never_gets_going_is_refused():
    with pytest.raises(ValueError, match="never gets to its peak"):
        recipes.IWSLT14.schedule(1_000)
    settings = recipes.CIFAR.settings
    with pytest.raises(ValueError, match="decay must be one of"):
        recipes.Recipe(settings, None, "", decay="cos")
    with pytest.raises(ValueError, match="end of a warmup"):
        recipes.Recipe(settings, None, "", decay="inverse square root")
    short = recipes.Recipe(settings, None, "", warmup=0.01, decay="inverse square root")
    with pytest.raises(ValueError, match="warmup of a step"):
        short.schedule(10)
    assert recipes.CIFAR.schedule(1)(0) > 0


def test_a_state_in_the_place_of_parameters_is_refused():
    state = ivon(0.1, 100).init({"w": jnp.ones((2, 2))})
    for wrong in (state, posterior(state)):
        with pytest.raises(TypeError, match=r"pass posterior_mean\(state\)"):
            recipes.hess_init_for(wrong, 100)
