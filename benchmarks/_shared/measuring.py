"""Timing in one process, interleaved, as ratios; and what the numbers were measured on."""

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np


def environment() -> str:
    """Command, date, commit, hardware and versions, in two lines."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = name[1] if name else platform.processor() or platform.machine()
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = f"{processor}, {cores} cores"
    if device.platform != "cpu":
        hardware = f"{len(jax.devices())} x {device.device_kind}; host: {hardware}"
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "optax"))
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    return f"{command}\n{datetime.date.today()}{_commit()}; {hardware}; {versions}"


def _commit() -> str:
    """The commit of the code, where git knows it, and whether it has been changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        what = [*git, "describe", "--always", "--dirty", "--exclude=*"]
        name = subprocess.check_output(what, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f", commit {name}"


def interleaved(
    functions: dict[str, Callable[[int], None]], repetitions: int = 15, block_seconds: float = 0.05
) -> dict[str, np.ndarray]:
    """Seconds per step of functions, which return after so many, in each repetition.

    In a repetition every function gets its turn of about `block_seconds`.
    """
    calls = {}
    for name, function in functions.items():
        function(2)  # compile, and touch all memory
        start = time.perf_counter()
        function(1)
        once = time.perf_counter() - start
        calls[name] = max(1, round(block_seconds / max(once, 1e-6)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function(calls[name])
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return {name: np.array(x) for name, x in seconds.items()}


def ratios(values: np.ndarray) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(median), float(low), float(high)


def ratio_cell(values: np.ndarray) -> str:
    """Median, with the quartiles behind it."""
    median, low, high = ratios(values)
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def jax_loop(step: Callable, carry: object, *args: object) -> Callable[[int], None]:
    """A function that runs a donated, jitted step `carry -> carry` so many times."""
    box = [carry]

    def run(calls: int) -> None:
        for _ in range(calls):
            box[0] = step(box[0], *args)
        jax.block_until_ready(box[0])

    return run
