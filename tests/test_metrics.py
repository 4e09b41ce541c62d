import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")

N, K = 200, 5


def random_predictions(seed=0):
    """Log-probabilities, some of them tied, certain or wrong with certainty, and labels."""
    rng = np.random.default_rng(seed)
    logits = np.round(3 * rng.standard_normal((N, K)))  # rounded: many ties
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    probs[:10] = np.eye(K)[rng.integers(0, K, 10)]
    labels = rng.integers(0, K, N)
    probs[:5] = np.eye(K)[labels[:5]]
    with np.errstate(divide="ignore"):
        return np.log(probs), probs, labels


@pytest.fixture(params=["eager", "jit"])
def call(request):
    """The metric as it is, and under jit; both must agree with the reference."""
    if request.param == "eager":
        return lambda f, *args, **kw: np.asarray(f(*map(jnp.asarray, args), **kw))
    return lambda f, *args, **kw: np.asarray(
        jax.jit(lambda *a: f(*a, **kw))(*map(jnp.asarray, args))
    )


def test_nll_is_the_log_loss(call):
    log_probs, probs, labels = random_predictions()
    log_probs, probs, labels = log_probs[10:], probs[10:], labels[10:]
    with jax.enable_x64(True):
        got = call(metrics.nll, log_probs, labels)
    np.testing.assert_allclose(got, sklearn_metrics.log_loss(labels, probs), rtol=1e-10)


def test_nll_of_a_class_that_was_ruled_out_is_infinite():
    log_probs = jnp.log(jnp.array([[1.0, 0.0]]))
    assert metrics.nll(log_probs, jnp.array([1])) == jnp.inf
    assert metrics.nll(log_probs, jnp.array([0])) == 0.0


def test_accuracy_is_that_of_scikit_learn(call):
    log_probs, probs, labels = random_predictions()
    expected = sklearn_metrics.accuracy_score(labels, probs.argmax(-1))
    np.testing.assert_allclose(call(metrics.accuracy, log_probs, labels), expected, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, K])
def test_top_k_accuracy_counts_ties_for_the_lower_index(k, call):
    log_probs, probs, labels = random_predictions()
    order = np.argsort(-probs, axis=-1, kind="stable")[:, :k]
    expected = np.mean((order == labels[:, None]).any(-1))
    np.testing.assert_allclose(
        call(metrics.top_k_accuracy, log_probs, labels, k=k), expected, rtol=1e-6
    )


def test_top_k_accuracy_without_ties_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    log_probs = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((N, K)), jnp.float32))
    labels = rng.integers(0, K, N)
    expected = sklearn_metrics.top_k_accuracy_score(labels, log_probs, k=3)
    np.testing.assert_allclose(metrics.top_k_accuracy(log_probs, labels, 3), expected, rtol=1e-6)


def test_brier_is_the_mean_squared_distance_to_the_one_hot_label(call):
    log_probs, probs, labels = random_predictions()
    expected = np.mean(np.sum((probs - np.eye(K)[labels]) ** 2, -1))
    np.testing.assert_allclose(call(metrics.brier, log_probs, labels), expected, rtol=1e-5)


def test_brier_of_two_classes_is_twice_that_of_scikit_learn():
    rng = np.random.default_rng(2)
    p, labels = rng.uniform(size=N), rng.integers(0, 2, N)
    got = metrics.brier(jnp.log(jnp.asarray(np.stack([1 - p, p], -1), jnp.float32)), labels)
    np.testing.assert_allclose(got, 2 * sklearn_metrics.brier_score_loss(labels, p), rtol=1e-5)


def bins_by_loop(probs, labels, num_bins, equal_mass):
    """The documented rule, one prediction after another."""
    confidence, correct = probs.max(-1), probs.argmax(-1) == labels
    members = [[] for _ in range(num_bins)]
    for c, hit in zip(confidence, correct, strict=True):
        if equal_mass:
            index = int(np.sum(confidence < c)) * num_bins // len(confidence)
        else:
            index = next(b for b in range(num_bins) if c <= (b + 1) / num_bins or b == num_bins - 1)
        members[index].append((c, hit))
    with_nan = [np.mean(m, axis=0) if m else (np.nan, np.nan) for m in members]
    return [len(m) for m in members], *np.transpose(with_nan)


