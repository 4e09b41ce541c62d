"""IVON in the gap between two clusters of data against exact inference and a deep ensemble.

`python benchmarks/evidence/uses/regression_1d.py` takes the problems and the three methods of
examples/regression_1d.py, and adds five networks of AdamW, IVON in an eigenbasis, and NUTS, which
needs blackjax: `pip install -e ".[examples,hmc]"`. All but AdamW share prior and likelihood. In a
matrix of one column all weights share one basis, so that its posterior has a full covariance: the
best Gaussian with one, by Adam on the free energy, says how much of an error is left to its form.

Settings were chosen on other data sets: nine were tried for IVON and nine in the eigenbasis,
selected by their training objective, the free energy; twenty for AdamW, selected, for one network
and for the ensemble, by the NLL of held-out points in the clusters, in the gap and outside. AdamW
is thereby told about gaps, as IVON is not: selected in the clusters alone, its ensemble was far
worse in the gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from blackjax.diagnostics import effective_sample_size, potential_scale_reduction

from benchmarks._shared.journal import parse
from examples import regression_1d as example
from examples._shared.reporting import cell, format_table
from examples._shared.training import train
from examples.regression_1d import MEMBERS, NUM_TRAIN, Problem, network
from ivon_jax import Eigenbasis, Moments, auto_sample, ivon, posterior, predict_moments

CHAINS = 4
MAX_DOUBLINGS = 8  # of a NUTS trajectory
Array = jax.Array


@dataclass
class Options:
    """The command line."""

    seeds: int = 16
    """Data sets."""
    steps: int = 20_000
    """Full-batch gradients of each network."""
    draws: int = 250
    """Of each of four chains of NUTS, after as many steps of adaptation."""


def main(argv: Sequence[str] | None = None) -> None:
    """Fits every data set by every method and prints the tables."""
    options = parse(Options, __doc__, argv)
    split = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))
    problem_keys, start_keys, keys = jnp.swapaxes(split(jnp.arange(options.seeds)), 0, 1)
    problems = jax.jit(jax.vmap(example.draw_problem))(problem_keys)
    starts = jax.jit(jax.vmap(example.draw_members))(start_keys)
    chains = jax.jit(jax.vmap(partial(run_nuts, options.draws)))(problems, starts, keys)
    ensemble = jax.vmap(partial(fit_ensemble, options.steps))(problems, starts, keys)
    functions = chains.functions.reshape(options.seeds, -1, chains.functions.shape[-1])

    def fitted(fit: Any) -> Moments:
        return jax.vmap(partial(fit, options.steps))(problems, starts, keys)

    # A `vmap` would decompose the matrices of all data sets in every step.
    fit = partial(fit_eigenbasis, options.steps)
    eigenbasis = jax.lax.map(lambda x: fit(*x), (problems, starts, keys))
    methods = {
        "AdamW": fitted(example.fit_adamw),
        f"{MEMBERS} of AdamW": ensemble,
        "IVON": fitted(example.fit_ivon),
        f"{MEMBERS} of IVON": fitted(example.fit_mixture),
        "eigenbasis": eigenbasis,
        "best Gaussian": fitted(fit_gaussian),
        "NUTS": jax.vmap(moments_of)(functions),
    }
    print(f"\n{example.table(methods, problems)}\n\n{true_function(methods, problems)}\n")
    print(
        f"Mean ± standard error over {options.seeds} data sets. NUTS is the reference: as true\n"
        "functions are drawn from the prior, its band holds about 95 % of them, and no Gaussian\n"
        f"prediction has a lower NLL, both over many data sets.\n{convergence(chains)}"
    )


def moments_of(functions: Array) -> Moments:
    """Mean and variance over equally likely functions on axis 0, with the noise on top."""
    variance = jnp.var(functions, axis=0)
    return Moments(jnp.mean(functions, axis=0), variance + example.NOISE**2, variance)


def fit_ensemble(steps: int, problem: Problem, starts: Array, key: Array) -> Moments:
    """Networks of AdamW from different initial weights."""
    tx = optax.adamw(example.schedule(1e-4, steps), weight_decay=0.1)
    batches: Any = {"epochs": steps, "batch_size": NUM_TRAIN, "progress": False}

    def member(start: Array) -> Array:
        weights, _ = train(tx, example.loss_fn, start, (problem.x, problem.y), key=key, **batches)
        return network(weights, problem.test_x)

    return moments_of(jax.vmap(member)(starts))


def fit_eigenbasis(steps: int, problem: Problem, starts: Array, key: Array) -> Moments:
    """Predictions of IVON with all weights in one column, in the eigenbasis of its gradients."""
    noise_key, key, predict_key = jax.random.split(key, 3)
    basis = Eigenbasis(decay=0.999)
    tx = ivon(example.schedule(0.03, steps), **example.SETTINGS, basis=basis)
    batches: Any = {"epochs": steps, "batch_size": NUM_TRAIN, "progress": False}

    def loss_fn(column: Array, batch: Any) -> Array:
        return example.loss_fn(column[:, 0], batch)

    def outputs(column: Array, x: Array) -> Array:
        return network(column[:, 0], x)

    data, tx = (problem.x, problem.y), auto_sample(tx, noise_key)
    _, state = train(tx, loss_fn, starts[0][:, None], data, key=key, **batches)
    predict = predict_moments(outputs, example.SAMPLES, noise_variance=example.NOISE**2)
    return predict(predict_key, posterior(state), problem.test_x)


def fit_gaussian(steps: int, problem: Problem, starts: Array, key: Array) -> Moments:
    """Predictions of the Gaussian N(m, LLᵀ) of least free energy, by Adam with 16 samples."""
    size = len(starts[0])
    train_key, predict_key = jax.random.split(key)

    def free_energy(params: tuple[Array, Array], key: Array) -> Array:
        mean, noise = params[0], jax.random.normal(key, (8, size)) @ root(params[1]).T
        losses = jax.vmap(example.loss_fn, (0, None))
        data = problem.x, problem.y
        loss = jnp.mean(losses(mean + noise, data) + losses(mean - noise, data)) / 2
        square = jnp.sum(mean**2) + jnp.sum(root(params[1]) ** 2)
        return NUM_TRAIN * loss + 0.5 * square - jnp.sum(jnp.diag(params[1]))

    def root(x: Array) -> Array:
        return jnp.tril(x, -1) + jnp.diag(jnp.exp(jnp.diag(x)))

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(free_energy)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), None

    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    params = starts[0], jnp.log(0.05) * jnp.eye(size)
    keys = jax.random.split(train_key, steps)
    (mean, x), _ = jax.lax.scan(step, (params, tx.init(params)), keys)[0]
    weights = mean + jax.random.normal(predict_key, (example.SAMPLES, size)) @ root(x).T
    return moments_of(jax.vmap(network, (0, None))(weights, problem.test_x))


class Chains(NamedTuple):
    """Function values (chains, draws, n) and the number of divergent transitions."""

    functions: Array
    divergences: Array


def run_nuts(draws: int, problem: Problem, starts: Array, key: Array) -> Chains:
    """Draws functions from the posterior by NUTS, after as many steps of adaptation."""

    def log_density(weights: Array) -> Array:
        loss = example.loss_fn(weights, (problem.x, problem.y))
        return -0.5 * jnp.sum(weights**2) - NUM_TRAIN * loss

    def chain(start: Array, key: Array) -> Chains:
        adapt_key, key = jax.random.split(key)
        adaptation = blackjax.window_adaptation(
            blackjax.nuts, log_density, max_num_doublings=MAX_DOUBLINGS
        )
        (state, tuned), _ = adaptation.run(adapt_key, start, draws)  # pyright: ignore[reportCallIssue]
        kernel: Any = blackjax.nuts(log_density, **tuned)

        def step(state: Any, key: Array) -> tuple[Any, Chains]:
            state, info = kernel.step(key, state)
            return state, Chains(network(state.position, problem.test_x), info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(key, draws))[1]

    chains = jax.vmap(chain)(starts[:CHAINS], jax.random.split(key, CHAINS))
    return chains._replace(divergences=jnp.sum(chains.divergences))


def true_function(methods: dict[str, Moments], problems: Problem) -> str:
    """How often the band of the function itself, without noise, holds the true one."""
    distance = np.abs(problems.test_x[0])
    rows = [["true function in 95 % band, %", *methods]]
    for name, where in {
        "clusters": (distance >= 1) & (distance <= 2),
        "gap": distance < 1,
        "outside": distance > 2,
    }.items():
        inside = (
            np.abs(problems.test_f - m.mean) <= example.BAND * np.sqrt(m.model_variance)
            for m in methods.values()
        )
        rows.append([name, *(cell(100 * x[:, where].mean(axis=1), 0) for x in inside)])
    return format_table(rows)


def convergence(chains: Chains) -> str:
    """R-hat and effective sample size of NUTS, at the worst of all inputs and data sets."""
    worst = jax.jit(lambda x: jnp.max(jax.vmap(potential_scale_reduction)(x)))
    fewest = jax.jit(lambda x: jnp.min(jax.vmap(effective_sample_size)(x)))
    seeds, count, draws, _ = chains.functions.shape
    return (
        f"NUTS, worst of all inputs and data sets: R-hat {worst(chains.functions):.3f}, effective "
        f"sample size {fewest(chains.functions):.0f} of {count * draws};\n"
        f"{chains.divergences.sum()} of {seeds * count * draws:,} transitions diverged."
    )


if __name__ == "__main__":
    main()
