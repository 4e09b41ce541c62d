"""A perceptron on handwritten digits, trained at many settings at once by IVON or AdamW."""

from functools import partial
from typing import Any, NamedTuple

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
B2 = 0.999
IMAGES_AT_ONCE = 500  # bounds the memory of prediction

Data = tuple[Array, Array]


class Run(NamedTuple):
    """What is the same for all lanes: "ivon" or "adamw", its length, and the network's width."""

    method: str
    epochs: int
    width: int


@partial(jax.jit, static_argnums=0)
def train_lanes(run: Run, values: Values, seeds: Array, data: Data, test: Data) -> dict:
    """Each lane has a setting and a seed of its own, along axis 0."""
    return jax.vmap(partial(train, run), (0, 0, None, None))(values, seeds, data, test)


def train(run: Run, values: Values, seed: Array, data: Data, test: Data) -> dict[str, Array]:
    """Test results, and what was seen on the way after each epoch."""
    variational = run.method == "ivon"
    model: Any = Perceptron(run.width)
    num_train = len(data[1])
    num_steps = run.epochs * (num_train // BATCH)
    values = {**values, "b2": B2} if variational else values
    settings = ivon_settings(values, num_steps, num_train) if variational else {}
    tx = optimizer(run.method, values, num_steps, num_train)

    def loss(params: Any, batch: Data) -> Array:
        return cross_entropy(model.apply(params, batch[0]), batch[1])

    step = step_of(run.method, loss, tx)

    def epoch(carry: Any, key: Array) -> tuple:
        params, state = scan_epoch(step, BATCH, data, carry, key)
        seen = diagnostics(state, settings) if variational else {}
        seen = {name: seen[f"update/{name}"] for name in ("gain", "risk") if variational}
        return (params, state), seen | {"loss": loss(params, data)}

    keys = seed_keys(seed)
    params = model.init(keys.init, data[0][:1])
    carry = (params, tx.init(params))
    start = diagnostics(carry[1], settings)["signal_to_noise/p50"] if variational else None
    (params, state), seen = jax.lax.scan(epoch, carry, jax.random.split(keys.epochs, run.epochs))
    at_mean = jax.nn.log_softmax(
        jax.lax.map(lambda x: model.apply(params, x[None])[0], test[0], batch_size=IMAGES_AT_ONCE)
    )
    if not variational:
        return seen | scores(at_mean, test[1])
    averaged = predict_log_probs(model.apply, SAMPLES)(keys.predict, posterior(state), test[0])
    mean = {"start": start, "nll_mean": metrics.nll(at_mean, test[1])}
    return seen | mean | scores(averaged, test[1])


def scores(log_probs: Array, labels: Array) -> dict[str, Array]:
    """NLL and accuracy."""
    return {"nll": metrics.nll(log_probs, labels), "accuracy": metrics.accuracy(log_probs, labels)}
