import jax.numpy as jnp
import pytest

from ivon_jax import (
    auto_sample,
    ivon,
    leave_one_out,
    linearize,
    mc_value_and_grad,
    predict_draws,
    predict_log_probs,
    predict_moments,
    predict_samples,
    sensitivity,
)


def function(*_):
    return jnp.zeros(())


@pytest.mark.parametrize(
    ("call", "old", "new"),
    [
        (lambda **old: auto_sample(ivon(0.1, 10), 0, **old), "mc_samples", "num_samples"),
        *[
            (lambda f=f, **old: f(function, **old), "batch_size", "sample_batch_size")
            for f in (
                mc_value_and_grad,
                predict_draws,
                predict_log_probs,
                predict_moments,
                predict_samples,
            )
        ],
        (lambda **old: linearize(function, **old), "batch_size", "data_batch_size"),
        *[
            (lambda f=f, **old: f(function, function, **old), "batch_size", "data_batch_size")
            for f in (leave_one_out, sensitivity)
        ],
    ],
)
def test_an_old_name_is_refused_with_the_new_one(call, old, new):
    with pytest.raises(TypeError, match=f"the argument {old} is now called {new}"):
        call(**{old: 2})
