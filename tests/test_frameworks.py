"""Prediction and the rest with Flax linen, Flax nnx and equinox, BatchNorm included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import (
    ivon,
    leave_one_out,
    linearize,
    posterior,
    predict_log_probs,
    predict_samples,
    sample_params,
)

linen = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 0, 1, 2])


def linen_model():
    model = linen.Sequential([linen.Dense(5), jnp.tanh, linen.Dense(3)])
    params = model.init(KEY, X)
    return params, model.apply


def nnx_model():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.inner, self.outer = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.outer(jnp.tanh(self.inner(x)))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest)(x)


def equinox_model():
    model = eqx.nn.MLP(4, 3, 5, 1, jnp.tanh, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: jax.vmap(eqx.combine(params, static))(x)


@pytest.mark.parametrize("build", [linen_model, nnx_model, equinox_model])
def test_every_use_takes_the_model(build):
    params, apply = build()
    state = ivon(0.1, 10).init(params)
    # nnx.merge needs the structure of nnx.State, which the parameters give.
    log_probs = jax.jit(predict_log_probs(apply, 4))(KEY, state, X, params=params)
    samples = [sample_params(k, state, params)[0] for k in jax.random.split(KEY, 4)]
    expected = np.mean([jax.nn.softmax(apply(s, X)) for s in samples], axis=0)
    np.testing.assert_allclose(np.exp(log_probs), expected, rtol=1e-4)
    lin = linearize(apply, data_batch_size=6)(state, X, params=params)
    np.testing.assert_allclose(lin.mean, apply(params, X), rtol=1e-5)
    loss = lambda f, y: -jax.nn.log_softmax(f)[y]  # noqa: E731
    estimate = leave_one_out(apply, loss)(posterior(state), X, targets=LABELS, params=params)
    assert np.all(np.isfinite(estimate.loss))


def test_batch_norm_statistics_are_recomputed_for_each_sample():
    """The recipe of the README: statistics of reference data, inside apply_fn, momentum 0."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            x = linen.Dense(5)(x)
            x = linen.BatchNorm(use_running_average=not train, momentum=0.0)(x)
            return linen.Dense(3)(jnp.tanh(x))

    model, reference = Net(), 3 * X + 1
    variables = model.init(KEY, X, train=True)
    params, stats = variables["params"], variables["batch_stats"]

    def apply_fn(params, x):
        variables = {"params": params, "batch_stats": stats}
        _, fresh = model.apply(variables, reference, train=True, mutable=["batch_stats"])
        return model.apply({"params": params, **fresh}, x, train=False)

    state = ivon(0.1, 10).init(params)
    outputs = predict_samples(apply_fn, 3)(KEY, state, X)
    for key, output in zip(jax.random.split(KEY, 3), outputs, strict=True):
        sample, _ = sample_params(key, state)
        hidden = reference @ sample["Dense_0"]["kernel"] + sample["Dense_0"]["bias"][None]
        mean, variance = hidden.mean(0), hidden.var(0)
        x = X @ sample["Dense_0"]["kernel"] + sample["Dense_0"]["bias"][None]
        x = (x - mean[None]) / np.sqrt(variance + 1e-5)[None]
        x = x * sample["BatchNorm_0"]["scale"][None] + sample["BatchNorm_0"]["bias"][None]
        expected = np.tanh(x) @ sample["Dense_1"]["kernel"] + sample["Dense_1"]["bias"][None]
        np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-4)
