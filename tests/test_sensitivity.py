import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    ivon,
    leave_one_out,
    linearize,
    posterior,
    sensitivity,
)

X = jnp.asarray(np.random.default_rng(0).standard_normal((7, 4)), jnp.float32)
LABELS = jnp.array([0, 1, 2, 0, 1, 2, 0])
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def network(params, x):
    return jnp.tanh(x @ params["w"])


@pytest.fixture(scope="module")
def state():
    w = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)
    return ivon(0.1, 5).init({"w": w})


def test_classification_uses_the_full_covariance_and_p_minus_y(state):
    got = sensitivity(network, cross_entropy, data_batch_size=3)(state, X, targets=LABELS)
    lin = linearize(network)(state, X)
    error = jax.nn.softmax(network(state.mean, X)) - jax.nn.one_hot(LABELS, 3)
    np.testing.assert_allclose(got.error, error, rtol=1e-4, atol=1e-6)
    deviation = np.einsum("nkl,nl->nk", lin.covariance, error)
    np.testing.assert_allclose(got.deviation, deviation, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.score, np.linalg.norm(deviation, axis=-1), rtol=1e-4)
    np.testing.assert_allclose(
        got.variance, np.diagonal(lin.covariance, axis1=1, axis2=2), rtol=1e-5
    )


def test_the_diagonal_option_leaves_covariances_out(state):
    got = sensitivity(network, cross_entropy, diagonal=True)(state, X, targets=LABELS)
    variance = linearize(network, diagonal=True)(state, X).covariance
    np.testing.assert_allclose(got.variance, variance, rtol=1e-5)
    np.testing.assert_allclose(got.deviation, variance * got.error, rtol=1e-5)
    loo = leave_one_out(network, cross_entropy, diagonal=True)(state, X, targets=LABELS)
    np.testing.assert_allclose(
        loo.output, network(state.mean, X) + got.deviation, rtol=1e-4, atol=1e-6
    )


def test_the_temperature_scales_the_score(state):
    f = sensitivity(network, cross_entropy)
    half = f(posterior(state, temperature=0.5), X, targets=LABELS)
    np.testing.assert_allclose(half.score, 0.5 * f(state, X, targets=LABELS).score, rtol=1e-5)


@pytest.mark.parametrize("second_order", [False, True])
def test_leave_one_out_formulas(second_order, state):
    """(I − vH)⁻¹ v e by plain linear algebra."""
    got = leave_one_out(network, cross_entropy, second_order=second_order, data_batch_size=7)(
        state, X, targets=LABELS
    )
    lin = linearize(network)(state, X)
    for i in range(7):
        v = np.asarray(lin.covariance[i], np.float64)
        p = np.asarray(jax.nn.softmax(lin.mean[i]), np.float64)
        hessian = np.diag(p) - np.outer(p, p)
        error = p - np.eye(3)[LABELS[i]]
        factor = np.linalg.inv(np.eye(3) - v @ hessian) if second_order else np.eye(3)
        output = np.asarray(lin.mean[i]) + factor @ v @ error
        np.testing.assert_allclose(got.output[i], output, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(
            got.loss[i], np.log(np.sum(np.exp(output))) - output[LABELS[i]], rtol=1e-3
        )


def test_images_as_outputs_and_jit(state):
    apply = lambda p, x: network(p, x).reshape(-1, 3, 1)  # noqa: E731
    loss = lambda f, y: jnp.sum((f - y) ** 2)  # noqa: E731
    targets = jnp.zeros((7, 3, 1))
    got = jax.jit(lambda s: sensitivity(apply, loss)(s, X, targets=targets))(state)
    assert got.deviation.shape == got.variance.shape == (7, 3, 1) and got.score.shape == (7,)
    f = leave_one_out(apply, loss, second_order=True)
    assert f(posterior(state, temperature=0.01), X, targets=targets).output.shape == (7, 3, 1)


@pytest.mark.parametrize("build", [sensitivity, leave_one_out])
def test_bad_input_is_refused(build, state):
    f = build(network, cross_entropy)
    with pytest.raises(ValueError, match="equally many"):
        f(state, X, targets=LABELS[1:])
    with pytest.raises(ValueError, match="a scalar"):
        build(network, lambda f, y: f - y)(state, X, targets=jnp.zeros((7, 3)))
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        build(network, LABELS)
    with pytest.raises(TypeError, match="targets"):
        f(state, X, LABELS)
    with pytest.raises(ValueError, match="data_batch_size must be"):
        build(network, cross_entropy, data_batch_size=0)
