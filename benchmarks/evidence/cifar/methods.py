"""The methods that are compared: how each is trained, and what it predicts.

All get the same initial weights, batches and crops from a seed and, but for SWAG's last quarter,
one schedule. A run is written to a file after every epoch, so that it can be stopped and goes on.
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
from tqdm import tqdm

from benchmarks._shared import methods as shared
from benchmarks._shared.networks import RESNET20
from benchmarks.evidence.cifar.data import Images, augment
from benchmarks.evidence.images.methods import (
    Fitted,
    Members,
    at_mean,
    fitted_by,
    make_step,
    sample_log_probs,
    swag_of,
    swag_optimizer,
)
from ivon_jax import recipes

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
        return swag_optimizer(values, run.num_steps - collected(run) * run.steps_per_epoch)
    name = "adamw" if run.method == "adamw" else "sgd"
    return shared.optimizer(name, values, run.num_steps, run.num_train)


def collected(run: Run) -> int:
    """Epochs after which SWAG collects weights."""
    return max(2, round(COLLECT * run.epochs))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def one_step(run: Run, values: Any, carry: Any, data: Images, key: Array, rows: Array) -> Any:
    """One augmented step; returns parameters and optimizer state."""
    crop_key, key = jax.random.split(key)
    batch = augment(crop_key, data.images[rows]), data.labels[rows]
    params, state = carry
    tx = make_optimizer(run, values)
    step = make_step(NETWORK, run.method, values, tx, run.num_train)
    params, state, _ = step(key, params, state, batch)
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


def train(run: Run, values: Mapping[str, Any], data: Images, seed: int, folder: Path) -> Fitted:
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
    if run.method == "swag":
        return swag_of(jax.tree.map(lambda *x: jnp.stack(x), *snapshots))
    return fitted_by(run.method, values, *carry)


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

    def __call__(self, fitted: Fitted, key: Array, images: np.ndarray) -> dict[str, np.ndarray]:
        """At a "point" (n, 10), and where there are samples at these, (S, n, 10)."""
        found = {"point": self._samples(at_mean(fitted), key, images, 1)[0]}
        if not isinstance(fitted, Members):
            found["samples"] = self._samples(fitted, key, images, self.samples)
        return found

    def _samples(self, fitted: Fitted, key: Array, images: np.ndarray, count: int) -> np.ndarray:
        batches = _batches(images, self.batch_size)
        parts = [sample_log_probs(NETWORK, fitted, key, x, count) for x in batches]
        return np.concatenate(parts, axis=1)[:, : len(images)]


def _batches(images: np.ndarray, size: int) -> Iterable[np.ndarray]:
    """Of equal size: the last one is filled up."""
    for first in range(0, len(images), size):
        rows = np.arange(first, first + size) % len(images)
        yield images[rows]
