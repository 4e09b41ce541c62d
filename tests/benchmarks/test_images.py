"""The comparison of image classifiers on the smallest settings, and its verdicts."""

import json

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.networks import Perceptron
from benchmarks.evidence.images import main, report, tuning

SMALL = ["--seeds", "1", "--epochs", "1", "--overlong", "2"]


@pytest.mark.slow
def test_it_compares_judges_the_claims_and_goes_on_from_its_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(main.NETWORKS, "mlp", Perceptron(depth=0))  # compiles faster
    monkeypatch.setattr(main, "LOOK_IMAGES", 797)  # as many as in the test set
    monkeypatch.setitem(main.SAMPLES, "mlp", 2)
    monkeypatch.setattr(main, "KEPT_SEEDS", 0)
    monkeypatch.setattr(main, "LOOKS", 2)
    for name in ("REPORTED", "LOOK_SAMPLES"):
        monkeypatch.setattr(main, name, 2)
    few = {method: main.CHOSEN["mlp", "digits"][method] for method in ("sgd", "ivon")}
    monkeypatch.setitem(main.CHOSEN, ("mlp", "digits"), few)
    path = tmp_path / "images.jsonl"
    main.main([*SMALL, "--results", str(path)])
    printed = capsys.readouterr().out
    assert "IVON: one sample is worse than the mean" in printed
    assert "Over-long training: 2 times the epochs" in printed
    assert (tmp_path / "images.png").stat().st_size > 10_000
    lines = path.read_text().splitlines()
    runs = [json.loads(line)["run"]["task"] for line in lines if "run" in json.loads(line)]
    assert runs == ["compare", "overlong"] * 2
    main.main([*SMALL, "--report", "--results", str(path)])
    assert path.read_text().splitlines() == lines


def test_the_search_marks_its_choice(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(main.NETWORKS, "mlp", Perceptron(width=8, depth=1))
    monkeypatch.setitem(tuning.GRIDS, "digits", {"dropout": dict.fromkeys(GRID, (0.1,))})
    arguments = ["--tune", "--epochs", "1", "--results", str(tmp_path / "tuning.jsonl")]
    main.main(arguments)
    assert "chosen" in capsys.readouterr().out


GRID = ("learning_rate", "weight_decay", "rate")


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ((1.0, 1.1, 0.9), "reproduced"),
        ((1.0, -1.1, 0.9), "not reproduced"),
        ((-1.0, -1.1, -0.9), "reversed"),
        ((1.0,), "no verdict from fewer than two seeds"),
        ((0.0, 0.0, 0.0), "not reproduced"),
    ],
)
def test_a_verdict_needs_two_standard_errors(differences, verdict):
    assert report.Claim("", [report.Statement("", dict(enumerate(differences)))]).verdict == verdict


def test_a_claim_needs_all_of_its_statements():
    holds, none = {0: 1.0, 1: 1.1, 2: 0.9}, {0: 0.1, 1: -0.1, 2: 0.0}
    both = [report.Statement("more", holds), report.Statement("no more", none, none=True)]
    assert report.Claim("", both).verdict == "reproduced"
    rise = [report.Statement("more", holds), report.Statement("no more", holds, none=True)]
    assert report.Claim("", rise).verdict == "not reproduced"


def test_what_averaging_and_the_mean_buy_is_paired_by_seed():
    def result(mean, drawn):
        return {"metrics": {"ece": drawn}, "mean": {"ece": mean}}

    ivon = {0: result(0.5, 0.1), 1: result(0.7, 0.2)}
    sgd = {1: {"metrics": {"ece": 0.8}}, 0: {"metrics": {"ece": 0.6}}}
    claim = report.averaging_claim(ivon, sgd, "IVON", "ece")
    found = [pytest.approx(list(each.differences.values())) for each in claim.statements]
    assert found == [[0.4, 0.5], [0.5, 0.6], [0.3, 0.4]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist", "--data-dir", "nowhere"], "looked for t10k"),
        (["--report"], "has no results yet"),
    ],
)
def test_what_cannot_be_done_is_a_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main.main(arguments)
