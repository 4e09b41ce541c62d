"""IVON on a small regression, watched: at every check, or at every step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.evidence.uci.methods import BATCH, WARMUP_SHARE, apply, half_square, init, schedule
from ivon_jax import diagnostics, ivon, sample_params

CHECK = 50  # steps
B2 = 0.999

Array = jax.Array


class Run(NamedTuple):
    """What is the same for all lanes."""

    steps: int
    guard: tuple[tuple[str, float], ...]

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises."""
        return max(1, round(WARMUP_SHARE * self.steps))

    def settings(self, values: Any, num_train: int) -> dict[str, Any]:
        """Arguments of `ivon`."""
        ess = values["sharpness"] * num_train
        return {
            "learning_rate": schedule(values["learning_rate"], self.steps),
            "ess": ess,
            "hess_init": values["hess_init"],
            "weight_decay": values["prior_precision"] / ess,
            "b2": B2,
            **dict(self.guard),
        }


def loss_at(params: Any, data: Any) -> Array:
    """Half the mean squared error."""
    return half_square(apply(params, data[0]), data[1])


def begin(run: Run, values: Any, seed: Array, data: Any) -> tuple:
    """The optimizer, parameters and state, and the keys of the steps."""
    tx = ivon(**run.settings(values, len(data[1])))
    init_key, steps_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, data[0].shape[1])
    return tx, (params, tx.init(params)), jax.random.split(steps_key, run.steps)


def one_step(tx: Any, data: Any, carry: Any, key: Array) -> tuple:
    """A step on a random batch; returns the carry, the update and the gradient's norm."""
    params, state = carry
    rows_key, noise_key = jax.random.split(key)
    rows = jax.random.randint(rows_key, (BATCH,), 0, len(data[1]))
    sample, noise = sample_params(noise_key, state)
    grads = jax.grad(loss_at)(sample, (data[0][rows], data[1][rows]))
    updates, state = tx.update(grads, state, params, noise=noise)
    return (optax.apply_updates(params, updates), state), updates, optax.tree.norm(grads)


def watched(run: Run, values: Any, seed: Array, data: Any, test: Any) -> dict[str, Array]:
    """Loss, gain and risk at every check, and the test loss of the mean at the end."""
    tx, carry, keys = begin(run, values, seed, data)
    settings = run.settings(values, len(data[1]))

    def check(carry: Any, keys: Array) -> tuple:
        carry, _ = jax.lax.scan(lambda c, k: (one_step(tx, data, c, k)[0], None), carry, keys)
        seen = diagnostics(carry[1], settings)
        now = {name: seen[f"update/{name}"] for name in ("gain", "risk")}
        return carry, now | {"loss": loss_at(carry[0], data)}

    carry, seen = jax.lax.scan(check, carry, keys.reshape(-1, CHECK))
    return seen | {"test": loss_at(carry[0], test)}


@partial(jax.jit, static_argnums=0)
def train_lanes(run: Run, values: Any, seeds: Array, data: Any, test: Any) -> dict[str, Array]:
    """Each run has settings and a seed of its own, along axis 0."""
    return jax.vmap(partial(watched, run), (0, 0, None, None))(values, seeds, data, test)


@partial(jax.jit, static_argnums=0)
def trace(run: Run, values: Any, seed: Array, data: Any, test: Any) -> dict[str, Array]:
    """One run, step by step: the weight that moves furthest, and what it belongs to.

    `move` and `sigma` are of that weight, `gain` is (h₀+δ)/(h+δ) there, `active` the share of the
    training rows in which the unit of that weight is active, before the step.
    """
    del test
    tx, carry, keys = begin(run, values, seed, data)
    settings = run.settings(values, len(data[1]))
    delta, h0 = settings["weight_decay"], settings["hess_init"]

    def step(carry: Any, key: Array) -> tuple:
        params, _ = carry
        active = jnp.mean(data[0] @ params["w1"] + params["b1"] > 0, axis=0)
        carry, updates, norm = one_step(tx, data, carry, key)
        # One row per unit: its incoming weights, bias and outgoing weight.
        moves = _by_unit(updates)
        precision = _by_unit(carry[1].hess) + delta
        place = jnp.argmax(jnp.abs(moves))
        here = precision.ravel()[place]
        return carry, {
            "loss": loss_at(carry[0], data),
            "gradient": norm,
            "unit": place // moves.shape[1],
            "move": moves.ravel()[place],
            "sigma": jax.lax.rsqrt(settings["ess"] * here),
            "gain": (h0 + delta) / here,
            "active": active[place // moves.shape[1]],
        }

    return jax.lax.scan(step, carry, keys)[1]


def _by_unit(params: Any) -> Array:
    return jnp.concatenate([params["w1"], params["b1"][None], params["w2"][None]]).T
