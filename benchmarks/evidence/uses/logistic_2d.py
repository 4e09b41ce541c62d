"""What IVON learns where the exact answer can be drawn: logistic regression with two weights.

Run `python examples/logistic_2d.py`; it takes some ten seconds on two cores. Twenty iris flowers
(every fifth versicolor and virginica of scikit-learn's data) are classified by standardised petal
length and width under a Gaussian prior. So few flowers leave a wide, skewed posterior, which a
grid gives exactly. IVON's diagonal Gaussian is set against it, against the best diagonal Gaussian
there is (found by quadrature, without sampling), and against the Laplace approximation; SGD ends
at the mode.

IVON and SGD share the number of steps, batches of 5, warmup and cosine decay. `--tune` tries nine
settings of each and selects by the training objective: the exact free energy λE_q[loss] + KL for
IVON, the regularised loss for SGD.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from sklearn.datasets import load_iris

    from benchmarks.evidence.uses.logistic_2d_exact import (
        PRIOR_PRECISION,
        Diagonal,
        Grid,
        energy,
        exact_posterior,
        free_energy,
        laplace,
        optimal_diagonal,
    )
    from examples._shared.reporting import (
        COLORS,
        cell,
        example_parser,
        format_table,
        positive,
        save_figure,
    )
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed; run: pip install -e ".[examples]"')

from ivon_jax import ivon, posterior, sample_params

START = (-4.0, 8.0)  # far from the mode, to make a path that can be seen
BATCH_SIZE = 5
WARMUP_SHARE = 0.05  # of the steps

IVON = {"learning_rate": 0.03, "hess_init": 0.1, "b2": 0.999}
SGD = {"learning_rate": 0.1, "momentum": 0.0}
GRIDS = {
    "IVON": {"learning_rate": (0.03, 0.1, 0.3), "hess_init": (0.1,), "b2": (0.99, 0.999, 0.9999)},
    "SGD": {"learning_rate": (0.1, 0.3, 1.0), "momentum": (0.0, 0.9, 0.95)},
}

Array = jax.Array
Values = Mapping[str, Any]  # hyperparameters by name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    start = time.perf_counter()
    options = parse(argv)
    signed = flowers()
    print(
        f"{len(signed)} flowers, 2 weights, prior precision {PRIOR_PRECISION:g}; "
        f"{options.seeds} seeds, {options.steps:,} steps in batches of {BATCH_SIZE}"
    )
    if options.tune:
        tune(signed, options.steps, options.seeds)
    else:
        for name, values in {"IVON": IVON, "SGD": SGD}.items():
            print(f"  {name:<5}" + ", ".join(f"{key} {value:g}" for key, value in values.items()))
        report(options, signed)
    print(f"Wall-clock time {time.perf_counter() - start:.0f} s, compilation included.")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = example_parser(
        "IVON against the exact posterior of a logistic regression with two weights.",
        png="logistic_2d.png",
        seeds=10,
    )
    parser.add_argument("--steps", type=positive, default=20_000, help="training steps")
    parser.add_argument("--tune", action="store_true", help="try the grids instead of the report")
    return parser.parse_args(argv)


def flowers() -> np.ndarray:
    """Standardised petal length and width times the label ±1, (20, 2): p(y|x) = σ(signed·w)."""
    features, species = load_iris(return_X_y=True)
    rows = np.flatnonzero(species > 0)[::5]
    petals = features[rows][:, 2:]
    petals = (petals - petals.mean(axis=0)) / petals.std(axis=0)
    return petals * np.where(species[rows] == 2, 1.0, -1.0)[:, None]


# --- Training -------------------------------------------------------------------------------------


def loss_fn(weights: Array, signed: Array) -> Array:
    """The mean negative log-likelihood per flower."""
    return jnp.mean(jax.nn.softplus(-(signed @ weights)))


def schedule(learning_rate: Any, steps: int) -> Callable[[Any], Any]:
    """Linear warmup and cosine decay to zero."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, round(WARMUP_SHARE * steps), steps)
    return lambda count: learning_rate * shape(jnp.asarray(count, jnp.float32))


