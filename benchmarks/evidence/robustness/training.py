"""A perceptron on handwritten digits, trained at many settings at once by IVON or AdamW."""

from functools import partial
from typing import Any

import jax

from benchmarks._shared.methods import (
    Array,
    Values,
    cross_entropy,
    ivon_settings,
    optimizer,
    scan_epoch,
    seed_keys,
    step_of,
)
from benchmarks._shared.networks import Perceptron
from ivon_jax import diagnostics, metrics, posterior, predict_log_probs

BATCH = 50
SAMPLES = 32

Data = tuple[Array, Array]


@partial(jax.jit, static_argnums=(0, 1, 2))
def train_lanes(
    method: str, epochs: int, width: int, values: Values, seeds: Array, data: Data, test: Data
) -> dict[str, Array]:
    """Test results, and what was seen on the way after each epoch.

    Each lane has a setting and a seed of its own, along axis 0.
    """
    model: Any = Perceptron(width)
    variational = method == "ivon"
    num_steps, num_train = epochs * (len(data[1]) // BATCH), len(data[1])

    def loss(params: Any, batch: Data) -> Array:
        return cross_entropy(model.apply(params, batch[0]), batch[1])

    def train(values: Values, seed: Array) -> dict[str, Array]:
        tx = optimizer(method, values, num_steps, num_train)
        settings = ivon_settings(values, num_steps, num_train)

        def epoch(carry: Any, key: Array) -> tuple:
            params, state = scan_epoch(step_of(method, loss, tx), BATCH, data, carry, key)
            seen = {"loss": loss(params, data)}
            if variational:
                seen["risk"] = diagnostics(state, settings)["update/risk"]
            return (params, state), seen

        keys = seed_keys(seed)
        params = model.init(keys.init, data[0][:1])
        carry = start = (params, tx.init(params))
        (params, state), seen = jax.lax.scan(epoch, carry, jax.random.split(keys.epochs, epochs))
        if variational:
            seen["start"] = diagnostics(start[1], settings)["signal_to_noise/p50"]
            predict = predict_log_probs(model.apply, SAMPLES)
            log_probs = predict(keys.predict, posterior(state), test[0])
        else:
            log_probs = jax.nn.log_softmax(model.apply(params, test[0]))
        return seen | {"nll": metrics.nll(log_probs, test[1])}

    return jax.vmap(train)(values, seeds)
