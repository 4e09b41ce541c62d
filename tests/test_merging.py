import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import Eigenbasis, Posterior, ivon, merge, posterior, prior_of, task_arithmetic

INF = jnp.inf


def q(mean, precision):
    return Posterior({"w": jnp.asarray(mean)}, {"w": jnp.asarray(precision, jnp.float32)})


A, B = q([0.0, 2.0], [1.0, 4.0]), q([4.0, 2.0], [3.0, 4.0])


def test_posteriors_of_different_ess_are_weighted_by_their_precisions():
    a = posterior(ivon(0.1, ess=10, weight_decay=0.0).init(jnp.zeros(1)))
    b = posterior(ivon(0.1, ess=30, weight_decay=0.0).init(jnp.full(1, 4.0)))
    np.testing.assert_allclose(merge([a, b]).mean, [3.0])


def test_one_model_merges_to_itself():
    for got in (merge([A]), merge([A], base=q([1.0, 1.0], [0.5, 0.5]))):
        chex.assert_trees_all_close(got, A, rtol=1e-6)


def test_fixed_elements_stay_where_all_models_agree():
    fixed = q([1.0, 2.0], [INF, 4.0])
    got = merge([fixed, q([1.0, 6.0], [INF, 4.0])])
    np.testing.assert_array_equal(got.mean["w"], [1.0, 4.0])
    np.testing.assert_array_equal(got.precision["w"], [INF, 8.0])
    state = ivon(0.1, 10).init({"w": jnp.ones(2)})
    np.testing.assert_allclose(merge([state, state]).precision["w"], 20.002, rtol=1e-6)
    trees = [{"n": jnp.arange(2), "w": jnp.full(2, x)} for x in (1.0, 3.0)]
    arithmetic = task_arithmetic(trees[1:], trees[0], weights=[0.5])
    np.testing.assert_array_equal(arithmetic["w"], [2.0, 2.0])
    assert arithmetic["n"].dtype == jnp.int32
    with_integers = Posterior({"n": jnp.arange(2)}, {"n": jnp.full(2, INF)})
    assert merge([with_integers] * 2).mean["n"].dtype == jnp.int32


@pytest.mark.parametrize(
    "other", [q([1.5, 2.0], [INF, 4.0]), q([1.0, 2.0], [2.0, 4.0])], ids=["value", "precision"]
)
def test_fixed_elements_that_differ_are_refused(other):
    fixed = q([1.0, 2.0], [INF, 4.0])
    for models, base in (([fixed, other], None), ([fixed], other)):
        with pytest.raises(ValueError, match=r"fixed, but at \['w'\]"):
            merge(models, base=base)
        traced = jax.jit(lambda m, b: merge(m, base=b))(models, base)
        assert np.isnan(traced.mean["w"][0]) and np.isfinite(traced.mean["w"][1])


def test_removing_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match=r"not positive at \['w'\]: smallest -2"):
        merge([A, B], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match=r"smallest 0. Where it is zero no model knows anything"):
        merge([q([0.0, 1.0], [0.0, 1.0])] * 2)
    traced = jax.jit(lambda a, b: merge([a, b], weights=[1.0, -1.0]))(A, B)
    assert np.isnan(traced.mean["w"]).all() and np.isnan(traced.precision["w"]).all()


def test_low_precision_weights_are_merged_in_float32():
    narrow = Posterior(jnp.array([1.0, 3.0], jnp.bfloat16), jnp.array([1.0, 1e-4]))
    other = Posterior(jnp.array([2.0, 5.0], jnp.bfloat16), jnp.array([3.0, 1e-4]))
    got = merge([narrow, other])
    assert got.mean.dtype == jnp.bfloat16 and got.precision.dtype == jnp.float32
    np.testing.assert_array_equal(got.mean.astype(jnp.float32), [1.75, 4.0])


