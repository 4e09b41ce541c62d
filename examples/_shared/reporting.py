"""What the examples share: means over seeds, tables and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A palette that is told apart under colour blindness (Okabe and Ito).
COLORS = {
    "IVON": "#00785A",
    "IVON at the mean": "#7FBFA4",
    "AdamW": "#E69F00",
    "SGD": "#0072B2",
    "reference": "#444444",
    "unfamiliar": "#CC3311",
}


def mean_and_error(values: np.ndarray | Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over axis 0 and its standard error, which is NaN for a single value."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / np.sqrt(len(values))


def cell(values: np.ndarray | Sequence[float], decimals: int) -> str:
    """`mean ± standard error` over seeds, or the number itself if there is one."""
    mean, error = mean_and_error(values)
    return f"{mean:.{decimals}f}" + (f" ± {error:.{decimals}f}" if len(values) > 1 else "")


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns with a rule under the first row; the first column is set flush left."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def draw_band(ax: Axes, x: Any, values: Any, color: str, line: str = "-", **style: Any) -> None:
    """The mean over axis 0 of the values, within a band of one standard error."""
    mean, error = mean_and_error(values)
    ax.plot(x, mean, line, color=color, **style)
    ax.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure without the upper and right spines, and says where it is."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise SystemExit(f"error: cannot write {path}: {error.strerror}") from None
    print(f"Figure written to {path}")
