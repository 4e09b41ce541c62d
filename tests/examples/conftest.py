"""What the examples compute does not depend on how well it is compiled: compile quickly."""

import os

import jax
import pytest

OPTION = "jax_disable_most_optimizations"


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """Here and in the processes that the tests start."""
    before = jax.config.read(OPTION)
    os.environ[OPTION.upper()] = "1"
    jax.config.update(OPTION, True)
    yield
    jax.config.update(OPTION, before)
    del os.environ[OPTION.upper()]
    jax.clear_caches()  # other tests compare bits of what is compiled well


@pytest.fixture(autouse=True)
def the_promotion_of_users():
    """Optax's own optimizers do not pass under the strict rules of the other tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
