import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import ivon, mc_value_and_grad, posterior, sample_params

PARAMS = {"w": jnp.array([[0.5, -1.0], [2.0, 0.1], [0.0, 0.3]]), "b": jnp.array([0.2, -0.2])}
X = jnp.linspace(-1, 1, 24).reshape(8, 3)
Y = jnp.sin(jnp.arange(16.0)).reshape(8, 2)
KEY = jax.random.key(0)
# Sums of at most 12 terms of order one in another order.
REORDERED = {"rtol": 1e-5, "atol": 1e-6}


def loss(params, x, y):
    return jnp.mean(jnp.sum((jnp.tanh(x @ params["w"] + params["b"][None]) - y) ** 2, axis=-1))


def make_state(params=PARAMS, **settings):
    settings = {"ess": 20.0, "hess_init": 0.5, "weight_decay": 0.1, **settings}
    return ivon(0.1, **settings).init(params)


@pytest.mark.parametrize("sample_batch_size", [None, 1, 3, 4, 6, 100])
def test_any_batch_size_gives_the_explicit_vmap_of_sample_params(sample_batch_size):
    state = make_state()
    samples, noise = jax.vmap(sample_params, (0, None))(jax.random.split(KEY, 6), state)
    values, stack = jax.vmap(jax.value_and_grad(loss), (0, None, None))(samples, X, Y)
    f = mc_value_and_grad(loss, 6, sample_batch_size=sample_batch_size)
    value, grads, hess = f(KEY, state, X, Y)
    np.testing.assert_allclose(value, values.mean(), rtol=1e-6)
    chex.assert_trees_all_close(grads, jax.tree.map(lambda g: g.mean(axis=0), stack), **REORDERED)
    tx = ivon(0.1, 20.0, hess_init=0.5, weight_decay=0.1)
    chex.assert_trees_all_close(
        tx.update(grads, state, PARAMS, hess=hess),
        tx.update(stack, state, PARAMS, noise=noise),
        **REORDERED,
    )


def test_the_product_uses_the_ess_and_weight_decay_of_the_state():
    state = make_state()._replace(ess=jnp.float32(40.0))
    _, grads, hess = mc_value_and_grad(loss)(KEY, state, X, Y)
    _, noise = sample_params(jax.random.split(KEY, 1)[0], state)
    expected = jax.tree.map(lambda n, g: 40.0 * 0.6 * n * g, noise, grads)
    chex.assert_trees_all_close(hess, expected, rtol=1e-5)


def test_antithetic_pairs_cancel_exactly_on_a_quadratic():
    def quadratic(p):
        return 1.5 * jnp.sum((p - 1.0) ** 2)

    state = make_state(jnp.array([0.25, 3.0]))
    f = mc_value_and_grad(quadratic, 4, antithetic=True)
    _, grads, _ = f(KEY, state)
    np.testing.assert_allclose(grads, 3.0 * (state.mean - 1.0), rtol=1e-6)
    _, plain, _ = mc_value_and_grad(quadratic, 4)(KEY, state)
    assert np.max(np.abs(plain - grads)) > 0.01


def test_antithetic_pairs_are_the_mean_plus_and_minus_one_noise():
    state = make_state()
    f = mc_value_and_grad(lambda p: (jnp.sum(p["b"]), p), 4, has_aux=True, antithetic=True)
    (_, samples), _, _ = f(KEY, state)
    centred = jax.tree.map(lambda s, m: s - m[None], samples, state.mean)
    jax.tree.map(lambda c: np.testing.assert_allclose(c[0::2], -c[1::2], atol=5e-7), centred)
    assert not np.allclose(np.abs(centred["b"][0]), np.abs(centred["b"][2]))


