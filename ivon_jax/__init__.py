"""IVON for JAX: variational learning for large networks at the price of AdamW."""

from ivon_jax.auto_sample import AutoSampleState, auto_sample, reseed
from ivon_jax.estimators import mc_value_and_grad
from ivon_jax.optimizer import ivon
from ivon_jax.posterior import posterior, posterior_mean, prior_of, with_mean
from ivon_jax.sampling import sample_params
from ivon_jax.state import IVONState, Posterior

__version__ = "0.1.0"

__all__ = [
    "AutoSampleState",
    "IVONState",
    "Posterior",
    "auto_sample",
    "ivon",
    "mc_value_and_grad",
    "posterior",
    "posterior_mean",
    "prior_of",
    "reseed",
    "sample_params",
    "with_mean",
]
