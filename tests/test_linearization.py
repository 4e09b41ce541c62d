import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import (
    Posterior,
    ivon,
    linearize,
    predict_moments,
    predict_samples,
    probit_log_probs,
)

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((6, 4)), jnp.float32)


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def q(scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(1)
    mean = {"v": rng.standard_normal((5, 3)), "w": rng.standard_normal((4, 5))}
    precision = jax.tree.map(lambda m: rng.uniform(1, 4, m.shape) / scale**2, mean)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), Posterior(mean, precision))


def covariance_by_differences(q, x, step=1e-6):
    """Σ_p J_p J_pᵀ/precision_p from central differences in float64, one weight at a time."""
    leaves, treedef = jax.tree.flatten(q.mean)
    total = 0.0
    for i, (leaf, precision) in enumerate(zip(leaves, jax.tree.leaves(q.precision), strict=True)):
        for index in np.ndindex(leaf.shape):

            def at(shift, i=i, leaf=leaf, index=index):
                moved = [*leaves[:i], leaf.at[index].add(shift), *leaves[i + 1 :]]
                return np.asarray(network(treedef.unflatten(moved), x))

            column = (at(step) - at(-step)) / (2 * step)
            total = total + column[:, :, None] * column[:, None, :] / float(precision[index])
    return total


@pytest.mark.parametrize("data_batch_size", [None, 4, 6])
def test_the_covariance_is_that_of_finite_differences(data_batch_size):
    with jax.enable_x64(True):
        wide, x = q(dtype=np.float64), X.astype(jnp.float64)
        expected = covariance_by_differences(wide, x)
        full = jax.jit(linearize(network, data_batch_size=data_batch_size))(wide, x)
        diagonal = linearize(network, diagonal=True, data_batch_size=data_batch_size)(wide, x)
        np.testing.assert_allclose(full.mean, network(wide.mean, x), rtol=1e-12)
        np.testing.assert_allclose(full.covariance, expected, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(
            diagonal.covariance, np.diagonal(expected, axis1=1, axis2=2), rtol=1e-7
        )


def test_a_linear_model_is_exact():
    lin = linearize(lambda p, x: x @ p["w"])(Posterior({"w": X.T}, {"w": jnp.ones((4, 6))}), X)
    for i in range(6):
        np.testing.assert_allclose(lin.covariance[i], np.eye(6) * np.sum(X[i] ** 2), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-2, 1e-3])
def test_sampling_tends_to_the_linearised_predictive_as_sigma_tends_to_zero(scale):
    """Antithetic pairs remove odd orders: what differs is sampling error, and terms of σ⁴."""
    samples = 4000
    with jax.enable_x64(True):
        narrow, x = q(scale, np.float64), X.astype(jnp.float64)
        exact = jax.tree.map(np.asarray, linearize(network)(narrow, x))
        f = predict_samples(network, samples, sample_batch_size=2000)
        drawn = np.asarray(f(jax.random.key(0), narrow, x))
        f = predict_moments(network, samples, noise_variance=0.0, sample_batch_size=2000)
        moments = jax.tree.map(np.asarray, f(jax.random.key(0), narrow, x))
    sd = np.sqrt(np.diagonal(exact.covariance, axis1=1, axis2=2))
    assert np.all(np.abs(moments.mean - exact.mean) < 5 * sd / np.sqrt(samples) + 10 * sd**2)
    centred = drawn - drawn.mean(0)
    sampled = np.einsum("snk,snl->nkl", centred, centred) / samples
    # Var of a product of Gaussians is at most 2 sd_k² sd_l²; the next order is relative to σ.
    bound = (5 * np.sqrt(2 / samples) + 10 * scale) * sd[:, :, None] * sd[:, None, :]
    assert np.all(np.abs(sampled - exact.covariance) < bound)


def test_outputs_of_any_shape():
    def images(params, x):
        return network(params, x).reshape(-1, 3, 1)[..., [0, 0]]

    full, diagonal = linearize(images)(q(), X), linearize(images, diagonal=True)(q(), X)
    assert full.mean.shape == diagonal.covariance.shape == (6, 3, 2)
    assert full.covariance.shape == (6, 3, 2, 3, 2)
    np.testing.assert_allclose(full.covariance[:, 1, 0, 1, 1], diagonal.covariance[:, 1, 0], 1e-5)
    scalars = linearize(lambda p, x: network(p, x)[:, 0])(q(), X)
    assert scalars.mean.shape == scalars.covariance.shape == (6,)


def test_fixed_leaves_and_leaves_that_ivon_does_not_own_add_no_variance():
    params = {"scale": jnp.float32(2.0), "w": jnp.ones(4, jnp.bfloat16)}
    state = ivon(0.1, 10, weight_decay=0.0).init({"scale": 0, "w": params["w"]})
    apply = lambda p, x: (x @ p["w"].astype(jnp.float32)) * p["scale"]  # noqa: E731
    lin = linearize(apply)(state, X, params=params)
    assert lin.covariance.dtype == jnp.float32
    np.testing.assert_allclose(lin.covariance, 4 * np.sum(X**2, -1) / 10, rtol=1e-2)
    fixed = Posterior(params["w"].astype(jnp.float32), jnp.array([1.0, jnp.inf, 1.0, jnp.inf]))
    lin = linearize(lambda w, x: x @ w)(fixed, X)
    np.testing.assert_allclose(lin.covariance, np.sum(X[:, ::2] ** 2, -1), rtol=1e-5)


def test_the_probit_correction_flattens_and_keeps_the_order():
    mean = jnp.array([[2.0, 0.0, -1.0]])
    certain = probit_log_probs(mean, jnp.zeros((1, 3)))
    np.testing.assert_allclose(certain, jax.nn.log_softmax(mean), rtol=1e-6)
    wide = probit_log_probs(mean, 100 * jnp.eye(3)[None])
    assert np.all(np.argsort(wide) == np.argsort(mean)) and np.ptp(wide) < 0.6
    np.testing.assert_allclose(wide, probit_log_probs(mean, jnp.full((1, 3), 100.0)), rtol=1e-6)


def test_the_probit_correction_is_near_the_integral_for_two_classes():
    """E sigmoid(z) by quadrature; the approximation is known to be good to about 0.02."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    for mean in (-2.0, 0.5, 3.0):
        for variance in (0.1, 1.0, 4.0):
            exact = weights @ (1 / (1 + np.exp(-mean - np.sqrt(variance) * nodes)))
            # Logits (z, 0), in which both are scaled alike.
            got = probit_log_probs(jnp.array([mean, 0.0]), jnp.array([variance, variance]))
            assert abs(np.exp(got[0]) - exact / weights.sum()) < 0.02


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="leading axis"):
        linearize(lambda p, x: network(p, x)[0])(q(), X)
    with pytest.raises(TypeError, match="one floating array"):
        linearize(lambda p, x: (network(p, x), x))(q(), X)
    with pytest.raises(TypeError, match="apply_fn must be a function"):
        linearize(q())(q(), X)
    with pytest.raises(ValueError, match="data_batch_size must be an integer"):
        linearize(network, data_batch_size=0)
    with pytest.raises(ValueError, match="equally many"):
        linearize(network)(q(), jnp.float32(1.0))
    for shapes in (((3,), (2, 2)), ((4, 1), (4, 1)), ((), ())):
        with pytest.raises(ValueError, match="K >= 2 classes"):
            probit_log_probs(*map(jnp.zeros, shapes))


def test_integer_logits_are_refused():
    with pytest.raises(TypeError, match="floating; got int"):
        probit_log_probs(jnp.array([3, 0]), jnp.array([0.9, 0.9]))
