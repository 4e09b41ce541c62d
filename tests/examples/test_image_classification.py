import pytest

pytest.importorskip("flax")

from examples.image_classification import main


def test_the_main_job_prints_its_table_and_writes_its_figure(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    main(seeds=2, epochs=1, figure=figure)
    lines = capsys.readouterr().out.splitlines()
    (top,) = (i for i, line in enumerate(lines) if line.startswith("----"))
    columns = [column.strip() for column in lines[top - 1].split("  ") if column]
    assert columns == ["SGD", "AdamW", "IVON at the mean", "IVON, 64 samples"]
    rows = lines[top + 1 : top + 7]
    expected = ["accuracy", "NLL", "ECE", "Brier", "AUROC, letters", "AUROC, photo patches"]
    assert all(row.startswith(name) for row, name in zip(rows, expected, strict=True))
    assert all(row.count("±") == 4 and "nan" not in row for row in rows)
    assert figure.stat().st_size > 10_000