@pytest.mark.parametrize("sample_batch_size", [None, 2, 3])
def test_split_batch_gives_each_sample_its_own_slice_in_order(sample_batch_size):
    def with_aux(params, x, y):
        return loss(params, x, y), x

    f = mc_value_and_grad(
        with_aux, 4, has_aux=True, split_batch=True, sample_batch_size=sample_batch_size
    )
    (_, slices), _, _ = f(KEY, make_state(), X, Y)
    np.testing.assert_array_equal(slices, X.reshape(4, 2, 3))


def test_only_the_named_arguments_are_split():
    def with_aux(params, x, scale):
        return jnp.sum(params["b"]) * jnp.sum(x) * jnp.sum(scale), (x, scale)

    f = mc_value_and_grad(with_aux, 4, has_aux=True, split_batch=True, batch_argnums=1)
    (_, (x, scale)), _, _ = f(KEY, make_state(), X, jnp.ones(3))
    assert x.shape == (4, 2, 3) and scale.shape == (4, 3)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_rng_arguments_are_folded_for_each_sample_and_never_split(make_key):
    def with_aux(params, x, rng):
        return jnp.sum(params["b"]) * jnp.sum(x), jax.random.normal(rng, (2,))

    f = mc_value_and_grad(with_aux, 4, has_aux=True, split_batch=True, rng_argnums=2)
    (_, draws), _, _ = f(KEY, make_state(), X, make_key(1))
    assert np.unique(np.asarray(draws)).size == 8


def test_aux_is_stacked_and_the_value_averaged():
    def with_aux(params):
        value = jnp.sum(params["b"])
        return value, {"value": value}

    for num_samples in (1, 5):
        f = mc_value_and_grad(with_aux, num_samples, has_aux=True, sample_batch_size=2)
        (value, aux), _, _ = f(KEY, make_state())
        assert aux["value"].shape == (num_samples,)
        np.testing.assert_allclose(value, aux["value"].mean(), rtol=1e-5)


def test_the_gradient_transform_acts_on_each_sample_before_the_product():
    clip = optax.clip_by_global_norm(0.1)

    def transform(grads):
        return clip.update(grads, clip.init(grads))[0]

    state = make_state()
    samples, noise = jax.vmap(sample_params, (0, None))(jax.random.split(KEY, 3), state)
    stack = jax.vmap(transform)(jax.vmap(jax.grad(loss), (0, None, None))(samples, X, Y))
    _, grads, hess = mc_value_and_grad(loss, 3, grad_transform=transform)(KEY, state, X, Y)
    tx = ivon(0.1, 20.0, hess_init=0.5, weight_decay=0.1)
    chex.assert_trees_all_close(
        tx.update(grads, state, hess=hess), tx.update(stack, state, noise=noise), **REORDERED
    )


def test_gradsq_is_the_scaled_mean_of_squares():
    state = make_state()
    samples, _ = jax.vmap(sample_params, (0, None))(jax.random.split(KEY, 3), state)
    stack = jax.vmap(jax.grad(loss), (0, None, None))(samples, X, Y)
    f = mc_value_and_grad(loss, 3, estimator="gradsq", estimator_scale=8.0)
    _, _, hess = f(KEY, state, X, Y)
    expected = jax.tree.map(lambda g: 8.0 * jnp.mean(g**2, axis=0), stack)
    chex.assert_trees_all_close(hess, expected, **REORDERED)


def test_hutchinson_is_exact_for_a_diagonal_hessian_at_the_mean():
    def quartic(params, scale):
        return scale * sum(jnp.sum(p**4) for p in jax.tree.leaves(params)), scale

    f = mc_value_and_grad(quartic, 3, has_aux=True, estimator="hutchinson")
    _, _, hess = f(KEY, make_state(), jnp.array(0.5))
    chex.assert_trees_all_close(hess, jax.tree.map(lambda p: 6.0 * p**2, PARAMS), **REORDERED)


