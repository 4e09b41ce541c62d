import jax
import numpy as np
import pytest

pytest.importorskip("flax")

from examples import leave_one_out
from examples.leave_one_out import EVERY, PATIENCE, kept, main


def test_every_criterion_is_in_the_table_and_the_figure_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(leave_one_out, "HELD_OUT", 0)  # so that both runs are the same program
    figure = tmp_path / "figure.png"
    main(seeds=2, epochs=2 * EVERY, figure=figure)
    output = capsys.readouterr().out
    for criterion in ("best epoch by the test", "leave-one-out", "a fifth held", "never stopping"):
        (row,) = [line for line in output.splitlines() if line.startswith(criterion)]
        assert row.count("±") == 3
    assert "nan" not in output
    assert figure.stat().st_size > 10_000


def test_what_is_held_out_is_cut_from_the_same_training_set():
    key = jax.random.key(0)
    (images, labels), nothing, _ = leave_one_out.draw_data(key, 0)
    train, valid, _ = leave_one_out.draw_data(key, 100)
    assert len(nothing[1]) == 0 and len(valid[1]) == 100
    for whole, *parts in zip((images, labels), train, valid, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_what_comes_after_the_patience_is_not_seen():
    losses = np.ones((2, 2 * PATIENCE))
    losses[:, 3] = 0.5
    losses[0, 3 + PATIENCE] = 0.0
    losses[1, 4 + PATIENCE] = 0.0
    assert kept(losses).tolist() == [3 + PATIENCE, 3]
