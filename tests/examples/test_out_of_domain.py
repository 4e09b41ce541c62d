import pytest

pytest.importorskip("flax")

from examples.out_of_domain import main


def test_the_table_has_both_methods_and_the_figure_is_written(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, epochs=1, figure=figure)
    output = capsys.readouterr().out
    assert "AdamW" in output and "IVON" in output
    for row in ("NLL", "entropy, letters", "MI, digits", "FPR95 of entropy, photo patches, %"):
        assert row in output
    assert "nan" not in output
    assert figure.stat().st_size > 10_000