@pytest.mark.parametrize("equal_mass", [False, True])
@pytest.mark.parametrize("num_bins", [1, 4, 15, 300])
def test_calibration_bins_follow_the_stated_rule(num_bins, equal_mass, call):
    """With ties, empty bins, certain predictions and confidences on the edge of a bin."""
    log_probs, probs, labels = random_predictions()
    probs[20:30] = [0.5, 0.5, 0, 0, 0]
    probs[30:40] = [0.25, 0.75, 0, 0, 0]
    with np.errstate(divide="ignore"):
        log_probs = np.log(probs)
    # The function sees exp(log p); the loop must see the same numbers to be held to the edges.
    with jax.enable_x64(True):
        probs = np.asarray(jnp.exp(jnp.asarray(log_probs)))
        parts = [
            call(lambda *a, f=f: getattr(
                metrics.calibration_bins(*a, num_bins, equal_mass=equal_mass), f
            ), log_probs, labels)
            for f in metrics.CalibrationBins._fields
        ]  # fmt: skip
        ece = call(metrics.ece, log_probs, labels, num_bins=num_bins, equal_mass=equal_mass)
    count, confidence, accuracy = bins_by_loop(probs, labels, num_bins, equal_mass)
    np.testing.assert_array_equal(parts[0], count)
    np.testing.assert_allclose(parts[1], confidence, rtol=1e-12)
    np.testing.assert_allclose(parts[2], accuracy, rtol=1e-12)
    gaps = np.nan_to_num(np.abs(accuracy - confidence))
    np.testing.assert_allclose(ece, np.sum(np.array(count) / N * gaps), rtol=1e-12)


def test_bins_of_equal_mass_are_equally_full_without_ties():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((60, 3)), jnp.float32)
    labels = jnp.zeros(60, jnp.int32)
    bins = metrics.calibration_bins(jax.nn.log_softmax(logits), labels, 6, equal_mass=True)
    np.testing.assert_array_equal(bins.count, [10] * 6)


def test_ece_does_not_depend_on_the_order_of_the_examples():
    log_probs, _, labels = random_predictions()
    order = np.random.default_rng(0).permutation(N)
    for equal_mass in (False, True):
        a = metrics.ece(jnp.asarray(log_probs), jnp.asarray(labels), equal_mass=equal_mass)
        b = metrics.ece(
            jnp.asarray(log_probs[order]), jnp.asarray(labels[order]), equal_mass=equal_mass
        )
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_entropy_and_mutual_information_are_those_of_scipy(call):
    stats = pytest.importorskip("scipy.stats")
    _, probs, _ = random_predictions()
    samples = np.stack([probs, np.roll(probs, 1, axis=-1), probs[:, ::-1]])
    with np.errstate(divide="ignore"):
        log_samples = np.log(samples)
    with jax.enable_x64(True):
        entropy = call(metrics.predictive_entropy, log_samples)
        information = call(metrics.mutual_information, log_samples)
    np.testing.assert_allclose(entropy, stats.entropy(samples, axis=-1), atol=1e-14)
    expected = stats.entropy(samples.mean(0), axis=-1) - stats.entropy(samples, axis=-1).mean(0)
    np.testing.assert_allclose(information, expected, atol=1e-12)


def test_mutual_information_of_equal_samples_is_zero_and_never_negative():
    log_probs, _, _ = random_predictions()
    same = jnp.stack([jnp.asarray(log_probs, jnp.float32)] * 7)
    information = metrics.mutual_information(same)
    assert jnp.all(information >= 0) and jnp.all(information < 1e-5)


