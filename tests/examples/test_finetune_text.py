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


def test_the_threshold_keeps_the_risk_on_the_sentences_that_chose_it():
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet([1.0, 1.0], 200)).astype(np.float32)
    labels = (rng.random(200) < np.exp(log_probs[:, 1])).astype(int)
    threshold = finetune_text.threshold_for(0.1, log_probs, labels)
    answered = np.exp(log_probs.max(-1)) >= threshold
    assert 0 < (log_probs.argmax(-1) != labels)[answered].mean() <= 0.1
    assert finetune_text.threshold_for(-1.0, log_probs, labels) == np.inf  # none is good enough
