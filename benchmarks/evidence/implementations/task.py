"""What both sides of the comparison are given: data, initial weights, batches, settings."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import optax

from benchmarks._shared.methods import warmup_cosine
from examples._shared.datasets import load_small_digits

SIZES = (64, 128, 128, 10)
EPOCHS = 30
BATCH_SIZE = 50
SAMPLES = 64  # of the posterior


class Task:
    """The digits of scikit-learn and a perceptron, the same for all implementations."""

    def __init__(self):
        data = load_small_digits()
        self.images, self.test_images = (
            (2 * images - 1).reshape(len(images), -1)
            for images in (data.train_images, data.test_images)
        )
        self.labels, self.test_labels = data.train_labels.astype(np.int64), data.test_labels
        self.num_train = len(self.labels)
        self.num_steps = EPOCHS * (self.num_train // BATCH_SIZE)

    def weights(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Initial weights (inputs, outputs) and biases of every layer."""
        rng = np.random.default_rng(seed)
        return [
            ((rng.standard_normal((a, b)) / np.sqrt(a)).astype("float32"), np.zeros(b, "float32"))
            for a, b in itertools.pairwise(SIZES)
        ]

    def batches(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All batches of a run, in order."""
        rng = np.random.default_rng((seed, 1))
        for _ in range(EPOCHS):
            order = rng.permutation(self.num_train)
            for rows in order.reshape(-1, BATCH_SIZE):
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
