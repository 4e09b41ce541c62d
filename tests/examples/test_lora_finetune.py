import pytest

pytest.importorskip("flax")

from examples import lora_finetune
from examples.lora_finetune import WINDOW, main


def test_both_optimizers_are_in_the_table_and_the_figure_is_written(tmp_path, capsys, monkeypatch):
    test = slice(lora_finetune.NUM_TRAIN, lora_finetune.NUM_TRAIN + 8 * WINDOW)
    monkeypatch.setattr(lora_finetune, "TEST", test)
    monkeypatch.setattr(lora_finetune, "DEPTH", 1)  # half as much to compile
    figure = tmp_path / "figure.png"
    main(seeds=2, pretrain_steps=2, steps=2, figure=figure)
    output = capsys.readouterr().out
    for name, errors in (("base", 0), ("AdamW", 5), ("IVON", 5)):
        (row,) = [line for line in output.splitlines() if line.startswith(name)]
        assert row.count("±") == errors
    assert "nan" not in output
    assert figure.stat().st_size > 10_000
