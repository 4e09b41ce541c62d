"""IVON inside, under and beside other optax transformations."""

import functools
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    IVONState,
    auto_sample,
    ivon,
    mc_value_and_grad,
    posterior,
    posterior_mean,
    reseed,
    sample_params,
)

PARAMS = {"b": jnp.array([0.5, -1.0]), "w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}
GRADS = {"b": jnp.array([3.0, -0.1]), "w": jnp.array([[0.2, -0.4], [1.0, 5.0]])}
KEY = jax.random.key(7)

base = functools.partial(ivon, 0.1, ess=100.0, weight_decay=0.01, b2=0.99)


def loss(params: Any) -> jax.Array:
    """A quadratic whose Hessian is 2 everywhere."""
    return sum(jnp.sum(jnp.square(x - 1.0)) for x in jax.tree.leaves(params))


def draw(state: Any, params: Any = None) -> Any:
    """The noise of one sample."""
    return sample_params(KEY, state, params)[1]


def ivon_state(state: Any) -> IVONState:
    """The only IVONState inside a state."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, IVONState))
    (found,) = [x for x in leaves if isinstance(x, IVONState)]
    return found


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


# chain


CLIP = optax.clip_by_global_norm(1.0)
CHAINS = {
    "chain": lambda tx: optax.chain(CLIP, tx),
    "nested": lambda tx: optax.chain(optax.identity(), optax.chain(optax.chain(CLIP), tx)),
    "named": lambda tx: optax.named_chain(("clip", CLIP), ("ivon", tx)),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_clip_before_ivon_in_a_chain_acts_on_the_gradient(chain):
    plain, chained = base(), chain(base())
    plain_state, chained_state = plain.init(PARAMS), chained.init(PARAMS)
    noise = draw(plain_state)
    chex.assert_trees_all_equal(draw(chained_state), noise)
    clipped, _ = CLIP.update(GRADS, CLIP.init(PARAMS))
    expected, plain_state = plain.update(clipped, plain_state, PARAMS, noise=noise)
    updates, chained_state = chained.update(GRADS, chained_state, PARAMS, noise=noise)
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(ivon_state(chained_state), plain_state)
    chex.assert_trees_all_equal(posterior(chained_state), posterior(plain_state))


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_auto_sample_works_inside_and_around_a_chain(chain):
    around, inside = auto_sample(chain(base()), 0), chain(auto_sample(base(), 0))

    def two_steps(tx):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params_around, state_around = two_steps(around)
    params_inside, state_inside = two_steps(inside)
    chex.assert_trees_all_close(params_around, params_inside, rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(
        posterior_mean(state_around), posterior_mean(state_inside), rtol=1e-6, atol=1e-6
    )


def test_auto_sample_passes_extra_arguments_on():
    def scaled(grads, state, params=None, *, factor=1.0, **extra):
        return jax.tree.map(lambda g: factor * g, grads), state

    scale = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scaled)
    tx = auto_sample(optax.chain(scale, base()), 0)
    state = tx.init(PARAMS)
    doubled, _ = tx.update(GRADS, state, PARAMS, factor=2.0)
    by_hand, _ = tx.update(jax.tree.map(lambda g: 2.0 * g, GRADS), state, PARAMS)
    chex.assert_trees_all_equal(doubled, by_hand)


# inject_hyperparams


def halving(start: float) -> optax.Schedule:
    """A schedule that halves at every step, in strictly promoted float32."""
    return lambda count: start * jnp.exp2(-jnp.asarray(count, jnp.float32))


SCHEDULES = {"learning_rate": 0.4, "ess": 1000.0, "weight_decay": 2.0}


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_injected_schedule_takes_effect_at_every_step(name):
    numbers = {"learning_rate": 0.1, "ess": 100.0, "weight_decay": 0.01, "b2": 0.999}
    tx = optax.inject_hyperparams(ivon)(**{**numbers, name: halving(SCHEDULES[name])})
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    expected = ivon(**{**numbers, name: SCHEDULES[name]}).init(PARAMS)
    chex.assert_trees_all_equal(ivon_state(state), expected)
    params = PARAMS
    for step in range(3):
        noise = draw(state)
        updates, state = update(GRADS, state, params, noise=noise)
        # The reference has the value of this step written out as a constant.
        now = SCHEDULES[name] * 0.5**step
        by_hand, expected = ivon(**{**numbers, name: now}).update(
            GRADS, expected, params, noise=noise
        )
        chex.assert_trees_all_close(updates, by_hand, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(ivon_state(state), expected, rtol=1e-4, atol=1e-6)
        params = optax.apply_updates(params, updates)
    # The comparison has teeth: without the schedule the next step is another one.
    fixed = ivon(**{**numbers, name: SCHEDULES[name]})
    outcomes = []
    for updates, new_state in (
        fixed.update(GRADS, expected, params, noise=noise),
        update(GRADS, state, params, noise=noise),
    ):
        outcomes.append(np.stack([updates["w"], posterior(new_state).precision["w"]]))
    assert np.all(np.any(np.abs(outcomes[0] - outcomes[1]) > 1e-3, axis=0))


def test_a_scheduled_ess_changes_the_width_of_the_next_sample():
    tx = optax.inject_hyperparams(ivon)(0.1, ess=halving(1000.0), b2=0.999)
    state = tx.init(PARAMS)
    precisions = []
    for _ in range(3):
        _, state = tx.update(GRADS, state, PARAMS, noise=jax.tree.map(jnp.zeros_like, PARAMS))
        hess, delta = ivon_state(state).hess["w"], ivon_state(state).weight_decay
        precisions.append(posterior(state).precision["w"] / (hess + delta))
    for value, precision in zip([1000.0, 500.0, 250.0], precisions, strict=True):
        np.testing.assert_allclose(precision, np.full((2, 2), value), rtol=1e-6)


def test_an_injected_hyperparameter_edited_by_hand_takes_effect():
    tx = optax.inject_hyperparams(ivon)(0.1, ess=100.0)
    state = tx.init(PARAMS)
    state.hyperparams["learning_rate"] = jnp.array(0.0)
    updates, state = tx.update(GRADS, state, PARAMS, noise=draw(state))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))


def test_auto_sample_takes_injected_schedules():
    tx = auto_sample(optax.inject_hyperparams(ivon)(halving(0.4), ess=halving(100.0)), 0)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(ivon_state(state).ess, 25.0)
    assert set(optax.tree.get(state, "hyperparams")) >= {"learning_rate", "ess", "b2"}


def test_integers_may_be_injected():
    tx = optax.inject_hyperparams(ivon)(1, ess=100, weight_decay=0, b1=0)
    plain = ivon(1, ess=100, weight_decay=0, b1=0)
    state, plain_state = tx.init(PARAMS), plain.init(PARAMS)
    updates, _ = jax.jit(tx.update)(GRADS, state, PARAMS, noise=draw(state))
    expected, _ = plain.update(GRADS, plain_state, PARAMS, noise=draw(state))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)


BFLOAT16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)


def test_bfloat16_parameters_need_a_wider_hyperparam_dtype():
    with pytest.raises(TypeError, match=r"hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(ivon)(0.1, ess=100.0).init(BFLOAT16)


def test_bfloat16_parameters_train_with_float32_hyperparameters():
    tx = optax.inject_hyperparams(ivon, hyperparam_dtype=jnp.float32)(
        halving(0.1), ess=100.0, b2=0.99999
    )
    plain = ivon(halving(0.1), ess=100.0, b2=0.99999)
    state, plain_state = tx.init(BFLOAT16), plain.init(BFLOAT16)
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS)
    noise = draw(state)
    updates, state = jax.jit(tx.update)(grads, state, BFLOAT16, noise=noise)
    expected, plain_state = jax.jit(plain.update)(grads, plain_state, BFLOAT16, noise=noise)
    chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_close(ivon_state(state), plain_state, rtol=1e-6, atol=1e-6)
    assert np.any(ivon_state(state).hess["w"] != 1.0)  # 1 - b2 is not 0, as in bfloat16.


def _is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ndim(x) == 2, params)


STATIC = {"mask": _is_matrix, "momentum_dtype": jnp.bfloat16}


@pytest.mark.parametrize("name", STATIC)
def test_a_callable_that_is_not_a_schedule_is_refused_with_a_hint(name):
    factory = optax.inject_hyperparams(ivon, hyperparam_dtype=jnp.float32)
    with pytest.raises((TypeError, ValueError), match=rf"static_args=\('{name}',\)"):
        factory(0.1, ess=100.0, **{name: STATIC[name]}).init(PARAMS)


def test_callables_named_in_static_args_are_kept():
    factory = optax.inject_hyperparams(ivon, static_args=("mask", "momentum_dtype"))
    tx = factory(0.1, ess=100.0, weight_decay=0.5, **STATIC)
    state = tx.init(PARAMS)
    for _ in range(2):
        _, state = jax.jit(tx.update)(GRADS, state, PARAMS, noise=draw(state))
        np.testing.assert_array_equal(ivon_state(state).weight_decay, [0.0, 0.5])
        assert {x.dtype.name for x in jax.tree.leaves(ivon_state(state).momentum)} == {"bfloat16"}


# masked


NESTED = {"body": PARAMS, "head": {"v": jnp.array([1.0, 2.0, 3.0])}}
NESTED_GRADS = {"body": GRADS, "head": {"v": jnp.array([-1.0, 0.5, 2.0])}}
MASKS = {
    "tree": {"body": {"b": True, "w": True}, "head": {"v": False}},
    "prefix": {"body": True, "head": False},
    "callable": lambda tree: {"body": True, "head": jax.tree.map(lambda x: False, tree["head"])},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_leaves_are_not_owned_and_their_raw_gradient_passes_on(mask):
    tx = optax.masked(base(), mask)
    state = tx.init(NESTED)
    alone = base()
    alone_state = alone.init(PARAMS)
    for field in (ivon_state(state).mean, ivon_state(state).hess, ivon_state(state).momentum):
        assert len(jax.tree.leaves(field)) == 2
    sample, noise = sample_params(KEY, state, NESTED)
    assert jax.tree.structure(sample) == jax.tree.structure(noise) == jax.tree.structure(NESTED)
    chex.assert_trees_all_equal(noise["body"], draw(alone_state))
    chex.assert_trees_all_equal(sample["head"], NESTED["head"])
    np.testing.assert_array_equal(noise["head"]["v"], np.zeros(3))
    updates, state = tx.update(NESTED_GRADS, state, NESTED, noise=noise)
    expected, alone_state = alone.update(GRADS, alone_state, PARAMS, noise=noise["body"])
    chex.assert_trees_all_equal(updates["body"], expected)
    chex.assert_trees_all_equal(updates["head"], NESTED_GRADS["head"])
    chex.assert_trees_all_equal(posterior_mean(state)["body"], alone_state.mean)
    assert all(map(is_masked, jax.tree.leaves(posterior_mean(state)["head"], is_leaf=is_masked)))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_noise_may_be_a_full_tree_or_only_that_of_the_owned_leaves(mask):
    state = optax.masked(base(), mask).init(NESTED)
    owned_only, full = draw(state), draw(state, NESTED)
    assert len(jax.tree.leaves(owned_only)) == 2
    results = [
        optax.masked(base(), mask, mask_compatible_extra_args=masks_noise).update(
            NESTED_GRADS, state, NESTED, noise=noise
        )
        for noise in (owned_only, full)
        for masks_noise in (False, True)
    ]
    for result in results[1:]:
        chex.assert_trees_all_equal(result, results[0])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masked_works_inside_auto_sample(mask):
    tx = auto_sample(optax.masked(base(), mask), 0)
    alone = auto_sample(base(), 0)
    state, alone_state = tx.init(NESTED), alone.init(PARAMS)
    updates, state = tx.update(NESTED_GRADS, state, NESTED)
    expected, alone_state = alone.update(GRADS, alone_state, PARAMS)
    chex.assert_trees_all_equal(updates["body"], expected)
    chex.assert_trees_all_equal(updates["head"], NESTED_GRADS["head"])
    mean = posterior_mean(state, NESTED)
    chex.assert_trees_all_equal(mean["body"], posterior_mean(alone_state))
    chex.assert_trees_all_equal(mean["head"], NESTED["head"])


def test_a_weight_decay_mask_for_all_parameters_fits_inside_masked():
    decay = {"body": {"b": False, "w": True}, "head": {"v": True}}
    tx = optax.masked(base(mask=decay), MASKS["prefix"])
    state = tx.init(NESTED)
    np.testing.assert_allclose(ivon_state(state).weight_decay, [0.0, 0.01])
    _, state = tx.update(NESTED_GRADS, state, NESTED, noise=draw(state))
    np.testing.assert_allclose(ivon_state(state).weight_decay, [0.0, 0.01])


# partition


# optax.adam raises a float to an integer step count.
adam_promotion = functools.partial(jax.numpy_dtype_promotion, "standard")
LABELS = {"body": "bayes", "head": "point"}


def test_ivon_beside_adam_updates_only_its_own_leaves():
    adam = optax.adam(0.01)
    tx = optax.partition({"bayes": base(), "point": adam}, LABELS)
    state = tx.init(NESTED)
    sample, noise = sample_params(KEY, state, NESTED)
    chex.assert_trees_all_equal(sample["head"], NESTED["head"])
    alone = base()
    expected, _ = alone.update(GRADS, alone.init(PARAMS), PARAMS, noise=noise["body"])
    with adam_promotion():
        updates, state = tx.update(NESTED_GRADS, state, NESTED, noise=noise)
        adam_updates, _ = adam.update(NESTED_GRADS["head"], adam.init(NESTED["head"]))
    chex.assert_trees_all_equal(updates["body"], expected)
    chex.assert_trees_all_equal(updates["head"], adam_updates)
    # The posterior of a leaf that IVON does not own is a point.
    q = posterior(state, NESTED)
    chex.assert_trees_all_equal(q.mean["head"], NESTED["head"])
    assert np.all(np.isposinf(q.precision["head"]["v"]))


def test_ivon_beside_adam_under_auto_sample():
    tx = auto_sample(optax.partition({"bayes": base(), "point": optax.adam(0.01)}, LABELS), 0)
    adam, alone = optax.adam(0.01), auto_sample(base(), 0)
    with adam_promotion():
        updates, _ = tx.update(NESTED_GRADS, tx.init(NESTED), NESTED)
        adam_updates, _ = adam.update(NESTED_GRADS["head"], adam.init(NESTED["head"]))
    chex.assert_trees_all_equal(updates["head"], adam_updates)
    chex.assert_trees_all_equal(updates["body"], alone.update(GRADS, alone.init(PARAMS), PARAMS)[0])


def _two_ivons() -> optax.GradientTransformationExtraArgs:
    wide = ivon(0.5, ess=10.0, hess_init=0.1, weight_decay=0.0)
    return optax.partition({"bayes": base(), "point": wide}, LABELS)


def test_two_ivons_with_different_settings_own_disjoint_leaves():
    tx, first = _two_ivons(), base()
    second = ivon(0.5, ess=10.0, hess_init=0.1, weight_decay=0.0)
    state = tx.init(NESTED)
    # One call samples both, with and without the parameters.
    sample, noise = sample_params(KEY, state, NESTED)
    chex.assert_trees_all_equal(sample_params(KEY, state), (sample, noise))
    q = posterior(state)
    np.testing.assert_allclose(q.precision["body"]["w"], np.full((2, 2), 101.0), rtol=1e-6)
    np.testing.assert_allclose(q.precision["head"]["v"], np.ones(3), rtol=1e-6)
    updates, state = tx.update(NESTED_GRADS, state, NESTED, noise=noise)
    for part, alone in (("body", first), ("head", second)):
        alone_state = alone.init(NESTED[part])
        expected, alone_state = alone.update(
            NESTED_GRADS[part], alone_state, NESTED[part], noise=noise[part]
        )
        chex.assert_trees_all_equal(updates[part], expected)
        chex.assert_trees_all_equal(posterior_mean(state)[part], alone_state.mean)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_two_ivons_share_one_auto_sample(num_samples):
    tx = auto_sample(_two_ivons(), 0, num_samples=num_samples)
    params, state = NESTED, tx.init(NESTED)
    for _ in range(num_samples):
        updates, state = tx.update(NESTED_GRADS, state, params)
        params = optax.apply_updates(params, updates)
    mean = posterior_mean(state)
    assert jax.tree.structure(mean) == jax.tree.structure(NESTED)
    for old, new, sample in zip(*map(jax.tree.leaves, (NESTED, mean, params)), strict=True):
        assert np.all(old != new)
        assert np.all(sample != new)


def test_estimates_of_the_library_pass_through_partition():
    tx = _two_ivons()
    state = tx.init(NESTED)
    _, grads, hess = mc_value_and_grad(loss, 2)(KEY, state, params=NESTED)
    updates, state = tx.update(grads, state, NESTED, hess=hess)
    chex.assert_trees_all_close(
        optax.apply_updates(NESTED, updates), posterior_mean(state, NESTED), rtol=1e-6, atol=1e-6
    )


# Gradients that are not finite


NAN_GRADS = {**GRADS, "w": GRADS["w"].at[0, 1].set(jnp.nan)}


class FiniteForm(NamedTuple):
    wrap: Any
    explicit: bool


FINITE_FORMS = {
    "explicit": FiniteForm(base, explicit=True),
    "auto": FiniteForm(lambda: auto_sample(base(), 0), explicit=False),
    "auto_window": FiniteForm(lambda: auto_sample(base(), 0, num_samples=2), explicit=False),
}
every_finite_form = pytest.mark.parametrize("form", FINITE_FORMS.values(), ids=FINITE_FORMS)


def _extra(form: FiniteForm, state: Any) -> dict[str, Any]:
    return {"noise": draw(state)} if form.explicit else {}


@every_finite_form
def test_apply_if_finite_leaves_the_state_untouched_by_a_nan_gradient(form):
    tx = optax.apply_if_finite(form.wrap(), max_consecutive_errors=5)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    updates, state = update(GRADS, state, PARAMS, **_extra(form, state))
    params = optax.apply_updates(PARAMS, updates)
    updates, after = update(NAN_GRADS, state, params, **_extra(form, state))
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
    # And the run goes on as if the bad batch had never been.
    a, _ = update(GRADS, after, params, **_extra(form, state))
    b, _ = update(GRADS, state, params, **_extra(form, state))
    chex.assert_trees_all_equal(a, b)


@every_finite_form
def test_without_apply_if_finite_a_nan_gradient_stays_in_the_mean(form):
    tx = form.wrap()
    params, state = PARAMS, tx.init(PARAMS)
    for grads in (GRADS, NAN_GRADS, GRADS, GRADS):
        updates, state = tx.update(grads, state, params, **_extra(form, state))
        params = optax.apply_updates(params, updates)
    poisoned = np.isnan(posterior_mean(state)["w"])
    np.testing.assert_array_equal(poisoned, [[False, True], [False, False]])
    np.testing.assert_array_equal(np.isnan(params["w"]), poisoned)
    assert np.all(np.isfinite(posterior_mean(state)["b"]))


def test_auto_sample_around_apply_if_finite_draws_a_new_sample_of_the_old_mean():
    tx = auto_sample(optax.apply_if_finite(base(), 5), 0)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    updates, after = tx.update(NAN_GRADS, state, params)
    chex.assert_trees_all_equal(ivon_state(after), ivon_state(state))
    moved = optax.apply_updates(params, updates)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(moved))
    assert np.all(moved["w"] != params["w"])


# MultiSteps


def test_multi_steps_around_auto_sample_holds_one_draw_per_window():
    window, micro_steps = 3, 7
    tx = optax.MultiSteps(auto_sample(base(), 0), every_k_schedule=window)

    @jax.jit
    def step(params, state, target):
        grads = jax.tree.map(lambda p: p - target, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    reference = auto_sample(base(), 0)
    held, reference_state, sums = PARAMS, reference.init(PARAMS), None
    params, state = PARAMS, tx.init(PARAMS)
    # MultiSteps divides its float accumulator by its integer step count.
    with jax.numpy_dtype_promotion("standard"):
        for t in range(micro_steps):
            before = params
            grads = jax.tree.map(lambda p, t=t: (p - t) / window, held)
            sums = grads if sums is None else jax.tree.map(jnp.add, sums, grads)
            params, state = step(params, state, float(t))
            if (t + 1) % window:
                chex.assert_trees_all_equal(params, before)
            else:
                assert np.all(params["w"] != before["w"])
                updates, reference_state = reference.update(sums, reference_state, held)
                held, sums = optax.apply_updates(held, updates), None
                chex.assert_trees_all_close(params, held, rtol=1e-5, atol=1e-6)
    assert int(ivon_state(state).count) == micro_steps // window


def test_multi_steps_around_explicit_ivon_while_one_sample_is_held():
    tx, plain = optax.MultiSteps(base(), every_k_schedule=2), base()
    state = tx.init(PARAMS)
    noise = draw(state)
    other = jax.tree.map(lambda g: -3.0 * g, GRADS)
    with jax.numpy_dtype_promotion("standard"):  # As above.
        update = jax.jit(tx.update)
        first, state = update(GRADS, state, PARAMS, noise=noise)
        second, state = update(other, state, PARAMS, noise=noise)
    chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, PARAMS))
    mean_grads = jax.tree.map(lambda g: -g, GRADS)
    expected, _ = plain.update(mean_grads, plain.init(PARAMS), PARAMS, noise=noise)
    chex.assert_trees_all_close(second, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        optax.apply_updates(PARAMS, second), posterior_mean(state), rtol=1e-6, atol=1e-6
    )


# scan, vmap, donation, abstract evaluation


def _step_of(tx: optax.GradientTransformation, explicit: bool) -> Any:
    def step(params, state, key):
        if explicit:
            point, noise = sample_params(key, state, params)
            updates, state = tx.update(jax.grad(loss)(point), state, params, noise=noise)
        else:
            updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


FORMS = {
    "explicit": (base, True),
    "auto": (lambda: auto_sample(base(), 0), False),
    "auto_window": (lambda: auto_sample(base(), 0, num_samples=2), False),
    "inject": (lambda: optax.inject_hyperparams(ivon)(0.1, ess=100.0), True),
    "auto_inject": (
        lambda: auto_sample(optax.chain(CLIP, optax.inject_hyperparams(ivon)(0.1, ess=100.0)), 0),
        False,
    ),
    "decay_mask": (lambda: base(mask=_is_matrix), True),
}
every_form = pytest.mark.parametrize(("build", "explicit"), FORMS.values(), ids=FORMS)


@pytest.mark.parametrize("name", ["explicit", "auto", "auto_window", "auto_inject"])
def test_scan_equals_the_python_loop(name):
    build, explicit = FORMS[name]
    tx = build()
    step = _step_of(tx, explicit)
    keys = jax.random.split(KEY, 3)

    @jax.jit
    def scanned(params, state, keys):
        return jax.lax.scan(lambda carry, key: (step(*carry, key), None), (params, state), keys)[0]

    params, state = PARAMS, tx.init(PARAMS)
    for key in keys:
        params, state = step(params, state, key)
    result = scanned(PARAMS, tx.init(PARAMS), keys)
    chex.assert_trees_all_close(result, (params, state), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["explicit", "auto", "auto_window"])
def test_vmap_trains_an_ensemble(name):
    build, explicit = FORMS[name]
    tx = build()
    step = _step_of(tx, explicit)
    params = jax.tree.map(lambda x: jnp.stack([x, x + 1.0]), PARAMS)
    states = jax.vmap(tx.init)(params)
    keys = jax.random.split(KEY, 2)
    if not explicit:
        states = jax.vmap(reseed)(states, keys)
    step_all = jax.jit(jax.vmap(step))
    reached, new_states = params, states
    for _ in range(2):
        reached, new_states = step_all(reached, new_states, keys)
    last = lambda tree: jax.tree.map(lambda x: x[-1], tree)  # noqa: E731
    alone, state = last((params, states))
    for _ in range(2):
        alone, state = step(alone, state, keys[-1])
    chex.assert_trees_all_close(last((reached, new_states)), (alone, state), rtol=1e-5, atol=1e-6)


def test_ensemble_members_draw_different_samples_after_reseed():
    tx = auto_sample(base(), 0)
    step = jax.jit(jax.vmap(_step_of(tx, explicit=False), (0, 0, None)))
    params = jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
    states = jax.vmap(tx.init)(params)
    same, _ = step(params, states, KEY)
    np.testing.assert_array_equal(same["w"][0], same["w"][1])
    states = jax.vmap(reseed)(states, jax.random.split(KEY, 2))
    different, states = step(params, states, KEY)
    assert np.all(different["w"][0] != different["w"][1])
    # Gradients at different samples: from the second step on the means differ as well.
    _, states = step(different, states, KEY)
    mean = posterior_mean(states)["w"]
    assert np.all(mean[0] != mean[1])


@every_form
def test_fresh_parameters_and_state_may_be_donated_together(build, explicit):
    tx = build()
    step = jax.jit(_step_of(tx, explicit), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    for key in jax.random.split(KEY, 2):
        before = [params, state]
        params, state = step(params, state, key)
        # A buffer shared by two leaves could not be donated twice; all of them were.
        assert all(x.is_deleted() for x in jax.tree.leaves(before[0]))
        owned = ivon_state(before[1])
        assert all(x.is_deleted() for x in jax.tree.leaves((owned.mean, owned.hess)))
    fresh = tx.init(PARAMS)  # The transformation itself keeps no donated buffer.
    chex.assert_trees_all_equal(ivon_state(fresh).mean, PARAMS)


def test_donating_the_state_leaves_parameters_posterior_and_other_states_alive():
    tx = auto_sample(base(), jax.random.key(3), num_samples=2)
    params = jax.tree.map(jnp.copy, PARAMS)
    state, other = tx.init(params), tx.init(params)
    q, mean = posterior(state), posterior_mean(state)
    jax.jit(tx.update, donate_argnums=(1,))(GRADS, state, params)
    assert all(x.is_deleted() for x in jax.tree.leaves(ivon_state(state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, other, q, mean)))


@every_form
def test_eval_shape_of_init_gives_the_avals_of_init(build, explicit):
    del explicit
    tx = build()
    abstract = jax.eval_shape(tx.init, PARAMS)
    concrete = tx.init(PARAMS)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for a, c in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (a.shape, a.dtype) == (c.shape, c.dtype)
    from_shapes = jax.eval_shape(
        tx.init, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    )
    assert from_shapes == abstract


# optax.tree


MAPPED = {
    **{name: build for name, (build, _) in FORMS.items()},
    "auto_decay_mask": lambda: auto_sample(base(mask={"b": False, "w": True}), 0),
    "decay_mask_reads_names": lambda: base(mask=lambda params: {k: k == "w" for k in params}),
    "multi_steps": lambda: optax.MultiSteps(auto_sample(base(), 0), every_k_schedule=2),
}


@pytest.mark.parametrize("build", MAPPED.values(), ids=MAPPED)
def test_map_params_reaches_mean_hess_and_momentum_and_nothing_else(build):
    tx = build()
    state = tx.init(PARAMS)
    specs = {"b": 10.0, "w": 20.0}
    mapped = optax.tree.map_params(
        tx,
        lambda x, spec: jnp.full_like(x, spec),
        state,
        specs,
        transform_non_params=lambda x: jnp.zeros_like(x),
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    part, old = ivon_state(mapped), ivon_state(state)
    for tree in (part.mean, part.hess, part.momentum):
        np.testing.assert_array_equal(tree["b"], np.full(2, 10.0))
        np.testing.assert_array_equal(tree["w"], np.full((2, 2), 20.0))
    for x, like in (
        (part.count, old.count),
        (part.ess, old.ess),
        (part.weight_decay, old.weight_decay),
    ):
        np.testing.assert_array_equal(x, np.zeros(like.shape))


def test_map_params_skips_the_leaves_that_masked_leaves_out():
    tx = optax.masked(base(), {"b": False, "w": True})
    mapped = optax.tree.map_params(
        tx,
        lambda x, spec: x if is_masked(x) else spec,
        tx.init(PARAMS),
        {"b": "replicated", "w": "sharded"},
        transform_non_params=lambda x: "replicated",
        is_leaf=is_masked,
    )
    part = ivon_state(mapped)
    assert part.mean == {"b": optax.MaskedNode(), "w": "sharded"}
    assert part.count == part.ess == part.weight_decay == "replicated"


@every_form
def test_optax_tree_get_finds_hess_and_mean(build, explicit):
    del explicit
    state = build().init(PARAMS)
    chex.assert_trees_all_equal(optax.tree.get(state, "hess"), ivon_state(state).hess)
    chex.assert_trees_all_equal(optax.tree.get(state, "mean"), PARAMS)


def test_optax_tree_set_replaces_hess():
    state = auto_sample(optax.chain(CLIP, base()), 0).init(PARAMS)
    new = jax.tree.map(lambda x: jnp.full_like(x, 3.0), PARAMS)
    state = optax.tree.set(state, hess=new)
    np.testing.assert_allclose(posterior(state).precision["b"], np.full(2, 301.0), rtol=1e-6)


# Leaves of all kinds


def _train_one(tree: Any, grads: Any) -> tuple[Any, Any]:
    """One explicit and two automatic steps; the parameters that they reach."""
    tx = base()
    state = tx.init(tree)
    _, noise = sample_params(KEY, state, tree)
    updates, _ = tx.update(grads, state, tree, noise=noise)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)
    reached = optax.apply_updates(tree, updates)
    auto = auto_sample(base(), 0, num_samples=2)
    automatic, state = tree, auto.init(tree)
    for _ in range(2):
        updates, state = auto.update(grads, state, automatic)
        automatic = optax.apply_updates(automatic, updates)
    return reached, automatic


def test_none_leaves_stay_none():
    # As equinox.filter leaves them.
    tree = {"a": PARAMS["w"], "activation": None, "layers": [None, PARAMS["b"]]}
    grads = {"a": GRADS["w"], "activation": None, "layers": [None, GRADS["b"]]}
    state = base().init(tree)
    assert state.mean["activation"] is None
    sample, noise = sample_params(KEY, state)
    assert jax.tree.structure(sample) == jax.tree.structure(noise) == jax.tree.structure(tree)
    for reached in _train_one(tree, grads):
        assert reached["activation"] is None
        assert reached["layers"][0] is None
        assert np.all(reached["a"] != tree["a"])


MIXED = {
    "flag": jnp.array(True),
    "index": jnp.array([0, 2], jnp.int32),
    "w": jnp.array([1.0, -2.0, 3.0]),
}


def _mixed_loss(tree: Any) -> jax.Array:
    picked = tree["w"][tree["index"]]
    return jnp.where(tree["flag"], jnp.sum(jnp.square(picked)), 0.0)


def test_integer_and_bool_leaves_with_float0_gradients_are_not_owned():
    grads = jax.grad(_mixed_loss, allow_int=True)(MIXED)
    assert grads["index"].dtype == grads["flag"].dtype == jax.dtypes.float0
    state = base().init(MIXED)
    for tree in (state.mean, state.hess, state.momentum):
        assert is_masked(tree["flag"])
        assert is_masked(tree["index"])
    sample, noise = sample_params(KEY, state, MIXED)
    np.testing.assert_array_equal(noise["index"], np.zeros(2))
    chex.assert_trees_all_equal(
        {k: sample[k] for k in ("flag", "index")}, {k: MIXED[k] for k in ("flag", "index")}
    )
    for reached in _train_one(MIXED, grads):
        for name in ("flag", "index"):
            assert reached[name].dtype == MIXED[name].dtype
            np.testing.assert_array_equal(reached[name], MIXED[name])
        assert np.all(reached["w"] != MIXED["w"])


def test_float0_gradients_pass_through_when_no_parameters_are_given():
    grads = jax.grad(_mixed_loss, allow_int=True)(MIXED)
    tx = base()
    state = tx.init(MIXED)
    updates, _ = tx.update(grads, state, noise=draw(state))
    assert updates["index"].dtype == updates["flag"].dtype == jax.dtypes.float0


def test_the_estimator_differentiates_around_integer_leaves():
    tx = base()
    state = tx.init(MIXED)
    estimate = jax.jit(mc_value_and_grad(_mixed_loss, 2))
    _, grads, hess = estimate(KEY, state, params=MIXED)
    updates, state = tx.update(grads, state, MIXED, hess=hess)
    reached = optax.apply_updates(MIXED, updates)
    np.testing.assert_array_equal(reached["index"], MIXED["index"])
    np.testing.assert_array_equal(reached["w"], posterior_mean(state)["w"])


EMPTY_TREES = [{}, (), [], {"a": {}, "b": None}, {"only": jnp.arange(2)}]


@pytest.mark.parametrize("tree", EMPTY_TREES, ids=str)
def test_a_tree_without_floating_leaves_trains_to_itself(tree):
    for reached in _train_one(tree, jax.tree.map(lambda x: np.zeros(2, jax.dtypes.float0), tree)):
        chex.assert_trees_all_equal(reached, tree)


@pytest.mark.parametrize(
    "tree", [jnp.array(2.0), np.float32(2.0), (jnp.array(2.0), np.ones(2, "f"))]
)
def test_scalar_and_numpy_leaves_train(tree):
    for reached in _train_one(tree, jax.tree.map(jnp.ones_like, tree)):
        assert jax.tree.structure(reached) == jax.tree.structure(tree)
        for new, old in zip(jax.tree.leaves(reached), jax.tree.leaves(tree), strict=True):
            assert new.shape == np.shape(old)
            assert np.all(new != old)


def test_python_float_leaves_train_as_in_other_optax_transformations():
    # init takes them, and so does every optax optimizer; update has to follow.
    reached, _ = _train_one({"scale": 2.0}, {"scale": 1.0})
    expected, _ = _train_one({"scale": jnp.array(2.0)}, {"scale": jnp.array(1.0)})
    np.testing.assert_allclose(reached["scale"], expected["scale"], rtol=1e-6)


def test_complex_leaves_are_refused_by_path():
    tree = {"layer": [PARAMS["w"], {"phase": jnp.ones(2, jnp.complex64)}]}
    for tx in (base(), auto_sample(base(), 0), optax.chain(CLIP, base())):
        with pytest.raises(TypeError, match=re.escape("['layer'][1]['phase']")):
            tx.init(tree)
