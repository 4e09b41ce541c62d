"""Uncertainty in the gap between two clusters of data: IVON, AdamW and exact inference.

Run `python examples/regression_1d.py` (about 90 seconds on two cores). NUTS needs blackjax:
`pip install -e ".[examples,hmc]"`.

A network with one hidden layer of 16 tanh units, small enough for NUTS, is fitted to 40 points in
[-2, -1] and [1, 2]; the noise is known. The data are generated: every seed draws a true function
from the network's prior, so that the exact posterior is calibrated by construction. IVON and NUTS
share prior and likelihood (weight decay times the effective sample size is the prior precision).
AdamW is a point estimate: one network, and an ensemble of five. Beside that ensemble stands the
mixture of five IVON posteriors.

All runs start at draws from the prior and take the same number of full-batch gradients. Settings
were chosen by `--tune` on other data sets: nine were tried for IVON, selected by its training
objective, the free energy (three of equal rate times h0 tie; the middle one is used); twenty for
AdamW, selected, for one network and for the ensemble, by the NLL of held-out points in the
clusters, in the gap and outside. AdamW is thereby told about gaps, as IVON is not: selected in the
clusters alone, its ensemble was far worse in the gap.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from blackjax.diagnostics import effective_sample_size, potential_scale_reduction
    from tqdm import tqdm

    from benchmarks.evidence.uses.regression_1d_methods import (
        MEMBERS,
        NOISE,
        Chains,
        Problem,
        draw_problem,
        draw_weights,
        free_energy,
        mixture,
        moments_of,
        network,
        run_nuts,
        train_adamw,
        train_ivon,
    )
    from benchmarks.evidence.uses.regression_1d_report import (
        ADAMW,
        BAND,
        ENSEMBLE,
        IVON,
        MIXTURE,
        NUTS,
        draw,
        table,
    )
    from examples._shared.reporting import cell, example_parser, format_table, positive, save_figure
except ModuleNotFoundError as error:
    package = (error.name or "a package").split(".")[0]
    extras = "examples,hmc" if package == "blackjax" else "examples"
    sys.exit(f'error: {package} is not installed; run: pip install -e ".[{extras}]"')

from ivon_jax import Moments, metrics, predict_moments

CHAINS = 4
POSTERIOR_SAMPLES = 500
TUNING_SEED = 1000  # the first; the report's are 0, 1, ...

SETTINGS = {
    IVON: {"learning_rate": 0.1, "hess_init": 3.0, "b2": 0.999},
    ADAMW: {"learning_rate": 1e-3, "weight_decay": 1.0},
    ENSEMBLE: {"learning_rate": 1e-4, "weight_decay": 0.1},
}
IVON_GRID = {"learning_rate": (0.03, 0.1, 0.3), "hess_init": (1.0, 3.0, 10.0), "b2": (0.999,)}
ADAMW_GRID = {
    "learning_rate": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "weight_decay": (0.1, 0.3, 1.0, 3.0),
}

Array = jax.Array
Values = Mapping[str, Any]  # hyperparameters by name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit status."""
    start = time.perf_counter()
    options = parse(argv)
    print(
        f"{options.seeds} data sets, noise {NOISE:g}; {options.steps:,} full-batch steps per "
        f"network, NUTS with {CHAINS} chains of {options.draws} draws"
    )
    if options.tune:
        tune(options)
    else:
        report(options)
    print(f"Wall-clock time {time.perf_counter() - start:.0f} s, compilation included.")
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = example_parser(
        "Uncertainty in the gap between data: IVON, AdamW and NUTS.",
        png="regression_1d.png",
        seeds=16,
    )
    parser.add_argument("--steps", type=positive, default=20_000, help="training steps")
    parser.add_argument(
        "--draws", type=positive, default=250, help="draws per chain, and steps of its adaptation"
    )
    parser.add_argument("--tune", action="store_true", help="try the grids instead of the report")
    return parser.parse_args(argv)


# --- Runs -----------------------------------------------------------------------------------------


def make_problems(first_seed: int, seeds: int) -> tuple[Problem, Array, Array]:
    """Data sets, MEMBERS starting weights and a key for each seed, with the seeds on axis 0."""

    def one(seed: Array) -> tuple[Problem, Array, Array]:
        data_key, start_key, key = jax.random.split(jax.random.key(seed), 3)
        starts = jax.vmap(draw_weights)(jax.random.split(start_key, MEMBERS))
        return draw_problem(data_key), starts, key

    return jax.jit(jax.vmap(one))(first_seed + jnp.arange(seeds))


def ivon_runs(
    values: Values, steps: int, problem: Problem, starts: Array, key: Array
) -> tuple[Moments, Any]:
    """Moments at the test inputs and final states of MEMBERS runs of IVON on one data set."""
    predict = predict_moments(network, POSTERIOR_SAMPLES, noise_variance=NOISE**2)

    def one(start: Array, key: Array) -> tuple[Moments, Any]:
        train_key, predict_key = jax.random.split(key)
        state = train_ivon(network, problem.x, problem.y, steps, values, start, train_key)
        return predict(predict_key, state, problem.test_x), state

    return jax.vmap(one)(starts, jax.random.split(key, MEMBERS))


def adamw_runs(values: Values, steps: int, problem: Problem, starts: Array) -> Array:
    """Function values at the test inputs of MEMBERS runs of AdamW on one data set."""

    def one(start: Array) -> Array:
        weights = train_adamw(network, problem.x, problem.y, steps, values, start)
        return network(weights, problem.test_x)

    return jax.vmap(one)(starts)