@pytest.mark.parametrize("estimator", ["reparam", "gradsq", "hutchinson"])
def test_integer_and_foreign_leaves_pass_through(estimator):
    params = {**PARAMS, "n": jnp.arange(2), "other": jnp.ones(3, jnp.bfloat16)}
    mask = {"w": True, "b": True, "n": True, "other": False}
    tx = optax.masked(ivon(0.1, 20.0), mask)
    state = tx.init(params)

    def f(p, x, y):
        return loss(p, x, y) + jnp.sum(p["other"].astype(jnp.float32)) * jnp.sum(p["n"] * 1.0)

    g = jax.jit(mc_value_and_grad(f, 2, estimator=estimator))
    with jax.numpy_dtype_promotion("standard"):
        _, grads, hess = g(KEY, state, X, Y, params=params)
    np.testing.assert_allclose(grads["other"], 1.0)
    assert grads["n"].dtype == jax.dtypes.float0
    np.testing.assert_array_equal(hess["n"], 0.0)
    if estimator != "gradsq":
        np.testing.assert_array_equal(hess["other"], 0.0)
    new = tx.update(grads, state, params, hess=hess)[1]
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_with_bfloat16_parameters_samples_are_cast_and_averages_stay_float32():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = make_state(params)

    def f(p):
        assert {x.dtype for x in jax.tree.leaves(p)} == {jnp.dtype(jnp.bfloat16)}
        return jnp.sum(p["b"] ** 2)

    value, grads, hess = mc_value_and_grad(f, 4)(KEY, state, params=params)
    dtypes = {x.dtype for x in jax.tree.leaves((value, grads, hess))}
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_a_posterior_works_in_place_of_the_state():
    state = make_state()
    f = mc_value_and_grad(loss, 3)
    chex.assert_trees_all_close(f(KEY, state, X, Y), f(KEY, posterior(state), X, Y), rtol=1e-6)


def test_memory_does_not_grow_with_the_number_of_samples():
    params = jnp.ones(10_000)
    state = make_state(params)

    def temporaries(num_samples):
        f = mc_value_and_grad(lambda p: jnp.sum(jnp.sin(p)), num_samples)
        memory = jax.jit(f).lower(KEY, state).compile().memory_analysis()
        return memory.temp_size_in_bytes

    # Beyond the keys: 8 bytes a sample, twice.
    assert temporaries(64) - temporaries(4) <= 60 * 8 * 4


def test_the_loss_is_traced_into_one_body_whatever_the_number_of_samples():
    def program_size(num_samples):
        f = mc_value_and_grad(loss, num_samples)
        return len(jax.jit(f).lower(KEY, make_state(), X, Y).as_text())

    assert program_size(64) < 1.05 * program_size(4)


@pytest.mark.parametrize("with_vma", [True, False])
def test_axis_name_draws_on_each_device_and_averages(with_vma):
    state = make_state()
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def with_aux(params, x, y):
        return loss(params, x, y), params["b"]

    f = mc_value_and_grad(with_aux, 3, has_aux=True, axis_name="d")
    out = ((spec(), spec("d")), spec(), spec())
    sharded = jax.shard_map(
        lambda s, x, y: f(KEY, s, x, y),
        mesh=mesh,
        in_specs=(spec(), spec("d"), spec("d")),
        out_specs=out,
        check_vma=with_vma,
    )
    (value, biases), grads, hess = jax.jit(sharded)(state, X, Y)
    assert np.unique(np.asarray(biases)).size == biases.size == 24
    parts = []
    for i in range(4):
        key = jax.random.fold_in(KEY, i)
        part = slice(2 * i, 2 * i + 2)
        parts.append(mc_value_and_grad(loss, 3)(key, state, X[part], Y[part]))
    expected = jax.tree.map(lambda *xs: sum(xs) / 4, *parts)
    chex.assert_trees_all_close((value, grads, hess), expected, **REORDERED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer >= 1"),
        ({"num_samples": 2.0}, "num_samples must be an integer >= 1"),
        ({"num_samples": 3, "antithetic": True}, "come in pairs"),
        ({"sample_batch_size": 0}, "sample_batch_size must be an integer >= 1"),
        ({"estimator": "fisher"}, "estimator must be one of"),
        ({"estimator_scale": 2.0}, "'gradsq' only"),
        ({"estimator": "gradsq", "estimator_scale": -1.0}, "estimator_scale must be > 0"),
        ({"batch_argnums": 1}, "split_batch=True only"),
        ({"rng_argnums": 0}, "parameters are argument 0"),
        ({"rng_argnums": (1,), "split_batch": True, "batch_argnums": (1,)}, "cannot be in both"),
    ],
)
def test_options_out_of_range_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        mc_value_and_grad(loss, **options)


