"""One training step of `gpt2.py`, with AdamW or IVON behind the same two functions.

IVON needs no parameters beside its state: the mean in the state is what AdamW calls parameters, and
hess and momentum take the place of AdamW's two moments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import gpt2_model
import jax
import jax.numpy as jnp
import optax
from gpt2_model import Config, Layout

from ivon_jax import (
    ivon,
    mc_value_and_grad,
    posterior_mean,
    predict_samples,
    recipes,
)

Array = jax.Array
PyTree = Any

# As published for GPT-2 of 125M, 355M and 773M. The tiny preset's are the best of four for each
# optimizer, by validation loss: AdamW 5e-4, 1e-3, 3e-3, 1e-2; IVON 250, 500, 1000, 3000.
ADAMW_RATES = {"tiny": 1e-3, "small": 6e-4, "medium": 3e-4, "large": 2.5e-4}
IVON_RATES = {"tiny": 500.0, "small": 300.0, "medium": 200.0, "large": 150.0}
IVON_RECIPES = {
    "tiny": recipes.GPT2_125M,
    "small": recipes.GPT2_125M,
    "medium": recipes.GPT2_355M,
    "large": recipes.GPT2_773M,
}


@dataclass(frozen=True)
class Settings:
    """What a run does with its optimizer."""

    optimizer: str  # "adamw" or "ivon"
    learning_rate: float
    steps: int
    warmup: int
    weight_decay: float
    ess: float = 1e10
    hess_init: float = 1e-3
    b2: float = 0.99999
    clip_radius: float = 1e-3
    clip_norm: float = 1.0
    samples: str = "shared"  # or "group": one sample for each index of the mesh axis "data"
    skip_bad_steps: int = 0  # how many steps in a row with a gradient that is not finite to skip


class TrainState(NamedTuple):
    """Everything that a checkpoint holds."""

    step: Array  # int32
    params: PyTree  # () with IVON, which keeps the mean in its own state
    opt_state: PyTree
    key: Array  # data of the run's key


class Trainer(NamedTuple):
    """A method of training: pure functions, to be compiled."""

    tx: optax.GradientTransformationExtraArgs
    init: Callable[[PyTree, Array], TrainState]
    step: Callable[[TrainState, Array], tuple[TrainState, Array]]


def schedule(settings: Settings) -> optax.Schedule:
    """Linear warmup, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup, max(settings.steps, settings.warmup + 1)
    )


def make_trainer(config: Config, layout: Layout, settings: Settings) -> Trainer:
    """The trainer for these settings."""
    make = _adamw_trainer if settings.optimizer == "adamw" else _ivon_trainer
    return make(config, layout, settings)


def _guarded(tx: Any, settings: Settings) -> Any:
    if not settings.skip_bad_steps:
        return tx
    return optax.apply_if_finite(tx, settings.skip_bad_steps)


def _loss(config: Config, layout: Layout) -> Callable[[PyTree, Array], Array]:
    log_likelihoods = gpt2_model.token_log_likelihoods(config, layout)
    return lambda params, windows: -jnp.mean(log_likelihoods(params, windows))


def _adamw_trainer(config: Config, layout: Layout, settings: Settings) -> Trainer:
    adamw = optax.adamw(
        schedule(settings),
        b1=0.9,
        b2=0.95,
        weight_decay=settings.weight_decay,
        mask=gpt2_model.is_matrix,
    )
    tx = _guarded(optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw), settings)
    value_and_grad = jax.value_and_grad(_loss(config, layout))

    def step(state: TrainState, batch: Array) -> tuple[TrainState, Array]:
        loss, grads = _mean_over_micro_batches(
            lambda windows, _: value_and_grad(state.params, windows),
            (jnp.zeros([]), jax.tree.map(jnp.zeros_like, state.params)),
            batch,
            _step_key(state),
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), loss

    def init(params: PyTree, key: Array) -> TrainState:
        return TrainState(_zero(), params, tx.init(params), jax.random.key_data(key))

    return Trainer(tx, init, step)


