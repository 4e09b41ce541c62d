import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ivon_jax import Posterior, ivon, posterior, sample_params

TEN_MILLION = 10_000_000
IMPLEMENTATIONS = ["threefry2x32", "rbg", "unsafe_rbg"]


def unit_posterior(tree):
    """N(0, 1) for every leaf: its noise is ε itself."""
    return Posterior(jax.tree.map(jnp.zeros_like, tree), jax.tree.map(jnp.ones_like, tree))


# --- the distribution of the draws -----------------------------------------------------------


@functools.cache
def ten_million():
    """Sorted standardised draws of one leaf of a state with σ = 1/√(16·(0.5+0.125)) = 0.316."""
    tx = ivon(0.1, ess=16.0, hess_init=0.5, weight_decay=0.125)
    state = tx.init(jnp.full(TEN_MILLION, 3.0))
    _, noise = jax.jit(sample_params)(jax.random.key(20240), state)
    return np.sort(np.asarray(noise)).astype(np.float64) * np.sqrt(10.0)


def test_moments_of_ten_million_draws():
    """Each sample moment within 4.5 of its standard errors 1, √2, √15−9, √96 over √n."""
    z, n = ten_million(), TEN_MILLION
    assert abs(z.mean()) < 4.5 / np.sqrt(n)
    assert abs(np.mean(z**2) - 1) < 4.5 * np.sqrt(2 / n)
    assert abs(np.mean(z**3)) < 4.5 * np.sqrt(15 / n)
    assert abs(np.mean(z**4) - 3) < 4.5 * np.sqrt(96 / n)


def test_ten_million_draws_pass_kolmogorov_and_smirnov():
    """√n·D exceeds 2.3 with probability 2exp(−2·2.3²) = 5e-5.

    That the draws come from 2^23 equidistant uniforms adds √n·2^-23 = 4e-4.
    """
    z, n = ten_million(), TEN_MILLION
    cdf = scipy.special.ndtr(z)
    steps = np.arange(n + 1) / n
    distance = max(np.max(steps[1:] - cdf), np.max(cdf - steps[:-1]))
    assert np.sqrt(n) * distance < 2.3


@pytest.mark.parametrize("threshold", [3.0, 4.0, 5.0])
def test_tails_of_ten_million_draws(threshold):
    """Counts beyond ±3, ±4 (317 each) and ±5 (2.9 each) within binomial bounds of 1e-5."""
    z, p = ten_million(), scipy.special.ndtr(-threshold)
    low, high = scipy.stats.binom.interval(1 - 1e-5, TEN_MILLION, p)
    below = np.searchsorted(z, -threshold)
    above = TEN_MILLION - np.searchsorted(z, threshold)
    assert low <= below <= high
    assert low <= above <= high
    both_low, both_high = scipy.stats.binom.interval(1 - 1e-5, TEN_MILLION, 2 * p)
    assert max(1, both_low) <= below + above <= both_high


def draws_of_leaves(n):
    """Six leaves of one draw."""
    noise = sample_params(jax.random.key(1), unit_posterior([jnp.zeros(n)] * 6))[1]
    return np.stack(noise)


def draws_of_steps(n):
    """The keys that loops use: split, folded in, and consecutive seeds.

    From three bases, because split(key)[i] and fold_in(key, i) are one and the same.
    """
    q = unit_posterior(jnp.zeros(n))
    keys = [*jax.random.split(jax.random.key(0), 3)]
    keys += [jax.random.fold_in(jax.random.key(1), i) for i in range(3)]
    keys += [jax.random.key(i) for i in range(2, 5)]
    return np.stack([sample_params(k, q)[1] for k in keys])


def draws_of_vmap(n):
    """Two leaves of four samples."""
    q = unit_posterior([jnp.zeros(n)] * 2)
    keys = jax.random.split(jax.random.key(2), 4)
    return np.concatenate(jax.vmap(sample_params, (0, None))(keys, q)[1])


