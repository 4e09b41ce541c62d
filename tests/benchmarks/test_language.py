"""The language benchmark on a few hundred characters: runs, report and messages."""

import lzma

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.journal import Journal
from benchmarks._shared.networks import GPT
from benchmarks.evidence.language import main, plateau
from benchmarks.evidence.language.text import CONTEXT, Text, fixed_windows, read_text
from benchmarks.evidence.language.training import TRIED, Ivon, matrices_of_layers


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "small.txt"
    path.write_bytes((np.arange(4000) % 7 + 97).astype(np.uint8).tobytes())
    return path


def test_parts_follow_each_other_and_do_not_overlap(text_file):
    text = read_text(text_file)
    assert text.vocabulary == 7
    assert [len(text.train), len(text.tuning), len(text.validation)] == [3400, 200, 400]
    parts = np.concatenate([text.train, text.tuning, text.validation])
    assert np.array_equal(parts, np.arange(4000) % 7)


def test_a_compressed_text_reads_as_the_text_itself(text_file):
    packed = text_file.with_suffix(".xz")
    packed.write_bytes(lzma.compress(text_file.read_bytes()))
    assert read_text(packed).digest == read_text(text_file).digest


def test_windows_predict_every_character_once():
    windows = fixed_windows(np.arange(193, dtype=np.uint8), most=100)
    assert np.array_equal(np.ravel(windows[:, 1:]), np.arange(1, 193))


def test_adamw_and_ivon_try_as_many_different_settings():
    methods = ("AdamW", "IVON", "IVON, eigenbasis")
    assert {len(set(TRIED[name])) for name in methods} == {9}


def test_settings_of_ivon_mean_the_same_in_runs_of_any_length():
    settings = Ivon(1e-3, ess=1e8, hess_init=0.01, clip_radius=0.1, turnover=2.0)
    arguments = settings.arguments(400)
    assert arguments["b2"] == pytest.approx(1 - 2 / 400)
    longest = arguments["learning_rate"](20) * (0.01 + 1e-6) * 0.1  # at the end of the warmup
    assert longest == pytest.approx(1e-3)


def test_muon_leaves_embeddings_and_vectors_to_adamw():
    params = GPT(layers=1, heads=1, width=4, context=CONTEXT, vocabulary=7).init(jax.random.key(0))
    numbers = jax.tree_util.tree_leaves_with_path(matrices_of_layers(params))
    found = [jax.tree_util.keystr(path) for path, _ in numbers]
    names = ("qkv", "out", "up", "down")
    assert {x.split("[")[3].strip("']") for x in found} == set(names)
    assert all(x.startswith("['layers']") for x in found)


def test_runs_are_reported(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "POINTS", 5)
    for name in ("CURVE_WINDOWS", "FINAL_WINDOWS"):
        monkeypatch.setattr(main, name, 2)
    tiny = GPT(layers=1, heads=1, width=4, context=CONTEXT, vocabulary=7)
    monkeypatch.setattr(Text, "network", tiny)  # compiles faster
    tried = {name: TRIED[name][:1] for name in ("AdamW", "IVON, eigenbasis")}
    monkeypatch.setattr(main, "TRIED", tried)
    timed = {"seconds": dict.fromkeys(TRIED, 0.01), "ratio": dict.fromkeys(TRIED, (1.0, 0.9, 1.1))}
    monkeypatch.setattr(main, "timing", lambda *_: timed)
    path = tmp_path / "language.jsonl"
    main.main([f"--text={text_file}", "--steps=5", "--seeds=1", f"--results={path}"])
    printed = capsys.readouterr().out
    assert "eigenbasis, 8 samples" in printed
    assert "chosen" in printed
    assert "at equal time" in printed
    assert (tmp_path / "language.png").stat().st_size > 10_000
    for _, found in Journal(path).select(part="run"):
        assert [step for step, _ in found["curve"]] == [1, 2, 3, 4, 5]
    other = tmp_path / "other.jsonl"
    with pytest.raises(SystemExit, match="no results yet"):
        main.main([f"--text={text_file}", f"--results={other}", f"--chosen-in={other}"])
    assert main.chosen_elsewhere(path) == {name: x[0] for name, x in tried.items()}


@pytest.mark.parametrize(("size", "message"), [(None, "cannot read"), (500, "at least 1,300")])
def test_a_missing_or_short_text_is_a_message(size, message, tmp_path):
    path = tmp_path / "text"
    if size:
        path.write_bytes(b"a" * size)
    with pytest.raises(SystemExit, match=message):
        main.main(["--text", str(path), "--results", str(tmp_path / "language.jsonl")])


def test_counted_pairs_know_a_text_in_which_one_character_tells_the_next(text_file):
    assert plateau.loss_of_pairs(read_text(text_file)) < 0.01
