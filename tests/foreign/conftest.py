import jax
import pytest


@pytest.fixture(autouse=True)
def rules_of_users():
    """The promotion rules under which these loops were written."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