def nuts_run(draws: int, problem: Problem, starts: Array, key: Array) -> Chains:
    """The functions that NUTS draws on one data set."""
    x, y, inputs = problem.x, problem.y, problem.test_x
    return run_nuts(network, x, y, inputs, draws, starts[:CHAINS], key)


def first_of(members: Any) -> Any:
    """The first member of every seed's ensemble."""
    return jax.tree.map(lambda x: x[:, 0], members)


# --- Report ---------------------------------------------------------------------------------------


def report(options: argparse.Namespace) -> None:
    """Runs every method, prints the table and writes the figure."""
    for name, values in SETTINGS.items():
        print(f"  {name:<14}{described(values)}")
    problems, starts, keys = make_problems(0, options.seeds)
    runs = {
        IVON: (partial(ivon_runs, SETTINGS[IVON], options.steps), problems, starts, keys),
        ADAMW: (partial(adamw_runs, SETTINGS[ADAMW], options.steps), problems, starts),
        ENSEMBLE: (partial(adamw_runs, SETTINGS[ENSEMBLE], options.steps), problems, starts),
        NUTS: (partial(nuts_run, options.draws), problems, starts, keys),
    }
    results = {}
    with tqdm(total=len(runs), unit="method") as bar:
        for name, (function, *arguments) in runs.items():
            bar.set_description(f"{name} (the longest)" if name == NUTS else name)
            results[name] = jax.device_get(jax.jit(jax.vmap(function))(*arguments))
            bar.update()
    posteriors, _ = results[IVON]
    chains = results[NUTS]
    draws = chains.functions.reshape(options.seeds, -1, chains.functions.shape[-1])
    methods = {
        ADAMW: jax.vmap(moments_of)(results[ADAMW][:, :1]),
        ENSEMBLE: jax.vmap(moments_of)(results[ENSEMBLE]),
        IVON: first_of(posteriors),
        MIXTURE: jax.vmap(mixture)(posteriors),
        NUTS: jax.vmap(moments_of)(draws),
    }
    methods, problems = jax.device_get((methods, problems))
    several = options.seeds > 1
    print(f"\n{table(methods, problems)}\n")
    if several:
        print(f"Mean ± standard error over {options.seeds} data sets.")
    print(
        f"std of f: of the function, without the noise of {NOISE:g}. NLL: of noisy test points\n"
        "under a Gaussian with the predicted mean and variance, noise included; lower is better.\n"
        "RMS from NUTS: distance of a method's mean, and of its std of f, to those of NUTS, over\n"
        f"[-3, 3]. Last rows: share of true function values within {BAND:g} std of f of the mean.\n"
        "NUTS is the reference: as true functions are drawn from the prior, its band holds about\n"
        "95 % of them, and no Gaussian prediction has a lower NLL, both over many data sets.\n"
        "A diagonal Gaussian has no correlations between weights, and many settings of the\n"
        "weights that fit the data but differ in the gap are out of its reach.\n"
    )
    print(convergence(chains))
    title = f"the first of {options.seeds} data sets" if several else "the data set"
    save_figure(draw(methods, results[ENSEMBLE][0], problems, title), options.output)


def convergence(chains: Chains) -> str:
    """R-hat and effective sample size of NUTS, at the worst of all inputs and data sets."""
    r_hat = jax.vmap(potential_scale_reduction)(chains.functions)
    effective = jax.vmap(effective_sample_size)(chains.functions)
    seeds, num_chains, draws, _ = chains.functions.shape
    return (
        f"NUTS, worst of all inputs and data sets: R-hat {jnp.max(r_hat):.3f}, effective sample "
        f"size {jnp.min(effective):.0f} of {num_chains * draws};\n"
        f"{chains.divergences.sum()} of {seeds * num_chains * draws:,} transitions diverged."
    )


# --- Tuning ---------------------------------------------------------------------------------------


def tune(options: argparse.Namespace) -> None:
    """Prints every setting's scores, mean and standard error over data sets; lower is better."""
    problems, starts, keys = make_problems(TUNING_SEED, options.seeds)

    def nll(moments: Moments) -> str:
        scores = jax.vmap(metrics.gaussian_nll)(moments.mean, moments.variance, problems.test_y)
        return cell(np.asarray(scores), 3)

    @jax.jit
    def run_ivon(values: Values) -> tuple[Moments, Array]:
        run = partial(ivon_runs, values, options.steps)
        moments, states = jax.vmap(run)(problems, starts, keys)
        energies = jax.vmap(partial(free_energy, network))
        return moments, energies(problems.x, problems.y, first_of(states), keys)

    @jax.jit
    def run_adamw(values: Values) -> Array:
        return jax.vmap(partial(adamw_runs, values, options.steps))(problems, starts)

    rows = [["IVON", "free energy (selects)", "NLL"]]
    for values in settings(IVON_GRID):
        moments, energies = run_ivon(values)
        rows.append([described(values), cell(np.asarray(energies), 2), nll(first_of(moments))])
    print(f"\n{format_table(rows)}\n")
    rows = [["AdamW", "NLL (selects)", f"NLL of {MEMBERS} nets (selects theirs)"]]
    for values in settings(ADAMW_GRID):
        functions = run_adamw(values)
        scores = [nll(jax.vmap(moments_of)(f)) for f in (functions[:, :1], functions)]
        rows.append([described(values), *scores])
    print(f"{format_table(rows)}\n\nNLL: of held-out points everywhere in [-3, 3].")


def settings(grid: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of a grid's values."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def described(values: Values) -> str:
    """Hyperparameters as text."""
    return ", ".join(f"{key} {value:g}" for key, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
