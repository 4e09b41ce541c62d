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
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
from jax._src import compiler as jax_compiler

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    # A program that another worker is writing just now is compiled here too.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache")


SCRIPTS = ("benchmarks", "examples")
# What is tested here are bits, memory or instructions of the programs that users get.
COMPILED_WELL = (
    "test_checkpoint",
    "test_collectives",
    "test_compiler",
    "test_invariance",
    "test_noise",
    "test_optimizer",
    "test_processes",
    "test_sample_groups",
    "test_sampling",
)
QUICK = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
    "xla_backend_optimization_level": 0,
}
try:
    jax.jit(lambda: 0, compiler_options=QUICK)()
except jax.errors.JaxRuntimeError:  # another XLA has other options
    QUICK = {}
QUICK_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())

_options = jax_compiler.get_compile_options


def _quick_options(*args, env_options_overrides=None, **kwargs):
    overrides = {**QUICK, **(env_options_overrides or {})}
    return _options(*args, env_options_overrides=overrides, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def compilation(request: pytest.FixtureRequest):
    """Most tests spend their time in the compiler: what they run is compiled quickly, not well."""
    wanted = _options if request.path.stem in COMPILED_WELL else _quick_options
    if jax_compiler.get_compile_options is not wanted:
        jax.clear_caches()
        jax_compiler.get_compile_options = wanted


@pytest.fixture(autouse=True, scope="module")
def script_rules(request: pytest.FixtureRequest):
    """Scripts run under the promotion rules of users, in processes of their own as well."""
    if request.path.parent.name not in SCRIPTS:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} {QUICK_FLAGS}")
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """MiniLM in small, with random parameters, and a word as a token."""
    import jax.numpy as jnp
    import numpy as np

    from examples._shared import minilm

    sizes = {"WIDTH": 8, "DEPTH": 2, "HEADS": 2, "HIDDEN": 12, "VOCABULARY": 40, "POSITIONS": 64}
    for name, size in sizes.items():
        monkeypatch.setattr(minilm, name, size)

    def load_encoder():
        params = minilm.Encoder().init(jax.random.key(1), jnp.ones((1, 4), jnp.int32))["params"]
        # Gains and biases other than one and zero.
        return jax.tree.map(
            lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
        )

    def tokenize(texts, length):
        words = [[1 + sum(map(ord, w)) % 39 for w in text.split()][:length] for text in texts]
        return np.array([w + [0] * (length - len(w)) for w in words], np.int32)

    monkeypatch.setattr(minilm, "load_encoder", load_encoder)
    monkeypatch.setattr(minilm, "tokenize", tokenize)
