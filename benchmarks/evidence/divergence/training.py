"""IVON on a small regression, watched: at every check, or at every step."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks._shared.methods import Carry, ivon_step, warmup_cosine, warmup_steps
from benchmarks.evidence.uci.methods import BATCH, apply, half_square, init
from ivon_jax import diagnostics, ivon

CHECK = 50  # steps
B2 = 0.999

Array = jax.Array


class Run(NamedTuple):
    """What is the same for all lanes."""

    steps: int
    guard: tuple[tuple[str, float], ...] = ()

    @property
    def warmup(self) -> int:
        """Steps in which the rate rises."""
        return warmup_steps(self.steps)

    def settings(self, values: Any, num_train: int) -> dict[str, Any]:
        """Arguments of `ivon`."""
        ess = values["sharpness"] * num_train
        return {
            "learning_rate": warmup_cosine(values["learning_rate"], self.steps),
            "ess": ess,
            "hess_init": values["hess_init"],
            "weight_decay": values["prior_precision"] / ess,
            "b2": B2,
            **dict(self.guard),
        }


def loss_at(params: Any, data: Any) -> Array:
    """Half the mean squared error."""
    return half_square(apply(params, data[0]), data[1])


def begin(settings: Any, steps: int, seed: Array, data: Any) -> tuple:
    """A step on a random batch in the form of scan; parameters and state; the keys of the steps.

    The state keeps the norm of the last gradient.
    """
    norm = optax.snapshot("gradient", optax.tree.norm)
    tx = optax.chain(norm, ivon(**settings))
    step = ivon_step(loss_at, tx)

    def one(carry: Carry, key: Array) -> tuple[Carry, None]:
        rows_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (BATCH,), 0, len(data[1]))
        params, state, _ = step(noise_key, carry[0], carry[1], (data[0][rows], data[1][rows]))
        return (params, state), None

    init_key, steps_key = jax.random.split(jax.random.key(seed))
    params = init(init_key, data[0].shape[1])
    return one, (params, tx.init(params)), jax.random.split(steps_key, steps)


@partial(jax.jit, static_argnums=0)
def train_lanes(run: Run, values: Any, seeds: Array, data: Any, test: Any) -> dict[str, Array]:
    """Loss, gain and risk at every check, and the test loss of the mean at the end.

    Each run has settings and a seed of its own, along axis 0.
    """

    def watched(values: Any, seed: Array) -> dict[str, Array]:
        settings = run.settings(values, len(data[1]))
        one, carry, keys = begin(settings, run.steps, seed, data)

        def check(carry: Carry, keys: Array) -> tuple:
            carry, _ = jax.lax.scan(one, carry, keys)
            seen = diagnostics(carry[1], settings)
            now = {name: seen[f"update/{name}"] for name in ("gain", "risk")}
            return carry, now | {"loss": loss_at(carry[0], data)}

        carry, seen = jax.lax.scan(check, carry, keys.reshape(-1, CHECK))
        return seen | {"test": loss_at(carry[0], test)}

    return jax.vmap(watched)(values, seeds)


@partial(jax.jit, static_argnums=0)
def trace(run: Run, values: Any, seed: Array, data: Any) -> dict[str, Array]:
    """One run, step by step: the weight that moves furthest, and what it belongs to.

    `move` and `sigma` are of that weight, `gain` is (h₀+δ)/(h+δ) there, `active` the share of the
    training rows in which the unit of that weight is active, before the step.
    """
    settings = run.settings(values, len(data[1]))
    one, carry, keys = begin(settings, run.steps, seed, data)
    delta, h0 = settings["weight_decay"], settings["hess_init"]

    def step(carry: Carry, key: Array) -> tuple:
        before = carry[0]
        active = jnp.mean(data[0] @ before["w1"] + before["b1"] > 0, axis=0)
        carry, _ = one(carry, key)
        # One row per unit: its incoming weights, bias and outgoing weight.
        moves = _by_unit(optax.tree.sub(carry[0], before))
        precision = _by_unit(carry[1][1].hess) + delta
        place = jnp.argmax(jnp.abs(moves))
        here = precision.ravel()[place]
        return carry, {
            "loss": loss_at(carry[0], data),
            "gradient": optax.tree.get(carry[1], "gradient"),
            "unit": place // moves.shape[1],
            "move": moves.ravel()[place],
            "sigma": jax.lax.rsqrt(settings["ess"] * here),
            "gain": (h0 + delta) / here,
            "active": active[place // moves.shape[1]],
        }

    return jax.lax.scan(step, carry, keys)[1]


def _by_unit(params: Any) -> Array:
    return jnp.concatenate([params["w1"], params["b1"][None], params["w2"][None]]).T
