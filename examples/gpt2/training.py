"""One training step, with AdamW or IVON behind the same two functions.

IVON needs no parameters beside its state: the mean in the state is what AdamW calls parameters, and
hess and momentum take the place of AdamW's two moments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from examples.gpt2 import model as gpt2_model
from examples.gpt2.model import Config, Layout
from ivon_jax import ivon, mc_value_and_grad, posterior_mean, predict_samples, recipes

Array = jax.Array
PyTree = Any

# AdamW's rates are those in common use for these sizes. The tiny preset's are the best of four for
# each optimizer, by the loss on the validation windows that the script reports as well: AdamW 5e-4,
# 1e-3, 3e-3, 1e-2; IVON 250, 500, 1000, 3000.
ADAMW_RATES = {"tiny": 1e-3, "small": 6e-4, "medium": 3e-4, "large": 2.5e-4}
IVON_SETTINGS = {
    "tiny": {**recipes.GPT2_125M.settings, "learning_rate": 500.0},
    "small": recipes.GPT2_125M.settings,
    "medium": recipes.GPT2_355M.settings,
    "large": recipes.GPT2_773M.settings,
}


@dataclass(frozen=True)
class AdamW:
    """What a run does with AdamW."""

    learning_rate: float
    steps: int
    warmup: int
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class Ivon:
    """What a run does with IVON; by default as published for GPT-2."""

    learning_rate: float
    steps: int
    warmup: int
    weight_decay: float = 1e-6
    ess: float = 1e10
    hess_init: float = 1e-3
    b2: float = 0.99999
    clip_radius: float = 1e-3
    clip_norm: float = 1.0
    samples: int = 1  # of every micro-batch, each on its own part of it


Settings = AdamW | Ivon


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


def make_trainer(
    config: Config, layout: Layout, settings: Settings, skip_bad_steps: bool = False
) -> Trainer:
    """The trainer; on request the state stays as it is where a gradient is not finite."""
    is_ivon = isinstance(settings, Ivon)
    tx, step = (_ivon if is_ivon else _adamw)(config, layout, settings)

    def init(params: PyTree, key: Array) -> TrainState:
        step, kept = jnp.zeros([], jnp.int32), () if is_ivon else params
        return TrainState(step, kept, tx.init(params), jax.random.key_data(key))

    def guarded(state: TrainState, batch: Array) -> tuple[TrainState, Array]:
        new, loss = step(state, batch)
        ok = is_finite(new)
        kept = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, state)
        return kept._replace(step=new.step), loss

    return Trainer(tx, init, guarded if skip_bad_steps else step)


def _adamw(config: Config, layout: Layout, settings: Any) -> tuple[Any, Any]:
    decay: Any = {"weight_decay": settings.weight_decay, "mask": gpt2_model.is_matrix}
    tx = optax.adamw(_schedule(settings), b1=0.9, b2=0.95, **decay)
    value_and_grad = jax.value_and_grad(_loss(config, layout))

    def step(state: TrainState, batch: Array) -> tuple[TrainState, Array]:
        loss, grads = _mean_over_micro_batches(
            lambda windows, _: value_and_grad(state.params, windows),
            (jnp.zeros([]), jax.tree.map(jnp.zeros_like, state.params)),
            batch,
            state,
        )
        grads = clip_by_norm(grads, settings.clip_norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.key), loss

    return tx, step


def _ivon(config: Config, layout: Layout, settings: Any) -> tuple[Any, Any]:
    tx = ivon(
        _schedule(settings),
        settings.ess,
        hess_init=settings.hess_init,
        b2=settings.b2,
        weight_decay=settings.weight_decay,
        mask=gpt2_model.is_matrix,
        clip_radius=settings.clip_radius,
    )
    groups = layout.mesh.shape["data"]
    own = settings.samples > 1  # the model then sees a sample's part of the batch only
    split = own and groups > 1  # and each index of `data` evaluates other samples
    estimate = mc_value_and_grad(
        _loss(config, layout._replace(batch=("fsdp",)) if own else layout),
        num_samples=settings.samples,
        split_batch=own,
        sample_batch_size=groups if split else None,
        spmd_axis_name="data" if split else None,
        grad_transform=lambda grads: clip_by_norm(grads, settings.clip_norm),
    )

    def step(state: TrainState, batch: Array) -> tuple[TrainState, Array]:
        zeros = jax.tree.map(jnp.zeros_like, posterior_mean(state.opt_state))
        loss, grads, hess = _mean_over_micro_batches(
            lambda windows, key: estimate(key, state.opt_state, windows),
            (jnp.zeros([]), zeros, zeros),
            batch,
            state,
        )
        _, opt_state = tx.update(grads, state.opt_state, hess=hess)
        return TrainState(state.step + 1, (), opt_state, state.key), loss

    return tx, step


def _schedule(settings: Settings) -> optax.Schedule:
    """Linear warmup, then a cosine to 0."""
    return optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.warmup, settings.steps
    )


def _loss(config: Config, layout: Layout) -> Callable[[PyTree, Array], Array]:
    log_likelihoods = gpt2_model.token_log_likelihoods(config, layout)
    return lambda params, windows: -jnp.mean(log_likelihoods(params, windows))


def clip_by_norm(grads: PyTree, bound: float) -> PyTree:
    """Gradients of at most this global norm; NaN where the norm is not finite.

    (optax.clip_by_global_norm turns finite gradients whose norm overflows into zeros.)
    """
    norm = optax.tree.norm(grads)
    scale = jnp.where(jnp.isfinite(norm), jnp.minimum(1.0, bound / norm), jnp.nan)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def _mean_over_micro_batches(
    estimate: Callable[[Array, Array], PyTree], zeros: PyTree, batch: Array, state: TrainState
) -> PyTree:
    """The mean of `estimate(windows, key)` over axis 0 of the batch, each with its own key."""
    count = batch.shape[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    if count == 1:
        return estimate(batch[0], key)

    def add(total: PyTree, xs: tuple[Array, Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, estimate(*xs)), None

    total, _ = jax.lax.scan(add, zeros, (batch, jax.random.split(key, count)))
    return jax.tree.map(lambda x: x / count, total)


def is_finite(state: TrainState) -> Array:
    """Whether all of the state is."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state)]))


