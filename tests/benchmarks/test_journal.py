"""Finished runs are kept, whatever stops the command, and are not computed again."""

import json

import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.journal import Evidence, Journal, parse, read_journal, write_tables


def counted(calls):
    def work(runs):
        calls.append(len(runs))
        return [{"square": run["x"] ** 2} for run in runs]

    return work


def test_a_command_goes_on_where_it_was_stopped(tmp_path, capsys):
    path, calls = tmp_path / "r.jsonl", []
    first = Journal(path, total=3)
    assert first.compute_all([{"x": 1}, {"x": 2}], counted(calls)) == [{"square": 1}, {"square": 4}]
    with path.open("a") as file:
        file.write('{"run": {"x": 3}, "resu')  # killed while writing
    second = Journal(path, total=3)
    results = second.compute_all([{"x": 2}, {"x": 3}, {"x": 1}], counted(calls))
    assert results == [{"square": 4}, {"square": 9}, {"square": 1}] and calls == [2, 1]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["run"]["x"] for r in records if "run" in r] == [1, 2, 3]
    assert len([r for r in records if "environment" in r]) == 2
    assert "[3/3" in capsys.readouterr().err


def test_runs_are_told_apart_by_all_that_they_depend_on(tmp_path):
    journal = Journal(tmp_path / "r.jsonl")
    journal.compute({"x": 1, "steps": 10}, lambda: {"y": 1})
    journal.compute({"x": 1, "steps": 20}, lambda: {"y": 2})
    journal.compute({"steps": 10, "x": 1}, lambda: pytest.fail("it is there"))
    assert journal.select(steps=20) == [({"x": 1, "steps": 20}, {"y": 2})]
    assert len(journal.select(x=1)) == 2


def test_tables_name_what_they_were_measured_on(tmp_path, capsys):
    journal = Journal(tmp_path / "r.jsonl")
    journal.compute({"x": 1}, lambda: {"y": 1})
    write_tables(journal, "Title", {"part": [("a", "b"), ("1", "2")]}, "Notes.")
    text = (tmp_path / "r.md").read_text()
    assert text.startswith("# Title\n\nNotes.\n\n## part") and "jax" in text
    assert "## part" in capsys.readouterr().out


def test_files_that_are_none_of_ours_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no results yet"):
        read_journal(tmp_path / "none.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text('{"a": 1}\n')
    with pytest.raises(SystemExit, match="line 1, is not a record"):
        Journal(other)
    for name in ("results.json", "no/such/folder.jsonl"):
        with pytest.raises(SystemExit, match=r"not a \.jsonl file in an existing folder"):
            parse(Evidence, None, ["--results", str(tmp_path / name)])
