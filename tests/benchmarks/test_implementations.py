"""The comparison with PyTorch as a user runs it, with the smallest settings, or without PyTorch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "implementations.py"
SMALL = ("--seeds", 2, "--epochs", 2, "--samples", 2, "--repetitions", 2)
PYTORCH = all(importlib.util.find_spec(name) for name in ("torch", "ivon"))


def run(*arguments, folder):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(PYTORCH, reason="PyTorch and ivon-opt are there")
def test_without_pytorch_it_says_what_to_install(tmp_path):
    done = run(folder=tmp_path)
    assert done.returncode != 0
    assert "not installed; run: pip install" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.oracle
@pytest.mark.skipif(not PYTORCH, reason='needs PyTorch: pip install -e ".[oracle]"')
def test_both_sides_train_and_are_compared(tmp_path):
    done = run(*SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ("IVON, cosine: NLL, samples", "AdamW, constant rate: NLL", "PyTorch AdamW"):
        assert row in done.stdout
