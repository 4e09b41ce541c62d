"""Checkpoints: continued on other devices, after kills, damage and a full disk."""

import contextlib
import os
import resource
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("orbax.checkpoint", reason='the examples need: pip install -e ".[examples]"')

from examples.gpt2.checkpoints import DIGESTS, Checkpoints
from ivon_jax import ivon, sample_params

RUN = {"model": {"width": 128, "depth": 2}, "data": "tokens", "lr": 0.1, "betas": (0.9, 0.99)}


def numbers(step):
    """A small state, of which each step has another one."""
    return {"w": jnp.arange(6.0).reshape(2, 3) + step, "n": jnp.int32(step)}


def fill(directory, steps=(1, 2, 3), **options):
    with Checkpoints(directory, RUN, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, numbers(step))


def restored(directory, like=None, run=RUN):
    with Checkpoints(directory, run) as checkpoints:
        return checkpoints.restore(numbers(0) if like is None else like)


def folders(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_is(checkpoint, step):
    assert checkpoint[0] == step
    chex.assert_trees_all_equal(checkpoint[1], numbers(step), strict=True)


def spread(tree, devices):
    """Shardings over the first devices: along the first axis where it can be split."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
    return jax.tree.map(
        lambda x: NamedSharding(mesh, P("d") if x.ndim and x.shape[0] % 8 == 0 else P()), tree
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_a_state_on_four_devices_continues_on_fewer_bit_for_bit(tmp_path, devices):
    params = {"w": jax.random.normal(jax.random.key(0), (8, 5)), "b": jnp.ones(16, jnp.bfloat16)}
    tx = ivon(0.1, ess=100.0, hess_init=0.5)
    sample, noise = sample_params(jax.random.key(3), tx.init(params))
    params, opt_state = tx.update(sample, tx.init(params), params, noise=noise)
    state = {"params": params, "optimizer": opt_state}
    with Checkpoints(tmp_path / "new" / "folder", RUN) as checkpoints:
        checkpoints.save(7, jax.device_put(state, spread(state, 4)))
    shardings = spread(state, devices)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    step, back = restored(tmp_path / "new" / "folder", like)
    assert step == 7
    chex.assert_trees_all_equal(back, state, strict=True)
    assert jax.tree.map(lambda x: x.sharding, back) == shardings


def test_the_last_few_are_kept_each_step_once_and_runs_are_not_mixed(tmp_path):
    assert restored(tmp_path) is None
    fill(tmp_path, [0, 1, 2, 3, 4, 4], keep=2)
    assert folders(tmp_path) == ["3", "4"]
    with Checkpoints(tmp_path, RUN) as checkpoints:
        with pytest.raises(ValueError, match="has a checkpoint of step 4, so that none of step 4"):
            checkpoints.save(4, numbers(1))
        assert_is(checkpoints.restore(numbers(0)), 4)
        checkpoints.save(4, numbers(4))
    assert_is(restored(tmp_path), 4)


def test_a_checkpoint_of_another_run_names_every_difference(tmp_path):
    fill(tmp_path, [1])
    run = {"model": {"width": 256, "depth": 2, "heads": 4}, "data": "tokens", "betas": [0.9, 0.99]}
    with pytest.raises(ValueError, match="another model, optimizer or data set") as error:
        restored(tmp_path, run=run)
    assert (
        "lr is 0.1 there and absent here; model.heads is absent there and 4 here; "
        "model.width is 128 there and 256 here. Continue"
    ) in str(error.value)
    other = {"w": jnp.zeros((2, 4)), "n": jnp.float32(0), "v": jnp.zeros(1)}
    with pytest.raises(ValueError, match="another model") as error:
        restored(tmp_path, like=other)
    for difference in (
        "['w'] is float32[2, 3] there and float32[2, 4] here",
        "['n'] is int32[] there and float32[] here",
        "['v'] is absent there",
    ):
        assert difference in str(error.value)


def parts(folder):
    """The files that are read; the one with the arrays last."""
    inner = (p for p in folder.rglob("*") if p.is_file() and p.parent != folder)
    return sorted(inner, key=os.path.getsize)


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    return data


DAMAGES = {
    "changed since it was written": lambda folder: flip(parts(folder)[-1]),
    "state.* changed": lambda folder: os.truncate(parts(folder)[-1], 9),
    "state/.* is missing": lambda folder: parts(folder)[-1].unlink(),
    "digests.json is missing": lambda folder: (folder / DIGESTS).unlink(),
    "digests.json itself is unreadable": lambda folder: os.truncate(folder / DIGESTS, 9),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_continued(tmp_path, reason):
    fill(tmp_path)
    for _ in range(2):  # a step can be damaged twice
        DAMAGES[reason](tmp_path / "3")
        with Checkpoints(tmp_path, RUN) as checkpoints:
            with pytest.warns(UserWarning, match=f"step 3 in .*{reason}.* step 2 is used") as seen:
                assert_is(checkpoints.restore(numbers(0)), 2)
            assert seen[0].filename == __file__
            assert folders(tmp_path) == ["1", "2", "3.corrupt"]
            checkpoints.save(3, numbers(3))
        assert_is(restored(tmp_path), 3)


def test_a_changed_byte_in_any_file_is_noticed_and_training_does_not_begin_again(tmp_path):
    fill(tmp_path, [1, 2])
    flip(parts(tmp_path / "2")[-1])
    files = parts(tmp_path / "1")
    assert len(files) > 5
    for path in files:
        data, name = flip(path), path.relative_to(tmp_path / "1")
        reasons = rf"All .* damaged:\n  step 2: .* changed.*\n  step 1: {name} changed"
        with pytest.raises(RuntimeError, match=reasons):
            restored(tmp_path)
        path.write_bytes(data)
    assert folders(tmp_path) == ["1", "2"]
    for path in (tmp_path / "1").iterdir():  # files that Orbax does not read are no loss
        if path.is_file() and path.name != DIGESTS:
            path.write_text("?")
    with pytest.warns(UserWarning, match="step 1 is used"):
        assert_is(restored(tmp_path), 1)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_what_a_run_killed_in_a_save_leaves_is_continued_from_the_one_before(
    tmp_path, monkeypatch, moment
):
    write = Checkpoints._write_digests

    def write_and_copy(self):
        """The files of this moment are those that a kill would leave."""
        if moment == "after" or self._current != 3:
            write(self)
        if self._current == 3:
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
            if moment == "before":
                write(self)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_write_digests", write_and_copy)
        fill(tmp_path / "run")
    left = folders(tmp_path / "killed")
    assert left[:2] == ["1", "2"] and left[2].startswith("3.") and len(left) == 3
    with Checkpoints(tmp_path / "killed", RUN) as checkpoints:
        assert_is(checkpoints.restore(numbers(0)), 2)
        checkpoints.save(3, numbers(3))
    assert folders(tmp_path / "killed") == ["1", "2", "3"]
    assert_is(restored(tmp_path / "killed"), 3)


@contextlib.contextmanager
def limited_files(size):
    """Larger files cannot be written; the error is much like that of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_save_without_space_is_an_error_and_leaves_the_others(tmp_path):
    def large(step):  # numbers that do not compress
        return {"w": np.random.default_rng(step).integers(0, 2**32, 100_000, dtype=np.uint32)}

    with Checkpoints(tmp_path, RUN, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, large(step))
        checkpoints.wait()
        message = "step 3 could not be written .*File too large.* kept there: 1, 2"
        with limited_files(100_000), pytest.raises(RuntimeError, match=message):
            checkpoints.save(3, large(3))  # in the background
            checkpoints.wait()
        assert folders(tmp_path) == ["1", "2"]
        checkpoints.save(3, large(3))  # there is space again
    step, state = restored(tmp_path, large(0))
    assert step == 3 and folders(tmp_path) == ["2", "3"]
    chex.assert_trees_all_equal(state, large(3))
