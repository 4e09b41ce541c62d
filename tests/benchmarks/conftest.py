"""A fixture for tests of what a script prints, which does not depend on how it is compiled."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles without most of XLA's optimisations, under the promotion rules of users."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()  # no other test may reuse what was compiled here
