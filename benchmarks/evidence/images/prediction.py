"""Predictions and their scores, for `images.py`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.evidence.images import image_metrics
from benchmarks.evidence.images.image_training import IMAGES_AT_ONCE, seed_keys
from benchmarks.evidence.images.ood_methods import Swag, draw_swag
from benchmarks.evidence.images.training import Values
from ivon_jax import Posterior, metrics, sample_params

REPORTED = 64  # samples behind the tables of methods that draw them
POINTS = ("sgd", "adamw")  # methods that give one set of weights
Array = jax.Array
Sets = dict[str, np.ndarray]  # of images, or of their log-probabilities, by name


class Predictor:
    """Log-probabilities of a network, compiled once."""

    def __init__(self, network: nn.Module):
        def at(params, images):
            logits: Any = network.apply(params, images)
            return jax.nn.log_softmax(logits)

        def masked(params, key, rate, images):
            logits: Any = network.apply(params, images, rate, rngs={"dropout": key})
            return jax.nn.log_softmax(logits)

        self._at, self._masked = jax.jit(at), jax.jit(masked)
        self._draw = jax.jit(draw)

    def at(self, params: Any, images: np.ndarray) -> np.ndarray:
        """Of one set of weights, (n, 10)."""
        return by_parts(partial(self._at, params), images)

    def samples(self, values: Values, fitted: Any, keys: Array, images: np.ndarray) -> np.ndarray:
        """Of every member of an ensemble, or of a draw per key: (samples, n, 10)."""
        if isinstance(fitted, list):
            return np.stack([self.at(params, images) for params in fitted])
        return np.stack([self._one_draw(values, fitted, images, key) for key in keys])

    def _one_draw(self, values: Values, fitted: Any, images: np.ndarray, key: Array) -> np.ndarray:
        if isinstance(fitted, Posterior | Swag):
            return self.at(self._draw(key, fitted), images)
        return by_parts(partial(self._masked, fitted, key, values["rate"]), images)


def draw(key: Array, q: Posterior | Swag) -> Any:
    """Weights from a Gaussian."""
    return draw_swag(key, q) if isinstance(q, Swag) else sample_params(key, q)[0]


def by_parts(log_probs: Callable[[np.ndarray], Array], images: np.ndarray) -> np.ndarray:
    """Applies a function to a bounded number of images at once."""
    starts = range(0, len(images), IMAGES_AT_ONCE)
    parts = [log_probs(images[start : start + IMAGES_AT_ONCE]) for start in starts]
    return np.concatenate([np.asarray(part) for part in parts])


def average(log_probs: np.ndarray) -> np.ndarray:
    """Averages probabilities over axis 0, in the log domain."""
    return np.logaddexp.reduce(log_probs, axis=0) - np.float32(np.log(len(log_probs)))


def measure(log_probs: Sets, labels: np.ndarray) -> dict[str, float]:
    """All metrics, NaN if the network diverged."""
    if all(np.isfinite(each).all() for each in log_probs.values()):
        return image_metrics.measure(log_probs, labels)
    unfamiliar = [f"auroc_{name}" for name in log_probs if name != "test"]
    return dict.fromkeys(["accuracy", "nll", "ece", "brier", *unfamiliar], float("nan"))


def evaluate(
    predictor: Predictor,
    method: str,
    values: Values,
    fitted: Any,
    seed: int,
    count: int,
    sets: Sets,
    labels: np.ndarray,
) -> dict[str, Any]:
    """Scores of one trained network, or of several.

    Args:
      predictor: of the network.
      method: how it was trained.
      values: its hyperparameters.
      fitted: what `images_training.fit` gave.
      seed: of the draws.
      count: number of posterior samples of IVON's curve; the rest has `REPORTED`.
      sets: images, those named `test` and the unfamiliar ones.
      labels: of the test images.
    """
    if method in POINTS:
        return {"metrics": measure({k: predictor.at(fitted, x) for k, x in sets.items()}, labels)}
    keys = jax.random.split(seed_keys(seed).predict, count)
    drawn = partial(predictor.samples, values, fitted)
    averages = {k: average(drawn(keys[:REPORTED], x)) for k, x in sets.items()}
    result = {"metrics": measure(averages, labels)}
    if not isinstance(fitted, Posterior):
        return result
    at_mean = {k: predictor.at(fitted.mean, x) for k, x in sets.items()}
    curve = sample_curve(drawn(keys, sets["test"]), labels)
    return {**result, "mean": measure(at_mean, labels), "curve": curve}


SCORES: Sequence[str] = ("nll", "accuracy", "ece")


def scores(log_probs: Array, labels: Array) -> Array:
    """The metrics named in `SCORES`."""
    return jnp.stack([getattr(metrics, name)(log_probs, labels) for name in SCORES])


scores_of_groups = jax.jit(jax.vmap(scores, (0, None)))


def sample_curve(log_probs: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """Metrics of the average of 1, 2, 4, ... samples.

    Each is the mean over all disjoint groups of so many samples, since one group of one sample
    says little about samples.
    """
    sizes, measured = [], []
    size, sums = 1, log_probs
    while len(sums):
        averages = sums - np.float32(np.log(size))
        measured.append(scores_of_groups(averages, labels).mean(axis=0))
        sizes.append(size)
        pairs = len(sums) // 2
        sums = np.logaddexp(sums[: 2 * pairs : 2], sums[1 : 2 * pairs : 2])
        size *= 2
    columns = np.asarray(measured).T.tolist()
    return {"samples": sizes, **dict(zip(SCORES, columns, strict=True))}
