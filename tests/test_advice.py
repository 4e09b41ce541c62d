import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    auto_sample,
    diagnostics,
    ivon,
    learning_status,
    posterior,
    posterior_mean,
    with_ess,
)
from tests.test_diagnostics import PARAMS, SETTINGS, trained

RATE = {"learning_rate": 0.1}


def test_the_status_says_what_is_wrong():
    assert str(learning_status(ivon(**SETTINGS).init(PARAMS), SETTINGS)).startswith(
        "not started: no step"
    )
    good = str(learning_status(trained(SETTINGS), SETTINGS))
    assert good.startswith("yes: after 3 steps") and "\n" not in good
    slow = {**SETTINGS, "b2": 0.99999}
    status, message = learning_status(trained(slow), slow)
    assert status == "no" and message.startswith("h stays near its start") and "Lower b2" in message
    assert "0.003 % of the way" in message
    clipped = {**SETTINGS, "clip_radius": 1e-3}
    kind, message = learning_status(trained(clipped), clipped)
    # α(h₀+δ)ξ = 0.2 · 0.7 · 1e-3
    assert kind == "at risk" and message.startswith("100 % of the steps are clipped")
    assert "is 0.00014 long" in message and "go by the training loss" in message
    # As h₀ and ξ of a transformer with the rate of a convolutional network.
    short = {"learning_rate": 0.1, "ess": 1e6, "hess_init": 1e-3, "clip_radius": 1e-3}
    kind, message = learning_status(trained(short), short)
    assert kind == "at risk" and "is 1.1e-07 long" in message and "raise the learn" in message
    # What h says comes first.
    exploded = trained(clipped)
    exploded = exploded._replace(hess=jax.tree.map(lambda h: h + 1e4, exploded.hess))
    momentum = jax.tree.map(lambda g: 1e3 * g, exploded.momentum)
    status = learning_status(exploded._replace(momentum=momentum), clipped)
    assert str(status).startswith("no: h ")
    summed = trained(SETTINGS)
    summed = summed._replace(hess=jax.tree.map(lambda h: h + 100.0, summed.hess))
    kind, message = learning_status(summed, SETTINGS)
    assert kind == "at risk" and "Is the loss a mean?" in message
    done = learning_status(
        trained(SETTINGS), {**SETTINGS, "learning_rate": lambda step: jnp.float32(0)}
    )
    assert done.kind == "yes" and "The rate is 0" in done.message
    broken = trained(SETTINGS, scale=np.nan)
    assert str(learning_status(broken, SETTINGS)).startswith("broken: 5 elements")
    exploded = trained(SETTINGS)
    exploded = exploded._replace(hess=jax.tree.map(lambda h: h + 1e4, exploded.hess))
    assert str(learning_status(exploded, SETTINGS)).startswith("no: h has exploded")
    nothing = ivon(0.1, 10).init({})
    assert "no free element" in learning_status(nothing._replace(count=1), RATE).message


@pytest.mark.parametrize("more", [{}, {"precision_floor": 0.1, "b2": 0.9}], ids=str)
def test_forgetting_the_start_is_not_taken_for_learning(more):
    settings = {**SETTINGS, **more}
    tx = ivon(**settings)
    state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(20):
        _, state = tx.update(zeros, state, PARAMS, hess=zeros)
    kind, message = learning_status(state, settings)
    assert kind == "no" and message.startswith("h has only been forgotten")


def test_a_curvature_far_below_the_start_is_learned():
    tx = ivon(**SETTINGS)
    state, small = tx.init(PARAMS), jax.tree.map(lambda x: jnp.full_like(x, 1e-4), PARAMS)
    for _ in range(3):
        _, state = tx.update(small, state, PARAMS, hess=small)
    assert learning_status(state, SETTINGS).kind == "yes"


def test_settings_with_another_start_are_reported_before_the_first_step():
    kind, message = learning_status(ivon(0.1, 1e3, hess_init=0.01).init(jnp.ones(3)), RATE)
    assert kind == "at risk" and "hess_init=1:" in message
    both = optax.partition(
        {k: ivon(0.1, 1e3, hess_init=x) for k, x in (("a", 0.5), ("b", 0.1))}, "a"
    )
    state = both.init(jnp.ones(3))
    assert learning_status(state, {**RATE, "hess_init": 0.5}).kind == "not started"


def test_noise_in_most_weights_is_said_during_the_run():
    state = trained(SETTINGS)
    state = state._replace(ess=jnp.float32(1e-3))
    assert "compare the samples' loss" in learning_status(state, SETTINGS | {"ess": 1e-3}).message


