"""What both sides of the comparison are given: data, initial weights, batches, settings."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax

from benchmarks._shared.methods import warmup_cosine
from examples._shared.datasets import load_small_digits

SIZES = (64, 128, 128, 10)


class Trained(NamedTuple):
    """Log-probabilities of the test images, (n, 10) and (samples, n, 10), and seconds."""

    point: np.ndarray
    samples: np.ndarray | None
    seconds: float


class Task:
    """The digits of scikit-learn and a perceptron, the same for all implementations."""

    def __init__(self, epochs: int, batch_size: int, samples: int):
        data = load_small_digits()
        self.images, self.test_images = (
            (2 * images - 1).reshape(len(images), -1)
            for images in (data.train_images, data.test_images)
        )
        self.labels = data.train_labels.astype(np.int64)
        self.test_labels = data.test_labels
        self.epochs, self.batch_size, self.samples = epochs, batch_size, samples

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.labels)

    @property
    def num_steps(self) -> int:
        """Number of gradient evaluations of a run."""
        return self.epochs * (self.num_train // self.batch_size)

    def weights(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Initial weights (inputs, outputs) and biases of every layer."""
        rng = np.random.default_rng(seed)
        return [
            (
                (rng.standard_normal((a, b)) / np.sqrt(a)).astype(np.float32),
                np.zeros(b, np.float32),
            )
            for a, b in itertools.pairwise(SIZES)
        ]

    def batches(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All batches of a run, in order."""
        rng = np.random.default_rng((seed, 1))
        per_epoch = self.num_train // self.batch_size
        for _ in range(self.epochs):
            order = rng.permutation(self.num_train)[: per_epoch * self.batch_size]
            for rows in order.reshape(per_epoch, -1):
                yield self.images[rows], self.labels[rows]


class Setting(NamedTuple):
    """An optimizer, its hyperparameters, and whether its rate is constant."""

    optimizer: str
    constant: bool
    values: dict[str, float]

    def schedule(self, task: Task) -> Callable[[Any], Any]:
        """The rate of a step: constant, or warmup and a cosine to zero."""
        rate = self.values["learning_rate"]
        if self.constant:
            return optax.constant_schedule(rate)
        return warmup_cosine(rate, task.num_steps)


IVON = {"hess_init": 0.5, "b2": 0.999, "weight_decay": 1e-4}
SETTINGS = {
    "IVON, cosine": Setting("ivon", False, {"learning_rate": 0.5, **IVON}),
    "IVON, constant rate": Setting("ivon", True, {"learning_rate": 0.2, **IVON}),
    "AdamW, cosine": Setting("adamw", False, {"learning_rate": 1e-2, "weight_decay": 0.1}),
    "AdamW, constant rate": Setting("adamw", True, {"learning_rate": 2e-3, "weight_decay": 0.1}),
}
