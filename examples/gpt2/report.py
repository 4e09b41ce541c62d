"""What a run reports: its file of metrics, table and figure."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from examples._shared.reporting import COLORS, format_table, save_figure

NAMES = {"adamw": "AdamW", "ivon": "IVON"}
Runs = dict[str, list[dict[str, Any]]]  # records by optimizer


def metrics_writer(path: Path, restored_step: int) -> Callable[..., None]:
    """`write(step=…, …)` adds a record to a file of JSON lines, on the first process.

    Records after the step that the run goes on from are dropped. Numbers that are not finite become
    null, as JSON has no others.
    """
    if jax.process_index():
        return lambda **_: None
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [x for x in read_metrics(path) if x["step"] <= restored_step and restored_step]
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(x) + "\n" for x in kept))
    new.replace(path)

    def write(**record: Any) -> None:
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    return write


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records, without a last line that a killed process left unfinished."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def report(folder: Path) -> None:
    """Prints the table and draws the figure of all runs in the folder."""
    runs = {name: read_metrics(folder / name / "metrics.jsonl") for name in NAMES}
    runs = {name: records for name, records in runs.items() if records}
    print("\n" + results_table(runs))
    save_loss_figure(folder / "gpt2.png", runs)


def _series(records: list[dict[str, Any]], key: str) -> list[tuple[int, Any]]:
    return [(x["step"], x[key]) for x in records if x.get(key) is not None]


def results_table(runs: Runs) -> str:
    """The last value of each quantity, one column per optimizer."""
    rows = [["", *(NAMES[name] for name in runs)]]
    for title, key, form in (
        ("steps", "step", "d"),
        ("training loss, nats per token", "loss", ".4f"),
        ("validation loss at the mean", "validation_mean", ".4f"),
        ("validation loss, averaged", "validation_averaged", ".4f"),
        ("tokens per second", "tokens_per_second", ",.0f"),
        ("memory of a step, MB per device", "step_memory_mb", ",.1f"),
    ):
        found = [_series(records, key) for records in runs.values()]
        rows.append([title, *(format(x[-1][1], form) if x else "" for x in found)])
    return format_table([row for row in rows if any(row[1:])])


def save_loss_figure(path: Path, runs: Runs) -> None:
    """Training and validation losses against steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, records in runs.items():
        title, color = NAMES[name], COLORS[NAMES[name]]
        styles = {
            "loss": {"alpha": 0.35, "lw": 1},
            "validation_mean": {"marker": "o", "ms": 8, "mfc": "none", "label": title},
            "validation_averaged": {"marker": "s", "ms": 4, "ls": "none"},
        }
        if name == "ivon":
            styles["validation_mean"]["label"] = f"{title}, at the mean"
            styles["validation_averaged"]["label"] = f"{title}, averaged"
        for key, style in styles.items():
            points = _series(records, key)
            if points:
                ax.plot(*zip(*points, strict=True), color=color, **style)
    ax.set(xlabel="step", ylabel="loss, nats per token", title="Validation (faint: training)")
    ax.legend(frameon=False)
    save_figure(figure, path)
