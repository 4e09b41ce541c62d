"""How evidence trains: one schedule, one optimizer per method, one step of IVON, one of the others.

A step is a function (key, params, state, batch) -> (params, state, loss), whatever the method, so
that a comparison differs in nothing else. Hyperparameters may be traced: a `vmap` over `values`
trains a whole grid in one computation.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ivon_jax import ivon, mc_value_and_grad, metrics, sample_params

WARMUP_SHARE = 0.05  # of the steps

Array = jax.Array
Params = Any
Batch = Any
Values = Mapping[str, Any]  # hyperparameters by name
Carry = tuple[Params, Any]  # parameters and optimizer state
Loss = Callable[[Params, Batch], Array]
Step = Callable[[Array, Params, Any, Batch], tuple[Params, Any, Array]]


# --- Optimizers -----------------------------------------------------------------------------------


def warmup_steps(num_steps: int) -> int:
    """Number of steps in which the rate rises."""
    return min(max(1, round(WARMUP_SHARE * num_steps)), num_steps - 1)


def warmup_cosine(peak: Any, num_steps: int) -> optax.Schedule:
    """Linear warmup over 5 % of the steps, then a cosine to zero; `peak` may be traced."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps(num_steps), num_steps)
    return lambda count: peak * shape(count)


def ivon_settings(values: Values, num_steps: int, num_train: int) -> dict[str, Any]:
    """Arguments of `ivon`, also for `diagnostics`.

    In `values`, `learning_rate` is the peak of the schedule. A `temperature` of 1 is Bayes and
    weighs every training example once; its inverse is `sharpness`, ess/N. `prior_precision`, λδ,
    stands for `weight_decay`. Everything else goes to `ivon` as it is.
    """
    settings = dict(values)
    settings["learning_rate"] = warmup_cosine(values["learning_rate"], num_steps)
    sharpness = settings.pop("sharpness", None)
    temperature = settings.pop("temperature", 1.0)
    settings["ess"] = num_train / temperature if sharpness is None else num_train * sharpness
    if "prior_precision" in values:
        settings["weight_decay"] = settings.pop("prior_precision") / settings["ess"]
    return settings


def optimizer(
    method: str, values: Values, num_steps: int, num_train: int
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum, AdamW or IVON with warmup, cosine, and weight decay on every parameter."""
    if method == "ivon":
        return ivon(**ivon_settings(values, num_steps, num_train))
    schedule, decay = warmup_cosine(values["learning_rate"], num_steps), values["weight_decay"]
    if method == "adamw":
        return optax.adamw(schedule, weight_decay=decay)
    if method != "sgd":
        raise ValueError(f"unknown method {method!r}")
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=0.9))


# --- Steps ----------------------------------------------------------------------------------------


def plain_step(loss_fn: Loss, tx: optax.GradientTransformation) -> Step:
    """The step of SGD or AdamW; the key is not used."""

    def step(key: Array, params: Params, state: Any, batch: Batch) -> tuple[Params, Any, Array]:
        del key
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def ivon_step(loss_fn: Loss, tx: optax.GradientTransformationExtraArgs) -> Step:
    """The step of IVON: the gradient is taken at a sample, the update moves the mean."""

    def step(key: Array, params: Params, state: Any, batch: Batch) -> tuple[Params, Any, Array]:
        sample, noise = sample_params(key, state)
        loss, grads = jax.value_and_grad(loss_fn)(sample, batch)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state, loss

    return step


def estimator_step(
    loss_fn: Callable[..., Array], tx: optax.GradientTransformationExtraArgs, **options: Any
) -> Step:
    """The step of IVON with several samples, clipped gradients or another estimate of h.

    The options are those of `mc_value_and_grad`.
    """
    estimate = mc_value_and_grad(loss_fn, **options)

    def step(key: Array, params: Params, state: Any, batch: Batch) -> tuple[Params, Any, Array]:
        loss, grads, hess = estimate(key, state, batch)
        updates, state = tx.update(grads, state, params, hess=hess)
        return optax.apply_updates(params, updates), state, loss

    return step


def step_of(method: str, loss_fn: Loss, tx: optax.GradientTransformationExtraArgs) -> Step:
    """The step that goes with `optimizer(method, ...)`."""
    return (ivon_step if method == "ivon" else plain_step)(loss_fn, tx)


# --- Seeds and batches ----------------------------------------------------------------------------


def seed_keys(seed: Any) -> Array:
    """The keys of one seed, the same for all methods: of initial weights, epochs, prediction."""
    return jax.random.split(jax.random.key(seed), 3)


def shuffled_batches(key: Array, num_examples: int, batch_size: int) -> tuple[Array, Array]:
    """A key and the rows of each batch of an epoch; an incomplete last batch is left out."""
    num_batches = num_examples // batch_size
    order_key, noise_key = jax.random.split(key)
    order = jax.random.permutation(order_key, num_examples)[: num_batches * batch_size]
    return jax.random.split(noise_key, num_batches), order.reshape(num_batches, batch_size)


def step_on_rows(
    step: Step, data: Any, carry: Carry, inputs: tuple[Array, Array]
) -> tuple[Carry, Array]:
    """A step on some rows of the arrays in `data`, in the form that `jax.lax.scan` takes."""
    (params, state), (key, rows) = carry, inputs
    params, state, loss = step(key, params, state, jax.tree.map(lambda x: x[rows], data))
    return (params, state), loss


def scan_epoch(step: Step, batch_size: int, data: Any, carry: Carry, key: Array) -> Carry:
    """One shuffled pass over the data as a single computation."""
    inputs = shuffled_batches(key, len(jax.tree.leaves(data)[0]), batch_size)
    return jax.lax.scan(partial(step_on_rows, step, data), carry, inputs)[0]


def scan_random_batches(
    step: Step, batch_size: int, data: Any, carry: Carry, keys: Array
) -> tuple[Carry, Array]:
    """A step for each key, on rows drawn with replacement, and the losses of all steps."""
    num_examples = len(jax.tree.leaves(data)[0])

    def one(carry: Carry, key: Array) -> tuple[Carry, Array]:
        rows_key, step_key = jax.random.split(key)
        rows = jax.random.randint(rows_key, (batch_size,), 0, num_examples)
        return step_on_rows(step, data, carry, (step_key, rows))

    return jax.lax.scan(one, carry, keys)


# --- Prediction -----------------------------------------------------------------------------------


def average(log_probs: Array) -> Array:
    """Log of the average of probabilities over axis 0, the samples."""
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(float(len(log_probs)))


def auroc(familiar: Any, unfamiliar: Any) -> float:
    """How well a score tells unfamiliar inputs; NaN for a network that diverged."""
    finite = bool(jnp.isfinite(familiar).all() and jnp.isfinite(unfamiliar).all())
    return float(metrics.detection(familiar, unfamiliar).auroc) if finite else float("nan")