@pytest.mark.parametrize("wrong", [{"hess_init": -1.0}, {"b1": 2.0}, {"clip_radius": 0.0}])
def test_settings_that_ivon_refuses_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        diagnostics(ivon(**SETTINGS).init(PARAMS), SETTINGS | wrong)


def test_a_mean_that_a_check_has_spoiled_is_not_blamed_on_the_rate():
    tx = auto_sample(ivon(**SETTINGS), 0, check=True)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(PARAMS, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: 2 * u, updates))
    kind, message = learning_status(state, SETTINGS)
    assert kind == "broken" and 0 < message.index("without jit say so") < message.index("rate")


def test_samples_that_are_mostly_noise_are_reported_before_the_first_step():
    for ess, expected in (
        (1.0, "at risk: the samples are mostly noise"),
        (1e3, "not started: no step"),
    ):
        status = learning_status(
            ivon(0.1, ess, hess_init=0.01).init(jnp.ones(3)), {**RATE, "hess_init": 0.01}
        )
        assert str(status).startswith(expected)


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (-0.1, "at risk: the learning rate at step 3 is -0.1"),
        (np.nan, "broken: the learning rate"),
        (np.inf, "broken: the learning rate"),
    ],
)
def test_a_rate_that_is_negative_or_nan_is_reported(rate, said):
    state = trained(SETTINGS)
    schedule = {**SETTINGS, "learning_rate": lambda step: jnp.where(step < 3, 0.1, rate)}
    assert str(learning_status(state, schedule)).startswith(said)
    assert learning_status(state, SETTINGS).kind == "yes"
    # Also after the step that it has spoilt.
    spoilt = state._replace(mean=jax.tree.map(lambda x: x * np.float32(rate), state.mean))
    assert "learning rate" in learning_status(spoilt, schedule).message


def test_settings_that_change_the_width_of_a_restored_posterior_are_reported():
    state = trained(SETTINGS)
    kind, message = learning_status(state, {**SETTINGS, "ess": 5000.0})
    assert kind == "at risk"
    assert "jumps by a factor of 0.1" in message and "steps 100 times" in message
    kind, message = learning_status(state, {**SETTINGS, "weight_decay": 0.4})
    assert kind == "at risk" and "trained with weight_decay=0.2" in message
    assert learning_status(state, {**SETTINGS, "weight_decay": 0.0}).kind == "at risk"
    # What is a schedule or not named is not compared.
    annealed = {**SETTINGS, "ess": lambda step: 100.0 + step, "weight_decay": lambda step: 0.1}
    assert learning_status(state, annealed).kind == "yes"
    named = {name: SETTINGS[name] for name in ("learning_rate", "hess_init", "b2")}
    assert learning_status(state, named).kind == "yes"
    moved = learning_status(with_ess(state, 25.0), {**SETTINGS, "ess": 25.0})
    assert "trained with" not in moved.message


def test_the_learning_rate_is_required():
    with pytest.raises(TypeError, match="settings lack the learning_rate"):
        learning_status(trained(SETTINGS), {"hess_init": 0.5})


def quadratic(settings, steps=10_000):
    """The gradient 2(p−f) from p = 10 with f = −1, in an `auto_sample` loop."""
    tx = auto_sample(ivon(**settings), 0)
    params = jnp.array([10.0])

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(2 * (params + 1), state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, tx.init(params))
    (_, state), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(start)
    return state


INFLATED = {"learning_rate": 0.1, "ess": 1e6, "b2": 0.999}


@pytest.mark.parametrize("ess", [1e6, 1e8])
def test_a_mean_that_is_stuck_because_large_gradients_inflate_h_is_reported(ess):
    settings = {**INFLATED, "ess": ess}
    state = quadratic(settings)
    assert posterior_mean(state)[0] > 5  # far from −1
    kind, message = learning_status(state, settings)
    assert kind == "no" and message.startswith("h is inflated") and "Lower ess" in message


@pytest.mark.parametrize("remedy", [{"ess": 1e4}, {"b2": 0.99999}])
def test_the_remedies_for_an_inflated_h_work(remedy):
    settings = {**INFLATED, **remedy}
    state = quadratic(settings)
    np.testing.assert_allclose(posterior_mean(state), -1, atol=0.01)
    assert "inflated" not in learning_status(state, settings).message