def test_gaussian_nll_is_that_of_scipy(call):
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    mean, targets = rng.standard_normal((2, N, 2))
    variance = rng.uniform(0.1, 3, (N, 2))
    with jax.enable_x64(True):
        got = call(metrics.gaussian_nll, mean, variance, targets)
    expected = -np.mean(stats.norm.logpdf(targets, mean, np.sqrt(variance)))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def roc_by_thresholds(in_scores, out_scores, true_rate):
    """FPR at a TPR by trying every threshold, with linear interpolation between two of them."""
    thresholds = np.concatenate([[-np.inf], np.unique([*in_scores, *out_scores])])
    tpr = np.array([np.mean(in_scores <= t) for t in thresholds])
    fpr = np.array([np.mean(out_scores <= t) for t in thresholds])
    after = int(np.argmax(tpr >= true_rate))
    if tpr[after] == true_rate:
        return fpr[after]
    share = (true_rate - tpr[after - 1]) / (tpr[after] - tpr[after - 1])
    return fpr[after - 1] + share * (fpr[after] - fpr[after - 1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("decimals", [1, 8])  # with and without ties
def test_detection_agrees_with_thresholds_tried_one_by_one(seed, decimals):
    rng = np.random.default_rng(seed)
    in_scores = np.round(rng.standard_normal(100 + seed), decimals)
    out_scores = np.round(1 + rng.standard_normal(83), decimals)
    got = metrics.detection(in_scores, out_scores)
    pairs = out_scores[:, None] - in_scores[None]
    np.testing.assert_allclose(got.auroc, np.mean((pairs > 0) + 0.5 * (pairs == 0)), rtol=1e-12)
    np.testing.assert_allclose(got.fpr95, roc_by_thresholds(in_scores, out_scores, 0.95))
    is_out = np.repeat([0, 1], [len(in_scores), len(out_scores)])
    both = np.concatenate([in_scores, out_scores])
    assert got.aupr_out == sklearn_metrics.average_precision_score(is_out, both)
    assert got.aupr_in == sklearn_metrics.average_precision_score(1 - is_out, -both)


def test_detection_at_the_extremes():
    perfect = metrics.detection(np.zeros(40), np.ones(7))
    assert perfect == (1.0, 1.0, 1.0, 0.0)
    wrong = metrics.detection(np.ones(40), np.zeros(7))
    assert wrong.auroc == 0.0 and wrong.fpr95 == 1.0
    blind = metrics.detection(np.zeros(40), np.zeros(60))
    assert blind.auroc == 0.5
    np.testing.assert_allclose(blind.fpr95, 0.95)


LOGITS = jnp.array([[2.0, 1.0, -1.0], [0.0, 3.0, 0.0]])
LABELS = jnp.array([0, 1])
OF_LABELS = (
    metrics.nll,
    metrics.accuracy,
    metrics.brier,
    metrics.ece,
    lambda log_probs, labels: metrics.top_k_accuracy(log_probs, labels, 2),
)


@pytest.mark.parametrize("metric", OF_LABELS)
def test_logits_and_probabilities_in_place_of_log_probabilities_are_refused(metric):
    for wrong in (LOGITS, jax.nn.softmax(LOGITS), jnp.full((2, 3), -jnp.inf)):
        with pytest.raises(ValueError, match="log_softmax"):
            metric(wrong, LABELS)
        assert jnp.isnan(jax.jit(metric)(wrong, LABELS))


@pytest.mark.parametrize("metric", OF_LABELS)
def test_predictions_of_a_diverged_run_are_nan(metric):
    assert jnp.isnan(metric(jnp.full((2, 3), jnp.nan), LABELS))
    assert jnp.isnan(metric(jnp.array([[-0.7, jnp.nan], [jnp.log(0.5), jnp.log(0.5)]]), LABELS))


@pytest.mark.parametrize("metric", OF_LABELS)
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8, jnp.int32])
def test_labels_of_any_integer_type(metric, dtype):
    log_probs = jax.nn.log_softmax(jnp.zeros((300, 256)).at[:, 3].set(1.0))
    labels = jnp.arange(300, dtype=jnp.int32) % (256 if dtype == jnp.uint8 else 128)
    got = metric(log_probs, labels.astype(dtype))
    np.testing.assert_array_equal(got, metric(log_probs, labels))
    with jax.enable_x64(True):
        assert jnp.isfinite(metric(log_probs.astype(jnp.float64), labels))


