import pytest

pytest.importorskip("flax")
pytest.importorskip("equinox")


@pytest.mark.parametrize("framework", ["linen", "nnx", "equinox"])
def test_a_quickstart_prints_a_table_of_both_optimizers(framework, capsys):
    quickstart = pytest.importorskip(f"examples.quickstart_{framework}")
    quickstart.main(epochs=1, batch_size=200)
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["accuracy", "NLL", "ECE"]
    assert [name for name, *_ in rows] == ["AdamW", "IVON"]
    assert all(0 < float(number) < 10 for row in rows for number in row[1:])