def draws_at_lags(n):
    """One leaf against itself, shifted."""
    z = np.asarray(sample_params(jax.random.key(3), unit_posterior(jnp.zeros(n)))[1])
    return np.stack([np.roll(z, lag) for lag in (0, 1, 2, 3, 4, 64, 128, n // 2)])


@pytest.mark.parametrize(
    "draws",
    [draws_of_leaves, draws_of_steps, draws_of_vmap, draws_at_lags],
    ids=lambda f: f.__name__,
)
def test_draws_are_uncorrelated(draws):
    """Every correlation of ε, and of ε², within 4.5/√n: 36 pairs at 7e-6 each."""
    n = 250_000
    z = draws(n).astype(np.float64)
    for power in (1, 2):
        correlation = np.corrcoef(z**power)
        np.fill_diagonal(correlation, 0.0)
        assert np.max(np.abs(correlation)) < 4.5 / np.sqrt(n)


def test_no_two_leaves_share_a_value():
    """Neither leaves of equal shape, nor one as the beginning of another."""
    shapes = [(64,), (64,), (8, 8), (65,), (), (), (1,)]
    noise = sample_params(jax.random.key(4), unit_posterior([jnp.zeros(s) for s in shapes]))[1]
    values = np.concatenate([np.ravel(x) for x in noise])
    # 260 draws on a grid of 2^23: a chance coincidence has probability 0.4 %; this key has none.
    assert len(np.unique(values)) == len(values)


def test_under_x64_the_noise_has_all_the_bits_of_float64():
    with jax.enable_x64(True):
        state = ivon(0.1, ess=1.0).init(jnp.zeros(1000, jnp.float64))
        sample, noise = sample_params(jax.random.key(0), state)
        assert sample.dtype == noise.dtype == jnp.float64
        assert np.any(noise != noise.astype(jnp.float32).astype(jnp.float64))


# --- scale and structure ---------------------------------------------------------------------

TREE = {"b": jnp.array([1.0, -2.0]), "w": jnp.arange(12.0).reshape(3, 4)}


@pytest.mark.parametrize("mask", [None, {"b": False, "w": True}])
def test_sigma_is_one_over_the_root_of_ess_times_hess_plus_decay(mask):
    ess, delta = 37.0, 0.3
    state = ivon(0.1, ess, weight_decay=delta, mask=mask).init(TREE)
    state = state._replace(hess=jax.tree.map(lambda m: 0.1 + m**2, TREE))
    sample, noise = sample_params(jax.random.key(5), state)
    epsilon = sample_params(jax.random.key(5), unit_posterior(TREE))[1]
    for k, h in state.hess.items():
        decay = delta if mask is None or mask[k] else 0.0
        sigma = 1 / np.sqrt(ess * (np.asarray(h, np.float64) + decay))
        # Four roundings to float32: h+δ, the product with λ, rsqrt and the product with ε.
        np.testing.assert_allclose(noise[k], np.asarray(epsilon[k]) * sigma, rtol=4 * 6e-8)
        np.testing.assert_array_equal(sample[k], state.mean[k] + noise[k])


def test_a_posterior_gives_the_draws_of_its_state():
    state = ivon(0.1, 10.0).init(TREE)
    key = jax.random.key(6)
    chex.assert_trees_all_equal(
        sample_params(key, posterior(state)), sample_params(key, state), strict=True
    )


def test_temperature_scales_the_noise():
    state = ivon(0.1, 10.0).init(TREE)
    key = jax.random.key(6)
    cold = sample_params(key, posterior(state, temperature=0.25))[1]
    # A power of four: exact.
    chex.assert_trees_all_equal(
        cold, jax.tree.map(lambda n: 0.5 * n, sample_params(key, state)[1]), strict=True
    )


def test_infinite_precision_is_no_noise():
    q = Posterior(TREE, {"b": jnp.array([jnp.inf, 1.0]), "w": jnp.full((3, 4), jnp.inf)})
    sample, noise = sample_params(jax.random.key(7), q)
    assert noise["b"][0] == 0.0 != noise["b"][1]
    np.testing.assert_array_equal(noise["w"], 0.0)
    np.testing.assert_array_equal(sample["w"], TREE["w"])


MIXED = {
    "f16": jnp.full((2, 2), 0.1, jnp.float16),
    "bf16": jnp.full(300, 0.1, jnp.bfloat16),
    "f32": jnp.full(3, 0.1),
    "int": jnp.array([1, 2], jnp.int32),
    "bool": jnp.array([True, False]),
    "u8": jnp.array(7, jnp.uint8),
}
OWNED = {"f16", "bf16", "f32"}


def assert_rounded_from(exact, rounded):
    """To one of the two neighbours."""
    exact, wide = np.asarray(exact), np.asarray(rounded, np.float32)
    spacing = float(jnp.finfo(rounded.dtype).eps) if rounded.dtype.itemsize < 4 else 0.0
    assert np.all(np.abs(wide - exact) <= spacing * np.abs(exact))


def test_with_params_unowned_leaves_pass_through_and_the_sample_has_the_dtypes_of_params():
    state = ivon(0.1, 10.0).init(MIXED)
    sample, noise = sample_params(jax.random.key(8), state, MIXED)
    for k, p in MIXED.items():
        assert sample[k].dtype == p.dtype
        assert noise[k].dtype == jnp.float32
        assert noise[k].shape == sample[k].shape == p.shape
        if k in OWNED:
            assert_rounded_from(state.mean[k] + noise[k], sample[k])
            assert np.all(noise[k] != 0)
        else:
            np.testing.assert_array_equal(sample[k], p)
            np.testing.assert_array_equal(noise[k], 0)
    # The noise is the draw, not the difference of rounded numbers.
    rounded = sample["bf16"].astype(jnp.float32) - state.mean["bf16"]
    assert np.mean(np.asarray(rounded != noise["bf16"])) > 0.9


def test_draws_are_the_same_with_and_without_params():
    state = ivon(0.1, 10.0).init(MIXED)
    key = jax.random.key(8)
    sample, noise = sample_params(key, state)
    with_params = sample_params(key, state, MIXED)
    for k in MIXED:
        if k in OWNED:
            np.testing.assert_array_equal(noise[k], with_params[1][k])
            assert_rounded_from(sample[k], with_params[0][k])
        else:
            assert sample[k] == noise[k] == optax.MaskedNode()


def test_leaves_masked_by_optax_pass_through_even_if_they_are_subtrees():
    params = {"head": TREE, "trunk": {"w": jnp.ones(3), "step": jnp.array(1)}}
    state = optax.masked(ivon(0.1, 10.0), {"head": True, "trunk": False}).init(params)
    sample, noise = sample_params(jax.random.key(9), state, params)
    chex.assert_trees_all_equal(sample["trunk"], params["trunk"], strict=True)
    for x in jax.tree.leaves(noise["trunk"]):
        np.testing.assert_array_equal(x, 0)
    alone = sample_params(jax.random.key(9), ivon(0.1, 10.0).init(TREE))
    chex.assert_trees_all_equal((sample["head"], noise["head"]), alone, strict=True)


def test_params_of_another_shape_are_refused_with_their_path():
    state = ivon(0.1, 10.0).init(TREE)
    with pytest.raises(ValueError, match=r"params has shape \(3,\) at \['b'\]"):
        sample_params(jax.random.key(0), state, {**TREE, "b": jnp.ones(3)})


def test_several_states_draw_different_noise_and_what_one_state_would_draw():
    """Under `optax.partition` each leaf has its own state's σ, and no leaf shares a draw."""
    params = {k: jnp.zeros(5) for k in "abcd"}
    labels = {"a": "wide", "b": "narrow", "c": "wide", "d": "narrow"}
    tx = optax.partition({"wide": ivon(0.1, 1.0), "narrow": ivon(0.1, 100.0)}, labels)
    state = tx.init(params)
    key = jax.random.key(10)
    noise = sample_params(key, state)[1]
    one = sample_params(key, ivon(0.1, 1.0).init(params))[1]
    assert len(np.unique(np.concatenate([noise[k] for k in "abcd"]))) == 20
    for k in params:
        scale = 1.0 if labels[k] == "wide" else 0.1
        np.testing.assert_allclose(noise[k], scale * one[k], rtol=3e-7)  # three roundings
    chex.assert_trees_all_equal(sample_params(key, state, params)[1], noise, strict=True)


def test_states_for_the_same_parameters_are_ambiguous():
    tx = optax.chain(ivon(0.1, 10.0), ivon(0.1, 10.0))
    with pytest.raises(ValueError, match="several IVON states for the same parameters"):
        sample_params(jax.random.key(0), tx.init(TREE))


def test_empty_trees_and_leaves():
    state = ivon(0.1, 10.0).init({"none": jnp.zeros((0, 3)), "one": jnp.zeros(())})
    sample, noise = sample_params(jax.random.key(0), state)
    assert sample["none"].shape == noise["none"].shape == (0, 3)
    assert noise["one"] != 0
    assert sample_params(jax.random.key(0), ivon(0.1, 10.0).init({})) == ({}, {})
    only_int = {"n": jnp.array(3)}
    state = ivon(0.1, 10.0).init(only_int)
    assert sample_params(jax.random.key(0), state, only_int)[0] == only_int


# --- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_typed_and_raw_keys_agree(impl):
    state = ivon(0.1, 10.0).init(TREE)
    key = jax.random.key(11, impl=impl)
    typed = sample_params(key, state)
    chex.assert_trees_all_equal(sample_params(jax.random.key_data(key), state), typed, strict=True)
    chex.assert_trees_all_equal(
        sample_params(np.asarray(jax.random.key_data(key)), state), typed, strict=True
    )


def test_every_word_of_a_wide_key_counts():
    state = ivon(0.1, 10.0).init(jnp.zeros(8))
    seen = []
    for i in range(4):
        words = jnp.zeros(4, jnp.uint32).at[i].set(1)
        seen.append(sample_params(words, state)[1])
    assert len(np.unique(np.stack(seen))) == 32


def test_the_default_implementation_of_the_user_does_not_matter():
    state = ivon(0.1, 10.0).init(TREE)
    key = jax.random.key(12, impl="threefry2x32")
    expected = sample_params(key, state)
    with jax.default_prng_impl("rbg"):
        chex.assert_trees_all_equal(sample_params(key, state), expected, strict=True)


@pytest.mark.parametrize(
    ("key", "got"),
    [
        (0, "got int"),
        (None, "got NoneType"),
        (jnp.array([0.0, 1.0]), r"got float32 of shape \(2,\)"),
        (jnp.array([0, 1], jnp.int32), r"got int32 of shape \(2,\)"),
        (jnp.zeros(3, jnp.uint32), r"got uint32 of shape \(3,\)"),
        (jnp.zeros((), jnp.uint32), r"got uint32 of shape \(\)"),
    ],
    ids=str,
)
def test_a_key_of_the_wrong_type_is_refused_with_an_example(key, got):
    state = ivon(0.1, 10.0).init(TREE)
    with pytest.raises(TypeError, match=rf"must be a PRNG key such as jax.random.key\(0\); {got}"):
        sample_params(key, state)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("shape", [(3,), (1,), (2, 2)])
def test_a_batch_of_keys_is_refused_with_the_vmap_to_write(impl, raw, shape):
    state = ivon(0.1, 10.0).init(TREE)
    keys = jax.random.split(jax.random.key(0, impl=impl), shape)
    keys = jax.random.key_data(keys) if raw else keys
    message = rf"batch of shape \({', '.join(map(str, shape))},?\).*jax.vmap\(sample_params"
    with pytest.raises(ValueError, match=message):
        sample_params(keys, state)


def test_swapped_arguments_are_refused():
    state = ivon(0.1, 10.0).init(TREE)
    with pytest.raises(ValueError, match="found no IVONState in a state of type PRNGKeyArray"):
        sample_params(state, jax.random.key(0))
    with pytest.raises(ValueError, match="found no IVONState"):
        sample_params(jax.random.key(0), TREE)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_vmap_over_keys_gives_the_draws_of_the_single_keys(impl):
    """Which the rbg generator itself does not promise."""
    state = ivon(0.1, 10.0).init(TREE)
    keys = jax.random.split(jax.random.key(13, impl=impl), 3)
    stacked = jax.vmap(sample_params, (0, None))(keys, state)
    for i, key in enumerate(keys):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x, i=i: x[i], stacked), sample_params(key, state), strict=True
        )


# --- sharding --------------------------------------------------------------------------------

SHARDED = {
    "rows": (jnp.linspace(-1, 1, 48).reshape(16, 3), PartitionSpec("x", None)),
    "columns": (jnp.linspace(-1, 1, 24).reshape(3, 8), PartitionSpec(None, "x")),
    "vector": (jnp.linspace(-1, 1, 1000), PartitionSpec("x")),
    "everywhere": (jnp.linspace(-1, 1, 5), PartitionSpec()),
}


def whole_state():
    """Different precisions, none a power of two: every rounding counts."""
    state = ivon(0.1, 10.0, weight_decay=0.3).init({k: x for k, (x, _) in SHARDED.items()})
    return state._replace(hess=jax.tree.map(lambda m: 0.1 + m**2, state.mean))


def mesh_of(num_devices):
    return Mesh(np.array(jax.devices()[:num_devices]), ("x",))


def sharded_state(num_devices):
    """The same state, every statistic sharded as SHARDED says."""
    mesh = mesh_of(num_devices)
    by_leaf = {k: NamedSharding(mesh, spec) for k, (_, spec) in SHARDED.items()}
    state = jax.device_put(whole_state(), NamedSharding(mesh, PartitionSpec()))
    trees = {f: jax.device_put(getattr(state, f), by_leaf) for f in ("mean", "hess", "momentum")}
    return state._replace(**trees)


@contextlib.contextmanager
def user_sets_partitionable(value):
    """What a user's `jax.config.update` does, for the length of a test."""
    before = jax.config.jax_threefry_partitionable
    jax.config.update("jax_threefry_partitionable", value)
    try:
        yield
    finally:
        jax.config.update("jax_threefry_partitionable", before)


@pytest.mark.parametrize(
    ("impl", "partitionable", "devices"),
    [
        ("threefry2x32", True, (1, 2, 4, 8)),
        ("threefry2x32", False, (8,)),
        ("rbg", True, (8,)),
        ("unsafe_rbg", True, (2,)),
    ],
)
def test_draws_are_bitwise_equal_on_one_to_eight_devices(impl, partitionable, devices):
    key = jax.random.key(14, impl=impl)
    expected = sample_params(key, whole_state())
    with user_sets_partitionable(partitionable):
        chex.assert_trees_all_equal(sample_params(key, whole_state()), expected, strict=True)
        for num_devices in devices:
            state = sharded_state(num_devices)
            drawn = jax.jit(sample_params)(key, state)
            chex.assert_trees_all_equal(drawn, expected, strict=True)
            for k, x in state.mean.items():
                assert drawn[1][k].sharding.is_equivalent_to(x.sharding, x.ndim)


@functools.cache
def stacked_draws(num_devices):
    """Eight samples under jit, with the sample axis sharded over the devices."""
    mesh = mesh_of(num_devices)
    keys = jax.random.split(jax.random.key(15), 8)
    arguments = jax.device_put((keys, whole_state()), NamedSharding(mesh, PartitionSpec()))
    draw = jax.vmap(sample_params, (0, None))
    return jax.jit(draw, out_shardings=NamedSharding(mesh, PartitionSpec("x")))(*arguments)


def test_stacked_draws_are_bitwise_equal_on_one_to_eight_devices():
    chex.assert_trees_all_equal(stacked_draws(8), stacked_draws(1), strict=True)
