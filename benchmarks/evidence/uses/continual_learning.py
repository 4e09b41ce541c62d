"""Learns tasks one after the other: the posterior of one task is IVON's prior for the next.

Run `python examples/continual_learning.py`; it takes about a minute on two cores. Five tasks are
made of scikit-learn's handwritten digits in two ways. Both are domain-incremental: one head serves
all tasks, and nothing tells the network which task an image belongs to.

* permuted: all ten digits in every task, each task with its pixels in an order of its own;
* split: the digits 0 and 1, then 2 and 3, ... are told apart as even or odd.

No method sees the images of an earlier task again, but for the reference, which is trained on all
at once. Methods share the network, the batches, the number of steps and the schedule (warmup, then
cosine to zero in every task). `--tune --seeds 3` tries 16 settings of each, which are scored on
held-out training images by the mean accuracy over all tasks after the last. All grids were moved
once, because of choices at an edge.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence

try:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm import tqdm

    from benchmarks.evidence.uses.continual_training import (
        BENCHMARKS,
        METHODS,
        NUM_TASKS,
        make_runner,
        make_tasks,
    )
    from examples._shared.reporting import (
        cell,
        example_parser,
        format_table,
        mean_and_error,
        positive,
        save_figure,
    )
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

IVON_GRID = {
    "learning_rate": (0.005, 0.02),
    "hess_init": (0.03, 0.1),
    "weight_decay": (1e-4, 1e-3),
    "temperature": (0.1, 0.3),
    "b2": (0.999,),
}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    "adamw": {
        "learning_rate": (3e-5, 1e-4, 3e-4, 1e-3),
        "weight_decay": (0.0, 0.01, 0.1, 1.0),
    },
    "ewc": {
        "learning_rate": (1e-3, 3e-3),
        "strength": (1.0, 3.0, 10.0, 30.0, 1e4, 1e5, 1e6, 1e7),
        "weight_decay": (1e-4,),
    },
    "ivon_afresh": IVON_GRID,
    "ivon": IVON_GRID,
    "joint": {
        "learning_rate": (1e-3, 3e-3, 1e-2, 3e-2),
        "weight_decay": (0.01, 0.1, 1.0, 10.0),
    },
}


def ivon_values(
    learning_rate: float, hess_init: float, weight_decay: float, temperature: float
) -> dict[str, float]:
    """Hyperparameters of IVON by name."""
    return {
        "learning_rate": learning_rate,
        "hess_init": hess_init,
        "weight_decay": weight_decay,
        "temperature": temperature,
        "b2": 0.999,
    }


CHOSEN: dict[str, dict[str, dict[str, float]]] = {
    "permuted": {
        "adamw": {"learning_rate": 3e-4, "weight_decay": 0.01},
        "ewc": {"learning_rate": 3e-3, "strength": 3.0, "weight_decay": 1e-4},
        "ivon_afresh": ivon_values(0.005, 0.1, 1e-4, 0.3),
        "ivon": ivon_values(0.02, 0.03, 1e-3, 0.3),
        "joint": {"learning_rate": 0.03, "weight_decay": 0.1},
    },
    "split": {
        "adamw": {"learning_rate": 1e-4, "weight_decay": 0.0},
        "ewc": {"learning_rate": 3e-3, "strength": 1e5, "weight_decay": 1e-4},
        "ivon_afresh": ivon_values(0.005, 0.03, 1e-4, 0.3),
        "ivon": ivon_values(0.005, 0.1, 1e-4, 0.1),
        "joint": {"learning_rate": 1e-3, "weight_decay": 1.0},
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    start = time.perf_counter()
    options = parse(argv)
    print(
        f"{NUM_TASKS} tasks, {options.steps:,} steps each, {options.seeds} seeds (weights, batches,"
        " noise; the orders of pixels; with --tune the split as well)"
    )
    if options.tune:
        for benchmark in options.benchmarks:
            tune(benchmark, options.seeds, options.steps)
    else:
        report(options)
    print(f"Wall-clock time {time.perf_counter() - start:.0f} s, compilation included.")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = example_parser(
        "Tasks learned one after the other: IVON's posterior as the prior of the next task.",
        png="continual_learning.png",
        seeds=5,
    )
    parser.add_argument("--steps", type=positive, default=600, help="training steps of each task")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        choices=tuple(BENCHMARKS),
        default=tuple(BENCHMARKS),
        help="how tasks are made",
    )
    parser.add_argument("--tune", action="store_true", help="try the grids instead of the report")
    return parser.parse_args(argv)


def tune(benchmark: str, seeds: int, steps: int) -> None:
    """Prints the validation accuracy of every setting of the grids."""
    tasks = make_tasks(benchmark, seeds, steps, validate=True)
    for method, grid in GRIDS.items():
        run = make_runner(benchmark, method)
        tried = []
        for setting in tqdm(list(itertools.product(*grid.values())), desc=METHODS[method].label):
            values = dict(zip(grid, setting, strict=True))
            matrices = np.asarray(run(values, tasks))
            tried.append((100 * matrices[:, -1].mean(axis=-1), values))
        best = max(tried, key=lambda each: each[0].mean())
        print(f"\n{benchmark}, {METHODS[method].label}: validation accuracy over all tasks, %")
        for final, values in tried:
            mark = "*" if values is best[1] else " "
            print(f"{mark} {cell(final, 2):<14} {describe(values)}")


def describe(values: dict[str, float]) -> str:
    """Hyperparameters in words."""
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


# --- Table ----------------------------------------------------------------------------------------


def report(options: argparse.Namespace) -> None:
    """Runs every method, prints the tables and writes the figure."""
    accuracies: dict[str, dict[str, np.ndarray]] = {}
    with tqdm(total=len(options.benchmarks) * len(METHODS), unit="run") as bar:
        for benchmark in options.benchmarks:
            tasks = make_tasks(benchmark, options.seeds, options.steps, validate=False)
            accuracies[benchmark] = {}
            for method in METHODS:
                bar.set_description(f"{benchmark}, {METHODS[method].label}")
                run = make_runner(benchmark, method)
                matrices = np.asarray(run(CHOSEN[benchmark][method], tasks))
                accuracies[benchmark][method] = 100 * matrices
                bar.update()
    for benchmark, by_method in accuracies.items():
        print(f"\n{BENCHMARKS[benchmark].title}")
        for method in METHODS:
            print(f"  {METHODS[method].label:<25} {describe(CHOSEN[benchmark][method])}")
        print(f"\n{table(by_method)}")
    spread = ", ± one standard error over seeds" if options.seeds > 1 else ""
    print(
        f"\nTest accuracy in %{spread}.\n"
        "At the end: mean over all tasks after the last, the number to compare; guessing gives\n"
        "10 (permuted) or 50 (split). When new: mean over tasks, each right after it was learned.\n"
        "Forgotten: the most that a task's accuracy ever was minus what is left of it at the\n"
        "end, mean over all tasks but the last. What hardly learns hardly forgets, so read the\n"
        "last two columns together. IVON is evaluated at the posterior mean. EWC weighs the\n"
        "Fisher information of old tasks by a tuned strength; IVON with the posterior as prior\n"
        "has no such factor: every task counts once, as Bayes' rule has it.\n"
    )
    save_figure(draw(accuracies), options.output)


def final_accuracy(matrices: np.ndarray) -> np.ndarray:
    """Mean over tasks after the last, by seed, of accuracies (seeds, after task, on task)."""
    return matrices[:, -1].mean(axis=-1)


def new_accuracy(matrices: np.ndarray) -> np.ndarray:
    """Mean over tasks of the accuracy right after learning, by seed."""
    return np.diagonal(matrices, axis1=1, axis2=2).mean(axis=-1)


def forgetting(matrices: np.ndarray) -> np.ndarray:
    """Best accuracy since a task was learned minus the final one, mean over all but the last."""
    lost = [
        matrices[:, task:, task].max(axis=1) - matrices[:, -1, task]
        for task in range(matrices.shape[2] - 1)
    ]
    return np.mean(lost, axis=0)


def table(by_method: dict[str, np.ndarray]) -> str:
    """The three summaries of every method."""
    rows = [["", "at the end", "when new", "forgotten"]]
    for method, matrices in by_method.items():
        row = [METHODS[method].label, cell(final_accuracy(matrices), 1)]
        if METHODS[method].joint:
            row += ["-", "-"]
        else:
            row += [cell(new_accuracy(matrices), 1), cell(forgetting(matrices), 1)]
        rows.append(row)
    return format_table(rows)


# --- Figure ---------------------------------------------------------------------------------------

TASK_COLORS = ("#332288", "#0072B2", "#00785A", "#E69F00", "#CC3311")


def draw(accuracies: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Accuracy on every task after each task: a row per benchmark, a column per method."""
    shown = [method for method in METHODS if not METHODS[method].joint]
    figure = Figure(figsize=(3.3 * len(shown), 0.6 + 3.1 * len(accuracies)), layout="constrained")
    axes = figure.subplots(len(accuracies), len(shown), sharey="row", sharex=True, squeeze=False)
    for row, (benchmark, by_method) in zip(axes, accuracies.items(), strict=True):
        for ax, method in zip(row, shown, strict=True):
            draw_method(ax, by_method[method], by_method["joint"])
            ax.set_title(METHODS[method].label, fontsize=10)
        row[0].set_ylabel(f"{BENCHMARKS[benchmark].title}\ntest accuracy, %")
    for ax in axes[-1]:
        ax.set_xlabel("tasks learned")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def draw_method(ax: Axes, matrices: np.ndarray, joint: np.ndarray) -> None:
    """One line per task from when it is learned, and their mean."""
    learned = np.arange(1, matrices.shape[1] + 1)
    for task in range(matrices.shape[2]):
        mean, error = mean_and_error(matrices[:, task:, task])
        style = {"color": TASK_COLORS[task], "marker": "o", "markersize": 3.5, "linewidth": 1.2}
        ax.errorbar(learned[task:], mean, np.nan_to_num(error), label=f"task {task + 1}", **style)
    so_far = np.stack([matrices[:, t, : t + 1].mean(axis=-1) for t in range(len(learned))], axis=1)
    ax.plot(learned, so_far.mean(axis=0), color="black", linewidth=2.6, label="mean so far")
    reference = final_accuracy(joint).mean()
    ax.axhline(reference, color="0.4", linestyle="--", linewidth=1.2, label="all tasks at once")
    ax.set_xticks(learned)


if __name__ == "__main__":
    sys.exit(main())
