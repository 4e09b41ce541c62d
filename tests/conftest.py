"""Eight CPU devices, jax at its strictest, and one compilation of what several tests compile."""

import os
import tempfile

import pytest

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The workers of pytest-xdist inherit the folder, so that each program is compiled once for all of
# them. A folder of your own in the same variable keeps it for the next run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="ivon_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name

import jax

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    # A program that another worker is writing just now is compiled here too.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation(request: pytest.FixtureRequest):
    """Scripts are tested under the promotion rules of users, and compiled quickly, not well."""
    if request.path.parent.name not in ("benchmarks", "examples"):
        yield
        return
    option = "jax_disable_most_optimizations"
    before = jax.config.read(option)
    jax.config.update(option, True)
    os.environ[option.upper()] = "1"  # for the processes that the tests start
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    del os.environ[option.upper()]
    jax.config.update(option, before)
    jax.clear_caches()  # other tests compare the bits of what is compiled well
