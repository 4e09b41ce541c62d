"""A small GPT as in ports of nanoGPT: decay groups by `multi_transform`, accumulation, a clip."""

import jax
import jax.numpy as jnp
import optax
import pytest

from ivon_jax import auto_sample, ivon, learning_status, posterior_mean

nn = pytest.importorskip("flax.linen")

VOCABULARY, BLOCK = 11, 16


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))


class GPT(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, 16)(tokens) + nn.Embed(BLOCK, 16)(jnp.arange(tokens.shape[1]))
        return nn.Dense(VOCABULARY, use_bias=False)(nn.LayerNorm()(Block()(x)))


def configure_optimizers(params, settings, accumulation):
    """nanoGPT's two groups: matrices decay, vectors do not."""
    groups = {
        "decay": ivon(**settings, weight_decay=1e-4),
        "no_decay": ivon(**settings, weight_decay=0.0),
    }
    labels = jax.tree.map(lambda p: "decay" if p.ndim >= 2 else "no_decay", params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(groups, labels))
    return auto_sample(tx, key=0, num_samples=accumulation)


def test_a_nanogpt_loop_with_decay_groups_and_accumulation():
    model = GPT()
    start = jax.random.randint(jax.random.key(0), (64, 1), 0, VOCABULARY)
    tokens = (start + 3 * jnp.arange(BLOCK)) % VOCABULARY  # the next one is three on
    params = model.init(jax.random.key(1), tokens[:, :-1])["params"]
    settings = {"learning_rate": 0.1, "ess": 1e5, "hess_init": 0.1, "b2": 0.99}
    settings["precision_floor"] = 0.1  # as learning_status advises
    tx = configure_optimizers(params, settings, accumulation=2)

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def train_step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for i in range(200):
        batch = tokens[32 * (i % 2) :][:32]
        params, opt_state, _ = train_step(params, opt_state, batch)
    assert jax.jit(loss_fn)(posterior_mean(opt_state), tokens) < 0.3  # log 11 is 2.4
    assert learning_status(opt_state, settings, params=params).kind == "yes"
