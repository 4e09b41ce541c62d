"""Answers of `logistic_2d.py` that need no sampling: the exact posterior and Gaussians beside it.

Data are features times labels ±1, `signed` of shape (n, 2), so that p(y|x, w) = σ(signed·w).
Everything is NumPy in double precision.
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.special

PRIOR_PRECISION = 0.1  # of each weight: a standard deviation of 3.2
NODES = 60  # of the quadrature


class Diagonal(NamedTuple):
    """A Gaussian with a diagonal covariance; or, with an axis in front, one for each seed."""

    mean: np.ndarray
    std: np.ndarray


def energy(weights: np.ndarray, signed: np.ndarray) -> np.ndarray:
    """−log p(y, w) for weights (..., 2)."""
    log_prior = -0.5 * PRIOR_PRECISION * np.sum(weights**2, axis=-1) + np.log(
        PRIOR_PRECISION / (2 * np.pi)
    )
    return np.sum(np.logaddexp(0.0, -(weights @ signed.T)), axis=-1) - log_prior


class Grid(NamedTuple):
    """The exact posterior on a grid of square cells."""

    ticks: tuple[np.ndarray, np.ndarray]  # of the first and the second weight
    density: np.ndarray
    log_evidence: float
    mean: np.ndarray
    std: np.ndarray


def exact_posterior(signed: np.ndarray, low: float = -8.0, high: float = 20.0) -> Grid:
    """The posterior by brute force; its tails beyond the grid are negligible."""
    ticks = np.linspace(low, high, 701)
    weights = np.stack(np.meshgrid(ticks, ticks, indexing="ij"), axis=-1)
    log_joint = -energy(weights, signed)
    cell_area = (ticks[1] - ticks[0]) ** 2
    log_evidence = float(scipy.special.logsumexp(log_joint) + np.log(cell_area))
    density = np.exp(log_joint - log_evidence)

    def expect(values: np.ndarray) -> np.ndarray:
        return np.sum(density[..., None] * values, axis=(0, 1)) * cell_area

    mean = expect(weights)
    return Grid((ticks, ticks), density, log_evidence, mean, np.sqrt(expect((weights - mean) ** 2)))


def free_energy(q: Diagonal, signed: np.ndarray) -> tuple[float, np.ndarray]:
    """E_q[log q − log p(y, w)] = KL(q‖posterior) − log evidence; its gradient in (m, log s).

    Under q each predictor z = x·w is a one-dimensional Gaussian: Gauss-Hermite quadrature gives
    the expectations to rounding error. The gradient is Bonnet's and Price's.
    """
    nodes, weights = scipy.special.roots_hermitenorm(NODES)
    weights = weights / np.sqrt(2 * np.pi)
    variance = q.std**2
    z = (signed @ q.mean)[:, None] + np.sqrt(signed**2 @ variance)[:, None] * nodes
    p = scipy.special.expit(-z)
    value = np.sum(np.logaddexp(0.0, -z) @ weights)
    value += 0.5 * np.sum(PRIOR_PRECISION * (q.mean**2 + variance) - 1)
    value -= 0.5 * np.sum(np.log(PRIOR_PRECISION * variance))
    grad_mean = PRIOR_PRECISION * q.mean - (p @ weights) @ signed
    grad_log_std = variance * (((p * (1 - p)) @ weights) @ signed**2 + PRIOR_PRECISION) - 1
    return float(value), np.concatenate([grad_mean, grad_log_std])


def optimal_diagonal(signed: np.ndarray) -> Diagonal:
    """The diagonal Gaussian of least KL(q‖posterior)."""

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return free_energy(Diagonal(theta[:2], np.exp(theta[2:])), signed)

    found = scipy.optimize.minimize(objective, np.zeros(4), jac=True, options={"gtol": 1e-8}).x
    return Diagonal(found[:2], np.exp(found[2:]))


def laplace(signed: np.ndarray) -> Diagonal:
    """The mode, and the width that the diagonal of the Hessian there gives."""

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        p = scipy.special.expit(-(signed @ weights))
        return float(energy(weights, signed)), PRIOR_PRECISION * weights - p @ signed

    mode = scipy.optimize.minimize(objective, np.zeros(2), jac=True, options={"gtol": 1e-8}).x
    p = scipy.special.expit(-(signed @ mode))
    return Diagonal(mode, (PRIOR_PRECISION + (p * (1 - p)) @ signed**2) ** -0.5)
