"""Every row of shard_map and pmap: what is right, what is refused, what is up to the user.

Each row names how the sample and the gradient are formed on a device, and what comes out under
`shard_map` with and without `check_vma`, and under `pmap`:

* whole: one sample, the gradient of the mean loss of all examples;
* stacked: a sample for every device, statistics averaged over the devices;
* summed: whole, with a gradient too large by the number of devices;
* own, own stream: every device learns from its own examples alone, from one sample or its own.

The last two are wrong unless meant; nothing in jax lets the library notice them.
"""

import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from ivon_jax import Eigenbasis, auto_sample, ivon, mc_value_and_grad, reseed, sample_params

DEVICES = 4
PARAMS = jnp.array([1.0, -2.0, 0.5])
X = jnp.sin(jnp.arange(3.0 * 16)).reshape(16, 3)
SHARDS = X.reshape(DEVICES, 4, 3)
KEY = jax.random.key(0)
SETTINGS = {"ess": 30.0, "hess_init": 0.5, "b2": 0.5}
# Means of sixteen numbers of order one in another order, and two steps from there.
REORDERED = {"rtol": 1e-5, "atol": 1e-5}

SUMMED_ALREADY = r"axis_name='d'.*already summed.*axis size"
NOT_REPLICATED = r"out_specs which require replication"


def loss(w, x):
    return 0.5 * jnp.mean((x @ w - 1.0) ** 2)


def mean_loss(w, x):
    return jax.lax.pmean(loss(w, x), "d")


def shared_key():
    return KEY


def own_key():
    return jax.random.fold_in(KEY, jax.lax.axis_index("d"))


def same(x):
    return x


def varying(params):
    return jax.lax.pcast(params, "d", to="varying")


def optimizer(axis_name):
    return ivon(0.1, **SETTINGS, axis_name=axis_name)


def statistics(state):
    return {"mean": state.mean, "hess": state.hess, "momentum": state.momentum}


def explicit(x, key=shared_key, axis_name=None, loss=loss, at=same, scale=1.0):
    tx = optimizer(axis_name)
    state = tx.init(PARAMS)
    sample, noise = sample_params(key(), state)
    grads = scale * jax.grad(loss)(at(sample), x)
    return statistics(tx.update(grads, state, noise=noise)[1])


def drop_in(x, seed=None, axis_name=None, loss=loss, start=same, scale=1.0, num_samples=1):
    tx = auto_sample(optimizer(axis_name), key=0, num_samples=num_samples)
    params, state = start(PARAMS), tx.init(PARAMS)
    if seed is not None:
        state = reseed(state, seed())
    for _ in range(2):
        updates, state = tx.update(scale * jax.grad(loss)(params, x), state, params)
        params = optax.apply_updates(params, updates)
    return statistics(state.inner_state)


def estimator(x, key=shared_key, axis_name=None, ivon_axis=None, scale=1.0):
    tx = optimizer(ivon_axis)
    state = tx.init(PARAMS)
    _, grads, hess = mc_value_and_grad(loss, 2, axis_name=axis_name)(key(), state, x)
    return statistics(tx.update(scale * grads, state, hess=scale * hess)[1])


class Row(NamedTuple):
    """A way to take steps on a device, and what comes of it: a label, or the error's message."""

    step: Callable[[jax.Array], Any]
    checked: str
    unchecked: str
    pmap: str