@pytest.mark.parametrize(("name", "value"), [("ess", 0.0), ("ess", -5.0), ("weight_decay", -1.0)])
@pytest.mark.parametrize("steps", [0, 1])
def test_an_injected_number_out_of_its_range_is_named(name, value, steps):
    settings = {"learning_rate": 0.1, "ess": 100.0, "weight_decay": 0.1}
    tx = auto_sample(optax.inject_hyperparams(ivon)(**settings), 0)
    params, state = PARAMS, tx.init(PARAMS)
    _, state = jax.jit(tx.update)(PARAMS, state, params)
    hyperparams = {**state.inner_state.hyperparams, name: jnp.float32(value)}
    state = state._replace(inner_state=state.inner_state._replace(hyperparams=hyperparams))
    for _ in range(steps):
        _, state = jax.jit(tx.update)(PARAMS, state, params)
    kind, message = learning_status(state, settings)
    # Before the step the state does not know of it yet.
    assert (kind == "broken" and message.startswith(f"{name} in the state is nan")) == bool(steps)


def test_a_long_step_is_that_of_the_leaf_with_the_largest_decay():
    settings = {**SETTINGS, "clip_radius": 0.1, "mask": {"b": True, "w": False}}
    numbers = diagnostics(trained(settings), settings)
    np.testing.assert_allclose(numbers["update/longest"], 0.2 * (0.5 + 0.2) * 0.1, rtol=1e-6)
    numbers = diagnostics(trained(settings), {**settings, "rescale_lr": False})
    np.testing.assert_allclose(numbers["update/longest"], 0.2 * 0.1, rtol=1e-6)
    warming = {**SETTINGS, "learning_rate": lambda step: jnp.float32(0)}
    assert diagnostics(trained(warming), warming)["update/longest"] == jnp.inf


def test_a_schedule_that_ends_a_rounding_below_zero_is_no_mistake():
    settings = {**SETTINGS, "learning_rate": -1.5e-9}
    assert learning_status(trained(SETTINGS), settings).kind == "yes"


def test_numbers_that_look_like_those_of_adamw_are_named_before_the_first_step():
    rate, decay = "learning rate of 0.001 is small", "weight_decay=0.05 is the coefficient of an L2"
    base = {"ess": 1e3, "hess_init": 1.0, "b2": 0.99}

    def rising(peak):
        return lambda step: peak * jnp.minimum(step.astype(jnp.float32) / 10, 1)

    def said(**settings):
        return str(learning_status(ivon(**settings).init(jnp.ones(3)), settings))

    assert rate in said(**base, learning_rate=1e-3) and rate in said(
        **base, learning_rate=rising(1e-3)
    )
    assert decay in said(**base, learning_rate=0.3, weight_decay=0.05)
    for usual in (
        {"learning_rate": 0.02, "weight_decay": 5e-3},
        {"learning_rate": rising(0.3)},
        {"learning_rate": lambda step: 0.3 * jnp.float32((step > 0) & (step < 30))},
        {"learning_rate": 1e-3, "clip_radius": 1e-3},
    ):
        message = said(**base, **usual)
        assert rate not in message and decay not in message


def test_most_weights_at_zero_are_no_noise():
    settings = {"learning_rate": 0.1, "ess": 100.0}
    status = learning_status(ivon(**settings).init(jnp.array([0.0, 0.0, 1.0])), settings)
    assert status.kind == "not started" and "Most weights start at zero" in status.message


@pytest.mark.parametrize("params", [{}, {"n": jnp.arange(3)}], ids=["empty", "integers"])
def test_nothing_to_learn_is_said_before_the_first_step(params):
    settings = {"learning_rate": 0.1, "ess": 100.0}
    status = learning_status(ivon(**settings).init(params), settings)
    assert status == ("no", "there is no free element to learn.")


def test_the_optimizer_in_place_of_its_settings_is_refused():
    tx = ivon(0.1, ess=100.0)
    with pytest.raises(TypeError, match="settings must be a dict of the keyword arguments"):
        diagnostics(tx.init(jnp.ones(3)), tx)  # pyright: ignore[reportArgumentType]


def test_leaves_of_no_size_under_a_general_prior_are_described():
    params = {"a": jnp.zeros((0,)), "b": jnp.ones(2)}
    prior = posterior(ivon(0.1, 100).init(params))
    settings = {"learning_rate": 0.1, "ess": 100.0, "prior": prior}
    assert learning_status(ivon(**settings).init(params), settings).kind == "not started"
