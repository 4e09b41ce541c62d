"""Two real processes, connected by `jax.distributed`, do what one does."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import process_worker
import pytest

TIMEOUT = 120
PROCESSES, LOCAL_DEVICES = 2, 2


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def workers(task, folder):
    """Two processes at their task; none of them outlives the block."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={LOCAL_DEVICES}",
    }
    port, script = free_port(), pathlib.Path(process_worker.__file__)
    started = []
    try:
        for i in range(PROCESSES):
            command = [sys.executable, script, task, str(i), str(PROCESSES), str(port), folder]
            with open(folder / f"log.{i}", "wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def log(folder):
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("log.*")))


def wait(process, folder, deadline):
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pytest.fail(f"a process hangs\n{log(folder)}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that two processes leave."""
    folder = tmp_path_factory.mktemp("processes")
    deadline = time.monotonic() + TIMEOUT
    with workers("once", folder) as started:
        codes = [wait(process, folder, deadline) for process in started]
    assert codes == [0] * PROCESSES, log(folder)
    return folder


def parts(folder, name):
    return [np.load(folder / f"{name}.{i}.npy") for i in range(PROCESSES)]


def alone():
    return process_worker.mesh_of(jax.devices()[:1])


def test_draws_of_two_processes_are_bitwise_those_of_one(folder):
    for name, expected in process_worker.draw(alone()).items():
        first, second = parts(folder, name)
        if expected.ndim:
            assert np.array_equal(np.isnan(first), ~np.isnan(second))
        np.testing.assert_array_equal(np.where(np.isnan(first), second, first), expected, name)


def test_training_on_the_data_of_two_processes_equals_training_on_one(folder):
    # Each step reorders a sum over the examples, worth their number times ε of its size.
    rounding = process_worker.STEPS * len(process_worker.TARGETS) * np.finfo(np.float32).eps
    for name, expected in process_worker.train(alone()).items():
        first, second = parts(folder, name)
        np.testing.assert_array_equal(first, second, name)
        scale = float(np.max(np.abs(expected)))
        np.testing.assert_allclose(first, expected, rtol=0, atol=rounding * scale, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("killed", range(PROCESSES))
def test_a_process_whose_companion_is_killed_ends_with_an_error(killed, tmp_path):
    deadline = time.monotonic() + TIMEOUT
    with workers("forever", tmp_path) as started:
        while len(list(tmp_path.glob("started.*"))) < PROCESSES:
            assert time.monotonic() < deadline, log(tmp_path)
            assert all(process.poll() is None for process in started), log(tmp_path)
            time.sleep(0.05)
        started[killed].send_signal(signal.SIGKILL)
        end = time.monotonic() + process_worker.HEARTBEAT + 30
        assert wait(started[1 - killed], tmp_path, end) != 0
