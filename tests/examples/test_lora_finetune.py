from typing import Any

import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import numpy as np

from examples import lora_finetune
from examples.lora_finetune import BASE, WINDOW, Options, finetune, main


def test_both_optimizers_are_in_the_table_and_the_figure_is_written(tmp_path, capsys, monkeypatch):
    test = slice(lora_finetune.NUM_TRAIN, lora_finetune.NUM_TRAIN + 8 * WINDOW)
    monkeypatch.setattr(lora_finetune, "TEST", test)
    figure = tmp_path / "figure.png"
    main(Options(seeds=2, pretrain_steps=2, steps=2, figure=figure))
    output = capsys.readouterr().out
    for name, errors in (("base", 0), ("AdamW", 5), ("IVON", 5)):
        (row,) = [line for line in output.splitlines() if line.startswith(name)]
        assert row.count("±") == errors
    assert "nan" not in output
    assert figure.stat().st_size > 10_000


def test_the_base_matrices_stay_and_the_adapters_move():
    tokens = jnp.arange(200) % 90
    base: Any = BASE.init(jax.random.key(0), tokens[None, :8])
    tuned, _ = finetune("IVON", base, tokens, jax.random.key(1), 2)
    dense, before = (tree["params"]["LoRADense_0"] for tree in (tuned, base))
    assert np.array_equal(dense["base"]["kernel"], before["base"]["kernel"])
    assert np.any(dense["lora_b"])
