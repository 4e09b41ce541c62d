"""A recurrent classifier as in equinox's examples: `optim.update(grads, opt_state)`, no params."""

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from ivon_jax import auto_sample, ivon, learning_status, posterior_mean, predict_samples

eqx = pytest.importorskip("equinox")


class RNN(eqx.Module):
    cell: eqx.nn.GRUCell
    linear: eqx.nn.Linear
    bias: jax.Array
    hidden_size: int = eqx.field(static=True)

    def __init__(self, in_size, out_size, hidden_size, *, key):
        ckey, lkey = jr.split(key)
        self.hidden_size = hidden_size
        self.cell = eqx.nn.GRUCell(in_size, hidden_size, key=ckey)
        self.linear = eqx.nn.Linear(hidden_size, out_size, use_bias=False, key=lkey)
        self.bias = jnp.zeros(out_size)

    def __call__(self, xs):
        def f(carry, x):
            return self.cell(x, carry), None

        out, _ = jax.lax.scan(f, jnp.zeros(self.hidden_size), xs)
        return (self.linear(out) + self.bias)[0]


def spirals(size, key):
    t = jnp.linspace(0, 2 * jnp.pi, 16)
    offset = jr.uniform(key, (size, 1), maxval=2 * jnp.pi)
    x1, x2 = jnp.sin(t + offset) / (1 + t), jnp.cos(t + offset) / (1 + t)
    y = jnp.arange(size) % 2
    x1 = jnp.where(y[:, None], -x1, x1)
    return jnp.stack([x1, x2], axis=2), y


def test_an_equinox_loop_without_params():
    model = RNN(2, 1, 8, key=jr.key(0))
    settings = {"learning_rate": 1.0, "ess": 25_600, "hess_init": 0.1, "b2": 0.99}
    settings["precision_floor"] = 0.1  # as learning_status advises
    optim = auto_sample(ivon(**settings), key=0)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    x, y = spirals(256, jr.key(1))

    @eqx.filter_value_and_grad
    def compute_loss(model):
        return optax.sigmoid_binary_cross_entropy(jax.vmap(model)(x), y).mean()

    @eqx.filter_jit
    def make_step(model, opt_state):
        loss, grads = compute_loss(model)
        updates, opt_state = optim.update(grads, opt_state)
        return loss, eqx.apply_updates(model, updates), opt_state

    losses = []
    for _ in range(300):
        loss, model, opt_state = make_step(model, opt_state)
        losses.append(float(loss))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    mean = eqx.combine(posterior_mean(opt_state, params), static)
    at_mean, _ = compute_loss(mean)
    assert at_mean < 0.5 < losses[0]
    outputs = predict_samples(lambda p, x: jax.vmap(eqx.combine(p, static))(x), 2)(
        jr.key(2), opt_state, x, params=params
    )
    assert outputs.shape == (2, 256)
    assert learning_status(opt_state, settings, params=params).kind in ("yes", "at risk")
