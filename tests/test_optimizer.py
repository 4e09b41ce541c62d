import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import auto_sample, ivon, mc_value_and_grad, posterior_mean, sample_params


def test_smoke():
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    loss = lambda p, x: jnp.mean((x @ p["w"] + p["b"][None]) ** 2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), ivon(0.1, ess=10))
    state = tx.init(params)
    x = jnp.ones((4, 3))
    s, n = sample_params(jax.random.key(0), state)
    u, state = jax.jit(tx.update)(jax.grad(loss)(s, x), state, params, noise=n)
    params = optax.apply_updates(params, u)
    for k in ("w", "b"):
        np.testing.assert_array_equal(params[k], posterior_mean(state)[k])
    f = mc_value_and_grad(loss, 6, batch_size=4, antithetic=True)
    for est in ("reparam", "gradsq", "hutchinson"):
        v, g, h = jax.jit(mc_value_and_grad(loss, 6, batch_size=4, antithetic=True, estimator=est))(jax.random.key(1), state, x)
        print(est, h)
    u, state = tx.update(g, state, params, hess=h)
    tx = auto_sample(tx, 0, mc_samples=3)
    st = tx.init(params)
    p = params
    for i in range(7):
        u, st = jax.jit(tx.update)(jax.grad(loss)(p, x), st, p)
        p = optax.apply_updates(p, u)
    print(st)
