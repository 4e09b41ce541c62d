import pytest

pytest.importorskip("flax")

from examples.regression_1d import main


def test_the_table_has_all_methods_in_every_region(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, steps=20, figure=figure)
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.count("±") == 3]
    for measure in ("std of f", "NLL", "% in 95 % band,"):
        for region in ("clusters", "gap", "outside"):
            assert sum(row.startswith(f"{measure} {region}") for row in rows) == 1
    assert "nan" not in output
    assert figure.stat().st_size > 10_000
