"""The README's code runs, in order, as it is printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

README = Path(__file__).parents[1] / "README.md"


def code_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_blocks_run_one_after_another():
    def apply(params, inputs):
        return jnp.tanh(inputs @ params["w"]) @ params["v"]

    def loss_fn(params, batch):
        inputs, labels = batch
        logits = apply(params, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    inputs = jnp.sin(jnp.arange(40.0)).reshape(10, 4)
    scope = {
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "apply": apply,
        "loss_fn": loss_fn,
        "inputs": inputs,
        "batch": (inputs, jnp.arange(10) % 3),
        "train": range(10),
        "params": {"w": jnp.ones((4, 5)) / 4, "v": jnp.ones((5, 3)) / 5},
        "schedule": optax.cosine_decay_schedule(0.1, 100),
        "key": jax.random.key(0),
    }
    blocks = code_blocks()
    assert len(blocks) >= 6
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules divide an integer count
        for block in blocks:
            exec(block, scope)
    assert jnp.isfinite(scope["loss"])
    assert jnp.allclose(jnp.exp(scope["log_p"]).sum(axis=-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("pattern", [r"\]\((?!https?://|#)([^)]+)\)", r"python ([\w/]+\.py)"])
def test_files_that_it_names_exist(pattern):
    for name in re.findall(pattern, README.read_text(encoding="utf-8")):
        assert (README.parent / name).exists(), name
