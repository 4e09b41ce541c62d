from typing import Any

import numpy as np
import pytest

pytest.importorskip("flax")

from examples import finetune_text

pytestmark = pytest.mark.usefixtures("small_encoder")
SMALL: Any = {"labels": 32, "held_out": 16, "epochs": 2}


def test_docstrings_are_told_apart_and_uncertain_ones_are_shown(capsys, monkeypatch):
    modules = {"numpy": ("numpy.linalg", "numpy.random"), "scipy": ("scipy.linalg",)}
    monkeypatch.setattr(finetune_text, "MODULES", modules)
    finetune_text.main(**SMALL)
    printed = capsys.readouterr().out
    assert "numpy, scipy" in printed and "16 samples" in printed and "nan" not in printed
    assert printed.count("; it is ") == 5


def test_sentences_of_ones_own_are_read_from_files(tmp_path, capsys):
    lines = [f"{'good' if i % 2 else 'bad'} word{i} film" for i in range(110)]
    for name, part in (("train", lines[:100]), ("test", lines[100:])):
        (tmp_path / name).write_text("\n".join([*part, "", "alone"]))
    files: Any = {"train_file": tmp_path / "train", "test_file": tmp_path / "test"}
    finetune_text.main(**files, **SMALL)
    assert "32 sentences to train on, 10 to test; bad, good" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="too few"):
        finetune_text.main(**files)
    for bad in ({"labels": 31}, {"sigma": 0.0}, {"held_out": 0}):
        with pytest.raises(SystemExit, match="positive"):
            finetune_text.main(**files, **{**SMALL, **bad})
    with pytest.raises(SystemExit, match="cannot read"):
        finetune_text.main(train_file=tmp_path / "none")


def calibrated(rng, count):
    """Log-probabilities of two classes, the larger uniform on [½, 1], and labels drawn by them."""
    sure = rng.uniform(0.5, 1.0, count)
    labels = (rng.random(count) > sure).astype(int)
    return np.log(np.stack([sure, 1 - sure], axis=1)), labels


def test_the_bound_on_the_risk_of_new_answers_holds_with_its_confidence():
    # From a probability t on, a share of (1 − t)/2 of the answers is wrong: .9 is the true bound.
    rng = np.random.default_rng(0)
    found = [finetune_text.threshold_for(0.05, *calibrated(rng, 500)) for _ in range(200)]
    assert np.mean(np.array(found) < 0.9) <= 0.1


def test_many_held_out_sentences_bring_the_threshold_near_the_true_one():
    found = finetune_text.threshold_for(0.05, *calibrated(np.random.default_rng(0), 50_000))
    assert 0.9 <= found < 0.915
    few = calibrated(np.random.default_rng(0), 20)
    assert finetune_text.threshold_for(0.05, *few) == np.inf  # tells nothing: answer none
