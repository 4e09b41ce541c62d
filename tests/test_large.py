"""Models of more than 2³¹ parameters, and leaves of more than 2³¹ elements, traced and not run."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import ivon_jax as ij

KEY = jax.random.key(0)
LEAVES = {f"layer {i}": (300_000_000,) for i in range(10)} | {"embedding": (50_000, 50_000)}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in LEAVES.items()}
NARROW = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in LEAVES.items()}
X, Y = jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)

TX = ij.ivon(0.1, ess=1e9)
STATE = TX.init(PARAMS)
Q = jax.eval_shape(ij.posterior, STATE)


def total(params):
    return sum(jnp.sum(x).astype(jnp.float32) for x in jax.tree.leaves(params))


def outputs(params, x):
    return x[:, None] * total(params) * jnp.ones((1, 3))


def loss(params, x):
    return jnp.mean(x) * total(params)


SAMPLED = {
    "predict_log_probs": ij.predict_log_probs(outputs, 2),
    "predict_moments": ij.predict_moments(outputs, 2, noise_variance=1.0),
    "predict_draws": ij.predict_draws(outputs, 2, noise_variance=1.0),
    "predict_samples": ij.predict_samples(outputs, 2),
    "mc_value_and_grad": ij.mc_value_and_grad(loss, 2),
}
OF_A_STATE = {
    "diagnostics": lambda state: ij.diagnostics(state, dict(ess=1e9), loss=1.0, num_examples=10),
    "posterior": ij.posterior,
    "posterior_mean": ij.posterior_mean,
    "prior_of": ij.prior_of,
    "kl_divergence": lambda state: ij.kl_divergence(state, ij.prior_of(state)),
    "with_ess": lambda state: ij.with_ess(state, 1e8),
    "with_mean": lambda state: ij.with_mean(state, ij.posterior_mean(state)),
    "sample_params": lambda state: ij.sample_params(KEY, state),
    "prune": lambda state: ij.prune(ij.posterior(state), fraction=0.5),
    "signal_to_noise": lambda state: ij.signal_to_noise(ij.posterior(state)),
    "merge": lambda state: ij.merge([ij.posterior(state)] * 2, base=ij.prior_of(state)),
    "task_arithmetic": lambda state: ij.task_arithmetic([state.mean] * 2, state.mean),
}


@pytest.mark.parametrize("name", OF_A_STATE)
def test_what_takes_a_state_traces(name):
    jax.eval_shape(OF_A_STATE[name], STATE)


@pytest.mark.parametrize("params", [PARAMS, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SAMPLED)
def test_what_draws_samples_traces(name, params):
    use = functools.partial(SAMPLED[name], KEY)
    jax.eval_shape(lambda state, x, params: use(state, x, params=params), STATE, X, params)


def test_linearized_outputs_trace():
    jax.eval_shape(lambda q, x: ij.linearize(outputs)(q, x), Q, X)


@pytest.mark.parametrize("use", [ij.sensitivity, ij.leave_one_out])
def test_perturbations_trace(use):
    f = use(outputs, optax.softmax_cross_entropy_with_integer_labels)
    jax.eval_shape(lambda q, x, y: f(q, x, targets=y), Q, X, Y)


@pytest.mark.parametrize("params", [PARAMS, NARROW], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options", [{}, {"store_mean": False}, {"antithetic": True}, {"num_samples": 4}], ids=str
)
def test_auto_sample_traces(params, options):
    if params is NARROW and "store_mean" in options:
        params = PARAMS  # the lean form takes no narrower parameters
    tx = ij.auto_sample(optax.chain(optax.clip_by_global_norm(1.0), TX), 0, **options)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert jax.tree.leaves(updates) == jax.tree.leaves(params)
    assert jax.tree.leaves(state) == jax.tree.leaves(tx.init(params))
