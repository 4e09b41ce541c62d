"""A process that trains and saves, to be killed or to run out of space: see test_checkpoints.py."""

import argparse
import contextlib
import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.gpt2 import checkpoints

RUN = {"model": {"width": 3}}
# Numbers that do not compress, so that a save takes a while.
START = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint32)


def state_at(step):
    """What training arrives at, by NumPy; the numbers wrap around."""
    return {"params": START * np.uint32(2 * step + 1), "step": np.uint32(step)}


def shardings():
    mesh = Mesh(np.array(jax.devices()), ("d",))
    return {"params": NamedSharding(mesh, P("d")), "step": NamedSharding(mesh, P())}


def like():
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state_at(0), shardings()
    )


@jax.jit(donate_argnums=0)
def advance(state):
    """In place, as training does: a save must hold what was there when it was called."""
    return {"params": state["params"] + jnp.asarray(2 * START), "step": state["step"] + 1}


def train(options):
    with checkpoints.Checkpoints(options.directory, RUN, keep=2) as saved:
        restored = saved.restore(like())
        first, state, _ = restored or (0, jax.device_put(state_at(0), shardings()), {})
        print(first, flush=True)
        for step in range(first + 1, options.last + 1):
            state = advance(state)
            if step == options.fail_at:
                fail(saved, step, state)
            saved.save(step, state, {"sequence": 10 * step})
            print(step, flush=True)


def fail(saved, step, state):
    """Saves with too little space for it."""
    saved.wait()
    with limited_files(100_000):
        saved.save(step, state, {})  # in the background
        try:
            saved.wait()
        except RuntimeError as error:
            print("error:", error, flush=True)


@contextlib.contextmanager
def limited_files(size):
    """Larger files cannot be written; the error is much like that of a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def die_around_digests(step, after):
    """Kills this process when the given step is written but has not got its name yet."""
    write = checkpoints.Checkpoints._write_digests

    def write_and_die(self):
        if after or self._current != step:
            write(self)
        if self._current == step:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.Checkpoints._write_digests = write_and_die


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("last", type=int, help="last step; it begins at what is in the directory")
    parser.add_argument("--fail-at", type=int, help="step to save with too little space at first")
    parser.add_argument("--die-before-digests", type=int, help="step")
    parser.add_argument("--die-after-digests", type=int, help="step")
    parser.add_argument("--process", type=int, help="one of two processes that train together")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.process is not None:
        jax.distributed.initialize(f"localhost:{options.port}", 2, options.process)
    die_at = options.die_before_digests or options.die_after_digests
    if die_at:
        die_around_digests(die_at, after=options.die_after_digests is not None)
    train(options)


if __name__ == "__main__":
    main()
