import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivon_jax import Posterior, ivon, posterior, prune, sample_params, signal_to_noise
from ivon_jax._uses.pruning import lower_quantiles


def random_posterior(seed=0):
    rng = np.random.default_rng(seed)
    mean = {"b": rng.standard_normal(7), "w": rng.standard_normal((5, 6))}
    precision = jax.tree.map(lambda m: rng.uniform(0.1, 10, m.shape), mean)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), Posterior(mean, precision))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_signal_to_noise_is_the_mean_over_sigma():
    q = random_posterior()
    np.testing.assert_allclose(
        flat(signal_to_noise(q)), np.abs(flat(q.mean)) * np.sqrt(flat(q.precision)), rtol=1e-6
    )
    state = ivon(0.1, 100, weight_decay=0.0).init(q.mean)
    np.testing.assert_allclose(flat(signal_to_noise(state)), np.abs(flat(q.mean)) * 10, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 36 / 37, 0.999])
def test_a_fraction_of_all_leaves_together_is_pruned(fraction):
    q = random_posterior()
    pruned, kept = jax.jit(lambda q: prune(q, fraction=fraction))(q)
    ratios = flat(signal_to_noise(q))
    number = int(np.floor(np.float32(fraction) * 37))
    expected = np.ones(37, bool)
    expected[np.argsort(ratios)[:number]] = False
    np.testing.assert_array_equal(flat(kept), expected)
    np.testing.assert_array_equal(flat(pruned.mean), np.where(expected, flat(q.mean), 0))
    np.testing.assert_array_equal(
        flat(pruned.precision), np.where(expected, flat(q.precision), np.inf)
    )


def test_a_threshold_prunes_what_is_below_it():
    q = random_posterior()
    pruned, kept = prune(q, threshold=1.5)
    np.testing.assert_array_equal(flat(kept), flat(signal_to_noise(q)) >= 1.5)
    again, kept_again = prune(pruned, threshold=1.5)  # what is fixed stays
    chex.assert_trees_all_equal(again, pruned)
    assert np.all(flat(kept_again))


def test_fixed_weights_are_neither_counted_nor_pruned():
    q = Posterior(jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([jnp.inf, 1.0, 1.0, jnp.inf]))
    pruned, kept = prune(q, fraction=0.5)
    np.testing.assert_array_equal(kept, [True, False, True, True])
    np.testing.assert_array_equal(pruned.mean, [0.0, 0.0, 2.0, 3.0])
    integers = Posterior({"n": jnp.arange(3)}, {"n": jnp.full(3, jnp.inf)})
    assert prune(integers, fraction=0.9)[0].mean["n"].dtype == jnp.int32


def test_a_model_without_weights_stays_empty():
    assert prune(Posterior({}, {}), fraction=0.5) == (Posterior({}, {}), {})


def test_ties_go_together():
    q = Posterior(jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.ones(4))
    np.testing.assert_array_equal(prune(q, fraction=0.25)[1], [False, False, False, True])


def test_pruned_weights_stay_at_zero_in_samples_and_in_training():
    pruned, kept = prune(random_posterior(), fraction=0.5)
    sample, _ = sample_params(jax.random.key(0), pruned)
    assert np.all(flat(sample)[~flat(kept)] == 0) and np.all(flat(sample)[flat(kept)] != 0)
    tx = ivon(0.1, 100, prior=pruned)
    state = tx.init(pruned.mean)
    ones = jax.tree.map(jnp.ones_like, pruned.mean)
    _, state = tx.update(ones, state, hess=ones)
    assert np.all(flat(state.mean)[~flat(kept)] == 0) and np.any(
        flat(state.mean) != flat(pruned.mean)
    )


@pytest.mark.parametrize("wrong", [{}, {"fraction": 0.1, "threshold": 1.0}])
def test_exactly_one_criterion_is_needed(wrong):
    with pytest.raises(ValueError, match="exactly one of fraction= and threshold="):
        prune(random_posterior(), **wrong)


@pytest.mark.parametrize("wrong", [{"fraction": 1.0}, {"fraction": -0.1}, {"threshold": -1.0},
                                   {"threshold": np.nan}])  # fmt: skip
def test_criteria_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        prune(random_posterior(), **wrong)


@pytest.mark.parametrize("seed", range(4))
def test_order_statistics_are_those_of_a_sort(seed):
    """Any magnitude and sign, ties, zeros and infinities; subnormal numbers count as zero."""
    rng = np.random.default_rng(seed)
    wide = rng.standard_normal((6, 5)) * 10.0 ** rng.integers(-37, 38, (6, 5))
    leaves = [wide, np.array([0.0, -0.0, np.inf, -np.inf, 3.0, 3.0, 1e-40]), np.float64(-7.5)]
    leaves = [np.asarray(x, np.float32) for x in leaves]
    everything = np.sort(np.concatenate([np.ravel(x) for x in leaves]))
    everything[np.abs(everything) < np.finfo(np.float32).tiny] = 0
    ranks = jnp.arange(len(everything), dtype=jnp.float32)
    got = jax.jit(lambda x: lower_quantiles(x, ranks))([jnp.asarray(x) for x in leaves])
    np.testing.assert_array_equal(got, everything)


def test_order_statistics_of_sharded_leaves_gather_nothing():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.arange(4096.0), spec)
    f = jax.jit(lambda x: lower_quantiles([x], jnp.array([0.0, 2048.0])))
    np.testing.assert_array_equal(f(x), [0.0, 2048.0])
    compiled = f.lower(x).compile().as_text()
    assert "all-gather" not in compiled and "all-reduce" in compiled


@pytest.mark.parametrize(("fraction", "number"), [(0.53, 53), (0.59, 59), (0.599, 59)])
def test_a_fraction_of_a_hundred_is_counted_in_decimals(fraction, number):
    q = Posterior(jnp.arange(1.0, 101.0), jnp.ones(100))
    assert int((~prune(q, fraction=fraction)[1]).sum()) == number


def test_leaves_that_are_no_numbers_stay_as_they_are():
    params = {"flag": jnp.array(True), "key": jax.random.key(3), "w": jnp.array([1.0, 2.0])}
    q = posterior(ivon(0.1, 100).init(params), params)
    pruned, kept = prune(q, fraction=0.5)
    assert pruned.mean["flag"].dtype == bool and bool(pruned.mean["flag"])
    assert pruned.mean["key"] == params["key"] and bool(kept["key"])
    np.testing.assert_array_equal(pruned.mean["w"], [0.0, 2.0])
    assert signal_to_noise(q)["key"] == np.inf


@pytest.mark.parametrize("limit", ["fraction", "threshold"])
def test_a_traced_limit_out_of_its_range_shows_as_nan(limit):
    pruned = jax.jit(lambda q, x: prune(q, **{limit: x})[0])
    assert np.isfinite(flat(pruned(random_posterior(), 0.5).mean)).all()
    for wrong in {"fraction": (1.0, 2.0, -0.1), "threshold": (-1.0,)}[limit]:
        assert np.isnan(flat(pruned(random_posterior(), wrong).mean)).all()
