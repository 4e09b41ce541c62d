"""IVON for JAX: variational learning for large networks at the cost of AdamW."""

from ivon_jax import metrics, recipes
from ivon_jax._core.auto_sampling import AutoSampleState, auto_sample, reseed
from ivon_jax._core.basis import Sides
from ivon_jax._core.eigenbasis import Eigenbasis
from ivon_jax._core.estimators import mc_value_and_grad
from ivon_jax._core.optimizer import ivon
from ivon_jax._core.posteriors import (
    kl_divergence,
    marginals,
    posterior,
    posterior_mean,
    prior_of,
    with_ess,
    with_mean,
)
from ivon_jax._core.sampling import sample_params
from ivon_jax._core.state import IVONState, Posterior
from ivon_jax._uses.advice import Status, learning_status
from ivon_jax._uses.linearization import Linearized, linearize, probit_log_probs
from ivon_jax._uses.merging import merge, task_arithmetic
from ivon_jax._uses.mixtures import Mixture, mixture
from ivon_jax._uses.monitoring import diagnostics
from ivon_jax._uses.perturbation import LeaveOneOut, Sensitivity, leave_one_out, sensitivity
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

# The optimizer and its posterior.
__all__ = ["auto_sample", "ivon", "mc_value_and_grad", "reseed", "sample_params"]
__all__ += [
    "kl_divergence",
    "marginals",
    "posterior",
    "posterior_mean",
    "prior_of",
    "with_ess",
    "with_mean",
]
__all__ += ["AutoSampleState", "Eigenbasis", "IVONState", "Posterior", "Sides"]
# Uses of the posterior.
__all__ += ["predict_at_mean", "predict_draws", "predict_log_probs", "predict_moments"]
__all__ += ["linearize", "mixture", "predict_samples", "probit_log_probs"]
__all__ += ["leave_one_out", "merge", "prune", "sensitivity", "signal_to_noise", "task_arithmetic"]
__all__ += ["diagnostics", "learning_status", "load", "load_metadata", "save"]
__all__ += ["LeaveOneOut", "Linearized", "Mixture", "Moments", "Sensitivity", "Status"]
__all__ += ["metrics", "recipes"]
