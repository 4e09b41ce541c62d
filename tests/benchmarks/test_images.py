"""The comparison of image classifiers as a user runs it, with the smallest settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "images.py"
SMALL = ("--seeds", 2, "--epochs", 1, "--samples", 2, "--methods", "sgd", "ivon", "--overlong", 2)


def run(*arguments, folder):
    command = [sys.executable, "-W", "error", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_it_compares_judges_the_claims_and_goes_on_from_its_file(tmp_path):
    done = run(*SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "IVON: one sample is worse than the mean" in done.stdout
    assert "Over-long training: 2 times the epochs" in done.stdout
    assert (tmp_path / "images.png").stat().st_size > 10_000
    lines = (tmp_path / "images.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    results = [each["result"] for each in records if "run" in each]
    # Two seeds of two usual and two over-long runs, and IVON's with its b2 kept.
    assert len(results) == 2 * (2 + 2 + 2)
    usual = [each["metrics"] for each in results if "metrics" in each]
    assert len(usual) == 4 and all(0.0 <= each["accuracy"] <= 1.0 for each in usual)

    again = run(*SMALL, "--report", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "images.jsonl").read_text().splitlines() == lines


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return pytest.importorskip("images_claims")


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1.0, 1.1, 0.9), "reproduced"),
        ((1.0, -1.1, 0.9), "not reproduced"),
        ((-1.0, -1.1, -0.9), "reversed"),
        ((1.0,), "no verdict from fewer than two seeds"),
        ((0.0, 0.0, 0.0), "not reproduced"),
    ],
)
def test_a_verdict_needs_two_standard_errors(differences, verdict, claims):
    assert claims.Claim("", [claims.Statement("", differences)]).verdict == verdict


def test_a_claim_needs_all_of_its_statements(claims):
    holds, none = (1.0, 1.1, 0.9), (0.1, -0.1, 0.0)
    both = [claims.Statement("more", holds), claims.Statement("no more", none, none=True)]
    assert claims.Claim("", both).verdict == "reproduced"
    rise = [claims.Statement("more", holds), claims.Statement("no more", holds, none=True)]
    assert claims.Claim("", rise).verdict == "not reproduced"


def test_what_averaging_and_the_mean_buy_is_paired_by_seed(claims):
    def result(mean, drawn):
        return {"metrics": {"ece": drawn}, "mean": {"ece": mean}}

    usual = {
        "ivon": {0: result(0.5, 0.1), 1: result(0.7, 0.2)},
        "sgd": {1: {"metrics": {"ece": 0.8}}, 0: {"metrics": {"ece": 0.6}}},
    }
    claim = claims.averaging_claim(usual, "ivon", "IVON", "ece", "ECE")
    found = [pytest.approx(list(each.differences)) for each in claim.statements]
    assert found == [[0.4, 0.5], [0.5, 0.6], [0.3, 0.4]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "mnist", "--data-dir", "nowhere"), "there is no such folder"),
        (("--report",), "has no results yet"),
    ],
)
def test_what_cannot_be_done_is_a_message_and_not_a_traceback(arguments, message, tmp_path):
    done = run(*arguments, folder=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
