"""The language benchmark on a few hundred characters: runs, report and messages."""

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.journal import Journal
from benchmarks.evidence.language import main, training


pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "small.txt"
    path.write_bytes((np.arange(4000) % 7 + 97).astype(np.uint8).tobytes())
    return path


def test_parts_follow_each_other_and_do_not_overlap(text_file):
    text = training.read_text(text_file)
    assert text.vocabulary == 7
    assert [len(x) for x in text[2:6]] == [3400, 200, 3600, 400]
    whole = np.concatenate([text.fit, text.tune, text.validation])
    assert np.array_equal(whole, np.arange(4000) % 7)
    assert np.array_equal(np.concatenate([text.fit, text.tune]), text.train)


def test_windows_predict_every_character_once():
    windows = training.fixed_windows(np.arange(193, dtype=np.uint8), most=100)
    assert np.array_equal(np.ravel(windows[:, 1:]), np.arange(1, 193))


def test_runs_are_reported(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "POINTS", 4)
    monkeypatch.setattr(training, "LAYERS", 1)  # compiles faster
    timed = {"seconds": {"AdamW": 0.01, "IVON": 0.02}, "ratio": [2.0, 1.9, 2.1]}
    monkeypatch.setattr(main, "timing", lambda *_: timed)
    path = tmp_path / "language.jsonl"
    main.main([f"--text={text_file}", "--steps=4", "--seeds=1", f"--results={path}"])
    assert "IVON, 16 samples" in capsys.readouterr().out
    assert (tmp_path / "language.png").stat().st_size > 10_000
    for _, found in Journal(path).select(part="final"):
        assert [step for step, _ in found["curve"]] == [1, 2, 3, 4]
        assert sum(found["mean"]["bins"]["count"]) == 384


def test_the_best_of_a_whole_sweep_is_chosen(text_file, tmp_path):
    journal = Journal(tmp_path / "language.jsonl")
    study = main.Study(training.read_text(text_file), 4, 1, journal)
    grid = training.GRIDS["AdamW"]
    for settings, loss in zip(grid, [float("nan"), 3.0, 1.0, 2.0, 2.0], strict=False):
        journal.compute(study.run("tune", settings), lambda loss=loss: {"loss": loss})
    assert study.chosen() == training.CHOSEN
    journal.compute(study.run("tune", grid[-1]), lambda: {"loss": 5.0})
    assert study.chosen()["AdamW"] == grid[2]


@pytest.mark.parametrize(("size", "message"), [(None, "cannot read"), (500, "at least")])
def test_a_missing_or_short_text_is_a_message(size, message, tmp_path):
    path = tmp_path / "text"
    if size:
        path.write_bytes(b"a" * size)
    with pytest.raises(SystemExit, match=message):
        main.main(["--text", str(path), "--results", str(tmp_path / "language.jsonl")])
