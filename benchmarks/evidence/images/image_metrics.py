"""The metrics of `image_classification.py`, from log-probabilities of shape (n, classes)."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from ivon_jax import metrics


def entropy(log_probs: np.ndarray) -> np.ndarray:
    """Entropy of each prediction in nats."""
    return np.asarray(metrics.predictive_entropy(jnp.asarray(log_probs)))


def measure(log_probs: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """All metrics of one trained model; `log_probs` has `test` and the unfamiliar sets."""
    test, true = jnp.asarray(log_probs["test"]), jnp.asarray(labels)
    of_labels = {
        "accuracy": metrics.accuracy(test, true),
        "nll": metrics.nll(test, true),
        "ece": metrics.ece(test, true),
        "brier": metrics.brier(test, true),
    }
    detected = {
        f"auroc_{name}": metrics.detection(entropy(log_probs["test"]), entropy(values)).auroc
        for name, values in log_probs.items()
        if name != "test"
    }
    return {name: float(value) for name, value in of_labels.items()} | detected


def sample_counts(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples, and that number."""
    powers = [2**power for power in range(num_samples.bit_length())]
    return sorted({*powers, num_samples})


def sample_curves(sample_log_probs: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """NLL and accuracy of the average of the first 1, 2, 4, ... samples."""
    running = np.logaddexp.accumulate(sample_log_probs, axis=0)
    counts = sample_counts(len(running))
    averages = [jnp.asarray(running[count - 1] - np.log(count)) for count in counts]
    true = jnp.asarray(labels)
    return {
        "samples": counts,
        "nll": [float(metrics.nll(log_probs, true)) for log_probs in averages],
        "accuracy": [float(metrics.accuracy(log_probs, true)) for log_probs in averages],
    }
