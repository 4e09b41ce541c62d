"""Several ways to predict, compared: settings are chosen on validation data, then tested once.

A result holds the metrics of each way by its name: at the "point", at "samples", of all seeds'
runs "together".
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Result, Run, Runs, current, grouped
from benchmarks._shared.methods import average
from benchmarks._shared.tuning import Grid, at_edges, described
from examples._shared.reporting import cell


def averaged(log_probs: np.ndarray) -> np.ndarray:
    """Log-probabilities (n, classes) of the average over samples, where there are several."""
    return log_probs if log_probs.ndim == 2 else np.asarray(average(jnp.asarray(log_probs)))


def average_of_files(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """The average of the probabilities that runs have left, by the name of the inputs."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise SystemExit(
            f"{missing[0].parent} lacks predictions of tested runs; start with another --results "
            "file, beside which they will be written again"
        )
    runs = [np.load(file) for file in files]
    return {name: averaged(np.stack([run[name] for run in runs])) for name in runs[0].files}


def chosen_by(result: Result) -> float:
    """The NLL that chooses: of samples, where there are samples."""
    way = "samples" if "samples" in result else "point"
    return result[way]["nll"]


Setting = TypeVar("Setting")


def best_of(tried: Sequence[Setting], scores: Sequence[float]) -> Setting:
    """The setting with the lowest score; leaves with a message if all are NaN."""
    if not np.isfinite(scores).any():
        raise SystemExit(f"every setting diverged, from {tried[0]} to {tried[-1]}")
    return tried[int(np.argmin(np.nan_to_num(scores, nan=np.inf)))]


def way_rows(ways: Mapping[tuple[str, str], str], tested: Runs, together: Runs) -> list[list[str]]:
    """A row for each way to predict, a column for each metric, in % but for the NLL."""
    known = {way for _, way in ways}
    measured = [x for _, result in tested + together for way, x in result.items() if way in known]
    columns = dict.fromkeys(name for x in measured for name in x)
    names = [name for name in columns if not isinstance(measured[0].get(name), dict)]
    rows = [["", "runs", *names]]
    for (method, way), title in ways.items():
        runs = together if way == "together" else tested
        own = [(run, result) for run, result in runs if run["method"] == method and way in result]
        if not own:
            continue
        own = own[-1:] if way == "together" else current(own)
        cells = (shown(name, [x[way][name] for _, x in own if name in x[way]]) for name in names)
        rows.append([title, str(own[0][0].get("runs", len(own))), *cells])
    return rows


def shown(name: str, values: Sequence[float]) -> str:
    """Mean and standard error of a metric."""
    if not values:
        return ""
    return cell(values, 3) if name == "nll" else cell(100 * np.asarray(values), 1)


def setting_rows(
    runs: Runs, grid_of: Callable[[Run], Grid], names: Mapping[str, str]
) -> list[list[str]]:
    """Validation scores of every setting; the chosen one is marked, and an edge of its grid."""
    rows = [["setting", "accuracy, %", "NLL", "ECE, %", "NLL at the point"]]
    for (method,), mine in grouped(runs, "method").items():
        best = min(mine, key=lambda x: np.nan_to_num(chosen_by(x[1]), nan=np.inf))[0]
        grid = {name: choices for name, choices in grid_of(best).items() if len(choices) > 2}
        edges = ", ".join(at_edges(grid, best["values"]))
        for run, result in mine:
            mark = f" (chosen{'; edge: ' + edges if edges else ''})" if run is best else ""
            x = result.get("samples") or result["point"]
            cells = f"{100 * x['accuracy']:.1f}", f"{x['nll']:.3f}", f"{100 * x['ece']:.1f}"
            cells = cells if np.isfinite(x["nll"]) else ("", "diverged", "")
            point = f"{result['point']['nll']:.3f}" if "samples" in result else ""
            rows.append([f"{names[method]}, {described(run['values'])}{mark}", *cells, point])
    return rows
