"""The posterior in an eigenbasis: trajectories, closed forms, and every use of it."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    Eigenbasis,
    Posterior,
    Sides,
    auto_sample,
    diagnostics,
    ivon,
    kl_divergence,
    linearize,
    load,
    marginals,
    mc_value_and_grad,
    merge,
    posterior,
    prior_of,
    prune,
    sample_params,
    save,
    signal_to_noise,
)
from ivon_jax._core.basis import in_coordinates
from ivon_jax._core.noise import standard_normals
from ivon_jax._core.optimizer import PRECISION_FLOOR, TURNED_FLOOR
from ivon_jax._core.sampling import threefry_key

SETTINGS: Any = {"ess": 50.0, "hess_init": 0.5, "b1": 0.9, "b2": 0.9, "weight_decay": 0.125}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def matrices(seed, *shapes):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(k, s, jnp.float64) for k, s in zip(keys, shapes, strict=True)]


def rotation(seed, size):
    return jnp.linalg.qr(matrices(seed, (size, size))[0])[0]


def rotated_gaussian(seed, rows=4, columns=3):
    """A posterior with a basis, and its covariance of the leaf as a vector."""
    mean, spread = matrices(seed, (rows, columns), (rows, columns))
    precision = jnp.exp(spread)
    left, right = rotation(seed + 1, rows), rotation(seed + 2, columns)
    turn = jnp.kron(left, right)  # of the leaf in C order
    covariance = turn @ jnp.diag(1 / precision.ravel()) @ turn.T
    return Posterior(mean, precision, (Sides(left, right),)), covariance


# --- The recursion --------------------------------------------------------------------------------


def in_numpy(m, gradient, noises, *, lr, every, decay, xi, prior=None, sides=None):
    """The recursion of `ivon` in the coordinates of the eigenbasis, for one matrix.

    The prior is a mean and the full precision of the matrix as a vector; `every=0` never turns.
    """
    floor = PRECISION_FLOOR if prior is None or not every else TURNED_FLOOR
    lam, h0, b1, b2, delta = (SETTINGS[k] for k in ("ess", "hess_init", "b1", "b2", "weight_decay"))
    m0, of_prior = prior or (0 * m, lam * delta * np.eye(m.size))
    smallest = np.linalg.eigvalsh(of_prior).min() / lam
    (rows, columns), trajectory = m.shape, []
    left, right = sides or (np.eye(rows), np.eye(columns))
    of_left, of_right = np.zeros((rows, rows)), np.zeros((columns, columns))
    h, g = np.full(m.shape, h0), np.zeros(m.shape)
    for t, e in enumerate(noises, start=1):
        turn = np.kron(left, right)
        delta = np.diag(turn.T @ of_prior @ turn).reshape(m.shape) / lam
        pull = (turn.T @ of_prior @ (m - m0).ravel()).reshape(m.shape) / lam
        h = np.maximum(h, floor * (h0 + delta) - delta)
        n = e / np.sqrt(lam * (h + delta))
        gradient_t = gradient(m + left @ n @ right.T)
        turned = left.T @ gradient_t @ right
        estimate = lam * (h + delta) * n * turned
        g = b1 * g + (1 - b1) * turned
        d = (1 - b2) * (estimate - h)
        h = h + d + 0.5 * d**2 / (h + delta)
        h = np.maximum(h, floor * (h0 + delta) - delta)
        step = (g / (1 - b1**t) + pull) / (h + delta)
        m = m - lr * (h0 + smallest) * left @ np.clip(step, -xi, xi) @ right.T
        of_left = decay * of_left + (1 - decay) * gradient_t @ gradient_t.T
        of_right = decay * of_right + (1 - decay) * gradient_t.T @ gradient_t
        momentum = left @ g @ right.T
        if every and t == 1:
            left, right = (np.linalg.eigh(f)[1][:, ::-1] for f in (of_left, of_right))
        elif every and t % every == 0:
            sorted_rows = np.argsort(-np.diag(left.T @ of_left @ left))
            sorted_columns = np.argsort(-np.diag(right.T @ of_right @ right))
            h = h[sorted_rows][:, sorted_columns]
            left, right = (
                q * np.where(np.diag(r) < 0, -1, 1)
                for q, r in (
                    np.linalg.qr(of_left @ left[:, sorted_rows]),
                    np.linalg.qr(of_right @ right[:, sorted_columns]),
                )
            )
        g = left.T @ momentum @ right
        trajectory.append((m, h))
    return trajectory


def quadratic(shape):
    """A loss with correlated rows and columns, and its gradient in NumPy."""
    a, b, target = matrices(7, (shape[0],) * 2, (shape[1],) * 2, shape)
    a, b = a @ a.T / shape[0], b @ b.T / shape[1]

    def loss(w):
        return 0.5 * jnp.sum((w - target) * (a @ (w - target) @ b)) + 0.1 * jnp.sum(w**4)

    def gradient(w):
        return np.asarray(a) @ (w - np.asarray(target)) @ np.asarray(b) + 0.4 * w**3

    return loss, gradient


def run(tx, loss, params, keys):
    """Every state of a loop with `sample_params`."""
    state = tx.init(params)

    @jax.jit
    def step(key, params, state):
        sample, noise = sample_params(key, state)
        updates, state = tx.update(jax.grad(loss)(sample), state, params, noise=noise)
        return optax.apply_updates(params, updates), state

    for key in keys:
        params, state = step(key, params, state)
        yield params, state


@pytest.mark.parametrize("shape", [(4, 3), (3, 4)])
@pytest.mark.parametrize("xi", [np.inf, 0.3])
def test_trajectories_equal_an_independent_implementation(shape, xi):
    loss, gradient = quadratic(shape)
    keys = jax.random.split(jax.random.key(1), 12)
    ones = jnp.ones(shape)
    noises = [np.asarray(standard_normals(threefry_key(key), [ones])[0]) for key in keys]
    start = matrices(2, shape)[0]
    how = {"lr": 0.05, "every": 3, "decay": 0.8, "xi": xi}
    expected = in_numpy(np.asarray(start), gradient, noises, **how)
    basis = Eigenbasis(update_every=3, decay=0.8)
    tx = ivon(0.05, **SETTINGS, clip_radius=xi, basis=basis)
    for (m, h), (params, state) in zip(expected, run(tx, loss, start, keys), strict=True):
        np.testing.assert_allclose(params, m, rtol=1e-9)
        np.testing.assert_allclose(state.hess, h, rtol=1e-8)


@pytest.mark.parametrize("is_turned", [False, True], ids=["diagonal prior", "turned prior"])
@pytest.mark.parametrize("every", [0, 2], ids=["its basis kept", "turned posterior"])
def test_a_prior_in_any_basis_is_that_of_the_full_gaussian(is_turned, every):
    q, covariance = rotated_gaussian(20)
    if not is_turned:
        q = q._replace(basis=())
        covariance = jnp.diag(1 / q.precision.ravel())
    loss, gradient = quadratic((4, 3))
    keys = jax.random.split(jax.random.key(1), 12)
    ones = jnp.ones((4, 3))
    noises = [np.asarray(standard_normals(threefry_key(key), [ones])[0]) for key in keys]
    start = matrices(2, (4, 3))[0]
    how = {"lr": 0.05, "every": every, "decay": 0.8, "xi": np.inf}
    full = np.asarray(q.mean), np.linalg.inv(covariance)
    kept = None if every or not is_turned else list(map(np.asarray, q.basis[0]))
    expected = in_numpy(np.asarray(start), gradient, noises, **how, prior=full, sides=kept)
    basis = Eigenbasis(update_every=every, decay=0.8) if every else None
    settings = {k: v for k, v in SETTINGS.items() if k != "weight_decay"}
    tx = ivon(0.05, **settings, prior=q, basis=basis)
    for (m, h), (params, state) in zip(expected, run(tx, loss, start, keys), strict=True):
        np.testing.assert_allclose(params, m, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(state.hess, h, rtol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, prior_of(state), q)
    if kept:
        jax.tree.map(np.testing.assert_array_equal, posterior(state).basis, q.basis)
    found = diagnostics(state, {"learning_rate": 0.05, **settings})
    np.testing.assert_allclose(found["kl"], kl_divergence(state, q), rtol=1e-6)


def test_a_turn_keeps_the_precision_positive_under_a_prior_that_turns_too():
    """A sharp prior in one direction lets h be negative there, which other directions forbid."""
    w = matrices(0, (6, 6))[0]
    prior = Posterior(0 * w, jnp.where(jnp.arange(6)[:, None] < 1, 1e4, 1e-3) * jnp.ones((6, 6)))
    tx = ivon(0.0, ess=10, b2=0.5, prior=prior, basis=Eigenbasis(update_every=1, decay=0.5))
    state, update = tx.init(w), jax.jit(tx.update)
    for grads in matrices(1, *[(6, 6)] * 8):
        _, state = update(grads, state, w, hess=-1e3 * jnp.ones((6, 6)))
        assert jax.tree.leaves(posterior(state).precision)[0].min() > 0


def test_a_part_takes_its_own_sides_of_a_prior_for_the_whole():
    one, _ = rotated_gaussian(0)
    other, _ = rotated_gaussian(9, 2, 5)
    prior = Posterior(*({"a": x, "b": y} for x, y in zip(one[:2], other[:2], strict=True)))
    prior = prior._replace(basis=one.basis + other.basis)
    part = ivon(0.1, ess=10, prior=prior)
    tx = optax.partition({"ivon": part, "sgd": optax.sgd(0.1)}, {"a": "sgd", "b": "ivon"})
    state = tx.init(prior.mean)
    jax.tree.map(np.testing.assert_array_equal, prior_of(state).basis, other.basis)
    jax.tree.map(np.testing.assert_array_equal, prior_of(state, prior.mean).basis[1:], other.basis)
    assert kl_divergence(part.init(prior.mean), prior) > 0
    turned = ivon(0.1, ess=10, prior=prior, basis=Eigenbasis())
    parts = {"all": turned, "none": turned}  # of which one owns nothing
    state = optax.partition(parts, {"a": "all", "b": "all"}).init(prior.mean)
    jax.tree.map(np.testing.assert_array_equal, prior_of(state).basis, prior.basis)


def test_a_leaf_that_a_basis_turns_is_fixed_as_a_whole_or_not():
    w = {"w": jnp.ones((3, 2))}
    fixed = Posterior({"w": 5 * w["w"]}, {"w": jnp.full((3, 2), jnp.inf)})
    tx = auto_sample(ivon(0.1, ess=10, prior=fixed, basis=Eigenbasis()), 0)
    _, state = jax.jit(tx.update)(w, tx.init(w), w)
    np.testing.assert_array_equal(state.inner_state.mean["w"], fixed.mean["w"])
    half = fixed._replace(precision={"w": jnp.array([[jnp.inf, 1.0]] * 3)})
    with pytest.raises(ValueError, match=r"infinite for a part of the leaf at \['w'\]"):
        jax.jit(ivon(0.1, ess=10, prior=half, basis=Eigenbasis()).init)(w)
    with pytest.raises(ValueError, match="infinite for a part"):
        ivon(0.1, ess=10, prior=half._replace(basis=(Sides((), rotation(0, 2)),))).init(w)
    rows_only = half._replace(basis=(Sides(rotation(0, 3)),))  # a column is fixed as a whole
    for prior in (half, rows_only):
        tx = ivon(0.1, ess=10, prior=prior)
        _, state = tx.update(w, tx.init(w), w, hess=w)
        np.testing.assert_array_equal(state.mean["w"][:, 0], 5.0)
        assert (state.mean["w"][:, 1] != 5.0).all()


def test_a_turned_prior_has_the_dtype_of_the_mean_and_optax_maps_over_it():
    q, _ = rotated_gaussian(0)
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), q)
    for prior, dtype in ((q, jnp.float32), (q, jnp.bfloat16), (narrow, jnp.float64)):
        w = q.mean.astype(dtype)
        for basis in (None, Eigenbasis()):
            tx = ivon(0.1, ess=10, prior=prior, basis=basis)
            state = tx.init(w)
            _, new = jax.eval_shape(lambda s, tx=tx, w=w: tx.update(w, s, w, hess=s.hess), state)
            assert jax.tree.structure(new) == jax.tree.structure(state)
            mapped = optax.tree.map_params(tx, lambda x: x, state)
            assert jax.tree.structure(mapped) == jax.tree.structure(state)


def test_priors_that_are_no_gaussian_are_refused():
    q, _ = rotated_gaussian(0)
    for sides, message in (
        (Sides(3 * jnp.ones((4, 4))), "not orthogonal"),
        (Sides(jnp.full((4, 4), jnp.nan)), "not orthogonal"),
        (Sides(jnp.eye(4, dtype=int)), "all floating"),
        (Sides([[1.0]]), "all floating"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ValueError, match=message):
            ivon(0.1, ess=10, prior=q._replace(basis=(sides,)))
    stacked = Posterior(*[jnp.ones((2, 3, 4))] * 2, (Sides(jnp.stack([jnp.eye(3)] * 2)),))
    with pytest.raises(ValueError, match="of other axes"):
        ivon(0.1, ess=10, prior=stacked, basis=Eigenbasis()).init(stacked.mean)


def test_the_identity_as_basis_changes_no_bit():
    loss, _ = quadratic((4, 3))
    keys = jax.random.split(jax.random.key(1), 8)
    start = matrices(2, (4, 3))[0]
    plain = run(ivon(0.05, **SETTINGS), loss, start, keys)
    turned = run(ivon(0.05, **SETTINGS, basis=Eigenbasis(max_dim=1)), loss, start, keys)
    for (a, _), (b, _) in zip(plain, turned, strict=True):
        assert np.array_equal(a, b)


def test_vectors_long_axes_and_kernels_of_convolutions():
    params = {"bias": jnp.ones(3), "table": jnp.ones((9, 4)), "kernel": jnp.ones((2, 2, 3, 4))}
    state = ivon(0.1, ess=10, basis=Eigenbasis(max_dim=8)).init(params)
    bias, kernel, table = state.basis.vectors
    assert bias == ((), ())
    assert kernel.rows == ()  # of 12
    assert table.rows == ()
    assert kernel.columns.shape == table.columns.shape == (4, 4)


def test_kernels_are_split_where_their_matrices_are_smallest():
    """Those of convolutions before the last axis, those of attention around heads · size."""
    params = {"conv": jnp.ones((2, 2, 5, 6)), "in": jnp.ones((6, 3, 2)), "out": jnp.ones((3, 2, 6))}
    state = ivon(0.1, ess=10, basis=Eigenbasis(max_dim=20)).init(params)
    sizes = [(len(rows), len(columns)) for rows, columns in state.basis.vectors]
    assert sizes == [(20, 6), (6, 6), (6, 6)]
    q = posterior(state)
    noise = matrices(5, (2, 6, 3, 2))[0]  # two samples
    turn = rotation(3, 6)
    basis = (Sides(), Sides(turn, turn.T), Sides())
    found = in_coordinates(basis, [noise, noise, noise])[1]
    expected = turn.T @ noise.reshape(2, 6, 6) @ turn.T
    np.testing.assert_allclose(found, expected.reshape(noise.shape))
    assert sample_params(jax.random.key(0), q)[0]["in"].shape == (6, 3, 2)


@pytest.mark.parametrize(("shape", "max_dim"), [((3, 4), 9), ((2, 3, 4), 9)])
def test_stacked_layers_do_what_they_do_apart(shape, max_dim):
    """Each has a basis of its own."""
    layers = 3
    options: Any = {"update_every": 2, "decay": 0.5, "max_dim": max_dim}
    stack, bias, *rest = matrices(3, (layers, *shape), (layers, 4), *2 * [(5, layers, *shape)])
    apart = dict(enumerate(stack))
    flags = {"kernel": True, "bias": True}
    tx = ivon(0.05, **SETTINGS, basis=Eigenbasis(**options, stacked=flags))
    own = ivon(0.05, **SETTINGS, basis=Eigenbasis(**options))
    state, states = tx.init({"kernel": stack, "bias": bias}), own.init(apart)
    step, steps = jax.jit(tx.update), jax.jit(own.update)
    for noise, grads in zip(*rest, strict=True):
        with_bias = ({"kernel": x, "bias": jnp.zeros_like(bias)} for x in (grads, noise))
        state = step(next(with_bias), state, noise=next(with_bias))[1]
        of_layers = (dict(enumerate(x)) for x in (grads, noise))
        states = steps(next(of_layers), states, noise=next(of_layers))[1]
    for field in ("mean", "hess", "momentum"):
        found = getattr(state, field)["kernel"]
        np.testing.assert_allclose(found, jnp.stack(list(getattr(states, field).values())))
    q, layerwise = posterior(state), posterior(states)
    np.testing.assert_allclose(
        marginals(q).precision["kernel"],
        jnp.stack(list(marginals(layerwise).precision.values())),
    )
    prior, priors = (Posterior(x.mean, jax.tree.map(jnp.ones_like, x.mean)) for x in (q, layerwise))
    of_bias = Posterior(*({"bias": x["bias"]} for x in (q.mean, q.precision)))
    other = Posterior(of_bias.mean, {"bias": jnp.ones_like(bias)})
    expected = kl_divergence(layerwise, priors) + kl_divergence(of_bias, other)
    np.testing.assert_allclose(kl_divergence(q, prior), expected)
    noise = sample_params(jax.random.key(0), q)[1]
    coordinates = in_coordinates(q.basis, jax.tree.leaves(noise))
    precision = jax.tree.leaves(q.precision)
    drawn = standard_normals(threefry_key(jax.random.key(0)), precision)
    for found, e, p in zip(coordinates, drawn, precision, strict=True):
        np.testing.assert_allclose(found, e / jnp.sqrt(p))


def test_a_basis_of_layers_does_not_mix_with_one_of_the_whole():
    stack = matrices(3, (3, 4, 2))[0]
    whole, layers = (
        ivon(0.1, ess=10, basis=Eigenbasis(stacked=stacked)).init({"kernel": stack})
        for stacked in (None, {"kernel": True})
    )
    with pytest.raises(ValueError, match="of other axes, or of stacked layers"):
        kl_divergence(whole, posterior(layers))
    with pytest.raises(ValueError, match="stacked is a single value"):
        ivon(0.1, ess=10, basis=Eigenbasis(stacked=True)).init({"kernel": stack})


def test_the_basis_is_that_of_the_second_moments_of_the_gradients():
    loss, _ = quadratic((4, 3))
    keys = jax.random.split(jax.random.key(1), 60)
    tx = ivon(1e-9, **{**SETTINGS, "ess": 1e9}, basis=Eigenbasis(update_every=1, decay=0.5))
    *_, (_, state) = run(tx, loss, matrices(2, (4, 3))[0], keys)
    (vectors, _), (factors, _) = state.basis.vectors[0], state.basis.factors[0]
    turned = vectors.T @ factors @ vectors
    np.testing.assert_allclose(turned, jnp.diag(jnp.diag(turned)), atol=1e-6 * turned.max())
    assert np.all(np.diff(np.diag(turned)) <= 1e-12)


def test_an_estimate_of_the_curvature_is_clipped_by_a_share_of_the_precision():
    w, estimate = matrices(2, (4, 3), (4, 3))
    bounded = ivon(0.05, **SETTINGS, basis=Eigenbasis(hess_clip=1.5))
    free = ivon(0.05, **SETTINGS, basis=Eigenbasis())
    state = bounded.init(w)
    bound = 1.5 * (SETTINGS["hess_init"] + SETTINGS["weight_decay"])
    _, clipped = bounded.update(w, state, w, hess=estimate)
    _, expected = free.update(w, state, w, hess=jnp.clip(estimate, -bound, bound))
    np.testing.assert_allclose(clipped.hess, expected.hess, rtol=1e-12)
    assert not np.allclose(clipped.hess, free.update(w, state, w, hess=estimate)[1].hess)


# --- In loops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_samples": 2}, {"store_mean": False}])
def test_auto_sample_draws_from_the_turned_posterior(options):
    loss, _ = quadratic((4, 3))
    tx = auto_sample(ivon(0.05, **SETTINGS, basis=Eigenbasis(update_every=2)), 0, **options)
    params = {"w": matrices(2, (4, 3))[0], "b": jnp.ones(3)}
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(jax.grad(lambda p: loss(p["w"] + p["b"][None]))(p), s, p))
    for _ in range(9):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    q = posterior(state, params)
    numbers = diagnostics(state, {**SETTINGS, "learning_rate": 0.05}, params=params)
    assert numbers["sample/distance"] < 5
    if "store_mean" not in options:
        assert numbers["sample/agreement"] == pytest.approx(1, abs=1e-4)
    assert loss(q.mean["w"] + q.mean["b"][None]) < loss(matrices(2, (4, 3))[0] + 1)


def test_noise_of_many_samples_and_ready_estimates_give_the_same_step():
    loss, _ = quadratic((4, 3))
    params = {"w": matrices(2, (4, 3))[0], "fixed": jnp.arange(2)}
    tx = ivon(0.05, **SETTINGS, basis=Eigenbasis())
    state = tx.init(params)
    apply = lambda p: loss(p["w"])  # noqa: E731
    first = mc_value_and_grad(apply, 4)(jax.random.key(0), state, params=params)
    _, state = tx.update(first[1], state, params, hess=first[2])  # now the basis has turned
    key = jax.random.key(1)
    _, grads, hess = mc_value_and_grad(apply, 4)(key, state, params=params)
    a, _ = tx.update(grads, state, params, hess=hess)
    keys = jax.random.split(key, 4)
    sample, noise = jax.vmap(sample_params, (0, None))(keys, state)
    each = jax.vmap(lambda w: jax.grad(loss)(w))(sample["w"])
    own = {"w": each, "fixed": params["fixed"]}
    b, _ = tx.update(own, state, params, noise={"w": noise["w"], "fixed": jnp.zeros(2)})
    np.testing.assert_allclose(a["w"], b["w"], rtol=1e-10)


@pytest.mark.parametrize("estimator", ["reparam", "gradsq", "hutchinson"])
def test_estimates_of_the_curvature_are_of_coordinates(estimator):
    a, b = matrices(3, (4, 4), (3, 3))
    a, b = a @ a.T, b @ b.T
    q, _ = rotated_gaussian(5)
    curvature = jnp.kron(a, b)
    turn = jnp.kron(*q.basis[0])
    loss = lambda w: 0.5 * w.ravel() @ curvature @ w.ravel()  # noqa: E731
    estimate = mc_value_and_grad(loss, 20_000, estimator=estimator, sample_batch_size=1000)
    _, _, hess = estimate(jax.random.key(0), q)
    exact = jnp.diag(turn.T @ curvature @ turn)
    if estimator == "gradsq":
        coordinates = turn.T @ q.mean.ravel()
        turned = turn.T @ curvature @ turn
        exact = (turned @ coordinates) ** 2 + jnp.diag(
            turned @ jnp.diag(1 / q.precision.ravel()) @ turned
        )
    assert jnp.abs(hess.ravel() - exact).max() < 0.1 * jnp.abs(exact).max()


def test_a_chain_a_partition_and_a_mask_hold_it():
    loss, _ = quadratic((4, 3))
    own = ivon(0.05, **SETTINGS, basis=Eigenbasis(update_every=2))
    parts = {"ivon": optax.chain(optax.clip(10.0), own), "plain": optax.sgd(0.1)}
    tx = optax.partition(parts, {"w": "ivon", "b": "plain"})
    params = {"w": matrices(2, (4, 3))[0], "b": jnp.ones(3)}
    state = tx.init(params)
    for key in jax.random.split(jax.random.key(0), 5):
        sample, noise = sample_params(key, state, params)
        grads = jax.grad(lambda p: loss(p["w"] + p["b"][None]))(sample)
        updates, state = tx.update(grads, state, params, noise=noise)
        params = optax.apply_updates(params, updates)
    q = posterior(state, params)
    assert jnp.isinf(q.precision["b"]).all()
    _, noise = sample_params(jax.random.key(1), q)
    assert not noise["b"].any()
    assert noise["w"].all()


def test_a_state_of_nnx_without_its_empty_parts_is_read():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    tx = auto_sample(ivon(0.05, **SETTINGS, basis=Eigenbasis()), 0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 4))) ** 2))(model))
    q = posterior(nnx.state(optimizer))
    assert [jax.tree.map(jnp.shape, sides) for sides in q.basis] == [((), ()), ((4, 4), (3, 3))]


def test_a_step_multiplies_no_more_than_it_must():
    """Noise, gradient, mean and step are turned once each, and two factors move."""
    params = {"w": jnp.ones((4, 3))}
    tx = auto_sample(ivon(0.05, **SETTINGS, basis=Eigenbasis()), 0)
    program = jax.make_jaxpr(tx.update)(params, tx.init(params), params)

    def products(jaxpr):
        count = 0
        for equation in jaxpr.eqns:
            count += equation.primitive.name == "dot_general"
            if equation.primitive.name != "cond":  # what only every tenth step does
                inner = (getattr(x, "jaxpr", x) for x in equation.params.values())
                count += sum(products(x) for x in inner if hasattr(x, "eqns"))
        return count

    # The gradient is turned twice, for g and for ĥ, which XLA merges.
    assert products(program.jaxpr) == 2 * 5 + 2


# --- The posterior --------------------------------------------------------------------------------


def test_draws_have_the_covariance_of_the_basis():
    q, covariance = rotated_gaussian(0)
    keys = jax.random.split(jax.random.key(0), 100_000)
    _, noise = jax.vmap(sample_params, (0, None))(keys, q)
    flat = noise.reshape(len(keys), -1)
    found = flat.T @ flat / len(keys)
    scale = jnp.sqrt(jnp.outer(jnp.diag(covariance), jnp.diag(covariance)))
    assert jnp.abs((found - covariance) / scale).max() < 5 * np.sqrt(2 / len(keys))


def test_marginals_are_the_diagonal_of_the_covariance():
    q, covariance = rotated_gaussian(0)
    found = marginals(q)
    np.testing.assert_allclose(1 / found.precision.ravel(), jnp.diag(covariance), rtol=1e-10)
    np.testing.assert_allclose(
        signal_to_noise(q).ravel(),
        jnp.abs(q.mean.ravel()) / jnp.sqrt(jnp.diag(covariance)),
        rtol=1e-10,
    )
    jax.tree.map(np.testing.assert_array_equal, marginals(found), found)


@pytest.mark.parametrize("kind", ["another basis", "the same", "diagonal"])
def test_kl_of_turned_gaussians_is_that_of_full_ones(kind):
    q, covariance = rotated_gaussian(0)
    prior, prior_covariance = rotated_gaussian(10)
    if kind == "the same":
        prior = Posterior(prior.mean, prior.precision, q.basis)
        turn = jnp.kron(*q.basis[0])
        prior_covariance = turn @ jnp.diag(1 / prior.precision.ravel()) @ turn.T
    elif kind == "diagonal":
        prior = Posterior(prior.mean, prior.precision)
        prior_covariance = jnp.diag(1 / prior.precision.ravel())
    shift, inverse = (q.mean - prior.mean).ravel(), jnp.linalg.inv(prior_covariance)
    logs = jnp.linalg.slogdet(prior_covariance)[1] - jnp.linalg.slogdet(covariance)[1]
    trace = jnp.trace(inverse @ covariance)
    exact = 0.5 * (trace + shift @ inverse @ shift - 12 + logs)
    np.testing.assert_allclose(kl_divergence(q, prior), exact, rtol=1e-10)


def test_linearised_outputs_have_the_full_covariance():
    q, covariance = rotated_gaussian(0)
    x = matrices(3, (5, 4))[0]
    found = linearize(lambda w, x: jnp.tanh(x @ w))(q, x)
    jacobian = jax.jacobian(lambda w: jnp.tanh(x @ w))(q.mean).reshape(5, 3, -1)
    exact = jnp.einsum("nip,pq,njq->nij", jacobian, covariance, jacobian)
    np.testing.assert_allclose(found.covariance, exact, rtol=1e-10)


def test_merging_in_a_common_basis_is_that_of_full_gaussians():
    base, _ = rotated_gaussian(0)
    a, b = (
        Posterior(m, base.precision + p**2, base.basis)
        for m, p in (matrices(seed, (4, 3), (4, 3)) for seed in (20, 21))
    )
    merged = merge([a, b], base=base)
    turn = jnp.kron(*base.basis[0])
    full = lambda q: turn @ jnp.diag(q.precision.ravel()) @ turn.T  # noqa: E731
    total = full(a) + full(b) - full(base)
    pull = sum(full(q) @ (q.mean - base.mean).ravel() for q in (a, b))
    exact = base.mean.ravel() + jnp.linalg.solve(total, pull)
    np.testing.assert_allclose(merged.mean.ravel(), exact, rtol=1e-8)
    np.testing.assert_allclose(full(merged), total, rtol=1e-8, atol=1e-10)


def test_a_saved_posterior_keeps_its_basis(tmp_path):
    pytest.importorskip("safetensors")
    q, _ = rotated_gaussian(0)
    mean, precision = ({"a": [jnp.ones(2)], "w": x} for x in q[:2])
    q = Posterior(mean, precision, (Sides(), *q.basis))
    save(tmp_path / "q.safetensors", q)
    found = load(tmp_path / "q.safetensors", mean)
    assert jax.tree.structure(found) == jax.tree.structure(q)
    jax.tree.map(np.testing.assert_array_equal, found, q)
    found = load(tmp_path / "q.safetensors")  # lists become dictionaries
    jax.tree.map(np.testing.assert_array_equal, found.basis, q.basis)


def test_what_cannot_be_done_says_what_to_do_instead(tmp_path):
    q, _ = rotated_gaussian(0)
    other, _ = rotated_gaussian(10)
    with pytest.raises(ValueError, match=r"prune marginals\(state\)"):
        prune(q, fraction=0.5)
    prune(marginals(q), fraction=0.5)
    for pair in ([q, other], [q, marginals(q)]):
        with pytest.raises(ValueError, match=r"merge marginals\(q\)"):
            merge(pair)
    assert jnp.isnan(jax.jit(lambda a, b: merge([a, b]).mean)(q, other)).all()
    for option in ({"update_every": 0}, {"decay": 1.5}, {"max_dim": 0}, {"hess_clip": 1.0}):
        with pytest.raises(ValueError, match=next(iter(option))):
            Eigenbasis(**option)
    with pytest.raises(TypeError, match=r"must be an Eigenbasis\(\)"):
        ivon(0.1, ess=10, basis=Eigenbasis)  # pyright: ignore[reportArgumentType]
    for basis, message in (
        (Sides(), "one Sides"),
        ((*q.basis, Sides()), "one Sides"),
        ((Sides(jnp.eye(2)),), "needs"),
        ((Sides((), jnp.ones((4, 3, 3))),), "needs"),  # columns of a stack without its rows
    ):
        with pytest.raises(ValueError, match=message):
            sample_params(jax.random.key(0), q._replace(basis=basis))


def test_a_state_with_another_kind_of_basis_is_refused():
    q, _ = rotated_gaussian(0)
    w = q.mean
    plain, turns = ivon(0.1, ess=10), ivon(0.1, ess=10, basis=Eigenbasis())
    kept, both = ivon(0.1, ess=10, prior=q), ivon(0.1, ess=10, prior=q, basis=Eigenbasis())
    kinds = {"no basis": plain, "the basis of its prior": kept, "a basis that turns": turns}
    for (has, made), (wanted, tx) in itertools.permutations(kinds.items(), 2):
        with pytest.raises(ValueError, match=f"state has {has}, where this .* has {wanted}"):
            tx.update(w, made.init(w), w, noise=w)
    with pytest.raises(ValueError, match="no basis"):
        both.update(w, plain.init(w), w, noise=w)


def test_a_base_of_one_precision_is_diagonal_in_every_basis():
    q, _ = rotated_gaussian(0)
    base = Posterior(jnp.zeros((4, 3)), jnp.full((4, 3), 0.1))
    merged = merge([q, q], base=base)
    turn = jnp.kron(*q.basis[0])
    full = turn @ jnp.diag(q.precision.ravel()) @ turn.T
    total = 2 * full - 0.1 * jnp.eye(12)
    exact = jnp.linalg.solve(total, 2 * full @ q.mean.ravel())
    np.testing.assert_allclose(merged.mean.ravel(), exact, rtol=1e-8)


def test_vectors_alone_have_no_basis_and_empty_leaves_are_left_alone():
    tx = ivon(0.1, ess=10, basis=Eigenbasis())
    q = posterior(tx.init({"b": jnp.ones(3)}))
    assert q.basis == ()
    prune(q, fraction=0.5)
    params = {"none": jnp.ones((3, 0)), "w": jnp.ones((2, 2))}
    state = tx.init(params)
    _, noise = sample_params(jax.random.key(0), state)
    tx.update(params, state, params, noise=noise)


def test_optax_maps_over_the_state_as_over_one_without_parameters():
    tx = ivon(0.1, ess=10, basis=Eigenbasis())
    params = {"b": jnp.ones(3), "w": jnp.ones((3, 2))}
    state = jax.eval_shape(tx.init, params)
    named = optax.tree_map_params(
        tx, lambda _, name: name, state, {"b": "b", "w": "w"}, transform_non_params=lambda _: "-"
    )
    assert named.mean == named.hess == {"b": "b", "w": "w"}
    assert named.basis == ("-", "-")


def test_a_part_that_owns_nothing_does_no_harm():
    parts = {name: ivon(0.1, ess=10, basis=Eigenbasis()) for name in "ab"}
    params = {"w": jnp.ones((3, 2))}
    tx = optax.partition(parts, {"w": "a"})

    @jax.jit
    def step(params, state):
        _, noise = sample_params(jax.random.key(0), state, params)
        return tx.update(params, state, params, noise=noise)

    _, state = step(params, tx.init(params))
    assert len(posterior(state, params).basis) == 1


def test_a_gradient_that_overflows_leaves_the_basis_alone():
    tx = ivon(0.1, ess=10, clip_radius=0.1, basis=Eigenbasis(update_every=1))
    w = jnp.ones((3, 2))
    state = tx.init(w)
    for size in (1.0, 1e200, 1.0):
        _, state = tx.update(size * w, state, w, hess=w)
    assert jnp.isfinite(state.mean).all()


def test_kl_of_what_a_basis_mixes_with_flat_or_fixed_elements_is_refused():
    turn = rotation(0, 2)
    q = Posterior(jnp.ones((2, 1)), jnp.array([[1.0], [3.0]]), (Sides(rows=turn),))
    some, none = jnp.array([[2.0], [0.0]]), jnp.full((2, 1), 2.0)
    flat, fixed = Posterior(q.mean, some), q._replace(precision=none.at[0].set(jnp.inf))
    for a, b in ((q, flat), (fixed, Posterior(q.mean, none))):
        with pytest.raises(ValueError, match="the root with others"):
            kl_divergence(a, b)
        assert jnp.isnan(jax.jit(kl_divergence)(a, b))
    assert kl_divergence(q, Posterior(q.mean, jnp.zeros((2, 1)))) == 0  # flat as a whole


def test_a_gradient_at_the_mean_moves_h_no_more_with_a_clip():
    tx = auto_sample(ivon(0.1, 10, weight_decay=1.0, basis=Eigenbasis(hess_clip=1.2)), 0)
    w = jnp.ones((2, 2))
    state = tx.init(w)
    inner = state.inner_state._replace(hess=jnp.full((2, 2), -0.9))
    _, new = tx.update(w, state._replace(inner_state=inner), w)
    assert jnp.all(new.inner_state.hess == -0.9)


def test_a_floor_that_is_traced_is_the_same():
    q, _ = rotated_gaussian(0)
    w = jnp.ones((4, 3))

    def hess(make):
        tx = make(0.1, ess=10, b2=0.0, prior=q, basis=Eigenbasis())
        return jax.jit(tx.update)(w, tx.init(w), w, hess=-100 * w)[1]

    injected = optax.inject_hyperparams(ivon, static_args=("prior", "basis"))
    np.testing.assert_allclose(hess(injected).inner_state.hess, hess(ivon).hess, rtol=1e-6)


# --- Closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", [None, Eigenbasis(update_every=10_000)], ids=["kept", "turned"])
def test_data_in_two_parts_have_the_mean_of_all(basis):
    """Linear regression: the second part's mean is exact if the prior keeps its correlations."""
    x, noise, w = matrices(3, (60, 4), (60, 1), (4, 1))
    x = x @ matrices(4, (4, 4))[0]
    y = x @ w + 0.5 * noise
    first, second = x[:30].T @ x[:30] + jnp.eye(4), x[30:].T @ x[30:]
    values, vectors = jnp.linalg.eigh(first)
    mean = jnp.linalg.solve(first, x[:30].T @ y[:30])
    prior = Posterior(mean, values[:, None], (Sides(vectors),))
    tx = ivon(0.3, ess=30, b2=0.9, hess_init=5.0, prior=prior, rescale_lr=False, basis=basis)

    def step(state, _):
        m = state.mean
        turn = state.basis.vectors[0].rows
        hess = jnp.diag(turn.T @ second @ turn)[:, None] / 30
        return tx.update(x[30:].T @ (x[30:] @ m - y[30:]) / 30, state, m, hess=hess)[1], None

    state = jax.lax.scan(step, tx.init(mean), length=2000)[0]
    q, total = posterior(state), first + second
    np.testing.assert_allclose(q.mean, jnp.linalg.solve(total, x.T @ y), rtol=1e-6)
    turn = q.basis[0].rows
    np.testing.assert_allclose(q.precision[:, 0], jnp.diag(turn.T @ total @ turn), rtol=1e-6)


