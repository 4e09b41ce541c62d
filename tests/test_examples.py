"""The examples as a user runs them: another process, another folder, small settings."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason='the examples need: pip install -e ".[examples]"')

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *arguments, folder):
    command = [sys.executable, "-W", "error", EXAMPLES / script, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def test_image_classification_prints_a_table_and_writes_a_figure(tmp_path):
    options = ("--epochs", 1, "--seeds", 2, "--posterior-samples", 3, "--json", "results.json")
    done = run("image_classification.py", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for row in ("accuracy", "NLL", "ECE", "Brier", "AUROC, letters", "seconds per epoch"):
        assert row in done.stdout
    assert (tmp_path / "image_classification.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert set(results) == {"SGD", "AdamW", "IVON at the mean", "IVON, 3 samples"}
    assert all(0.0 <= x <= 1.0 for column in results.values() for x in column["accuracy"])


def test_image_classification_reads_mnist_files(tmp_path):
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", rng.integers(0, 256, (10_000, 28, 28)))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(10_000) % 10)
    options = ("--dataset", "mnist", "--data-dir", tmp_path, "--epochs", 1, "--seeds", 1)
    done = run("image_classification.py", *options, "--methods", "sgd", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "8,000 training and 2,000 test images" in done.stdout


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_damaged_file_is_a_message_and_not_a_traceback(damage, tmp_path):
    if damage == "truncated":
        path = tmp_path / "t10k-images-idx3-ubyte.gz"
        write_idx(path, np.zeros((10_000, 28, 28)))
        path.write_bytes(path.read_bytes()[:100])
        write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(10_000) % 10)
    options = ("--dataset", "mnist", "--data-dir", tmp_path)
    done = run("image_classification.py", *options, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr and "t10k-images" in done.stderr
    assert "http" in done.stderr
