"""A variational autoencoder as in flax's examples: nnx modules with random streams, bfloat16."""

import jax
import jax.numpy as jnp
import optax
import pytest

from ivon_jax import auto_sample, ivon, learning_status, posterior_mean

nnx = pytest.importorskip("flax.nnx")

PIXELS = 16


class Encoder(nnx.Module):
    def __init__(self, rngs, dtype):
        self.linear1 = nnx.Linear(PIXELS, 24, rngs=rngs, param_dtype=dtype)
        self.mean = nnx.Linear(24, 2, rngs=rngs, param_dtype=dtype)
        self.std = nnx.Linear(24, 2, rngs=rngs, param_dtype=dtype)
        self.rngs = rngs

    def __call__(self, x):
        x = jax.nn.relu(self.linear1(x))
        mean, std = self.mean(x), jnp.exp(self.std(x))
        kl = 0.5 * jnp.mean(jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std), axis=-1))
        return mean + std * jax.random.normal(self.rngs.noise(), mean.shape, mean.dtype), kl


class VAE(nnx.Module):
    def __init__(self, rngs, dtype):
        self.encoder = Encoder(rngs, dtype)
        self.linear1 = nnx.Linear(2, 24, rngs=rngs, param_dtype=dtype)
        self.linear2 = nnx.Linear(24, PIXELS, rngs=rngs, param_dtype=dtype)

    def __call__(self, x):
        z, kl = self.encoder(x)
        return self.linear2(jax.nn.relu(self.linear1(z))), kl


def loss_fn(model, x):
    """The negative ELBO per example: a sum over pixels, a mean over the batch."""
    logits, kl = model(x)
    pixels = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), x)
    return jnp.mean(jnp.sum(pixels, axis=-1)) + kl.astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_nnx_autoencoder_is_evaluated_at_the_mean_and_goes_on(dtype):
    prototypes = jax.random.bernoulli(jax.random.key(0), 0.5, (4, PIXELS))
    x = jnp.tile(prototypes, (50, 1)).astype(jnp.float32)
    model = VAE(nnx.Rngs(0, noise=1), dtype)
    settings = {"learning_rate": 0.1, "ess": 10 * len(x), "hess_init": 1.0, "b2": 0.99}
    settings["precision_floor"] = 0.1  # as learning_status advises
    optimizer = nnx.Optimizer(model, auto_sample(ivon(**settings), key=0), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_fn)(model, x)
        optimizer.update(model, grads)
        return loss

    @nnx.jit
    def evaluate(model, optimizer, x):
        """The loop's model keeps its sample: the mean goes into another one."""
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        mean = optax.tree.cast_like(posterior_mean(optimizer.opt_state, params), params)
        return loss_fn(nnx.merge(graphdef, mean, rest), x)

    start = evaluate(model, optimizer, x)
    for _ in range(3):
        for _ in range(60):
            train_step(model, optimizer, x)
        now = evaluate(model, optimizer, x)
        assert model.linear1.kernel.get_value().dtype == dtype
    assert now < 0.6 * start
    params = nnx.state(model, nnx.Param)
    assert learning_status(optimizer.opt_state, settings, params=params).kind in ("yes", "at risk")
