"""A perceptron on handwritten digits, trained at many settings at once by IVON or AdamW."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.evidence.images.image_training import MLP, Data, predict, scan_epoch, seed_keys
from ivon_jax import (
    diagnostics,
    ivon,
    metrics,
    posterior,
    posterior_mean,
    predict_samples,
    sample_params,
)

BATCH = 50
WARMUP_SHARE = 0.05
SAMPLES = 32
B2 = 0.999

Array = jax.Array
Values = Mapping[str, Any]


class Run(NamedTuple):
    """What is the same for all lanes."""

    epochs: int
    width: int

    @property
    def model(self) -> MLP:
        """Two hidden layers."""
        return MLP(width=self.width)


def cross_entropy(model: MLP, params: Any, batch: Data) -> Array:
    """Mean over examples."""
    logits: Any = model.apply(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def schedule(peak: Any, num_steps: int) -> optax.Schedule:
    """Warmup, then cosine to zero."""
    warmup = max(1, round(WARMUP_SHARE * num_steps))
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, num_steps)
    return lambda count: peak * shape(count)


def ivon_settings(values: Values, num_steps: int, num_train: int) -> dict[str, Any]:
    """Arguments of `ivon`; the temperature is N/ess."""
    return {
        "learning_rate": schedule(values["learning_rate"], num_steps),
        "ess": num_train / values["temperature"],
        "hess_init": values["hess_init"],
        "weight_decay": values["weight_decay"],
        "precision_floor": values["precision_floor"],
        "b2": B2,
    }


def train_ivon(run: Run, values: Values, seed: Array, data: Data, test: Data) -> dict:
    """One run: NLL at the mean and averaged, and what was seen on the way after each epoch."""
    num_steps = run.epochs * (len(data[1]) // BATCH)
    settings = ivon_settings(values, num_steps, len(data[1]))
    tx = ivon(**settings)

    def step(key: Array, params: Any, state: Any, batch: Data) -> tuple:
        sample, noise = sample_params(key, state)
        loss, grads = jax.value_and_grad(partial(cross_entropy, run.model))(sample, batch)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state, loss

    keys, params = _start(run, seed, data)

    def epoch(carry: Any, key: Array) -> tuple:
        params, state = scan_epoch(step, BATCH, data, carry, key)
        seen = diagnostics(state, settings)
        seen = {name: seen[f"update/{name}"] for name in ("gain", "risk")}
        return (params, state), seen | {"loss": cross_entropy(run.model, params, data)}

    carry = (params, tx.init(params))
    start = diagnostics(carry[1], settings)["signal_to_noise/p50"]
    (_, state), seen = jax.lax.scan(epoch, carry, jax.random.split(keys.epochs, run.epochs))
    log_probs = jax.nn.log_softmax(
        predict_samples(run.model.apply, SAMPLES)(keys.predict, posterior(state), test[0])
    )
    averaged = jax.nn.logsumexp(log_probs, axis=0) - jnp.log(float(SAMPLES))
    at_mean = predict(run.model, posterior_mean(state), test[0])
    return seen | {
        "start": start,
        "nll": metrics.nll(averaged, test[1]),
        "accuracy": metrics.accuracy(averaged, test[1]),
        "nll_mean": metrics.nll(at_mean, test[1]),
    }


def train_adamw(run: Run, values: Values, seed: Array, data: Data, test: Data) -> dict:
    """The same for AdamW."""
    num_steps = run.epochs * (len(data[1]) // BATCH)
    rate = schedule(values["learning_rate"], num_steps)
    tx = optax.adamw(rate, weight_decay=values["weight_decay"])

    def step(key: Array, params: Any, state: Any, batch: Data) -> tuple:
        del key
        loss, grads = jax.value_and_grad(partial(cross_entropy, run.model))(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    keys, params = _start(run, seed, data)

    def epoch(carry: Any, key: Array) -> tuple:
        params, state = scan_epoch(step, BATCH, data, carry, key)
        return (params, state), {"loss": cross_entropy(run.model, params, data)}

    carry = (params, tx.init(params))
    (params, _), seen = jax.lax.scan(epoch, carry, jax.random.split(keys.epochs, run.epochs))
    log_probs = predict(run.model, params, test[0])
    return seen | {
        "nll": metrics.nll(log_probs, test[1]),
        "accuracy": metrics.accuracy(log_probs, test[1]),
    }


def _start(run: Run, seed: Any, data: Data) -> tuple:
    keys = seed_keys(seed)
    return keys, run.model.init(keys.init, data[0][:1])


@partial(jax.jit, static_argnums=(0, 1))
def train_lanes(
    method: str, run: Run, values: Values, seeds: Array, data: Data, test: Data
) -> dict:
    """Each run has a setting and a seed of its own, along axis 0."""
    train = {"ivon": train_ivon, "adamw": train_adamw}[method]
    return jax.vmap(partial(train, run), (0, 0, None, None))(values, seeds, data, test)
