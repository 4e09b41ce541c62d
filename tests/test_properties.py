"""Properties of the update for any gradients, noise and legal hyperparameters."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ivon_jax import ivon, posterior, sample_params
from ivon_jax._core.optimizer import PRECISION_FLOOR

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
SIZE = 8

hyperparameters = st.fixed_dictionaries(
    {
        "learning_rate": st.floats(0.0, 10.0),
        "ess": st.floats(1.0, 1e10),
        "hess_init": st.floats(1e-4, 10.0),
        "b1": st.floats(0.0, 0.999),
        "b2": st.floats(0.0, 0.99999),
        "weight_decay": st.floats(0.0, 1.0),
        "clip_radius": st.one_of(st.just(float("inf")), st.floats(1e-4, 1.0)),
    }
)
# |x| = |(1−β₂)(ĥ−h)|/(h+δ) up to 1e15, the range in which float32 cannot overflow.
pulls = hnp.arrays(np.float32, SIZE, elements=st.floats(-(2.0**50), 2.0**50, width=32))


@jax.jit
def step(hyper, state, grads, hess):
    return ivon(**hyper).update(grads, state, hess=hess)[1]


def float32(hyper):
    return {name: jnp.float32(value) for name, value in hyper.items()}


@SETTINGS
@given(hyperparameters, st.lists(pulls, min_size=1, max_size=4))
def test_the_precision_stays_positive_above_the_floor_and_at_least_half(hyper, steps):
    hyper = float32(hyper)
    state = ivon(**hyper).init(jnp.zeros(SIZE))
    floor = PRECISION_FLOOR * (hyper["hess_init"] + hyper["weight_decay"])
    for x in steps:
        old = state.hess + hyper["weight_decay"]
        # The new precision is old·(1+x+x²/2): from a large one a smaller |x| overflows.
        bound = jnp.minimum(jnp.sqrt(1e37 / old), 1e37 * (1 - hyper["b2"]) / old)  # nor may ĥ
        x = jnp.clip(x, -bound, bound)
        hess = state.hess + x * old / (1 - hyper["b2"])
        state = step(hyper, state, jnp.zeros(SIZE), hess)
        new = state.hess + hyper["weight_decay"]
        # Rounding of h+δ: half an ulp of δ, relative to the floor 1e-6(h₀+δ) at most 6 %; the
        # sums 1 + x + x²/2 lose a few ulp of x² near their minimum at x = −1.
        assert np.all(new >= 0.93 * floor)
        assert np.all(new >= 0.4999 * old - 4e-7 * hyper["weight_decay"])
        assert np.all(np.isfinite(state.hess))


@SETTINGS
@given(hyperparameters, st.sampled_from([-1.0, -0.9, -2.0, 1e-3]))
def test_a_hundred_adversarial_steps_in_a_row_never_reach_zero(hyper, pull):
    hyper = float32(hyper)
    state = ivon(**hyper).init(jnp.zeros(SIZE))
    delta = hyper["weight_decay"]

    def adversary(state, _):
        # x = −1 halves the precision each time, the most that any gradient can do.
        hess = state.hess + pull * (state.hess + delta) / (1 - hyper["b2"])
        return step(hyper, state, jnp.zeros(SIZE), hess), state.hess + delta

    state, precisions = jax.jit(lambda s: jax.lax.scan(adversary, s, length=100))(state)
    assert np.all(precisions > 0)
    sample, noise = sample_params(jax.random.key(0), state)
    assert np.all(np.isfinite(sample)) and np.all(np.isfinite(noise))


@SETTINGS
@given(
    hyperparameters,
    # A compiled step flushes subnormal numbers to zero.
    hnp.arrays(np.float32, SIZE, elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False)),
    hnp.arrays(np.float32, SIZE, elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False)),
)
def test_no_parameter_moves_further_than_rate_times_precision_times_radius(hyper, grads, mean):
    hyper = {**float32(hyper), "clip_radius": jnp.float32(min(hyper["clip_radius"], 1.0))}
    state = ivon(**hyper).init(jnp.asarray(mean))
    new = step(hyper, state, jnp.asarray(grads), state.hess)
    delta = hyper["weight_decay"]
    bound = hyper["learning_rate"] * (hyper["hess_init"] + delta) * hyper["clip_radius"]
    moved = np.abs(np.float64(new.mean) - np.float64(mean))
    # m − αu is rounded once, as is the bound itself.
    assert np.all(moved <= float(bound) * (1 + 1e-6) + np.spacing(np.abs(mean) + float(bound)))


leaf_shapes = st.sampled_from([(), (1,), (3,), (0,), (2, 2), (2, 0, 3)])
leaves = st.one_of(
    st.builds(lambda s, d: np.ones(s, d), leaf_shapes, st.sampled_from(["f4", "f2", "i4", "?"])),
    st.none(),
)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.dictionaries(st.sampled_from("abc"), children, max_size=3),
        st.lists(children, max_size=3),
        st.tuples(children),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(trees)
def test_any_tree_keeps_structure_shapes_and_dtypes(tree):
    params = {"root": jax.tree.map(jnp.asarray, tree)}
    tx = ivon(0.1, ess=10)

    def step(params):
        state = tx.init(params)
        sample, noise = sample_params(jax.random.key(0), state, params)
        updates, new = tx.update(sample, state, params, noise=noise)
        return (state, new), (sample, updates), posterior(state, params).mean

    def signature(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)

    # Structures and types are decided while tracing; nothing needs to be compiled.
    (state, new), (sample, updates), mean = jax.eval_shape(step, params)
    assert signature(new) == signature(state)
    assert signature(sample) == signature(updates) == signature(params)
    assert jax.tree.structure(mean) == jax.tree.structure(params)
