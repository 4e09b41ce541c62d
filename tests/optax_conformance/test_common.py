"""What optax asks of every contributed optimizer, asked of IVON.

The list of behaviours is that of optax's own `contrib/_common_test.py`; the code is ours.
Every test runs for the explicit form, whose loop draws the sample, and for two forms of
`auto_sample`, whose loop knows nothing of sampling.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import auto_sample, ivon, posterior_mean, sample_params

DTYPES = ["float16", "bfloat16", "float32", "float64"]


class Form(NamedTuple):
    """A way of using IVON: how the transformation is built, and who draws the sample."""

    build: Callable[..., optax.GradientTransformationExtraArgs]
    explicit: bool


def _auto(**hyperparams: Any) -> optax.GradientTransformationExtraArgs:
    return auto_sample(ivon(**hyperparams), key=0)


def _auto_clipped(**hyperparams: Any) -> optax.GradientTransformationExtraArgs:
    return auto_sample(optax.chain(optax.clip_by_global_norm(1e3), ivon(**hyperparams)), key=0)


FORMS = {
    "explicit": Form(ivon, explicit=True),
    "auto": Form(_auto, explicit=False),
    "auto_clipped": Form(_auto_clipped, explicit=False),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)

HYPERPARAMS = {"learning_rate": 0.1, "ess": 1000.0, "weight_decay": 1e-3, "b2": 0.999}


class Target(NamedTuple):
    """A function to minimise, and what it takes to do so."""

    initial: list[float]
    minimum: list[float]
    objective: Callable[[jax.Array], jax.Array]
    steps: int
    hyperparams: dict[str, float]


def _parabola(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x - jnp.array([1.0, -1.0, 1.0], x.dtype)))


def _rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.square(1.0 - x[0]) + 100.0 * jnp.square(x[1] - jnp.square(x[0]))


TARGETS = {
    "parabola": Target(
        initial=[-1.0, 10.0, 1.0],
        minimum=[1.0, -1.0, 1.0],
        objective=_parabola,
        steps=3000,  # an unlucky first draw makes h large and the steps short
        hyperparams={"learning_rate": 0.1, "ess": 1e4, "weight_decay": 0.0, "b2": 0.999},
    ),
    # The diagonal of its Hessian is 2 and 200 at the start, 802 and 200 at the minimum.
    "rosenbrock": Target(
        initial=[0.0, 0.0],
        minimum=[1.0, 1.0],
        objective=_rosenbrock,
        steps=20_000,
        hyperparams={
            "learning_rate": 0.5,
            "ess": 1e6,
            "weight_decay": 0.0,
            "b2": 0.9999,
            "hess_init": 500.0,
            "rescale_lr": False,
        },
    ),
}


@contextlib.contextmanager
def precision_for(dtype: str) -> Iterator[None]:
    """Enables 64-bit types while they are tested."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", dtype == "float64")
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def gradient(
    form: Form, objective: Callable[..., jax.Array], params: Any, state: Any, key: jax.Array
) -> tuple[Any, dict[str, Any]]:
    """The gradient where this form wants it, and the extra arguments of its update."""
    if not form.explicit:
        return jax.grad(objective)(params), {}
    sample, noise = sample_params(key, state, params)
    return jax.grad(objective)(sample), {"noise": noise}


def make_step(
    form: Form, tx: optax.GradientTransformation, objective: Callable[..., jax.Array]
) -> Callable[..., tuple[Any, Any]]:
    def step(params: Any, state: Any, key: jax.Array, **more: Any) -> tuple[Any, Any]:
        grads, extra_args = gradient(form, objective, params, state, key)
        updates, state = tx.update(grads, state, params, **extra_args, **more)
        return optax.apply_updates(params, updates), state

    return step


_COMPILED: list[str] = []


def _record_compilation(event: str, duration: float, **kwargs: Any) -> None:
    del duration, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(event)


jax.monitoring.register_event_duration_secs_listener(_record_compilation)


@every_form
def test_unknown_extra_arguments_are_ignored_and_a_second_call_compiles_nothing(form):
    tx = form.build(**HYPERPARAMS)
    step = jax.jit(make_step(form, tx, _parabola))
    params = jnp.array([-1.0, 10.0, 1.0])
    state = tx.init(params)
    keys = list(jax.random.split(jax.random.key(0), 2))
    value = jnp.float32(1.0)
    params, state = step(params, state, keys[0], value=value, an_argument_of_somebody_else=value)
    before = len(_COMPILED)
    step(params, state, keys[1], value=value, an_argument_of_somebody_else=value)
    assert len(_COMPILED) == before
    assert before > 0  # The listener does hear of compilations.


@every_form
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_scan_converges_to_the_minimum(form, target):
    tx = form.build(**target.hyperparams)
    step = make_step(form, tx, target.objective)

    @jax.jit
    def train(params, state, key):
        def body(carry, t):
            return step(*carry, jax.random.fold_in(key, t)), None

        steps = jnp.arange(target.steps, dtype=jnp.int32)
        return jax.lax.scan(body, (params, state), steps)[0]

    params = jnp.array(target.initial)
    params, state = train(params, tx.init(params), jax.random.key(0))
    mean = posterior_mean(state)
    np.testing.assert_allclose(mean, target.minimum, rtol=3e-2, atol=3e-2)
    if form.explicit:
        np.testing.assert_array_equal(params, mean)
    else:
        # The loop's parameters are a sample, but with this ess a narrow one.
        assert np.all(params != mean)
        np.testing.assert_allclose(params, target.minimum, rtol=6e-2, atol=6e-2)


