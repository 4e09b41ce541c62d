import pytest

pytest.importorskip("flax")

from examples.model_merging import main


def test_every_network_is_in_the_table_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, epochs=2, figure=figure)
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.count("±") == 4]
    names = ["base", "fine-tuned on left", "fine-tuned on right", "average"]
    names += ["task arithmetic", "IVON's merge", "IVON's merge", "joint training"]
    assert all(row.startswith(name) for row, name in zip(rows, names, strict=True))
    assert "nan" not in output
    assert figure.stat().st_size > 10_000
