import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import (
    Posterior,
    ivon,
    kl_divergence,
    linearize,
    metrics,
    posterior,
    posterior_mean,
    predict_at_mean,
    predict_draws,
    predict_log_probs,
    predict_moments,
    predict_samples,
    sample_params,
)

KEY = jax.random.key(3)
X = jnp.asarray(np.random.default_rng(0).standard_normal((10, 4)), jnp.float32)
Q = Posterior(
    {"w": jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)},
    {"w": jnp.full((4, 3), 2.0)},
)
SIZES = [(None, None), (1, 3), (4, 5), (100, 100)]


def apply(params, x):
    return x @ params["w"]


def outputs_by_hand(num_samples, q=Q):
    with jax.threefry_partitionable(True):
        keys = jax.random.split(KEY, num_samples)
    return jnp.stack([apply(sample_params(k, q)[0], X) for k in keys])


@pytest.mark.parametrize(("sample_batch_size", "data_batch_size"), SIZES)
def test_samples_are_those_of_sample_params_for_every_batch_size(
    sample_batch_size, data_batch_size
):
    f = predict_samples(
        apply, 7, sample_batch_size=sample_batch_size, data_batch_size=data_batch_size
    )
    for call in (f, jax.jit(f)):
        np.testing.assert_allclose(call(KEY, Q, X), outputs_by_hand(7), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("sample_batch_size", "data_batch_size"), SIZES)
def test_log_probs_average_probabilities_and_not_logits(sample_batch_size, data_batch_size):
    f = predict_log_probs(
        apply, 7, sample_batch_size=sample_batch_size, data_batch_size=data_batch_size
    )
    expected = np.log(np.mean(jax.nn.softmax(outputs_by_hand(7)), axis=0))
    for call in (f, jax.jit(f)):
        np.testing.assert_allclose(call(KEY, Q, X), expected, rtol=1e-4, atol=1e-5)


def test_log_probs_keep_classes_that_every_sample_rules_out():
    apply_fn = lambda params, x: jnp.stack([params["w"][0, 0] * x[:, 0] * 0, x[:, 0] - jnp.inf], -1)  # noqa: E731
    for size in (1, 3):
        log_probs = predict_log_probs(apply_fn, 3, sample_batch_size=size)(KEY, Q, X)
        np.testing.assert_array_equal(log_probs, [[0.0, -np.inf]] * 10)


