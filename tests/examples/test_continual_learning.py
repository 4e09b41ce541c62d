import pytest

pytest.importorskip("flax")

from examples.continual_learning import main


def test_every_method_is_in_the_table_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, steps=3, figure=figure)
    output = capsys.readouterr().out
    for tasks in ("Permuted digits", "Split digits"):
        for method, cells in (("AdamW", 3), ("IVON", 3), ("all tasks at once, AdamW", 1)):
            (row,) = [x for x in output.splitlines() if x.startswith(f"{tasks}: {method} ")]
            assert row.count("±") == cells
    assert "nan" not in output
    assert figure.stat().st_size > 10_000
