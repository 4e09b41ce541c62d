"""A Laplace approximation of the last layer: a Gaussian posterior of the head of a fitted network.

Daxberger et al., arXiv:2106.14806. The head's logits are W [φ; 1]; the Hessian of the loss is
Σ_i (diag p_i − p_i p_iᵀ) ⊗ φ_i φ_iᵀ plus the prior precision τ, which validation data choose.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax, logsumexp

PRECISIONS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


class LastLayer(NamedTuple):
    """The eigendecomposition of the Hessian without the prior, (classes · (width + 1)) squared."""

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray

    def predict(
        self, logits: np.ndarray, features: np.ndarray, precision: float, num_samples: int = 64
    ) -> np.ndarray:
        """Log-probabilities (n, classes), averaged over samples of the Gaussian of the logits."""
        n, classes = logits.shape
        inputs = _with_one(features)
        # Row (c, d) of the eigenvectors belongs to class c and input d.
        basis = self.eigenvectors.reshape(classes, inputs.shape[1], -1)
        scaled = basis / np.sqrt(self.eigenvalues + precision)
        factors = np.einsum("nd,cdk->nck", inputs, scaled)
        covariance = np.einsum("nck,nek->nce", factors, factors)
        roots = np.linalg.cholesky(covariance + 1e-10 * np.eye(classes))
        noise = np.random.default_rng(0).standard_normal((num_samples, n, classes))
        draws = logits + np.einsum("nce,sne->snc", roots, noise)
        return logsumexp(log_softmax(draws, axis=-1), axis=0) - np.log(num_samples)


def fit_last_layer(log_probs: np.ndarray, features: np.ndarray) -> LastLayer:
    """The Gaussian from the training set's predictions (N, classes) and features (N, width)."""
    probs, inputs = np.exp(log_probs.astype(np.float64)), _with_one(features)
    classes, width = probs.shape[1], inputs.shape[1]
    hessian = np.zeros((classes, width, classes, width))
    for c in range(classes):
        for e in range(classes):
            weights = probs[:, c] * ((c == e) - probs[:, e])
            hessian[c, :, e, :] = (weights[:, None] * inputs).T @ inputs
    values, vectors = np.linalg.eigh(hessian.reshape(classes * width, -1))
    return LastLayer(np.maximum(values, 0.0), vectors)


def choose_precision(
    posterior: LastLayer, logits: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> float:
    """The prior precision of `PRECISIONS` with the lowest NLL."""
    rows = np.arange(len(logits))

    def nll(precision: float) -> float:
        return -float(posterior.predict(logits, features, precision)[rows, labels].mean())

    return min(PRECISIONS, key=nll)


def _with_one(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features, np.ones_like(features[:, :1])], axis=1).astype(np.float64)