def test_arguments_that_do_not_fit_are_refused_when_called():
    state = make_state()
    with pytest.raises(ValueError, match=r"argument 1 of fun has shape \(8, 3\).*3 equal slices"):
        mc_value_and_grad(loss, 3, split_batch=True)(KEY, state, X, Y)
    with pytest.raises(ValueError, match=r"names argument 3"):
        mc_value_and_grad(loss, rng_argnums=3)(KEY, state, X, Y)
    with pytest.raises(TypeError, match=r"argument 2 of fun .* not a single PRNG key"):
        mc_value_and_grad(loss, rng_argnums=2)(KEY, state, X, Y)
    with pytest.raises(TypeError, match="key must be a PRNG key"):
        mc_value_and_grad(loss)(0, state, X, Y)
    with pytest.raises(ValueError, match="found no IVONState"):
        mc_value_and_grad(loss)(KEY, optax.adam(1e-3).init(PARAMS), X, Y)
    with pytest.raises(TypeError, match="fun must be a function"):
        mc_value_and_grad(PARAMS)


@pytest.mark.parametrize("estimator", ["reparam", "gradsq", "hutchinson"])
def test_fixed_leaves_of_a_posterior_have_no_curvature(estimator):
    params = {"w": jnp.ones(2), "f": jnp.ones(2)}
    state = optax.masked(ivon(0.1, 100), {"w": True, "f": False}).init(params)
    q = posterior(state, params)
    f = mc_value_and_grad(lambda p: jnp.sum(p["w"] ** 2 + p["f"] ** 2), 2, estimator=estimator)
    _, grads, hess = f(KEY, q)
    np.testing.assert_array_equal(hess["f"], 0.0)
    np.testing.assert_allclose(grads["f"], 2.0)
    assert np.all(hess["w"] != 0.0)


def test_aux_may_hold_python_numbers():
    f = mc_value_and_grad(lambda p: (jnp.sum(p["b"]), {"one": 1.0}), 2, has_aux=True)
    (_, aux), _, _ = f(KEY, make_state())
    np.testing.assert_array_equal(aux["one"], [1.0, 1.0])


def test_a_gradient_transform_sees_no_integer_leaves_and_must_keep_the_shapes():
    params = {**PARAMS, "n": jnp.arange(2)}
    state = make_state(params)
    clip = optax.clip_by_global_norm(0.1)

    def f(p):
        return jnp.sum(p["b"])

    transform = mc_value_and_grad(f, grad_transform=lambda g: clip.update(g, clip.init(g))[0])
    _, grads, _ = transform(KEY, state, params=params)
    assert grads["n"].dtype == jax.dtypes.float0
    for bad in (lambda g: None, lambda g: (g, ()), lambda g: jax.tree.map(jnp.sum, g)):
        with pytest.raises(ValueError, match="grad_transform must return"):
            mc_value_and_grad(f, grad_transform=bad)(KEY, state, params=params)


def test_integer_parameters_for_an_owned_leaf_are_refused():
    integers = jax.tree.map(lambda p: p.astype(jnp.int32), PARAMS)
    with pytest.raises(TypeError, match=r"params are int32 at \['b'\]"):
        mc_value_and_grad(loss)(KEY, make_state(), X, Y, params=integers)
