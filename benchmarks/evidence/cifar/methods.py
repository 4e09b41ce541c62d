"""The methods that are compared: how each is trained, and what it predicts.

All get the same initial weights, batches and crops from a seed and, but for SWAG's last quarter,
one schedule. A run is written
to a file after every epoch, so that it can be stopped and goes on.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from benchmarks._shared import methods as shared
from benchmarks._shared.networks import RESNET20
from benchmarks.evidence.cifar.data import Images, augment
from benchmarks.evidence.images.methods import Swag, draw_swag, swag_of
from ivon_jax import Posterior, posterior, predict_at_mean, predict_samples, recipes

Array = jax.Array
NETWORK: nn.Module = RESNET20
COLLECT = 0.25  # share of SWAG's epochs, the last ones, after each of which it collects weights
METHODS = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "sam": "SAM",
    "dropout": "MC-dropout",
    "swag": "SWAG",
    "ivon": "IVON",
}


class Run(NamedTuple):
    """What a run depends on besides its data; hashable, for compilation."""

    method: str
    epochs: int
    batch_size: int
    num_train: int

    @property
    def steps_per_epoch(self) -> int:
        """An incomplete last batch is left out."""
        return self.num_train // self.batch_size

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.steps_per_epoch


# --- Training -------------------------------------------------------------------------------------


def make_optimizer(run: Run, values: Mapping[str, Any]) -> Any:
    """SGD, AdamW or IVON with warmup and cosine; SWAG's rate stays in its last part."""
    if run.method == "ivon":
        b2 = recipes.b2_for(run.num_steps)
        return shared.optimizer("ivon", {**values, "b2": b2}, run.num_steps, run.num_train)
    if run.method == "swag":
        first = run.num_steps - collected(run) * run.steps_per_epoch
        shape, end = shared.warmup_cosine(1.0, first), values["swag_rate"]
        rise = values["learning_rate"] - end
        decay = optax.add_decayed_weights(values["weight_decay"])
        return optax.chain(decay, optax.sgd(lambda t: end + rise * shape(t), momentum=0.9))
    name = "adamw" if run.method == "adamw" else "sgd"
    return shared.optimizer(name, values, run.num_steps, run.num_train)


def collected(run: Run) -> int:
    """Epochs after which SWAG collects weights."""
    return max(2, round(COLLECT * run.epochs))