def train_ivon(signed: Array, steps: int, values: Values, key: Array) -> tuple[Array, Array]:
    """IVON's means and standard deviations after every step, (steps, 2) each."""
    tx = ivon(
        schedule(values["learning_rate"], steps),
        ess=len(signed),  # λ = N and a prior precision of λδ: plain Bayes
        hess_init=values["hess_init"],
        b2=values["b2"],
        weight_decay=PRIOR_PRECISION / len(signed),
    )

    def step(carry: Any, key: Array) -> tuple[Any, tuple[Array, Array]]:
        params, state = carry
        sample_key, batch_key = jax.random.split(key)
        sample, noise = sample_params(sample_key, state)
        grads = jax.grad(loss_fn)(sample, draw_batch(batch_key, signed))
        updates, state = tx.update(grads, state, params, noise=noise)
        q = posterior(state)
        carry = optax.apply_updates(params, updates), state
        return carry, (q.mean, jax.lax.rsqrt(q.precision))

    params = jnp.array(START)
    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[1]


def train_sgd(signed: Array, steps: int, values: Values, key: Array) -> Array:
    """SGD's weights after every step, (steps, 2); its weight decay is the same prior."""
    tx = optax.chain(
        optax.add_decayed_weights(PRIOR_PRECISION / len(signed)),
        optax.sgd(schedule(values["learning_rate"], steps), momentum=values["momentum"]),
    )

    def step(carry: Any, key: Array) -> tuple[Any, Any]:
        params, state = carry
        grads = jax.grad(loss_fn)(params, draw_batch(key, signed))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    params = jnp.array(START)
    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[1]


def draw_batch(key: Array, signed: Array) -> Array:
    """A batch of different flowers."""
    return jax.random.choice(key, signed, (min(BATCH_SIZE, len(signed)),), replace=False)


# --- Tuning ---------------------------------------------------------------------------------------


def tune(signed: np.ndarray, steps: int, seeds: int) -> None:
    """Prints the objective of every setting of the two grids, mean over seeds."""
    data = jnp.asarray(signed, jnp.float32)
    keys = jax.random.split(jax.random.key(1), seeds)  # not those of the report
    for name, train in {"IVON": train_ivon, "SGD": train_sgd}.items():
        run = jax.jit(jax.vmap(partial(train, data, steps), (None, 0)))
        for setting in itertools.product(*GRIDS[name].values()):
            values = dict(zip(GRIDS[name], setting, strict=True))
            path = jax.device_get(run(values, keys))
            if name == "IVON":
                ends = [Diagonal(*end) for end in zip(path[0][:, -1], path[1][:, -1], strict=True)]
                scores = [free_energy(end, signed)[0] for end in ends]
            else:
                scores = energy(path[:, -1], signed)
            text = ", ".join(f"{key} {value:g}" for key, value in values.items())
            print(f"{name:<5} {text:<45} objective {cell(scores, 5)}")


# --- Table and figure -----------------------------------------------------------------------------


class Results(NamedTuple):
    """Everything that is shown; paths have the shape (seeds, steps, 2)."""

    exact: Grid
    best: Diagonal
    laplace: Diagonal
    ivon: Diagonal
    sgd: np.ndarray


def report(options: argparse.Namespace, signed: np.ndarray) -> None:
    """Trains, prints the table and writes the figure."""
    data = jnp.asarray(signed, jnp.float32)
    keys = jax.random.split(jax.random.key(0), options.seeds)
    run_ivon = jax.jit(jax.vmap(partial(train_ivon, data, options.steps, IVON)))
    run_sgd = jax.jit(jax.vmap(partial(train_sgd, data, options.steps, SGD)))
    results = Results(
        exact_posterior(signed),
        optimal_diagonal(signed),
        laplace(signed),
        Diagonal(*jax.device_get(run_ivon(keys))),
        jax.device_get(run_sgd(keys)),
    )
    print(f"\n{table(signed, results)}\n")
    print(
        "w1: petal length, w2: petal width; means and standard deviations of their distribution.\n"
        "KL(q‖p) in nats, from q to the exact posterior p, by quadrature: 0 would be exact, and\n"
        "no diagonal Gaussian is below the best one's. IVON is to be compared with that row; what\n"
        "separates the row from the exact posterior is the price of the diagonal Gaussian.\n"
        f"± is one standard error over the {options.seeds} seeds, which draw batches and noise.\n"
    )
    save_figure(draw(signed, results), options.output)


