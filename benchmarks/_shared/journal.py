"""Results as JSON lines, one record per finished run: a command can be stopped and goes on."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tyro

from benchmarks._shared.measuring import environment
from examples._shared.reporting import format_table

Run = Mapping[str, Any]  # what identifies a run: all that it depends on
Result = Mapping[str, Any]
Runs = list[tuple[dict, dict]]  # what `Journal.select` finds


class Journal:
    """A file of finished runs; what is in it is not computed again.

    Every line is a record `{"run": ..., "result": ...}`, or `{"environment": ...}`, written each
    time that a command starts to compute, with its hardware, versions and date. A line that was
    cut short by a kill is dropped. `total` is the number of runs that the command asks for.
    """

    def __init__(self, path: Path, total: int = 0):
        self.path, self.total = path, total
        self.environments: list[str] = []
        self._finished: dict[str, tuple[dict, dict]] = {}  # run and result
        self._asked, self._begun = 0, False
        self._read()

    def compute(self, run: Run, work: Callable[[], Result]) -> Result:
        """The result of a run: read if it is there, else computed and written."""
        return self.compute_all([run], lambda missing: [work()])[0]

    def compute_all(
        self, runs: Sequence[Run], work: Callable[[list[Run]], Sequence[Result]]
    ) -> list[Result]:
        """The results of runs that are computed together; `work` gets those that are missing."""
        missing = [run for run in runs if _identity(run) not in self._finished]
        if missing:
            results = work(missing)
            if not self._begun:
                self._begun = True
                self.environments.append(environment())
                self._write({"environment": self.environments[-1]})
            for run, result in zip(missing, results, strict=True):
                self._write({"run": run, "result": result})
                self._finished[_identity(run)] = dict(run), dict(result)
        self._asked += len(runs)
        self._report(runs[-1])
        return [self._finished[_identity(run)][1] for run in runs]

    def select(self, **fields: Any) -> Runs:
        """All (run, result) whose run has these values, in the order of the file."""
        return [
            (run, result)
            for run, result in self._finished.values()
            if all(run.get(field) == value for field, value in fields.items())
        ]

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                if "run" in record:
                    self._finished[_identity(record["run"])] = record["run"], record["result"]
                else:
                    self.environments.append(record["environment"])
            except (ValueError, KeyError, TypeError):
                raise SystemExit(
                    f"{self.path}, line {number}, is not a record of results; move the file away, "
                    "or name another with --results"
                ) from None
        if len(whole) < len(content):
            self.path.write_bytes(whole)

    def _write(self, record: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record, default=float) + "\n")

    def _report(self, run: Run) -> None:
        what = ", ".join(f"{k} {v}" for k, v in run.items() if isinstance(v, str | int))
        place = f"{self._asked}/{self.total}" if self.total else f"{self._asked}"
        print(f"[{place}] {what}", file=sys.stderr, flush=True)


def _identity(run: Run) -> str:
    return json.dumps(run, sort_keys=True, default=float)


@dataclass(frozen=True)
class Evidence:
    """The options that all scripts with a journal have; each adds its own in a subclass."""

    results: Path
    """JSON lines, one per finished run; started again, the command goes on from there."""

    report: bool = False
    """Train nothing: make the tables (.md) and the figure (.png) beside the results."""

    def __post_init__(self) -> None:
        if self.results.suffix != ".jsonl" or not self.results.parent.is_dir():
            raise SystemExit(f"{self.results} is not a .jsonl file in an existing folder")


Options = TypeVar("Options")


def parse(
    options: type[Options], description: str | None, argv: Sequence[str] | None = None
) -> Options:
    """The command line as a dataclass, which checks values in its `__post_init__`."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(options, args=argv, description=description, config=config)


def command(
    options: type[Options],
    description: str | None,
    compute: Callable[[Options], None],
    report: Callable[[Journal], None],
) -> Callable[..., None]:
    """The `main(argv=None)` of a script: computes what is missing, and reports."""

    def main(argv: Sequence[str] | None = None) -> None:
        chosen: Any = parse(options, description, argv)
        if not chosen.report:
            compute(chosen)
        report(read_journal(chosen.results))

    return main


def read_journal(path: Path) -> Journal:
    """The finished runs, for a report; leaves with a message if there are none."""
    journal = Journal(path)
    if not journal.select():
        raise SystemExit(f"{path} has no results yet: run the command without --report first")
    return journal


def grouped(runs: Runs, *fields: str) -> dict[tuple, Runs]:
    """The runs by the values of some fields, in the order in which these first occur."""
    groups: dict[tuple, Runs] = {}
    for run, result in runs:
        groups.setdefault(tuple(run[field] for field in fields), []).append((run, result))
    return groups


def current(runs: Runs) -> Runs:
    """The runs with the settings of the last one; others were tested before a grid was changed."""
    return [(run, result) for run, result in runs if run["values"] == runs[-1][0]["values"]]


def file_of(folder: Path, run: Run, suffix: str = ".npz") -> Path:
    """A name for what a run leaves beside the journal, which depends on all that identifies it."""
    return folder / (hashlib.sha256(_identity(run).encode()).hexdigest()[:20] + suffix)


def table(items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]) -> list[list[str]]:
    """A row for each item, with a cell for each column, under the columns' names."""
    return [list(columns), *([cell_of(item) for cell_of in columns.values()] for item in items)]


def write_tables(
    journal: Journal, title: str, tables: Mapping[str, Sequence[Sequence[str]]], notes: str = ""
) -> None:
    """Prints tables and writes them, with what they were measured on, beside the results."""
    parts = [f"# {title}", *([notes] if notes else [])]
    parts += [f"## {name}\n\n```text\n{format_table(rows)}\n```" for name, rows in tables.items()]
    measured = "\n".join(dict.fromkeys(journal.environments))
    parts.append(f"## Measured by\n\n```text\n{measured}\n```")
    path = journal.path.with_suffix(".md")
    path.write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts[1:-1]))
    print(f"\nWritten to {path}")
