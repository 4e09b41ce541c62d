"""Metrics of predicted class probabilities, all from log-probabilities of shape (n, classes)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

NUM_BINS = 15


def accuracy(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose most probable class is the true one."""
    return float(np.mean(log_probs.argmax(axis=-1) == labels))


def nll(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """Negative log-likelihood, mean over examples."""
    return float(-np.mean(log_probs[np.arange(len(labels)), labels]))


def brier(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """Squared distance to the one-hot label, summed over classes, mean over examples (0 to 2)."""
    one_hot = np.eye(log_probs.shape[-1])[labels]
    return float(np.mean(np.sum((np.exp(log_probs) - one_hot) ** 2, axis=-1)))


@dataclass(frozen=True)
class Bins:
    """Reliability bins: number of examples, mean confidence and accuracy (NaN where empty)."""

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def reliability_bins(log_probs: np.ndarray, labels: np.ndarray) -> Bins:
    """Groups examples by the probability of the predicted class into 15 bins of equal width.

    Bin k of 1 to 15 holds confidences in ((k-1)/15, k/15].
    """
    confidence = np.exp(log_probs.max(axis=-1)).clip(max=1.0)
    correct = log_probs.argmax(axis=-1) == labels
    index = np.ceil(confidence * NUM_BINS).astype(int) - 1
    count = np.bincount(index, minlength=NUM_BINS)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(index, weights=values, minlength=NUM_BINS)
        return np.divide(sums, count, out=np.full(NUM_BINS, np.nan), where=count > 0)

    return Bins(count, mean(confidence), mean(correct))


def ece(log_probs: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: |accuracy - confidence| of each bin, weighted by its share."""
    bins = reliability_bins(log_probs, labels)
    gaps = np.nan_to_num(np.abs(bins.accuracy - bins.confidence))
    return float(np.sum(bins.count * gaps) / np.sum(bins.count))


def entropy(log_probs: np.ndarray) -> np.ndarray:
    """Entropy of each prediction in nats."""
    log_probs = np.maximum(log_probs, -1e3)  # so that 0 log 0 is 0
    return -np.sum(np.exp(log_probs) * log_probs, axis=-1)


def auroc(familiar: np.ndarray, unfamiliar: np.ndarray) -> float:
    """Area under the ROC curve of predictive entropy telling unfamiliar images from familiar."""
    scores = np.concatenate([entropy(familiar), entropy(unfamiliar)])
    is_unfamiliar = np.repeat([0, 1], [len(familiar), len(unfamiliar)])
    return float(roc_auc_score(is_unfamiliar, scores))


def measure(log_probs: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """All metrics of one trained model; `log_probs` has `test` and the unfamiliar sets."""
    test = log_probs["test"]
    metrics = {
        "accuracy": accuracy(test, labels),
        "nll": nll(test, labels),
        "ece": ece(test, labels),
        "brier": brier(test, labels),
    }
    unfamiliar = {name: values for name, values in log_probs.items() if name != "test"}
    return metrics | {f"auroc_{name}": auroc(test, values) for name, values in unfamiliar.items()}


def sample_counts(num_samples: int) -> list[int]:
    """Powers of two up to the number of samples, and that number."""
    powers = [2**power for power in range(num_samples.bit_length())]
    return sorted({*powers, num_samples})


def sample_curves(sample_log_probs: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """NLL and accuracy of the average of the first 1, 2, 4, ... samples."""
    running = np.logaddexp.accumulate(sample_log_probs, axis=0)
    counts = sample_counts(len(running))
    averages = [running[count - 1] - np.log(count) for count in counts]
    return {
        "samples": counts,
        "nll": [nll(log_probs, labels) for log_probs in averages],
        "accuracy": [accuracy(log_probs, labels) for log_probs in averages],
    }


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 0 and its standard error, which is NaN for a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))