def abstract_state(trainer: Trainer, params: PyTree, layout: Layout) -> Any:
    """Shapes, dtypes and shardings of a state: moments lie where their parameters lie."""
    state: Any = jax.eval_shape(lambda p: trainer.init(p, jax.random.key(0)), params)
    shardings = jax.tree.map(lambda p: p.sharding, params)

    def placed(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or layout.sharding())

    opt_state = optax.tree.map_params(
        trainer.tx, placed, state.opt_state, shardings, transform_non_params=placed
    )
    params = params if state.params else ()
    step, key = placed(state.step), placed(state.key)
    return state._replace(step=step, params=params, opt_state=opt_state, key=key)


def evaluator(
    config: Config, layout: Layout, settings: Settings, samples: int
) -> Callable[[Array, TrainState, Array], dict[str, Array]]:
    """`f(key, state, windows)`: NLL per token at the mean and, for IVON, averaged over samples."""
    log_likelihoods = gpt2_model.token_log_likelihoods(config, layout)
    at_samples = predict_samples(log_likelihoods, samples)

    def evaluate(key: Array, state: TrainState, windows: Array) -> dict[str, Array]:
        if isinstance(settings, AdamW):
            return {"validation_mean": -jnp.mean(log_likelihoods(state.params, windows))}
        draws = at_samples(key, state.opt_state, windows)
        averaged = jax.nn.logsumexp(draws, axis=0) - jnp.log(float(samples))
        at_mean = log_likelihoods(posterior_mean(state.opt_state), windows)
        return {"validation_mean": -jnp.mean(at_mean), "validation_averaged": -jnp.mean(averaged)}

    return evaluate
