"""Training the small GPT with AdamW or IVON: the same batches, schedule and clipping for both."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.evidence.language import model
from ivon_jax import ivon, mc_value_and_grad, recipes

Array = jax.Array
PyTree = Any

BATCH = 12
WARMUP = 0.05  # share of the run, as in nanoGPT's configuration
CLIP_NORM = 1.0


@dataclass(frozen=True)
class AdamW:
    """What is chosen for AdamW."""

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Ivon:
    """What is chosen for IVON; the defaults are the recipe for GPT-2.

    `hess` names the estimator of `mc_value_and_grad`: "reparam" is IVON's own. "gradsq" is scaled
    by the number of characters in a batch, which makes it an estimate of the Fisher information.
    """

    learning_rate: float
    ess: float = 1e10
    hess_init: float = 1e-3
    clip_radius: float = 1e-3
    b1: float = 0.9
    b2: float = 0.99999
    weight_decay: float = 1e-6
    hess: str = "reparam"


Settings = AdamW | Ivon


class State(NamedTuple):
    """What a run carries from step to step; with IVON the parameters are the posterior mean."""

    step: Array
    params: PyTree
    opt_state: PyTree


Advance = Callable[[Array, Array, State, int], State]
Step = Callable[[Array, PyTree, PyTree, Array], tuple[PyTree, PyTree]]


def make_training(
    settings: Settings, vocabulary: int, steps: int
) -> tuple[Callable[[Array], State], Advance]:
    """`init(key)`, and `advance(key, tokens, state, count)`, which runs `count` steps at once."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, max(1, round(WARMUP * steps)), max(2, steps)
    )
    if isinstance(settings, AdamW):
        tx, step = _adamw(settings, schedule)
    else:
        tx, step = _ivon(settings, schedule)

    def init(key: Array) -> State:
        params = model.init_params(key, vocabulary)
        return State(jnp.zeros([], jnp.int32), params, tx.init(params))

    def one(key: Array, tokens: Array, state: State) -> State:
        batch_key, noise_key = jax.random.split(jax.random.fold_in(key, state.step))
        windows = model.random_windows(batch_key, tokens, BATCH)
        return State(state.step + 1, *step(noise_key, state.params, state.opt_state, windows))

    def advance(key: Array, tokens: Array, state: State, count: Array | int) -> State:
        return jax.lax.fori_loop(0, count, lambda _, state: one(key, tokens, state), state)

    return init, jax.jit(advance, donate_argnums=2)


def _clipped(grads: PyTree) -> PyTree:
    return optax.clip_by_global_norm(CLIP_NORM).update(grads, optax.EmptyState())[0]


def _adamw(settings: AdamW, schedule: optax.Schedule) -> tuple[optax.GradientTransformation, Step]:
    tx = optax.adamw(
        schedule,
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        mask=recipes.matrices,
    )

    def step(_: Array, params: PyTree, opt_state: PyTree, windows: Array) -> tuple[PyTree, PyTree]:
        grads = _clipped(jax.grad(model.loss)(params, windows))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return tx, step


def _ivon(settings: Ivon, schedule: optax.Schedule) -> tuple[optax.GradientTransformation, Step]:
    tx = ivon(
        schedule,
        settings.ess,
        hess_init=settings.hess_init,
        b1=settings.b1,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        clip_radius=settings.clip_radius,
        mask=recipes.matrices,
    )
    scale = BATCH * model.CONTEXT if settings.hess == "gradsq" else 1
    estimate = mc_value_and_grad(
        model.loss,
        grad_transform=_clipped,
        estimator=settings.hess,
        estimator_scale=float(scale),
    )

    def step(
        key: Array, params: PyTree, opt_state: PyTree, windows: Array
    ) -> tuple[PyTree, PyTree]:
        _, grads, hess = estimate(key, opt_state, windows)
        updates, opt_state = tx.update(grads, opt_state, params, hess=hess)
        return optax.apply_updates(params, updates), opt_state

    return tx, step
