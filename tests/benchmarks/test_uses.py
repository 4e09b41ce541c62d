"""The evidence on the uses of the posterior, on the smallest settings: the tables are there."""

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')


pytestmark = pytest.mark.usefixtures("quick_compilation")


def rows_of(printed):
    """The rows of the printed tables by their first column."""
    cells = [line.split("  ") for line in printed.splitlines() if line.strip()]
    return {cell[0]: [x for x in cell[1:] if x] for cell in cells}


def test_sensitivity(capsys):
    from benchmarks.evidence.uses import sensitivity

    small = "--seeds 1 --retrained-seeds 1 --examples 4 --epochs 2 --steps 10"
    sensitivity.main(small.split())
    rows = rows_of(capsys.readouterr().out)
    assert all(len(rows[model]) == 8 for model in sensitivity.MODELS)
    assert all(len(rows[score]) == len(sensitivity.SETTINGS) for score in sensitivity.SCORES)


def test_leave_one_out(capsys):
    from benchmarks.evidence.uses import leave_one_out

    leave_one_out.main(["--seeds", "1", "--epochs", "20"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows["leave-one-out, second order"]) == 4
    assert len(rows["a fifth held out, then all learned"]) == 4


def test_merging(capsys):
    from benchmarks.evidence.uses import merging

    merging.main(["--seeds", "1", "--epochs", "2"])
    rows = rows_of(capsys.readouterr().out)
    assert all(len(rows[rule]) == 7 for rule in merging.RULES)
    assert len(rows["joint training"]) == 7


def test_continual(capsys):
    from benchmarks.evidence.uses import continual

    continual.main(["--seeds", "1", "--steps", "20"])
    rows = rows_of(capsys.readouterr().out)
    assert all(len(rows[f"{title}: EWC"]) == 3 for title in continual.CHOSEN)


def test_regression_1d(capsys):
    pytest.importorskip("blackjax", reason='NUTS needs: pip install -e ".[hmc]"')
    from benchmarks.evidence.uses import regression_1d

    regression_1d.main(["--seeds", "2", "--steps", "20", "--draws", "10"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows["clusters"]) == len(rows["std of f gap"]) == 4