def _ivon_trainer(config: Config, layout: Layout, settings: Settings) -> Trainer:
    groups = layout.mesh.shape["data"] if settings.samples == "group" else 1
    if groups > 1:  # the model sees the batch of one group
        layout = layout._replace(batch=("fsdp",))
    tx = _guarded(
        ivon(
            schedule(settings),
            settings.ess,
            hess_init=settings.hess_init,
            b2=settings.b2,
            weight_decay=settings.weight_decay,
            mask=gpt2_model.is_matrix,
            clip_radius=settings.clip_radius,
        ),
        settings,
    )
    clip = optax.clip_by_global_norm(settings.clip_norm)
    estimate = mc_value_and_grad(
        _loss(config, layout),
        num_samples=groups,
        batch_size=groups,
        split_batch=groups > 1,
        grad_transform=lambda grads: clip.update(grads, clip.init(grads))[0],
        spmd_axis_name="data" if groups > 1 else None,
    )

    def step(state: TrainState, batch: Array) -> tuple[TrainState, Array]:
        zeros = jax.tree.map(jnp.zeros_like, posterior_mean(state.opt_state))
        loss, grads, hess = _mean_over_micro_batches(
            lambda windows, key: estimate(key, state.opt_state, windows),
            (jnp.zeros([]), zeros, zeros),
            batch,
            _step_key(state),
        )
        _, opt_state = tx.update(grads, state.opt_state, hess=hess)
        return TrainState(state.step + 1, (), opt_state, state.key), loss

    def init(params: PyTree, key: Array) -> TrainState:
        return TrainState(_zero(), (), tx.init(params), jax.random.key_data(key))

    return Trainer(tx, init, step)


def _zero() -> Array:
    return jnp.zeros([], jnp.int32)


def _step_key(state: TrainState) -> Array:
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def _mean_over_micro_batches(
    estimate: Callable[[Array, Array], PyTree], zeros: PyTree, batch: Array, key: Array
) -> PyTree:
    """The mean of `estimate(windows, key)` over axis 0 of the batch, each with its own key."""
    count = batch.shape[0]
    if count == 1:
        return estimate(batch[0], key)

    def add(total: PyTree, xs: tuple[Array, Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, estimate(*xs)), None

    total, _ = jax.lax.scan(add, zeros, (batch, jax.random.split(key, count)))
    return jax.tree.map(lambda x: x / count, total)


def is_finite(state: TrainState) -> Array:
    """Whether all of the state is."""
    floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floating]))


def abstract_state(trainer: Trainer, params: PyTree, layout: Layout) -> Any:
    """Shapes, dtypes and shardings of a state: moments lie where their parameters lie.

    Args:
      trainer: the trainer.
      params: shapes, dtypes and shardings of the parameters.
      layout: where to put the rest, a copy on each device.
    """
    copied = layout.sharding()
    state: Any = jax.eval_shape(lambda p: trainer.init(p, jax.random.key(0)), params)

    def placed(leaf: Any, sharding: Any = copied) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shardings = jax.tree.map(lambda p: p.sharding, params)
    opt_state = optax.tree.map_params(
        trainer.tx, placed, state.opt_state, shardings, transform_non_params=placed
    )
    params = jax.tree.map(placed, state.params, shardings) if state.params else ()
    return state._replace(
        step=placed(state.step), params=params, opt_state=opt_state, key=placed(state.key)
    )


def evaluator(
    config: Config, layout: Layout, settings: Settings, samples: int
) -> Callable[[Array, TrainState, Array], dict[str, Array]]:
    """`f(key, state, windows)`: NLL per token at the mean and, for IVON, averaged over samples."""
    log_likelihoods = gpt2_model.token_log_likelihoods(config, layout)
    at_samples = predict_samples(log_likelihoods, samples)

    def evaluate(key: Array, state: TrainState, windows: Array) -> dict[str, Array]:
        if settings.optimizer == "adamw":
            return {"mean": -jnp.mean(log_likelihoods(state.params, windows))}
        mean = posterior_mean(state.opt_state)
        nll = {"mean": -jnp.mean(log_likelihoods(mean, windows))}
        if samples:
            draws = at_samples(key, state.opt_state, windows)
            averaged = jax.nn.logsumexp(draws, axis=0) - jnp.log(float(samples))
            nll["averaged"] = -jnp.mean(averaged)
        return nll

    return evaluate
