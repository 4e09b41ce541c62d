"""The comparison with PyTorch as a user runs it, with the smallest settings, or without PyTorch."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks.evidence import implementations as package
from benchmarks.evidence.implementations import main as implementations

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "implementations.jsonl"
PYTORCH = all(importlib.util.find_spec(name) for name in ("torch", "ivon"))
ROWS = ("IVON, cosine: NLL, samples", "AdamW, constant rate: NLL", "PyTorch AdamW")


def test_without_pytorch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ivon", None)  # as if not installed, also where it is
    monkeypatch.delitem(sys.modules, f"{package.__name__}.torch_side", raising=False)
    monkeypatch.delattr(package, "torch_side", raising=False)
    with pytest.raises(SystemExit, match="not installed; run: pip install"):
        implementations.main(["--results", str(tmp_path / "r.jsonl")])


def test_a_report_needs_the_results_alone(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text(RESULTS.read_text())
    implementations.main(["--results", str(path), "--report"])
    out = capsys.readouterr().out
    assert all(row in out for row in ROWS) and "different" not in out


# The extra brings PyTorch and the authors' package, several hundred MB that CI does without.
@pytest.mark.oracle
@pytest.mark.skipif(not PYTORCH, reason='needs PyTorch: pip install -e ".[oracle]"')
def test_both_sides_train_and_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(implementations, "EPOCHS", 2)
    monkeypatch.setattr(implementations, "REPETITIONS", 2)
    implementations.main(["--seeds", "2", "--results", str(tmp_path / "r.jsonl")])
    out = capsys.readouterr().out
    assert all(row in out for row in ROWS)