def test_the_average_of_many_samples_converges_to_quadrature():
    """One weight, two classes: E sigmoid(z), z ~ N(m, σ²), by Gauss-Hermite; 4 standard errors."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    q = Posterior(jnp.array([1.5]), jnp.array([0.25]))
    exact = 1 / (1 + np.exp(-(1.5 + 2.0 * nodes)))
    mean, spread = exact @ weights / weights.sum(), 0.5
    apply_fn = lambda w, x: jnp.stack([w[0] * x[:, 0], 0 * x[:, 0]], -1)  # noqa: E731
    f = jax.jit(predict_log_probs(apply_fn, 4000, sample_batch_size=500))
    got = jnp.exp(f(KEY, q, jnp.ones((1, 1))))[0, 0]
    assert abs(got - mean) < 4 * spread / np.sqrt(4000)


@pytest.mark.parametrize("sample_batch_size", [None, 7, 50])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_those_of_the_mixture_without_cancellation(sample_batch_size, offset):
    def head(params, x):
        mean = apply(params, x)
        return mean + jnp.asarray(offset, mean.dtype), jnp.exp(mean)

    with jax.enable_x64(True):
        q = jax.tree.map(lambda x: x.astype(jnp.float64), Q)
        x = X.astype(jnp.float64)
        samples = np.asarray(predict_samples(apply, 50, sample_batch_size=50)(KEY, q, x))
        got = predict_moments(head, 50, sample_batch_size=sample_batch_size, data_batch_size=4)(
            KEY, q, x
        )
        got = jax.tree.map(np.asarray, got)
    mean, model = samples.mean(0), samples.var(0)
    np.testing.assert_allclose(got.mean, mean + offset, rtol=1e-12)
    np.testing.assert_allclose(got.model_variance, model, rtol=1e-7)
    np.testing.assert_allclose(got.variance, model + np.exp(samples).mean(0), rtol=1e-7)


@pytest.mark.parametrize("noise_variance", [0.5, np.array([0.5, 1.0, 2.0], np.float32)])
def test_a_known_noise_variance_is_added(noise_variance):
    got = predict_moments(apply, 20, noise_variance=noise_variance)(KEY, Q, X)
    np.testing.assert_allclose(
        got.variance, got.model_variance + np.broadcast_to(noise_variance, (10, 3)), rtol=1e-5
    )


def test_linear_models_have_exact_moments_and_draws():
    """x·w with w ~ N(m, 1/p) is N(x·m, |x|²/p); bounds of 5 standard errors over 4000 samples."""
    exact_mean, exact_variance = X @ Q.mean["w"], np.sum(np.square(X), -1, keepdims=True) / 2.0
    moments = predict_moments(apply, 4000, noise_variance=1.0, sample_batch_size=2000)(KEY, Q, X)
    draws = predict_draws(apply, 4000, noise_variance=1.0, sample_batch_size=2000)(KEY, Q, X)
    total = exact_variance + 1.0
    for mean, variance in [(moments.mean, moments.variance), (draws.mean(0), draws.var(0))]:
        assert np.all(np.abs(mean - exact_mean) < 5 * np.sqrt(total / 4000))
        assert np.all(np.abs(variance / total - 1) < 5 * np.sqrt(2 / 4000))


def test_draws_add_the_noise_of_the_head_to_the_samples():
    samples = predict_samples(apply, 6)(KEY, Q, X)
    draws = predict_draws(apply, 6, noise_variance=0.0)(KEY, Q, X)
    # Two programs, which older versions of XLA round differently.
    np.testing.assert_allclose(draws, samples, rtol=1e-4, atol=1e-6)
    size = {"num_samples": 2000, "sample_batch_size": 2000}
    head = lambda p, x: (apply(p, x), jnp.full((len(x), 3), 4.0))  # noqa: E731
    samples = np.asarray(predict_samples(apply, **size)(KEY, Q, X))
    residual = (np.asarray(predict_draws(head, **size)(KEY, Q, X)) - samples) / 2
    assert abs(float(residual.mean())) < 0.02 and abs(float(residual.std()) - 1) < 0.02
    # The noise is independent of the weights' noise of the same sample.
    weights = samples - np.asarray(X @ Q.mean["w"])
    assert abs(np.corrcoef(np.ravel(residual), np.ravel(weights))[0, 1]) < 0.02


@pytest.mark.parametrize("size", [None, 3, 5, 10, 11])
def test_prediction_at_the_mean(size):
    state = ivon(0.1, 10).init(Q.mean)
    got = predict_at_mean(apply, data_batch_size=size)(state, X)
    np.testing.assert_allclose(got, X @ Q.mean["w"], rtol=1e-5)
    np.testing.assert_allclose(got, apply(posterior_mean(state), X), rtol=1e-5)


def test_a_temperature_scales_the_spread():
    state = ivon(0.1, 10).init(Q.mean)
    f = predict_moments(apply, 30, noise_variance=0.0)
    warm = f(KEY, posterior(state, temperature=4.0), X).variance
    np.testing.assert_allclose(warm, 4 * f(KEY, state, X).variance, rtol=1e-3)


def test_several_inputs_trees_of_outputs_and_any_shape():
    def tree_apply(params, x, scale):
        out = (x["a"] @ params["w"]) * scale[:, None]
        return {"grid": out.reshape(-1, 3, 1) * jnp.ones((1, 1, 2)), "sum": out.sum(-1)}

    f = predict_samples(tree_apply, 5, data_batch_size=4)
    out = jax.jit(f)(KEY, Q, {"a": X}, jnp.ones(10))
    assert out["grid"].shape == (5, 10, 3, 2) and out["sum"].shape == (5, 10)
    images = predict_log_probs(lambda p, x: x @ p["w"], 4, data_batch_size=3)
    assert images(KEY, Q, jnp.ones((8, 6, 6, 4))).shape == (8, 6, 6, 3)


def test_states_of_partitioned_optimizers_predict_with_the_leaves_that_ivon_does_not_own():
    params = {"frozen": jnp.ones((), jnp.bfloat16), "w": Q.mean["w"].astype(jnp.bfloat16)}
    labels = {"frozen": "none", "w": "bayes"}
    tx = optax.partition({"none": optax.set_to_zero(), "bayes": ivon(0.1, 10)}, labels)
    state = tx.init(params)

    def apply_fn(params, x):
        assert params["w"].dtype == params["frozen"].dtype == jnp.bfloat16
        return (x.astype(jnp.bfloat16) @ params["w"]) * params["frozen"]

    log_probs = predict_log_probs(apply_fn, 3)(KEY, state, X, params=params)
    assert log_probs.dtype == jnp.float32
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, rtol=1e-5)


def test_memory_does_not_grow_with_the_number_of_samples():
    def temporaries(num_samples):
        f = jax.jit(predict_log_probs(apply, num_samples, sample_batch_size=4, data_batch_size=5))
        return f.lower(KEY, Q, X).compile().memory_analysis().temp_size_in_bytes

    keys = 8 * 4000  # bytes of the keys themselves, twice at most
    assert temporaries(4000) - temporaries(40) <= 2 * keys
    assert 4 * keys < 4000 * 10 * 3 * 4  # what stacking the outputs would take


@pytest.mark.parametrize(
    "build",
    [predict_samples, predict_log_probs, predict_moments, predict_draws],
)
def test_numbers_of_samples_and_sizes_must_be_positive(build):
    for wrong in ({"num_samples": 0}, {"num_samples": 2.0}, {"sample_batch_size": 0},
                  {"data_batch_size": -1}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be an integer >= 1"):
            build(apply, **wrong)
    with pytest.raises(TypeError, match="apply_fn must be a function"):
        build(Q, 3, data_batch_size=2)


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="returns one floating array; got tuple"):
        predict_log_probs(lambda p, x: (apply(p, x), 1), 2)(KEY, Q, X)
    with pytest.raises(TypeError, match="got int32"):
        predict_log_probs(lambda p, x: jnp.argmax(apply(p, x), -1), 2)(KEY, Q, X)
    with pytest.raises(ValueError, match="noise_variance is given"):
        predict_moments(apply, 2)(KEY, Q, X)
    with pytest.raises(ValueError, match="noise_variance"):
        predict_moments(lambda p, x: (x, x), 2, noise_variance=1.0)(KEY, Q, X)
    with pytest.raises(ValueError, match=r"leading axis; got shape \(3, 5\)"):
        predict_samples(lambda p, x: apply(p, x).T, 2, data_batch_size=5)(KEY, Q, X)
    with pytest.raises(ValueError, match=r"equally many; got shapes \(10, 4\), \(9, 4\)"):
        predict_samples(lambda p, x, y: x @ p["w"], 2, data_batch_size=5)(KEY, Q, X, X[1:])
    for binary in (lambda p, x: x @ p["w"][:, 0], lambda p, x: x @ p["w"][:, :1]):
        with pytest.raises(ValueError, match="one logit f return"):
            predict_log_probs(binary, 2)(KEY, Q, X)
    with pytest.raises(ValueError, match=r"shape of the mean, \(10, 3\), .* got \(3,\)"):
        predict_moments(lambda p, x: (apply(p, x), jnp.ones(3)), 2)(KEY, Q, X)
    with pytest.raises(ValueError, match="noise_variance must be >= 0"):
        predict_draws(apply, 2, noise_variance=-1.0)
    negative = predict_moments(lambda p, x: (apply(p, x), -jnp.ones((10, 3))), 2)(KEY, Q, X)
    assert np.all(np.isnan(negative.variance))


@pytest.mark.parametrize("use", [predict_at_mean, predict_log_probs])
def test_a_network_with_holes_fails_with_a_hint_at_params(use):
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones((1, 3))}
    tx = optax.partition({"x": ivon(0.1, 10), "y": optax.set_to_zero()}, {"w": "x", "b": "y"})
    f = use(lambda p, x: x @ p["w"] + p["b"])
    args = (X,) if use is predict_at_mean else (KEY, X)
    with pytest.raises(TypeError) as error:
        f(*args[:-1], tx.init(params), X)
    assert "pass them as params=" in error.value.__notes__[0]
    assert f(*args[:-1], tx.init(params), X, params=params).shape == (10, 3)


def test_a_variance_of_each_example_in_batches_of_data_is_refused_with_the_way_to_say_it():
    q = Posterior(jnp.ones(2), jnp.ones(2))
    x, variance = jnp.ones((6, 2)), jnp.linspace(0.1, 0.6, 6)
    of_each = predict_moments(lambda w, x: x @ w, 2, noise_variance=variance, data_batch_size=2)
    with pytest.raises(ValueError, match=r"let apply_fn return \(mean, variance\)"):
        of_each(jax.random.key(0), q, x)
    pair = predict_moments(lambda w, x, v: (x @ w, v), 2, data_batch_size=2)
    found = pair(jax.random.key(0), q, x, variance)
    whole = predict_moments(lambda w, x: x @ w, 2, noise_variance=variance)
    np.testing.assert_allclose(found.variance, whole(jax.random.key(0), q, x).variance, rtol=1e-5)


def test_parameters_that_hold_a_prng_key_are_predicted_with():
    params = {"key": jax.random.key(3), "w": jnp.ones(2)}
    state = ivon(0.1, 100).init(params)

    def apply(p, x):
        return x @ p["w"] + jax.random.normal(p["key"])

    f, x, key = predict_samples(apply, 4), jnp.eye(2), jax.random.key(0)
    q = posterior(state, params)
    certain = q._replace(precision={**q.precision, "w": jnp.full(2, jnp.inf)})
    np.testing.assert_array_equal(f(key, certain, x), np.tile(apply(params, x), (4, 1)))
    assert f(key, state, x, params=params).shape == f(key, q, x).shape == (4, 2)
    assert linearize(apply)(q, x).covariance.shape == (2,)
    assert kl_divergence(q, q) == 0


@pytest.mark.parametrize("sample_batch_size", [None, 2])
def test_the_gradient_of_masked_logits_is_that_of_those_left(sample_batch_size):
    q = Posterior(jnp.array([0.5, -0.5]), jnp.array([4.0, 4.0]))

    def nll(x, apply):
        predict = predict_log_probs(apply, 4, sample_batch_size=sample_batch_size)
        return metrics.nll(predict(jax.random.key(0), q, x), jnp.array([0]))

    def left(w, x):
        return x * w[None]

    def masked(w, x):
        return jnp.concatenate([left(w, x), jnp.full((1, 1), -jnp.inf)], -1)

    x = jnp.array([[1.0, 2.0]])
    grads = [jax.grad(nll)(x, apply) for apply in (masked, left)]
    assert np.all(np.isfinite(grads))
    np.testing.assert_allclose(*grads, rtol=1e-5)
