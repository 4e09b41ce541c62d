"""The comparison of image classifiers as a user runs it, with the smallest settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "images.py"
SMALL = ("--seeds", 2, "--epochs", 1, "--samples", 2, "--methods", "sgd", "adamw", "ivon")


def run(*arguments, folder):
    command = [sys.executable, "-W", "error", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_it_compares_judges_the_claims_and_goes_on_from_its_file(tmp_path):
    done = run(*SMALL, "--overlong", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "IVON: one sample is worse than the mean" in done.stdout
    assert "does not overfit in over-long training" in done.stdout
    assert (tmp_path / "images.png").stat().st_size > 10_000
    lines = (tmp_path / "images.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    results = [each["result"] for each in records if "run" in each]
    # Two seeds of three usual and three over-long runs, and IVON's with its b2 kept.
    assert len(results) == 2 * (3 + 3 + 1)
    usual = [each["metrics"] for each in results if "metrics" in each]
    assert len(usual) == 6 and all(0.0 <= each["accuracy"] <= 1.0 for each in usual)

    again = run(*SMALL, "--overlong", 2, "--report", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "images.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "mnist"), "needs --data-dir"),
        (("--dataset", "mnist", "--data-dir", "nowhere"), "there is no such folder"),
        (("--report",), "has no results yet"),
        (("--samples", 3), "power of two"),
    ],
)
def test_what_cannot_be_done_is_a_message_and_not_a_traceback(arguments, message, tmp_path):
    done = run(*arguments, folder=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
