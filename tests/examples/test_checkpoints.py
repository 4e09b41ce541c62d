"""`examples/checkpoints.py`: continued on other devices, after kills, damage and a full disk."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("orbax.checkpoint", reason="needs: pip install orbax-checkpoint")

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
sys.path.insert(0, str(Path(__file__).parent))

import checkpoint_worker
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.gpt2.checkpoints import DIGESTS, Checkpoints
from ivon_jax import ivon, sample_params

RUN = {"model": {"width": 128, "depth": 2}, "data": "tokens", "lr": 0.1}
STRICT = ["-W", "error", "-W", "default:The checkpoint of step"]
WORKER = [sys.executable, *STRICT, checkpoint_worker.__file__]
ONE_DEVICE = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def numbers(step):
    """A small state, of which each step has another one."""
    return {"w": jnp.arange(6.0).reshape(2, 3) + step, "n": jnp.int32(step)}


def fill(directory, steps=(1, 2, 3), **options):
    with Checkpoints(directory, RUN, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, numbers(step), {"sequence": 10 * step})


def restored(directory, like=None, run=RUN):
    with Checkpoints(directory, run) as checkpoints:
        return checkpoints.restore(numbers(0) if like is None else like)


def folders(directory):
    return sorted(path.name for path in directory.iterdir())


def assert_same(a, b):
    """Bit for bit, type for type."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_is(checkpoint, step):
    assert checkpoint[0] == step and checkpoint[2] == {"sequence": 10 * step}
    assert_same(checkpoint[1], numbers(step))


# --- What is saved is restored --------------------------------------------------------------------


def ivon_state():
    """Optimizer after a step, and a key: all that training continues from."""
    params = {
        "w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32),
        "b": jnp.arange(16, dtype=jnp.bfloat16),
    }
    tx, key = ivon(0.1, ess=100.0, hess_init=0.5), jax.random.key(3)
    state = tx.init(params)
    sample, noise = sample_params(key, state)
    params, state = tx.update(sample, state, params, noise=noise)
    return {"params": params, "optimizer": state, "key": jax.random.key_data(key)}


