"""IVON for JAX: variational learning for large networks at the price of AdamW."""

from ivon_jax import metrics, recipes
from ivon_jax.auto_sample import AutoSampleState, auto_sample, reseed
from ivon_jax.diagnostics import diagnostics, learning_status
from ivon_jax.estimators import mc_value_and_grad
from ivon_jax.kl import kl_divergence
from ivon_jax.linearization import Linearized, linearize, probit_log_probs
from ivon_jax.merging import merge, task_arithmetic
from ivon_jax.optimizer import ivon
from ivon_jax.posterior import posterior, posterior_mean, prior_of, with_ess, with_mean
from ivon_jax.prediction import (
    Moments,
    predict_at_mean,
    predict_draws,
    predict_log_probs,
    predict_moments,
    predict_samples,
)
from ivon_jax.pruning import prune, signal_to_noise
from ivon_jax.sampling import sample_params
from ivon_jax.saving import load, load_metadata, save
from ivon_jax.sensitivity import (
    LeaveOneOut,
    Selection,
    Sensitivity,
    group_sensitivity,
    leave_one_out,
    select_by_leave_one_out,
    sensitivity,
)
from ivon_jax.state import IVONState, Posterior

__version__ = "0.1.0"

__all__ = [
    "AutoSampleState",
    "IVONState",
    "LeaveOneOut",
    "Linearized",
    "Moments",
    "Posterior",
    "Selection",
    "Sensitivity",
    "auto_sample",
    "diagnostics",
    "group_sensitivity",
    "ivon",
    "kl_divergence",
    "learning_status",
    "leave_one_out",
    "linearize",
    "load",
    "load_metadata",
    "mc_value_and_grad",
    "merge",
    "metrics",
    "posterior",
    "posterior_mean",
    "predict_at_mean",
    "predict_draws",
    "predict_log_probs",
    "predict_moments",
    "predict_samples",
    "prior_of",
    "probit_log_probs",
    "prune",
    "recipes",
    "reseed",
    "sample_params",
    "save",
    "select_by_leave_one_out",
    "sensitivity",
    "signal_to_noise",
    "task_arithmetic",
    "with_ess",
    "with_mean",
]
