"""The benchmarks are scripts: their folder is on the path. Compile quickly, as for the examples."""

import os
import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

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
