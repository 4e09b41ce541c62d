"""Both benchmarks in small: what they count, and their tables and figures."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.journal import Journal
from benchmarks._shared.networks import Perceptron
from benchmarks.evidence.divergence import main as divergence
from benchmarks.evidence.robustness import main as robustness

GUARD = "precision_floor 0.1"


def test_divergence_counts_runs_by_guard_and_writes_one_down(tmp_path, monkeypatch, capsys):
    path = tmp_path / "divergence.jsonl"
    # Both with a floor, the default one and the guard's: one program for both.
    guards = {"none": {"precision_floor": 1e-6}, GUARD: divergence.GUARDS[GUARD]}
    monkeypatch.setattr(divergence, "GUARDS", guards)
    grid = {name: values[:1] for name, values in divergence.GRID.items()}
    grid["learning_rate"] = (0.1, 30.0)  # a rate that is much too large
    monkeypatch.setattr(divergence, "GRID", grid)
    monkeypatch.setattr(divergence, "STEPS", 200)
    for _ in range(2):  # the second time it goes on
        divergence.main(["--seeds", "2", "--results", str(path)])
    journal = Journal(path)
    calm = journal.select(guard="none", learning_rate=0.1)
    assert len(calm) == 2 and all(x["diverged"] is None for _, x in calm)
    wild = [x for r, x in journal.select(guard="none", learning_rate=30.0) if "anatomy" not in r]
    assert len(wild) == 2 and all(x["diverged"] is not None for x in wild)
    assert all(x["warned"] is not None for x in wild)
    assert len(journal.select(guard=GUARD)) == 4
    ((_, anatomy),) = journal.select(anatomy=True)
    assert len({len(anatomy[name]) for name in ("step", "loss", "move", "sigma")}) == 1
    out = capsys.readouterr().out
    assert "2 of 2" in out and "step by step" in out
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_robustness_makes_tables_and_heat_maps(tmp_path, monkeypatch, capsys):
    path = tmp_path / "robustness.jsonl"
    small = {
        "EPOCHS": 4,
        "LEARNING_RATES": (0.3, 3.0),
        "HESS_INITS": (0.1,),
        "TEMPERATURES": (1.0, 0.1),
        "ADAMW_RATES": (1e-2, 1e3),
        "ADAMW_DECAYS": (0.1,),
        "WIDTH": 16,
        "RULE_WIDTHS": (16,),  # the grid's: one program for both
        "Perceptron": partial(Perceptron, depth=0),  # compiles faster
    }
    for name, value in small.items():
        monkeypatch.setattr(robustness, name, value)
    robustness.main(["--seeds", "1", "--results", str(path)])
    out = capsys.readouterr().out
    assert "How wide the good region is" in out and "by rule" in out
    journal = Journal(path)
    ((_, adamw),) = journal.select(method="adamw", learning_rate=1e-2)
    assert adamw["diverged"] is None and adamw["nll"] < 1.0
    ((_, wild),) = journal.select(method="adamw", learning_rate=1e3)
    assert wild["diverged"] is not None
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_an_epoch_that_is_worse_than_guessing_counts_once_the_warmup_is_over():
    lane = {"nll": np.inf, "loss": np.array([9.0, 1.0, 1.0, 2.4, 1.0]), "start": 1.0}
    lane["risk"] = np.array([0.0, 2.0, 0.0, 0.0, 0.0])
    summary = robustness.summary(lane)
    assert summary["diverged"] == 3 and summary["warned"] == 1 and summary["nll"] is None
    lane["loss"] = np.array([9.0, 1.0, 1.0, np.nan, 1.0])
    assert robustness.summary(lane)["diverged"] == 3