@pytest.mark.parametrize(("n", "num_bins"), [(1992, 20), (997, 333)])
def test_the_edges_of_bins_of_equal_mass_do_not_round(n, num_bins):
    confidence = jnp.linspace(0.5, 1.0, n, endpoint=False)
    log_probs = jnp.log(jnp.stack([confidence, 1 - confidence], -1))
    bins = metrics.calibration_bins(log_probs, jnp.zeros(n, jnp.int32), num_bins, equal_mass=True)
    expected = np.bincount(np.arange(n) * num_bins // n, minlength=num_bins)
    np.testing.assert_array_equal(bins.count, expected)


@pytest.mark.parametrize("metric", OF_LABELS)
def test_labels_that_do_not_fit_are_refused(metric):
    log_probs = jax.nn.log_softmax(LOGITS)
    with pytest.raises(ValueError, match=r"must have shape \(2,\), but have \(3,\)"):
        metric(log_probs, jnp.array([0, 1, 2]))
    with pytest.raises(ValueError, match=r"labels must have shape"):
        metric(log_probs.T, LABELS)
    with pytest.raises(TypeError, match="one-hot"):
        metric(log_probs, jnp.eye(3)[:2])
    with pytest.raises(ValueError, match=r"labels must be in 0 … 2; got 1 to 3"):
        metric(log_probs, jnp.array([1, 3]))
    assert jnp.isnan(jax.jit(metric)(log_probs, jnp.array([1, 3])))
    with pytest.raises(ValueError, match="no examples"):
        metric(log_probs[:0], LABELS[:0])


def test_any_leading_shape_and_low_precision_are_accepted():
    log_probs, _, labels = random_predictions()
    log_probs = jnp.asarray(log_probs, jnp.float32)
    grid = (log_probs.reshape(10, 20, K), jnp.asarray(labels).reshape(10, 20))
    for metric in OF_LABELS:
        flat = metric(log_probs[10:], jnp.asarray(labels)[10:])
        narrow = metric(log_probs[10:].astype(jnp.bfloat16), jnp.asarray(labels)[10:])
        assert narrow.dtype == jnp.float32
        np.testing.assert_allclose(flat, narrow, atol=0.1)
        both = metric(log_probs, jnp.asarray(labels)), metric(*grid)
        np.testing.assert_allclose(*both, rtol=1e-6)


def test_other_bad_input_is_refused():
    log_probs = jax.nn.log_softmax(LOGITS)
    with pytest.raises(ValueError, match="k=4 is above the number of classes, 3"):
        metrics.top_k_accuracy(log_probs, LABELS, 4)
    with pytest.raises(ValueError, match="num_bins must be an integer >= 1"):
        metrics.ece(log_probs, LABELS, 0)
    with pytest.raises(TypeError, match="int32 of shape"):
        metrics.predictive_entropy(LABELS)
    with pytest.raises(ValueError, match="samples on axis 0"):
        metrics.mutual_information(log_probs[0])
    with pytest.raises(ValueError, match="one shape"):
        metrics.gaussian_nll(jnp.zeros(3), jnp.ones(3), jnp.zeros((3, 1)))
    with pytest.raises(TypeError, match="mean must be floating; got int32"):
        metrics.gaussian_nll(jnp.zeros(3, jnp.int32), jnp.ones(3), jnp.zeros(3))
    with pytest.raises(ValueError, match="variance must be positive"):
        metrics.gaussian_nll(jnp.zeros(3), jnp.zeros(3), jnp.zeros(3))
    for bad in ([], [[1.0]], [np.nan]):
        with pytest.raises(ValueError, match="out_scores must be a non-empty vector"):
            metrics.detection([1.0], bad)


def test_the_risk_falls_with_coverage_where_confidence_ranks_the_errors():
    """Against a loop: errors among the k most confident predictions."""
    rng = np.random.default_rng(0)
    log_probs = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((50, 3)), jnp.float32) * 2)
    labels = jnp.asarray(rng.integers(0, 3, 50))
    coverage, risk = jax.jit(metrics.risk_coverage)(log_probs, labels)
    certain = np.asarray(log_probs)  # a slice of a jax array would be compiled for every k
    surest = np.argsort(-np.max(certain, axis=1))
    wrong = np.argmax(certain, axis=1) != np.asarray(labels)
    expected = [wrong[surest[:k]].mean() for k in range(1, 51)]
    np.testing.assert_allclose(risk, expected, rtol=1e-6)
    np.testing.assert_allclose(coverage, np.arange(1, 51) / 50, rtol=1e-6)
    np.testing.assert_allclose(risk[-1], 1 - metrics.accuracy(log_probs, labels), rtol=1e-6)
    assert np.all(np.isnan(metrics.risk_coverage(log_probs.at[0].set(jnp.nan), labels)[1]))
    with pytest.raises(ValueError, match="must be log-probabilities"):
        metrics.risk_coverage(log_probs + 1, labels)


def test_risk_and_coverage_of_labels_of_any_shape():
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (2, 3, 4)))
    labels = jnp.array([[0, 1, 2], [3, 0, 1]])
    found = metrics.risk_coverage(log_probs, labels)
    flat = metrics.risk_coverage(log_probs.reshape(6, 4), labels.ravel())
    jax.tree.map(np.testing.assert_array_equal, found, flat)
    assert "risk_coverage" in metrics.__all__


def test_no_predictions_have_no_average():
    with pytest.raises(ValueError, match="no predictions"):
        metrics.gaussian_nll(jnp.zeros(0), jnp.ones(0), jnp.zeros(0))


def test_gradients_are_finite_where_a_class_is_impossible():
    def log_probs(x):
        return jax.nn.log_softmax(jnp.stack([x, 0 * x, jnp.full_like(x, -jnp.inf)], -1))

    for score in (
        lambda x: metrics.predictive_entropy(log_probs(x)).sum(),
        lambda x: metrics.mutual_information(jnp.stack([log_probs(x), log_probs(2 * x)])).sum(),
    ):
        x = jnp.array([0.5, -1.0])
        numeric = [(score(x + d) - score(x - d)) / 2e-2 for d in 1e-2 * jnp.eye(2)]
        np.testing.assert_allclose(jax.grad(score)(x), numeric, atol=1e-3)


def test_a_variance_that_is_nan_makes_the_likelihood_nan():
    assert np.isnan(metrics.gaussian_nll(jnp.ones(2), jnp.array([1.0, jnp.nan]), jnp.ones(2)))