ROWS = {
    "explicit": {
        "one sample, axis_name": Row(
            partial(explicit, axis_name="d"), SUMMED_ALREADY, "whole", "whole"
        ),
        "one sample marked as varying, axis_name": Row(
            partial(explicit, axis_name="d", at=varying), "whole", "whole", "whole"
        ),
        "one sample, no axis_name": Row(explicit, "summed", "own", "own"),
        "one sample, averaged loss": Row(partial(explicit, loss=mean_loss), "whole", "own", "own"),
        "own samples, no axis_name": Row(
            partial(explicit, key=own_key), NOT_REPLICATED, "own stream", "own stream"
        ),
    },
    "auto_sample": {
        "same seed, axis_name": Row(
            partial(drop_in, axis_name="d"), SUMMED_ALREADY, "whole", "whole"
        ),
        "same seed, parameters marked as varying, axis_name": Row(
            partial(drop_in, axis_name="d", start=varying), "whole", "whole", "whole"
        ),
        "same seed, no axis_name": Row(drop_in, "summed", "own", "own"),
        "same seed, averaged loss": Row(partial(drop_in, loss=mean_loss), "whole", "own", "own"),
        "reseeded, axis_name": Row(
            partial(drop_in, seed=own_key, axis_name="d"), SUMMED_ALREADY, "stacked", "stacked"
        ),
        "reseeded, parameters marked as varying, axis_name": Row(
            partial(drop_in, seed=own_key, axis_name="d", start=varying),
            *("stacked", "stacked", "stacked"),
        ),
        "reseeded, windows of two calls, axis_name": Row(
            partial(drop_in, seed=own_key, axis_name="d", start=varying, num_samples=2),
            *("stacked windows", "stacked windows", "stacked windows"),
        ),
        "reseeded, no axis_name": Row(
            partial(drop_in, seed=own_key), NOT_REPLICATED, "own stream", "own stream"
        ),
    },
    "mc_value_and_grad": {
        "axis_name": Row(partial(estimator, axis_name="d"), "stacked", "stacked", "stacked"),
        "axis_name here and in ivon": Row(
            partial(estimator, axis_name="d", ivon_axis="d"), SUMMED_ALREADY, "stacked", "stacked"
        ),
        "own keys, axis_name in ivon": Row(
            partial(estimator, key=own_key, ivon_axis="d"), "stacked", "stacked", "stacked"
        ),
        "one key, axis_name in ivon": Row(
            partial(estimator, ivon_axis="d"), SUMMED_ALREADY, "whole", "whole"
        ),
        "one key, no axis_name": Row(estimator, "summed", "own", "own"),
        "own keys, no axis_name": Row(
            partial(estimator, key=own_key), NOT_REPLICATED, "own stream", "own stream"
        ),
    },
}
LABELS = ("whole", "summed", "own", "own stream", "stacked", "stacked windows")
STEPS = {"explicit": explicit, "auto_sample": drop_in, "mc_value_and_grad": estimator}
STREAM = {"explicit": "key", "auto_sample": "seed", "mc_value_and_grad": "key"}


@functools.cache
def references(learner):
    """Every label, computed on one device."""
    step, own = STEPS[learner], {STREAM[learner]: own_key}
    mapped = partial(jax.vmap, axis_name="d")

    def all_of_them():
        labels = {
            "whole": step(X),
            "summed": step(X, scale=float(DEVICES)),
            "own": mapped(step)(SHARDS),
            "own stream": mapped(partial(step, **own))(SHARDS),
        }
        if learner == "mc_value_and_grad":
            tx = optimizer(None)
            state = tx.init(PARAMS)
            keys = jax.vmap(partial(jax.random.fold_in, KEY))(jnp.arange(DEVICES))
            estimates = jax.vmap(mc_value_and_grad(loss, 2), (0, None, 0))(keys, state, SHARDS)
            labels["stacked"] = statistics(tx.update(estimates[1], state, hess=estimates[2])[1])
        if learner == "auto_sample":
            stacked = partial(step, **own, axis_name="d")
            labels["stacked"] = mapped(stacked)(SHARDS)
            labels["stacked windows"] = mapped(partial(stacked, num_samples=2))(SHARDS)
        return labels

    return jax.device_get(jax.jit(all_of_them)())


def on_devices(step, how):
    """What each device holds after `step`, stacked."""
    devices = jax.devices()[:DEVICES]
    if how == "pmap":
        return jax.pmap(step, axis_name="d", devices=devices)(SHARDS)
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,), devices=devices)
    shard_map = partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("d"))
    if how == "checked":
        return jax.jit(shard_map(step, out_specs=PartitionSpec()))(X)

    def stacked(x):
        return jax.tree.map(lambda a: a[None], step(x))

    return jax.jit(shard_map(stacked, out_specs=PartitionSpec("d"), check_vma=False))(X)


@functools.cache
def outcomes(learner, how):
    """All rows that are not refused, in one compilation."""
    rows = {k: row for k, row in ROWS[learner].items() if getattr(row, how) in LABELS}
    results = on_devices(lambda x: {k: row.step(x) for k, row in rows.items()}, how)
    return jax.device_get(results)


CASES = [
    pytest.param(learner, how, name, id=f"{learner}, {how}: {name}")
    for learner, rows in ROWS.items()
    for how in ("checked", "unchecked", "pmap")
    for name in rows
]


def on_every_device(result):
    """Stacked over the devices, where it is not yet."""
    return {k: np.broadcast_to(v, (DEVICES, *PARAMS.shape)) for k, v in result.items()}


def assert_close(result, expected):
    chex.assert_trees_all_close(on_every_device(result), on_every_device(expected), **REORDERED)


@pytest.mark.parametrize(("learner", "how", "name"), CASES)
def test_row(learner, how, name):
    row = ROWS[learner][name]
    expected = getattr(row, how)
    if expected in LABELS:
        assert_close(outcomes(learner, how)[name], references(learner)[expected])
    else:
        with pytest.raises(ValueError, match=expected):
            on_devices(row.step, how)


