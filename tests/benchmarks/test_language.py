"""`benchmarks/language.py` on a few hundred characters: runs, report and messages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import jax

from benchmarks._shared.journal import Journal
from benchmarks.evidence.language import main as language
from benchmarks.evidence.language import model as language_model
from benchmarks.evidence.language import report as language_report
from benchmarks.evidence.language import training as language_training

ADAMW = language_training.AdamW(6e-3)
IVON = language_training.Ivon(30.0, hess_init=1e-4, clip_radius=1.0, b2=0.99, hess="gradsq")


def small_text():
    return language_model.make_text("small.txt", (np.arange(4000) % 7 + 97).astype(np.uint8))


def test_parts_follow_each_other_and_do_not_overlap():
    text = small_text()
    assert text.vocabulary == 7
    assert [len(x) for x in text[2:6]] == [3400, 200, 3600, 400]
    whole = np.concatenate([text.fit, text.tune, text.validation])
    assert np.array_equal(whole, np.arange(4000) % 7)
    assert np.array_equal(np.concatenate([text.fit, text.tune]), text.train)


def test_windows_predict_every_character_once():
    windows = language_model.fixed_windows(np.arange(193, dtype=np.uint8), most=100)
    assert np.array_equal(np.ravel(windows[:, 1:]), np.arange(1, 193))


def test_runs_are_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language, "POINTS", 4)
    monkeypatch.setattr(language_model, "LAYERS", 1)  # compiles faster
    plan = language.Plan(small_text(), steps=4, seeds=1)
    journal = Journal(tmp_path / "language.jsonl")
    for settings in (ADAMW, IVON):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            found = language.final_run(plan, settings, 0)
        assert [step for step, _ in found["curve"]] == [1, 2, 3, 4]
        assert sum(found["mean"]["bins"]["count"]) == 384
        journal.compute(plan.run("final", settings), lambda found=found: found)
    timed = {"seconds": {"AdamW": 0.01, "IVON": 0.02}, "ratio": [2.0, 1.9, 2.1]}
    journal.compute(plan.run("timing"), lambda: timed)
    language_report.report(journal)
    assert "IVON, 16 samples" in capsys.readouterr().out
    assert (tmp_path / "language.png").stat().st_size > 10_000


def test_the_best_of_a_whole_sweep_is_chosen(tmp_path):
    plan = language.Plan(small_text(), steps=4, seeds=1)
    journal = Journal(tmp_path / "language.jsonl")
    grid = language.GRIDS["AdamW"]
    for number, settings in enumerate(grid[:-1]):
        losses = [float("nan"), 3.0, 1.0, 2.0, 2.0]
        journal.compute(plan.run("tune", settings), lambda x=losses[number]: {"loss": x})
    assert language.chosen_settings(plan, journal) == language.CHOSEN
    journal.compute(plan.run("tune", grid[-1]), lambda: {"loss": 5.0})
    assert language.chosen_settings(plan, journal)["AdamW"] == grid[2]


@pytest.mark.parametrize("size", [None, 500])
def test_a_missing_or_short_text_is_a_message(size, tmp_path):
    if size:
        (tmp_path / "text").write_bytes(b"a" * size)
    command = [sys.executable, BENCHMARKS / "language.py", "--text", "text"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert ("at least" if size else "cannot read") in done.stderr
