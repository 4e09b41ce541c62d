"""A small GPT as in miniGPT: plain JAX, an Explicit mesh, and buffers that are donated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ivon_jax import auto_sample, ivon, learning_status, posterior_mean

VOCABULARY, LENGTH, WIDTH = 13, 8, 16


def init(key):
    k = iter(jax.random.split(key, 8))
    normal = lambda *shape: jax.random.normal(next(k), shape) / shape[0] ** 0.5  # noqa: E731
    return {
        "embed": normal(VOCABULARY, WIDTH),
        "position": normal(LENGTH, WIDTH),
        "qkv": normal(WIDTH, 3 * WIDTH),
        "out": normal(WIDTH, WIDTH),
        "up": normal(WIDTH, 4 * WIDTH),
        "down": normal(4 * WIDTH, WIDTH),
        "head": normal(WIDTH, VOCABULARY),
    }


SPECS = {
    name: P(None, "model") if name in ("qkv", "up") else P() for name in init(jax.random.key(0))
}


def apply(params, tokens):
    x = params["embed"].at[tokens].get(out_sharding=P("batch", None, None)) + params["position"]
    q, k, v = jnp.split(jnp.einsum("btd,de->bte", x, params["qkv"], out_sharding=P("batch")), 3, -1)
    scores = jnp.einsum("bqd,bkd->bqk", q, k) / WIDTH**0.5
    scores = jnp.where(jnp.tri(LENGTH, dtype=bool), scores, -jnp.inf)
    x = x + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v) @ params["out"]
    hidden = jax.nn.gelu(jnp.einsum("btd,de->bte", x, params["up"], out_sharding=P("batch")))
    return (x + hidden @ params["down"]) @ params["head"]


def spec_of(name):
    return P(None, "model") if name in ("qkv", "up") else P()


def test_a_minigpt_loop_on_an_explicit_mesh_with_donated_buffers():
    mesh = jax.make_mesh((4, 2), ("batch", "model"), axis_types=(AxisType.Explicit,) * 2)
    settings = {"learning_rate": 0.1, "ess": 1e4, "hess_init": 0.1, "b2": 0.99}
    tx = auto_sample(optax.chain(optax.clip_by_global_norm(1.0), ivon(**settings)), key=0)
    start = np.arange(32)[:, None]
    tokens = (start + 2 * np.arange(LENGTH + 1)) % VOCABULARY

    def loss_fn(params, tokens):
        logits = apply(params, tokens[:, :-1])
        targets = jax.nn.one_hot(tokens[:, 1:], VOCABULARY)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def train_step(params, opt_state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        params = {k: put(x, spec_of(k)) for k, x in init(jax.random.key(0)).items()}
        tokens = put(tokens, P("batch"))
        opt_state = jax.jit(tx.init)(params)
        step = jax.jit(train_step, donate_argnums=(0, 1))
        for _ in range(150):
            params, opt_state, loss = step(params, opt_state, tokens)
            loss.block_until_ready()  # eight devices on two cores
        assert jax.jit(loss_fn)(posterior_mean(opt_state), tokens) < 0.3 < np.log(VOCABULARY)
        assert posterior_mean(opt_state)["up"].sharding == params["up"].sharding
        assert learning_status(opt_state, settings, params=params).kind == "yes"
    assert step._cache_size() <= 2  # jax tells P() from P(None, None), with AdamW as well