@pytest.mark.parametrize("learner", ROWS)
def test_no_two_labels_mean_the_same(learner):
    wanted = references(learner)
    means = {k: on_every_device(v)["mean"] for k, v in wanted.items()}
    for a, b in itertools.combinations(means, 2):
        assert np.max(np.abs(means[a] - means[b])) > 1e-3, (a, b)


def test_a_scan_carries_what_differs_by_device_once_the_window_is_marked_as_varying():
    tx = auto_sample(optimizer("d"), key=0, num_samples=2)

    def steps(x):
        state = reseed(tx.init(PARAMS), own_key())
        window = state.inner_state.window
        window = window._replace(grads=varying(window.grads), products=varying(window.products))
        inner_state = state.inner_state._replace(window=window)
        state = state._replace(inner_state=inner_state)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, x), state, params)
            return (optax.apply_updates(params, updates), state), None

        (_, state), _ = jax.lax.scan(step, (varying(PARAMS), state), length=2)
        return statistics(state.inner_state)

    assert_close(on_devices(steps, "checked"), references("auto_sample")["stacked windows"])


def trained_apart(train):
    """Parameters of every device after `train(x, start)`, which must differ."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec("d"), PartitionSpec()), "out_specs": PartitionSpec("d")}
    found = jax.jit(jax.shard_map(train, mesh=mesh, **specs))(X, PARAMS)
    assert found.shape == (DEVICES, 3, 1) and np.isfinite(found).all()
    assert len({float(x) for x in found[:, 0, 0]}) == DEVICES


@pytest.mark.parametrize("num_samples", [1, 2])
def test_every_device_trains_a_posterior_of_its_own_in_a_basis(num_samples):
    tx = auto_sample(ivon(0.1, **SETTINGS, basis=Eigenbasis()), 0, num_samples=num_samples)

    def train(x, start):
        params = start[:, None] + jax.lax.axis_index("d").astype(jnp.float32)
        state = tx.init(params)
        for _ in range(2 * num_samples):
            grads = jax.grad(lambda w: loss(w[:, 0], x))(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params[None]

    trained_apart(train)


def test_devices_that_draw_on_their_own_part_from_one_state_in_a_basis():
    tx = ivon(0.1, **SETTINGS, basis=Eigenbasis())

    def train(x, start):
        state = tx.init(start[:, None])
        for _ in range(2):
            sample, noise = sample_params(own_key(), state)
            grads = jax.grad(lambda w: loss(w[:, 0], x))(sample)
            _, state = tx.update(grads, state, noise=noise)
        return state.mean[None]

    trained_apart(train)


def test_devices_that_estimate_the_curvature_on_their_own_share_a_gradient_in_a_basis():
    tx = ivon(0.1, **SETTINGS, basis=Eigenbasis())

    def train(x, start):
        state = tx.init(start[:, None])
        for _ in range(2):
            hess = jnp.sum(x**2) * jnp.ones_like(state.mean)
            _, state = tx.update(jnp.ones_like(state.mean), state, hess=hess)
        return state.mean[None]

    trained_apart(train)


def test_an_axis_over_which_the_sample_is_replicated_is_named():
    tx = ivon(0.1, **SETTINGS, axis_name=("r", "c"))
    state = tx.init(PARAMS)

    def step(x):
        key = jax.random.fold_in(KEY, jax.lax.axis_index("r"))
        sample, noise = sample_params(key, state)
        return tx.update(jax.grad(loss)(sample, x), state, noise=noise)

    mesh = jax.make_mesh((2, 2), ("r", "c"), axis_types=(AxisType.Auto,) * 2)
    specs = {"in_specs": PartitionSpec(("r", "c")), "out_specs": PartitionSpec()}
    with pytest.raises(ValueError, match=r"axis_name='c'.*already summed"):
        jax.jit(jax.shard_map(step, mesh=mesh, **specs))(X)


@pytest.mark.parametrize("how", ["checked", "unchecked", "pmap"])
@pytest.mark.parametrize(
    "step",
    [
        partial(explicit, axis_name="e"),
        partial(drop_in, axis_name="e"),
        partial(estimator, axis_name="e"),
        partial(estimator, key=own_key, ivon_axis=("d", "e")),
    ],
    ids=["explicit", "auto_sample", "mc_value_and_grad", "one of two"],
)
def test_an_axis_that_is_not_mapped_is_an_error_beside_one_that_is(step, how):
    with pytest.raises(NameError, match="unbound axis name: e"):
        on_devices(step, how)