@every_form
def test_map_params_with_the_identity_changes_nothing(form):
    tx = form.build(**HYPERPARAMS)
    state = tx.init(jnp.array([1.0, 2.0]))
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    chex.assert_trees_all_equal(mapped, state)


@every_form
def test_inject_hyperparams_gives_the_same_updates_and_state(form):
    hyperparams = {**HYPERPARAMS, "b1": 0.8, "hess_init": 0.5, "clip_radius": 0.3}

    # inject_hyperparams reads the names of the hyperparameters from the signature.
    def factory(learning_rate, ess, weight_decay, b1, b2, hess_init, clip_radius):
        return form.build(
            learning_rate=learning_rate,
            ess=ess,
            weight_decay=weight_decay,
            b1=b1,
            b2=b2,
            hess_init=hess_init,
            clip_radius=clip_radius,
        )

    plain = factory(**hyperparams)
    injected = optax.inject_hyperparams(factory)(**hyperparams)
    params = jnp.array([-1.0, 2.0])
    grads = jnp.array([1.0, -0.5])

    def two_steps(tx):
        state = tx.init(params)

        @jax.jit
        def step(params, state, key):
            extra_args = {"noise": sample_params(key, state)[1]} if form.explicit else {}
            updates, state = tx.update(grads, state, params, **extra_args)
            return optax.apply_updates(params, updates), state

        current = params
        for key in jax.random.split(jax.random.key(0), 2):
            current, state = step(current, state, key)
        return current, state

    reached, state = two_steps(plain)
    injected_reached, injected_state = two_steps(injected)
    np.testing.assert_allclose(injected_reached, reached, rtol=1e-5)
    chex.assert_trees_all_close(injected_state.inner_state, state, rtol=1e-5, atol=1e-6)


@every_form
@every_dtype
def test_updates_have_the_dtype_of_the_parameters(form, dtype):
    with precision_for(dtype):
        tx = form.build(**HYPERPARAMS)
        params = {"a": jnp.array([1.0, 2.0], dtype), "b": jnp.array(3.0, dtype)}

        def run(params, key):
            state = tx.init(params)
            grads, extra_args = gradient(
                form, lambda p: jnp.sum(jnp.square(p["a"])) * p["b"], params, state, key
            )
            updates, state = tx.update(grads, state, params, **extra_args)
            without_params = tx.update(grads, state, **extra_args)[0] if form.explicit else None
            return updates, without_params, posterior_mean(state)

        # Types are decided while tracing; nothing needs to run.
        updates, without_params, mean = jax.eval_shape(run, params, jax.random.key(0))
        wide = "float64" if dtype == "float64" else "float32"
        assert {x.dtype.name for x in jax.tree.leaves(updates)} == {dtype}
        assert {x.dtype.name for x in jax.tree.leaves(without_params)} <= {dtype}
        assert {x.dtype.name for x in jax.tree.leaves(mean)} == {wide}


@every_form
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_multi_steps_updates_nothing_before_the_window_ends(form, dtype):
    tx = optax.MultiSteps(form.build(**HYPERPARAMS), every_k_schedule=4)
    params = jnp.array([1.0, 2.0], dtype)

    @jax.jit
    def first_update(params, state, key):
        grads, extra_args = gradient(form, lambda x: jnp.sum(jnp.square(x)), params, state, key)
        return tx.update(grads, state, params, **extra_args)

    state = tx.init(params)
    # MultiSteps divides its float accumulator by its integer step count.
    with jax.numpy_dtype_promotion("standard"):
        updates, new_state = first_update(params, state, jax.random.key(0))
    np.testing.assert_array_equal(updates, np.zeros(2))
    assert updates.dtype == params.dtype
    chex.assert_trees_all_equal(new_state.inner_opt_state, state.inner_opt_state)


@every_form
@every_dtype
def test_update_and_identity_are_interchangeable_branches_of_cond(form, dtype):
    with precision_for(dtype):
        tx = form.build(**HYPERPARAMS)
        params = jnp.array([-1.0, 10.0, 1.0], dtype)

        def step(params, state, key):
            grads, extra_args = gradient(form, _parabola, params, state, key)
            # lax.cond compares the types of its branches while tracing.
            updates, state = jax.lax.cond(
                jax.random.bernoulli(key),
                lambda: tx.update(grads, state, params, **extra_args),
                lambda: (jnp.zeros_like(params), state),
            )
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        new_params, new_state = jax.eval_shape(step, params, state, jax.random.key(0))
        assert new_params.dtype.name == dtype
        assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
        assert jax.tree.map(jnp.result_type, new_state) == jax.tree.map(jnp.result_type, state)


@every_form
def test_a_constant_schedule_equals_the_constant(form):
    def train(learning_rate):
        tx = form.build(**{**HYPERPARAMS, "learning_rate": learning_rate})
        step = jax.jit(make_step(form, tx, _parabola))
        params = jnp.array([-1.0, 10.0, 1.0])
        state = tx.init(params)
        for key in jax.random.split(jax.random.key(0), 5):
            params, state = step(params, state, key)
        return np.asarray(params)

    np.testing.assert_allclose(train(optax.constant_schedule(0.1)), train(0.1), rtol=1e-6)
