import pytest

pytest.importorskip("flax")

from examples.sensitivity import main


def test_both_scores_are_in_the_table_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, epochs=2, figure=figure)
    output = capsys.readouterr().out
    for score in ("sensitivity", "training loss"):
        (row,) = [line for line in output.splitlines() if line.startswith(score)]
        assert row.count("±") == 2
    assert "nan" not in output
    assert figure.stat().st_size > 10_000
