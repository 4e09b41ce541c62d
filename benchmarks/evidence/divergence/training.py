"""IVON on a small regression, watched: at every check, or at every step."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks._shared.methods import (
    Array,
    Carry,
    Step,
    Values,
    ivon_settings,
    ivon_step,
    scan_random_batches,
)
from benchmarks.evidence.uci.methods import BATCH, Data, apply, half_square, init
from ivon_jax import diagnostics, ivon

CHECK = 50  # steps


def loss_at(params: Any, data: Data) -> Array:
    """Half the mean squared error."""
    return half_square(apply(params, data[0]), data[1])


def begin(steps: int, settings: Any, seed: Array, data: Data) -> tuple[Step, Carry, Array]:
    """The step, parameters and state, and the keys of all steps.

    The state keeps the norm of the last gradient.
    """
    tx = optax.chain(optax.snapshot("gradient", optax.tree.norm), ivon(**settings))
    init_key, steps_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, data[0].shape[1])
    return ivon_step(loss_at, tx), (params, tx.init(params)), jax.random.split(steps_key, steps)


@partial(jax.jit, static_argnums=0)
def train_lanes(
    steps: int, values: Values, seeds: Array, data: Data, test: Data
) -> dict[str, Array]:
    """Loss and risk at every check, and the test loss of the mean at the end.

    Each run has settings and a seed of its own, along axis 0.
    """

    def watched(values: Values, seed: Array) -> dict[str, Array]:
        settings = ivon_settings(values, steps, len(data[1]))
        step, carry, keys = begin(steps, settings, seed, data)

        def check(carry: Carry, keys: Array) -> tuple:
            carry, _ = scan_random_batches(step, BATCH, data, carry, keys)
            risk = diagnostics(carry[1], settings)["update/risk"]
            return carry, {"risk": risk, "loss": loss_at(carry[0], data)}

        carry, seen = jax.lax.scan(check, carry, keys.reshape(-1, CHECK))
        return seen | {"test": loss_at(carry[0], test)}

    return jax.vmap(watched)(values, seeds)


@partial(jax.jit, static_argnums=0)
def trace(steps: int, values: Values, seed: Array, data: Data) -> dict[str, Array]:
    """One run, step by step: the weight that moves furthest, and what it belongs to.

    `move` and `sigma` are of that weight, `gain` is (h₀+δ)/(h+δ) there, `active` the share of the
    training rows in which the unit of that weight is active, before the step.
    """
    settings = ivon_settings(values, steps, len(data[1]))
    step, carry, keys = begin(steps, settings, seed, data)
    delta, h0 = settings["weight_decay"], settings["hess_init"]

    def watched(carry: Carry, key: Array) -> tuple:
        before = carry[0]
        active = jnp.mean(data[0] @ before["w1"] + before["b1"] > 0, axis=0)
        carry, _ = scan_random_batches(step, BATCH, data, carry, key[None])
        moves = by_unit(optax.tree.sub(carry[0], before))
        place = jnp.argmax(jnp.abs(moves))
        here = by_unit(carry[1][1].hess).ravel()[place] + delta
        unit = place // moves.shape[1]
        return carry, {
            "loss": loss_at(carry[0], data),
            "gradient": optax.tree.get(carry[1], "gradient"),
            "unit": unit,
            "move": moves.ravel()[place],
            "sigma": jax.lax.rsqrt(settings["ess"] * here),
            "gain": (h0 + delta) / here,
            "active": active[unit],
        }

    return jax.lax.scan(watched, carry, keys)[1]


def by_unit(params: Any) -> Array:
    """A row per hidden unit: its incoming weights, bias and outgoing weight."""
    return jnp.concatenate([params["w1"], params["b1"][None], params["w2"][None]]).T