def test_bad_input_is_refused():
    for wrong in ([], A):
        with pytest.raises(TypeError, match="non-empty sequence, with one entry per model"):
            merge(wrong)
    with pytest.raises(ValueError, match="found no IVONState"):
        merge([A.mean])
    with pytest.raises(TypeError, match="base must be a Posterior"):
        merge([A], base=A.mean)
    with pytest.raises(ValueError, match="2 models, 1 weights"):
        merge([A, B], weights=[1.0])
    with pytest.raises(ValueError, match="each of weights"):
        merge([A, B], weights=[1.0, np.nan])
    with pytest.raises(ValueError, match=r"posteriors\[1\].mean .* lacks \['w'\]"):
        merge([A, Posterior({"v": jnp.ones(2)}, {"v": jnp.ones(2)})])
    with pytest.raises(ValueError, match=r"posteriors\[1\].mean has shape \(3,\)"):
        merge([A, q(jnp.ones(3), jnp.ones(3))])
    with pytest.raises(ValueError, match=r"base.precision must be >= 0 .* the smallest is -1"):
        merge([A], base=q([0.0, 0.0], [1.0, -1.0]))
    with pytest.raises(ValueError, match=r"posteriors\[0\].precision must be >= 0"):
        merge([q([0.0, 0.0], [1.0, np.nan])])
    with pytest.raises(ValueError, match="structure"):
        task_arithmetic([A.mean], {"v": jnp.ones(2)})


def test_one_model_is_not_taken_for_several_and_any_sequence_is_taken():
    q = Posterior({"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    assert jnp.all(merge(x for x in (q, q)).precision["a"] == 2)
    for one in (q, ivon(0.1, ess=10).init(q.mean)):
        with pytest.raises(TypeError, match="one entry per model"):
            merge(one)
    for params in (q.mean, jnp.ones((2, 2))):
        with pytest.raises(TypeError, match="one model per entry"):
            task_arithmetic(params, q.mean)


def test_merging_in_a_basis_is_the_same_under_jit():
    params = {"w": jnp.arange(6.0).reshape(3, 2)}
    tx = ivon(0.1, ess=100, basis=Eigenbasis())
    state = tx.init(params)
    state = tx.update({"w": jnp.ones((3, 2))}, state, params, hess=state.hess)[1]
    base = prior_of(state)._replace(basis=())
    merged = merge([state, state], base=base)
    traced = jax.jit(lambda q, base: merge([q, q], base=base))(state, base)
    chex.assert_trees_all_close(traced, merged, rtol=1e-6)
    uneven = base._replace(precision={"w": base.precision["w"].at[0, 0].set(2.0)})
    with pytest.raises(ValueError, match="different bases"):
        merge([state, state], base=uneven)
    spoiled = jax.jit(lambda q, base: merge([q, q], base=base))(state, uneven)
    assert np.isnan(spoiled.mean["w"]).all()


def test_task_arithmetic_takes_parameters_only():
    state = ivon(0.1, 100).init(A.mean)
    for wrong in (A, state):
        with pytest.raises(TypeError, match=r"pass posterior_mean\(state\)"):
            task_arithmetic([wrong, wrong], A.mean)
        with pytest.raises(TypeError, match="a sequence"):
            task_arithmetic(wrong, A.mean)
    with pytest.raises(ValueError, match="params is empty"):
        task_arithmetic([], A.mean)
    one = task_arithmetic((x for x in [B.mean]), A.mean)
    chex.assert_trees_all_equal(one, B.mean)
    key = jax.random.key(0)
    with_others = [{"key": key, "flag": jnp.array(True), "scale": x} for x in (1.0, 3.0)]
    merged = task_arithmetic(with_others[1:], with_others[0], weights=[0.5])
    assert merged["key"] == key and merged["flag"] and merged["scale"] == 2.0
    with pytest.raises(ValueError, match=r"the models differ at \['flag'\]"):
        task_arithmetic([{**with_others[1], "flag": jnp.array(False)}], with_others[0])


def test_keys_are_merged_where_they_are_equal():
    params = {"key": jax.random.key(0), "w": jnp.ones(2)}
    q = posterior(ivon(0.1, 100).init(params), params)
    assert merge([q, q]).mean["key"] == params["key"]
    other = q._replace(mean={**q.mean, "key": jax.random.key(1)})
    with pytest.raises(ValueError, match=r"fixed, but at \['key'\]"):
        merge([q, other])


def test_a_leaf_that_only_one_posterior_has_is_refused_in_any_order():
    def q(b):
        return Posterior(*[{"a": jnp.ones(2), "b": b}] * 2)

    both, one = q(jnp.ones(2)), q(optax.MaskedNode())
    for posteriors in ([one, both], [both, one]):
        with pytest.raises(ValueError, match=r"\['b'\]"):
            merge(posteriors)
    with pytest.raises(ValueError, match=r"base\.mean has leaves at \['b'\]"):
        merge([one], base=both)