def test_linear_regression_is_exact_with_correlated_features():
    rng = np.random.default_rng(0)
    n, d, noise = 60, 4, 0.5
    x = jnp.asarray(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)))
    y = x @ jnp.asarray(rng.normal(size=(d, 1))) + noise * jnp.asarray(rng.normal(size=(n, 1)))
    loss = lambda w: 0.5 * jnp.mean((y - x @ w) ** 2) / noise**2  # noqa: E731
    delta = 0.02
    precision = x.T @ x / noise**2 + n * delta * jnp.eye(d)
    covariance = jnp.linalg.inv(precision)
    ridge = covariance @ x.T @ y / noise**2
    steps = 4000
    tx = ivon(
        lambda count: 0.2 * jnp.cos(0.5 * jnp.pi * count.astype(jnp.float64) / steps),
        ess=n,
        hess_init=10.0,
        b2=0.995,
        weight_decay=delta,
        basis=Eigenbasis(decay=0.99),
    )
    # Not antithetic: gradients at m ± n would leave nothing of the noise to find the basis from.
    estimate = mc_value_and_grad(loss, 8)

    def step(carry, key):
        params, state = carry
        _, grads, hess = estimate(key, state)
        updates, state = tx.update(grads, state, params, hess=hess)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros((d, 1))
    keys = jax.random.split(jax.random.key(0), steps)
    (_, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((start, tx.init(start)))
    q = posterior(state)
    sigma = jnp.sqrt(jnp.diag(covariance))
    assert jnp.abs((q.mean - ridge)[:, 0] / sigma).max() < 0.05
    turn = q.basis[0].rows
    found = turn @ jnp.diag(1 / q.precision[:, 0]) @ turn.T
    assert jnp.abs((found - covariance) / jnp.outer(sigma, sigma)).max() < 0.1
