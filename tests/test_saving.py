import json
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import Posterior, ivon, load, load_metadata, posterior, save

safetensors = pytest.importorskip("safetensors.numpy")


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


PARAMS = {
    "layers": [
        Layer(jnp.arange(6.0).reshape(2, 3).T, jnp.ones(2)),
        Layer(jnp.ones((1, 1)), jnp.ones(1)),
    ],
    "scale": jnp.float32(2.0),
}


def q_of(params):
    return posterior(ivon(0.1, 10).init(params))


def test_a_posterior_comes_back_bitwise(tmp_path):
    q = q_of(PARAMS)
    save(tmp_path / "q.safetensors", q, {"data": "digits"})
    chex.assert_trees_all_equal(load(tmp_path / "q.safetensors", like=PARAMS), q, strict=True)
    shapes = jax.eval_shape(lambda: PARAMS)
    chex.assert_trees_all_equal(load(str(tmp_path / "q.safetensors"), like=shapes), q, strict=True)
    assert load_metadata(tmp_path / "q.safetensors") == {"data": "digits"}
    nested = load(tmp_path / "q.safetensors")
    np.testing.assert_array_equal(nested.mean["layers"]["0"]["kernel"], PARAMS["layers"][0].kernel)
    assert set(nested.precision) == {"layers", "scale"}


def test_other_frameworks_read_the_file(tmp_path):
    """The plain reader of the format sees named tensors, transposed views among them."""
    save(tmp_path / "q.safetensors", q_of(PARAMS))
    tensors = safetensors.load_file(tmp_path / "q.safetensors")
    assert set(tensors) == {
        f"{part}.{name}"
        for part in ("mean", "precision")
        for name in (
            "layers.0.kernel",
            "layers.0.bias",
            "layers.1.kernel",
            "layers.1.bias",
            "scale",
        )
    }
    np.testing.assert_array_equal(tensors["mean.layers.0.kernel"], PARAMS["layers"][0].kernel)
    assert tensors["mean.scale"].shape == ()


def test_fixed_leaves_of_any_dtype_and_a_state_itself_are_saved(tmp_path):
    params = {"half": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(3), "w": jnp.ones(2)}
    state = ivon(0.1, 10).init({"half": 1, "n": params["n"], "w": params["w"]})
    q = posterior(state, params)
    save(tmp_path / "whole.safetensors", q)
    loaded = load(tmp_path / "whole.safetensors", like=params)
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded, q)
    chex.assert_trees_all_equal(loaded, q)
    save(tmp_path / "own.safetensors", state)
    np.testing.assert_array_equal(
        load(tmp_path / "own.safetensors").precision["w"], q.precision["w"]
    )
    root = Posterior(jnp.ones(3), jnp.full(3, 2.0))
    save(tmp_path / "root.safetensors", root)
    chex.assert_trees_all_equal(load(tmp_path / "root.safetensors"), root, strict=True)
    chex.assert_trees_all_equal(
        load(tmp_path / "root.safetensors", like=jnp.zeros(3)), root, strict=True
    )


def test_the_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    save(tmp_path / "q", q_of(PARAMS))
    assert (tmp_path / "q").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "q").chmod(0o640)
    save(tmp_path / "q", q_of(PARAMS))
    assert (tmp_path / "q").stat().st_mode & 0o777 == 0o640


def test_float64_is_kept_or_refused(tmp_path):
    with jax.enable_x64(True):
        q = q_of({"w": jnp.full(2, 1 / 3)})
        assert q.mean["w"].dtype == jnp.float64
        save(tmp_path / "q", q)
        chex.assert_trees_all_equal(load(tmp_path / "q"), q, strict=True)
    with pytest.raises(ValueError, match="jax_enable_x64"):
        load(tmp_path / "q")


def test_nnx_states_are_saved(tmp_path):
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param)
    save(tmp_path / "q", ivon(0.1, 10).init(params))
    assert set(load(tmp_path / "q").mean) == {"bias", "kernel"}


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "q.safetensors"
    save(path, q_of(PARAMS))
    before = path.read_bytes()

    def full_disk(tensors, name, metadata):
        del tensors, metadata
        with open(name, "wb") as file:
            file.write(before[:10])
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(path, q_of(PARAMS))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "q.safetensors"
    save(path, q_of(PARAMS))
    with pytest.raises(ValueError, match=r"it lacks mean.other"):
        load(path, like={**PARAMS, "other": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"it also has mean.scale"):
        load(path, like={"layers": PARAMS["layers"]})
    with pytest.raises(ValueError, match=r"mean.scale has shape \(\) in the file"):
        load(path, like={**PARAMS, "scale": jnp.ones(2)})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(path)
    safetensors.save_file({"w": np.ones(2)}, path)
    with pytest.raises(ValueError, match=r"not written by ivon_jax.save"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors")


def test_bad_names_and_metadata_are_refused(tmp_path):
    clash = {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"two leaves would be called 'mean.a.b'"):
        save(tmp_path / "q", q_of(clash))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save(tmp_path / "none" / "q", q_of(PARAMS))
    with pytest.raises(TypeError, match="strings to strings"):
        save(tmp_path / "q", q_of(PARAMS), {"epochs": 3})
    with pytest.raises(ValueError, match="reserved"):
        save(tmp_path / "q", q_of(PARAMS), {"ivon_jax": "x"})
    assert not list(tmp_path.iterdir())


def test_the_format_is_described_in_the_file(tmp_path):
    save(tmp_path / "q", q_of({"w": jnp.ones(2)}))
    from safetensors import safe_open

    with safe_open(tmp_path / "q", framework="numpy") as file:
        stored = json.loads(file.metadata()["ivon_jax"])
    assert stored == {
        "format": "ivon_jax.posterior.v1",
        "paths": {"mean.w": ["w"], "precision.w": ["w"]},
    }


def test_metadata_of_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"nothing that was saved")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_metadata(tmp_path / "x")
