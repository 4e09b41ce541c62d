"""The language benchmark on a few hundred characters: runs, report and messages."""

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.journal import Journal
from benchmarks._shared.networks import GPT
from benchmarks.evidence.language import main


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "small.txt"
    path.write_bytes((np.arange(4000) % 7 + 97).astype(np.uint8).tobytes())
    return path


def test_parts_follow_each_other_and_do_not_overlap(text_file):
    text = main.read_text(text_file)
    assert text.vocabulary == 7
    assert [len(text.train), len(text.validation)] == [3600, 400]
    assert np.array_equal(np.concatenate([text.train, text.validation]), np.arange(4000) % 7)


def test_windows_predict_every_character_once():
    windows = main.fixed_windows(np.arange(193, dtype=np.uint8), most=100)
    assert np.array_equal(np.ravel(windows[:, 1:]), np.arange(1, 193))


def test_runs_are_reported(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "POINTS", 4)
    for name in ("CURVE_WINDOWS", "FINAL_WINDOWS"):
        monkeypatch.setattr(main, name, 2)
    tiny = GPT(layers=1, heads=1, width=4, context=main.CONTEXT, vocabulary=7)
    monkeypatch.setattr(main.Text, "network", tiny)  # compiles faster
    timed = {"seconds": {"AdamW": 0.01, "IVON": 0.02}, "ratio": [2.0, 1.9, 2.1]}
    monkeypatch.setattr(main, "timing", lambda *_: timed)
    path = tmp_path / "language.jsonl"
    main.main([f"--text={text_file}", "--steps=4", "--seeds=1", f"--results={path}"])
    assert "IVON, 16 samples" in capsys.readouterr().out
    assert (tmp_path / "language.png").stat().st_size > 10_000
    for _, found in Journal(path).select(part="final"):
        assert [step for step, _ in found["curve"]] == [1, 2, 3, 4]


@pytest.mark.parametrize(("size", "message"), [(None, "cannot read"), (500, "at least 650")])
def test_a_missing_or_short_text_is_a_message(size, message, tmp_path):
    path = tmp_path / "text"
    if size:
        path.write_bytes(b"a" * size)
    with pytest.raises(SystemExit, match=message):
        main.main(["--text", str(path), "--results", str(tmp_path / "language.jsonl")])