def spread(tree, devices):
    """Shardings over so many devices: along the first axis where it can be split."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",))
    return jax.tree.map(
        lambda x: NamedSharding(mesh, P("d") if x.ndim and x.shape[0] % 8 == 0 else P()), tree
    )


@pytest.mark.parametrize("devices", [1, 2])
def test_a_state_on_four_devices_continues_on_fewer_bit_for_bit(tmp_path, devices):
    state = ivon_state()
    with Checkpoints(tmp_path / "new" / "folder", RUN) as checkpoints:
        checkpoints.save(7, jax.device_put(state, spread(state, 4)), {"sequence": 70})
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        spread(state, devices),
    )
    step, back, position = restored(tmp_path / "new" / "folder", like)
    assert (step, position) == (7, {"sequence": 70})
    assert_same(back, state)
    assert jax.tree.map(lambda x: x.sharding, back) == spread(state, devices)


def test_the_last_few_are_kept(tmp_path):
    fill(tmp_path, range(5), keep=2)
    assert folders(tmp_path) == ["3", "4"]
    assert_is(restored(tmp_path), 4)


def test_nothing_is_restored_from_nothing(tmp_path):
    assert restored(tmp_path / "new") is None


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path, RUN) as checkpoints:
        checkpoints.save(1, numbers(1), {"sequence": 10})
        checkpoints.save(1, numbers(1), {"sequence": 10})
    with Checkpoints(tmp_path, RUN) as checkpoints:
        assert_is(checkpoints.restore(numbers(0)), 1)
        checkpoints.save(1, numbers(1), {"sequence": 10})
    assert folders(tmp_path) == ["1"]


def test_a_run_that_does_not_continue_what_is_there_is_not_mixed_with_it(tmp_path):
    fill(tmp_path, [5])
    with (
        Checkpoints(tmp_path, RUN) as checkpoints,
        pytest.raises(ValueError, match="has a checkpoint of step 5, so that none of step 1"),
    ):
        checkpoints.save(1, numbers(1), {})
    assert_is(restored(tmp_path), 5)


# --- Another run ----------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_names_every_difference(tmp_path):
    fill(tmp_path, [1])
    run = {"model": {"width": 256, "depth": 2, "heads": 4}, "data": "tokens"}
    with pytest.raises(ValueError, match="another model, optimizer or data set") as error:
        restored(tmp_path, run=run)
    assert "model.width is 128 there and 256 here" in str(error.value)
    assert "model.heads is absent there and 4 here" in str(error.value)
    assert "lr is 0.1 there and absent here" in str(error.value)
    assert "data is" not in str(error.value) and "depth" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "difference"),
    [
        ("w", jnp.zeros((2, 4)), r"\['w'\] is \"float32\[2, 3\]\" there and \"float32\[2, 4\]\""),
        ("n", jnp.float32(0), r"\['n'\] is \"int32\[\]\" there and \"float32\[\]\" here"),
        ("v", jnp.zeros(1), r"\['v'\] is absent there"),
    ],
)
def test_other_arrays_are_named(tmp_path, name, array, difference):
    fill(tmp_path, [1])
    with pytest.raises(ValueError, match=difference):
        restored(tmp_path, like=numbers(0) | {name: array})


def test_a_description_is_compared_as_it_is_read_from_json(tmp_path):
    run = {"betas": (0.9, 0.99), 3: None, "nothing": float("nan")}
    with Checkpoints(tmp_path, run) as checkpoints:
        checkpoints.save(1, numbers(1), {"sequence": 10})
    assert_is(restored(tmp_path, run=run), 1)


# --- Damage ---------------------------------------------------------------------------------------


def largest(folder):
    """The file with the arrays."""
    return max((p for p in (folder / "state").rglob("*") if p.is_file()), key=os.path.getsize)


def truncate(folder):
    path = largest(folder)
    os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    path = largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


DAMAGES = {
    "truncated": (truncate, "changed since it was written"),
    "flipped": (flip, "changed since it was written"),
    "deleted": (lambda folder: largest(folder).unlink(), "is missing"),
    "emptied": (empty, "digests.json is missing"),
    "no digests": (lambda folder: (folder / DIGESTS).unlink(), "digests.json is missing"),
    "bad digests": (
        lambda folder: os.truncate(folder / DIGESTS, 9),
        "digests.json itself is unreadable",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_continued(tmp_path, kind):
    fill(tmp_path)
    damage, reason = DAMAGES[kind]
    damage(tmp_path / "3")
    with Checkpoints(tmp_path, RUN) as checkpoints:
        with pytest.warns(UserWarning, match=f"step 3 in .*{reason}.* step 2 is used") as caught:
            assert_is(checkpoints.restore(numbers(0)), 2)
        assert caught[0].filename == __file__
        assert folders(tmp_path) == ["1", "2", "3.corrupt"]
        checkpoints.save(3, numbers(3), {"sequence": 30})
    assert_is(restored(tmp_path), 3)


def test_every_file_that_is_read_is_checked(tmp_path):
    fill(tmp_path, [1])
    parts = [p for p in (tmp_path / "1").rglob("*") if p.is_file() and p.parent != tmp_path / "1"]
    assert len(parts) > 5
    for path in parts:
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(RuntimeError, match=f"step 1: {path.relative_to(tmp_path / '1')} chan"):
            restored(tmp_path)
        path.write_bytes(data)
    assert_is(restored(tmp_path), 1)


def test_files_that_orbax_does_not_read_are_no_loss(tmp_path):
    fill(tmp_path, [1])
    for path in (tmp_path / "1").iterdir():
        if path.is_file() and path.name != DIGESTS:
            path.write_text("?")
    assert_is(restored(tmp_path), 1)


def test_a_step_can_be_damaged_twice(tmp_path):
    fill(tmp_path, [1])
    for _ in range(2):
        with Checkpoints(tmp_path, RUN) as checkpoints:
            checkpoints.restore(numbers(0))
            checkpoints.save(2, numbers(2), {"sequence": 20})
        flip(tmp_path / "2")
        with pytest.warns(UserWarning, match="step 2"):
            assert_is(restored(tmp_path), 1)
    assert folders(tmp_path) == ["1", "2.corrupt"]


def test_if_all_are_damaged_training_does_not_begin_anew(tmp_path):
    fill(tmp_path)
    for step in "123":
        flip(tmp_path / step)
    for _ in range(2):  # nor at the next start
        with pytest.raises(RuntimeError, match=r"All .* damaged:(\n  step [321]: .*changed.*){3}"):
            restored(tmp_path)
    assert folders(tmp_path) == ["1", "2", "3"]


# --- Killed ---------------------------------------------------------------------------------------


def start(directory, *options):
    return subprocess.Popen(
        [*WORKER, directory, *map(str, options)], env=ONE_DEVICE, stdout=subprocess.PIPE, text=True
    )


def newest(directory):
    """The last step that is completely saved."""
    return max((int(name) for name in folders(directory) if name.isdigit()), default=0)


def unfinished(directory):
    return list(directory.glob("*tmp*"))


def kill(worker, is_time):
    """Kills the worker at the time given, unless it does so itself; the last step it printed."""
    deadline = time.monotonic() + 60
    while worker.poll() is None and not is_time() and time.monotonic() < deadline:
        time.sleep(0.001)
    worker.kill()
    printed = worker.communicate()[0].split()
    assert worker.returncode == -signal.SIGKILL
    return int(printed[-1])


def assert_continues(directory, printed):
    """The last save that was completed is intact; returns its step."""
    finished = newest(directory)
    with Checkpoints(directory, checkpoint_worker.RUN) as checkpoints:
        step, state, position = checkpoints.restore(checkpoint_worker.like())
    # Before a step is printed its save has begun, and the one before has ended.
    assert step == finished >= printed - 1
    assert position == {"sequence": 10 * step}
    assert_same(jax.device_get(state), checkpoint_worker.state_at(step))
    return step


def test_a_run_killed_in_a_save_continues_from_the_one_before(tmp_path):
    worker = start(tmp_path, 9999)
    printed = kill(worker, lambda: newest(tmp_path) > 2 and unfinished(tmp_path))
    step = assert_continues(tmp_path, printed)
    for moment in ("before", "after"):
        worker = start(tmp_path, 9999, f"--die-{moment}-digests", step + 2)
        printed = kill(worker, lambda: False)
        assert [path.name.split(".")[0] for path in unfinished(tmp_path)] == [str(step + 2)]
        step += 1
        assert assert_continues(tmp_path, printed) == step


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_at_any_time_continues(tmp_path, seed):
    moments = random.Random(seed)
    last = 0
    for _ in range(3):
        worker = start(tmp_path, 9999)
        while newest(tmp_path) == last:
            assert worker.poll() is None
            time.sleep(0.01)
        moment = time.monotonic() + moments.uniform(0, 0.4)
        printed = kill(worker, lambda moment=moment: time.monotonic() > moment)
        last = assert_continues(tmp_path, printed)


# --- No space left, and two processes -------------------------------------------------------------


def test_a_save_without_space_is_an_error_and_leaves_the_others(tmp_path):
    worker = start(tmp_path, 3, "--fail-at", 3)
    printed = worker.communicate()[0].splitlines()
    assert worker.returncode == 0
    # After the error there is space again, and the same step is saved.
    assert printed[:3] == ["0", "1", "2"] and printed[4:] == ["3"]
    assert "The checkpoint of step 3 could not be written" in printed[3]
    assert "File too large" in printed[3] and "kept there: 1, 2" in printed[3]
    assert folders(tmp_path) == ["2", "3"]
    assert assert_continues(tmp_path, 3) == 3


@pytest.mark.slow
def test_two_processes_save_and_agree_on_what_to_continue(tmp_path):
    def run_both(last):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        both = [start(tmp_path, last, "--process", i, "--port", port) for i in range(2)]
        lines = [worker.communicate(timeout=120)[0].splitlines() for worker in both]
        assert [worker.returncode for worker in both] == [0, 0]
        # Collectives write to standard output too.
        return [[line for line in printed if line.isdigit()] for printed in lines]

    assert run_both(3) == [["0", "1", "2", "3"]] * 2
    assert assert_continues(tmp_path, 3) == 3  # in one process
    flip(tmp_path / "3")
    assert run_both(4) == [["2", "3", "4"]] * 2
    assert folders(tmp_path) == ["3", "3.corrupt", "4"]
    assert assert_continues(tmp_path, 4) == 4