def make_step(run: Run, values: Mapping[str, Any]) -> shared.Step:
    """The training step; the loss is the mean cross-entropy."""
    tx = make_optimizer(run, values)

    def loss(params: Any, batch: Any, *rate: Any, **rngs: Any) -> Array:
        logits: Any = NETWORK.apply(params, batch[0], *rate, **rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def dropped(key: Array, params: Any, batch: Any) -> Array:
        return loss(params, batch, values["rate"], rngs={"dropout": key})

    def sharpest(key: Array, params: Any, state: Any, batch: Any) -> Any:
        """SAM (Foret et al. 2021): the gradient where the loss is largest nearby."""
        del key
        grads = jax.grad(loss)(params, batch)
        scale = values["rho"] / (optax.tree.norm(grads) + 1e-12)
        worst = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        value, grads = jax.value_and_grad(loss)(worst, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    if run.method == "ivon":
        return shared.ivon_step(loss, tx)
    if run.method == "sam":
        return sharpest
    if run.method == "dropout":

        def step(key: Array, params: Any, state: Any, batch: Any) -> Any:
            return shared.plain_step(partial(dropped, key), tx)(key, params, state, batch)

        return step
    return shared.plain_step(loss, tx)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def one_step(run: Run, values: Any, carry: Any, data: Images, key: Array, rows: Array) -> Any:
    """One augmented step; returns parameters and optimizer state."""
    crop_key, key = jax.random.split(key)
    batch = augment(crop_key, data.images[rows]), data.labels[rows]
    params, state = carry
    params, state, _ = make_step(run, values)(key, params, state, batch)
    return params, state


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def one_epoch(run: Run, values: Any, carry: Any, data: Images, keys: Array, rows: Array) -> Any:
    """All steps of an epoch in one program."""

    def step(carry: Any, inputs: Any) -> Any:
        return one_step(run, values, carry, data, *inputs), None

    return jax.lax.scan(step, carry, (keys, rows))[0]


@partial(jax.jit, static_argnums=0)
def start(run: Run, values: Any, key: Array, images: Array) -> Any:
    """Initial parameters and optimizer state."""
    params = NETWORK.init(key, images)
    return params, make_optimizer(run, values).init(params)


def train(run: Run, values: Mapping[str, Any], data: Images, seed: int, folder: Path) -> Any:
    """Trains, from where a file in the folder has stopped; returns what `predict` takes."""
    init_key, epochs_key, _ = shared.seed_keys(seed)
    carry = start(run, values, init_key, jnp.asarray(data.images[:1]))
    name = json.dumps([*run, dict(values), seed, data.labels[:1000].tolist()])
    file = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
    epoch, carry, snapshots = resume(file, carry)
    on_device: Any = Images(jax.device_put(data.images), jax.device_put(data.labels))
    bar = tqdm(total=run.epochs, initial=epoch, unit="epoch", desc=f"{run.method}, seed {seed}")
    for each in range(epoch, run.epochs):
        key = jax.random.fold_in(epochs_key, each)
        keys, rows = shared.shuffled_batches(key, run.num_train, run.batch_size)
        if jax.default_backend() == "cpu":  # whose gradient of a convolution is slow inside a loop
            for inputs in zip(keys, rows, strict=True):
                carry = one_step(run, values, carry, on_device, *inputs)
        else:
            carry = one_epoch(run, values, carry, on_device, keys, rows)
        if run.method == "swag" and each >= run.epochs - collected(run):
            snapshots.append(jax.tree.map(np.asarray, carry[0]))
        write(file, each + 1, carry, snapshots)
        bar.update()
    bar.close()
    file.unlink(missing_ok=True)
    if run.method == "ivon":
        return posterior(carry[1])
    if run.method == "swag":
        return swag_of(jax.tree.map(lambda *x: jnp.stack(x), *snapshots))
    return carry[0]


def write(file: Path, epoch: int, carry: Any, snapshots: list[Any]) -> None:
    """Replaces the file of a run."""
    leaves = [np.asarray(x) for x in jax.tree.leaves((carry, snapshots))]
    partial_file = file.with_name(f"{file.stem}_partial.npz")
    np.savez(partial_file, epoch, len(snapshots), *leaves)
    partial_file.replace(file)


def resume(file: Path, carry: Any) -> tuple[int, Any, list[Any]]:
    """Epochs done, parameters and state, and SWAG's weights."""
    if not file.is_file():
        return 0, carry, []
    with np.load(file) as found:
        epoch, count, *leaves = (found[name] for name in found.files)
    like = carry, [carry[0]] * int(count)
    carry, snapshots = jax.tree.unflatten(jax.tree.structure(like), leaves)
    return int(epoch), jax.tree.map(jnp.asarray, carry), snapshots


# --- Prediction -----------------------------------------------------------------------------------


class Predictor:
    """Log-probabilities of what was trained, in batches."""

    def __init__(self, samples: int, batch_size: int = 500):
        self.samples, self.batch_size = samples, batch_size

    def __call__(
        self, fitted: Any, values: Mapping[str, Any], key: Array, images: np.ndarray
    ) -> dict[str, np.ndarray]:
        """At a "point" (n, 10), and where there are samples at these, (S, n, 10)."""
        rate = values.get("rate")
        sampled = rate is not None or isinstance(fitted, Posterior | Swag)
        parts = [
            (
                _at_point(fitted, x),
                _at_samples(fitted, rate, key, x, self.samples) if sampled else None,
            )
            for x in _batches(images, self.batch_size)
        ]
        found = {"point": _joined((point for point, _ in parts), 0, len(images))}
        if sampled:
            found["samples"] = _joined((drawn for _, drawn in parts), 1, len(images))
        return found


def _batches(images: np.ndarray, size: int) -> Iterable[np.ndarray]:
    """Of equal size: the last one is filled up."""
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size) % len(images)
        yield images[rows]


def _joined(parts: Iterable[Any], axis: int, count: int) -> np.ndarray:
    whole = np.concatenate([np.asarray(part) for part in parts], axis)
    return whole.take(range(count), axis)


def _apply(params: Any, images: Array, *rate: Any, **rngs: Any) -> Any:
    logits: Any = NETWORK.apply(params, images, *rate, **rngs)
    return jax.nn.log_softmax(logits)


@jax.jit
def _at_point(fitted: Any, images: Array) -> Any:
    if isinstance(fitted, Posterior):
        return predict_at_mean(_apply)(fitted, images)
    return _apply(fitted.mean if isinstance(fitted, Swag) else fitted, images)


@partial(jax.jit, static_argnames="count")
def _at_samples(fitted: Any, rate: Any, key: Array, images: Array, count: int) -> Any:
    if isinstance(fitted, Posterior):
        return predict_samples(_apply, count)(key, fitted, images)
    keys = jax.random.split(key, count)
    if isinstance(fitted, Swag):
        return jax.lax.map(lambda k: _apply(draw_swag(k, fitted), images), keys)
    return jax.lax.map(lambda k: _apply(fitted, images, rate, rngs={"dropout": k}), keys)