def table(signed: np.ndarray, results: Results) -> str:
    """Means, standard deviations and KL(q‖p) by method."""
    exact = results.exact
    rows = [["", "w1 mean", "w1 std", "w2 mean", "w2 std", "KL(q‖p)"]]

    def add(label: str, mean: np.ndarray, std: np.ndarray, divergence: str) -> None:
        """One row; `mean` and `std` have the seeds on axis 0."""
        columns = (mean[:, 0], std[:, 0], mean[:, 1], std[:, 1])
        rows.append([label, *(cell(column, 3) for column in columns), divergence])

    def add_gaussian(label: str, q: Diagonal) -> None:
        values = [
            free_energy(Diagonal(*one), signed)[0] + exact.log_evidence
            for one in zip(*q, strict=True)
        ]
        add(label, *q, cell(values, 4))

    add("exact posterior", exact.mean[None], exact.std[None], "0")
    add_gaussian("best diagonal Gaussian", Diagonal(*(x[None] for x in results.best)))
    add_gaussian("IVON", Diagonal(*(x[:, -1] for x in results.ivon)))
    add_gaussian("Laplace, diagonal", Diagonal(*(x[None] for x in results.laplace)))
    first, second = (cell(weight, 3) for weight in results.sgd[:, -1].T)
    rows.append(["where SGD ends", first, "-", second, "-", "-"])
    return format_table(rows)


def draw(signed: np.ndarray, results: Results) -> Figure:
    """The training objective with the paths of the first seed, and the exact posterior."""
    figure = Figure(figsize=(11.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    learned = Diagonal(results.ivon.mean[0, -1], results.ivon.std[0, -1])
    exact = results.exact

    objective = energy(np.stack(np.meshgrid(*exact.ticks), axis=-1), signed) / len(signed)
    levels = np.geomspace(1.01 * objective.min(), 10 * objective.min(), 20)
    left.contour(*exact.ticks, objective, levels, colors="0.7", linewidths=0.8)
    left.plot(*START, "o", color="black", markersize=5, label="start")
    for label, path in {"SGD": results.sgd[0], "IVON": results.ivon.mean[0]}.items():
        left.plot(*path.T, color=COLORS[label], linewidth=1.2, label=f"{label}, path")
    left.set(xlim=(-5.5, 11.5), ylim=(-5.5, 11.5))
    left.set_title("Training objective per flower, prior included (first seed)", fontsize=10)

    right.contourf(*exact.ticks, exact.density.T, 12, cmap="Greys")
    right.plot(
        *exact.mean, "+", color="black", markersize=12, markeredgewidth=2, label="exact mean"
    )
    draw_gaussian(right, results.laplace, "Laplace", COLORS["SGD"], ":")
    draw_gaussian(right, results.best, "best diagonal", "black", "--")
    right.set(xlim=(-3, 10.5), ylim=(-3, 10.5))
    right.set_title("Exact posterior density", fontsize=10)

    for ax in (left, right):
        draw_gaussian(ax, learned, "IVON", COLORS["IVON"])
        ax.plot(*results.sgd[0, -1], "X", color=COLORS["SGD"], markersize=9, label="SGD, end")
        ax.set(xlabel="w1 (petal length)", ylabel="w2 (petal width)", aspect="equal")
    left.legend(fontsize=8, loc="lower left", framealpha=0.9)
    right.legend(fontsize=8, loc="upper right", framealpha=0.9)
    return figure


def draw_gaussian(ax: Axes, q: Diagonal, label: str, color: str, line: str = "-") -> None:
    """The mean, and the ellipses of one and two standard deviations."""
    angle = np.linspace(0.0, 2 * np.pi, 200)
    for size in (1, 2):
        x, y = q.mean[:, None] + size * q.std[:, None] * np.stack([np.cos(angle), np.sin(angle)])
        name = f"{label}, 1 and 2 σ" if size == 1 else None
        ax.plot(x, y, color=color, linestyle=line, linewidth=1.8, label=name)
    ax.plot(*q.mean, ".", color=color, markersize=7)


if __name__ == "__main__":
    sys.exit(main())
