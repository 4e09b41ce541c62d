"""IVON for JAX: variational learning for large networks at the price of AdamW."""

from ivon_jax import metrics, recipes
from ivon_jax._core.auto_sampling import AutoSampleState, auto_sample, reseed
from ivon_jax._core.estimators import mc_value_and_grad
from ivon_jax._core.optimizer import ivon
from ivon_jax._core.posteriors import (
    kl_divergence,
    posterior,
    posterior_mean,
    prior_of,
    with_ess,
    with_mean,
)
from ivon_jax._core.sampling import sample_params
from ivon_jax._core.state import IVONState, Posterior
from ivon_jax._uses.linearization import Linearized, linearize, probit_log_probs
from ivon_jax._uses.merging import merge, task_arithmetic
from ivon_jax._uses.monitoring import Status, diagnostics, learning_status
from ivon_jax._uses.perturbation import (
    LeaveOneOut,
    Sensitivity,
    leave_one_out,
    sensitivity,
)
from ivon_jax._uses.prediction import (
    Moments,
    predict_at_mean,
    predict_draws,
    predict_log_probs,
    predict_moments,
    predict_samples,
)
from ivon_jax._uses.pruning import prune, signal_to_noise
from ivon_jax._uses.saving import load, load_metadata, save

__version__ = "0.2.0"

__all__ = [
    "AutoSampleState",
    "IVONState",
    "LeaveOneOut",
    "Linearized",
    "Moments",
    "Posterior",
    "Sensitivity",
    "Status",
    "auto_sample",
    "diagnostics",
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
    "sensitivity",
    "signal_to_noise",
    "task_arithmetic",
    "with_ess",
    "with_mean",
]

_REMOVED = {
    "Selection": "the index of the smallest leave-one-out NLL, as in examples/leave_one_out.py",
    "group_sensitivity": "jax.ops.segment_sum(scores, groups, num_groups)",
    "select_by_leave_one_out": "the index of the smallest leave-one-out NLL, as in "
    "examples/leave_one_out.py",
}


def __getattr__(name: str) -> object:
    if name in _REMOVED:
        raise AttributeError(f"ivon_jax.{name} was removed in version 0.2: use {_REMOVED[name]}.")
    raise AttributeError(f"module 'ivon_jax' has no attribute {name!r}")
