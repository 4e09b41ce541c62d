"""Metrics file, utilisation, table and figure of `gpt2.py`."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from examples._shared.reporting import COLORS, format_table, save_figure

# Dense bfloat16 matrix products of one device, FLOP/s, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
NAMES = {"adamw": "AdamW", "ivon": "IVON"}


def peak_flops(tflops: float | None, dtype: str) -> tuple[float, str]:
    """FLOP/s of all devices, and where the number is from.

    Args:
      dtype: of the computation, in which unknown devices are measured.
      tflops: 1e12 FLOP/s of one device, if the user knows them.
    """
    if tflops is not None:
        return tflops * 1e12 * jax.device_count(), "as given"
    device = jax.local_devices()[0]
    peak = PEAK_FLOPS.get(device.device_kind)
    if peak is not None:
        return peak * jax.device_count(), f"from the data sheet of {device.device_kind}"
    # The devices of a CPU share its cores.
    units = jax.process_count() if device.platform == "cpu" else jax.device_count()
    return (
        _measured_flops(device, dtype) * units,
        f"measured with {dtype} products of 2048 x 2048 matrices",
    )


def _measured_flops(device: Any, dtype: str) -> float:
    size = 2048
    x = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), device)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


class Throughput:
    """Tokens per second and utilisation over a run, without compilation, evaluation and saving."""

    def __init__(self, step: int, tokens: int, flops_per_token: int, peak: float):
        """Starts the clock.

        Args:
          step: the step that the run starts after.
          tokens: per step.
          flops_per_token: of the model.
          peak: FLOP/s of all devices.
        """
        self._tokens, self._flops, self._peak = tokens, flops_per_token, peak
        self._steps, self._seconds = 0, 0.0
        self.restart(step)

    def restart(self, step: int) -> None:
        """Leaves out the time since the last count."""
        self._since = (step, time.perf_counter())

    def count(self, step: int) -> dict[str, float]:
        """The rates so far; to be called when the step has been computed."""
        self._steps += step - self._since[0]
        self._seconds += time.perf_counter() - self._since[1]
        self.restart(step)
        rate = self._steps * self._tokens / self._seconds
        return {"tokens_per_second": rate, "mfu_percent": 100 * rate * self._flops / self._peak}


class Metrics:
    """A file of JSON lines, one per record, of which those after a restored step are dropped."""

    def __init__(self, path: Path, restored_step: int, writes: bool):
        """Opens the file.

        Args:
          path: of the file.
          restored_step: step that the run goes on from.
          writes: whether this process writes.
        """
        self._path = path
        self._writes = writes
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [x for x in read_metrics(path) if x["step"] <= restored_step and restored_step]
            new = path.with_suffix(".new")
            new.write_text("".join(json.dumps(x) + "\n" for x in kept))
            new.replace(path)

    def write(self, **record: Any) -> None:
        """Adds a record; numbers that are not finite become null, as JSON has no others."""
        record = {k: v if math.isfinite(v) else None for k, v in record.items()}
        if self._writes:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records, without a last line that a killed process left unfinished."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _last(records: Sequence[dict[str, Any]], key: str) -> Any:
    values = (x[key] for x in reversed(records) if x.get(key) is not None)
    return next(values, math.nan)


def results_table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """One column per optimizer."""

    def row(title: str, key: str, form: str) -> list[str]:
        values = [_last(records, key) for records in runs.values()]
        return [title, *("" if math.isnan(x) else format(x, form) for x in values)]

    rows = [
        ["", *(NAMES[name] for name in runs)],
        row("steps", "step", "d"),
        row("training loss, nats per token", "loss", ".4f"),
        row("validation loss at the mean", "validation_mean", ".4f"),
        row("validation loss, averaged", "validation_averaged", ".4f"),
        row("perplexity at the mean", "perplexity_mean", ".3f"),
        row("perplexity, averaged", "perplexity_averaged", ".3f"),
        row("tokens per second", "tokens_per_second", ",.0f"),
        row("model FLOP utilisation, %", "mfu_percent", ".1f"),
        row("memory of a step, MB per device", "step_memory_mb", ",.1f"),
    ]
    return format_table([x for x in rows if any(x[1:])])


def save_loss_figure(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Training and validation losses against steps."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    ax = figure.subplots()
    for name, records in runs.items():
        color = COLORS[NAMES[name]]
        train = [x for x in records if x.get("loss") is not None]
        ax.plot(
            [x["step"] for x in train], [x["loss"] for x in train], color=color, alpha=0.35, lw=1
        )
        for key, style, label in (
            ("validation_mean", {"marker": "o", "ms": 8, "mfc": "none"}, "at the mean"),
            ("validation_averaged", {"marker": "s", "ms": 4, "ls": "none"}, "averaged"),
        ):
            points = [x for x in records if x.get(key) is not None]
            if points:
                ax.plot(
                    [x["step"] for x in points],
                    [x[key] for x in points],
                    **style,
                    color=color,
                    label=NAMES[name] if name == "adamw" else f"{NAMES[name]}, {label}",
                )
    ax.set(xlabel="step", ylabel="loss, nats per token", title="Validation (faint: training)")
    ax.legend(frameon=False)
    save_figure(figure, path)
