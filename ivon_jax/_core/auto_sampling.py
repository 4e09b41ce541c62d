"""Sampling inside the optimizer, for training loops that cannot pass the noise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivon_jax._core.axes import varying_axes, varying_over
from ivon_jax._core.basis import are_turned
from ivon_jax._core.checks import check_positive
from ivon_jax._core.gaussians import (
    check_recoverable,
    current_coordinates,
    current_noise,
    gaussian_basis,
    gaussian_mean,
    owned_leaves,
    with_means,
    without_means,
)
from ivon_jax._core.noise import THREEFRY, derived_keys, samples
from ivon_jax._core.sampling import threefry_key
from ivon_jax._core.state import (
    AutoSampleState,
    IVONState,
    Window,
    find_states,
    is_auto_sample_state,
    is_lean,
    map_states,
)
from ivon_jax._core.tampering import checked, with_loaded_means
from ivon_jax._core.trees import (
    PyTree,
    also_abstract,
    copy_array,
    difference,
    get_field,
    set_fields,
    unflatten_like,
    wide_dtype,
)
from ivon_jax._core.windows import Draw

_STREAM = 0x4155544F  # "AUTO": draws differ from those of `sample_params` with keys split from it


def auto_sample(
    tx: optax.GradientTransformation,
    key: jax.Array | int,
    *,
    num_samples: int = 1,
    store_mean: bool = True,
    antithetic: bool = False,
    check: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the training loop's parameters at a posterior sample.

    One line turns a loop written for AdamW into variational learning: `optax.apply_updates(params,
    updates)` lands on the *next* sample θ' = m' + n', and the noise of the current one is recovered
    as θ − m (redrawn from the key in a basis, and for parameters below float32, where the sum may
    round again). Evaluate and save `posterior_mean(state)`, not the loop's parameters. The first
    gradient is taken at the mean; it moves the mean but not `hess`.

    Args:
      tx: `ivon(...)`, or what contains it, as `optax.chain(optax.clip(1.0), ivon(...))`. Wrap once,
        around `optax.partition`: two wrappers with the same key would share draws.
      key: a PRNG key, or an integer seed. The state carries a copy of its data.
      num_samples: number of calls, each with its own sample, whose ĝ and n⊙ĝ are averaged
        before the mean moves. Schedules inside `ivon` count steps of the mean; those of
        `optax.inject_hyperparams` count calls.
      store_mean: whether the state holds the mean. Without it the state is as large as AdamW's:
        the mean is recovered as θ − n, with n drawn again from its key, and what needs the mean
        takes the loop's parameters, as in `posterior(state, params)`. The recovery adds about the
        rounding of a float32 update, twice that where σ is as large as the means.
      antithetic: whether every second sample mirrors the one before, m' − εσ' after m + εσ. With
        an even `num_samples` both are taken at one mean. With `num_samples=1` the mean moves in
        between, by a step that depends on ε, and h is biased upwards.
      check: whether each call verifies that the loop's parameters are those that the last one
        asked for, and that nothing after `ivon` in `tx` has changed its updates. If not, `update`
        raises, or under `jit` the mean becomes NaN. The state then holds a copy of the parameters:
        for a new loop's first steps. `learning_status(..., params=params)` costs nothing and finds
        most of it.

    Returns:
      A transformation whose `update(grads, state, params)` takes the loop's parameters. Without
      them the sample is drawn again, where all leaves are `ivon`'s and at least float32; the loop
      then adds one rounding of its parameters per step, which nothing corrects.

    Raises:
      TypeError: if `key` is no key or integer, or parameters are below float32 with
        `store_mean=False`.
      ValueError: if `num_samples` is not positive, `tx` has no `ivon()`, `params` are missing
        where they are needed, or `check` finds something.

    Example:
      >>> from ivon_jax import auto_sample, ivon, posterior_mean
      >>> tx = auto_sample(ivon(0.2, ess=1000, weight_decay=0.0), key=0)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(lambda w: 0.5 * jnp.sum((w - 3.0) ** 2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(jnp.all(jnp.abs(posterior_mean(state) - 3.0) < 0.1))
      True
    """
    num_samples = check_positive("num_samples", num_samples)
    key_data = _key_data(key)
    inner = optax.with_extra_args_support(tx)

    @also_abstract
    def init(params: PyTree) -> AutoSampleState:
        inner_state = inner.init(params)
        own = owned_leaves(inner_state)
        owned = own.split("params", params)[0]
        if num_samples > 1:
            inner_state = map_states(_with_window, inner_state)
        if not store_mean:
            check_recoverable(own, params)
            inner_state = without_means(inner_state)
        return AutoSampleState(
            key=copy_array(key_data),
            draw_key=copy_array(key_data),
            calls=jnp.zeros([], jnp.int32),
            at_mean=jnp.array(True),
            inner_state=inner_state,
            mirrored=jnp.array(False) if antithetic else (),
            expected=own.join(list(map(copy_array, owned))) if check else (),
        )

    def update(
        grads: PyTree, state: AutoSampleState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AutoSampleState]:
        if {"noise", "hess"} & extra_args.keys():
            raise ValueError("auto_sample draws its own noise: leave noise= and hess= out.")
        options = {"store_mean": store_mean, "antithetic": antithetic, "check": check}
        _check_continues(state, num_samples, options)
        given, handed_over = state, params is not None
        if params is None:
            params = _drawn_again(state, grads)
        own = owned_leaves(state.inner_state)
        owned = own.checked("params", params)
        if not store_mean:
            state = with_means(state, params)
        calls = state.calls + 1
        draw = Draw(
            noise=own.join(_coordinates_of(state, owned)),
            at_sample=jnp.logical_not(state.at_mean),
            closes=calls >= num_samples,  # or what a run with another number has begun
        )
        if store_mean:  # after the noise, which is not read at the first call
            state = with_loaded_means(state, owned)
        updates, inner_state = inner.update(
            grads, state.inner_state, params, noise=draw, **extra_args
        )
        own_updates, other_updates = own.split("updates", updates)
        if check:
            inner_state = checked(state, inner_state, owned, own_updates, handed_over=handed_over)
        key, draw_key = derived_keys(jax.random.wrap_key_data(state.key, impl=THREEFRY), 0, 2)
        new_state = state._replace(
            key=key,
            draw_key=draw_key,
            calls=jnp.where(draw.closes, 0, calls),
            at_mean=jnp.zeros_like(state.at_mean),
            inner_state=inner_state,
        )
        if antithetic:
            pairs_end = draw.closes if num_samples % 2 == 0 else False
            mirrored = ~(state.at_mean | jnp.asarray(state.mirrored) | pairs_end)
            new_state = new_state._replace(
                key=jnp.where(mirrored, state.key, key),
                draw_key=jnp.where(mirrored, state.draw_key, draw_key),
                mirrored=mirrored,
            )
        means = jax.tree.leaves(gaussian_mean(inner_state))
        noise, dtypes = current_noise(new_state), [p.dtype for p in owned]
        new_key = jax.random.wrap_key_data(new_state.draw_key, impl=THREEFRY)
        moved = samples(new_key, means, noise, dtypes)
        moves = [difference(x, p, p.dtype) for x, p in zip(moved, owned, strict=True)]
        if check:
            landed = [(p + u).astype(p.dtype) for p, u in zip(owned, moves, strict=True)]
            new_state = new_state._replace(expected=own.join(landed))
        joined = own.join(moves, other_updates)
        updates = unflatten_like(updates, jax.tree.leaves(joined))
        if not store_mean:
            new_state = new_state._replace(inner_state=without_means(inner_state))
        # Of the same nodes: those of an `nnx.State` have become dicts on the way.
        return updates, unflatten_like(given, jax.tree.leaves(new_state))

    # optax types a state as any tree of arrays.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def reseed(state: PyTree, key: jax.Array | int) -> PyTree:
    """Gives the `auto_sample` inside a state a stream of its own, from the next draw on.

    For ensemble members that start from one `init`: `jax.vmap(reseed)(states, keys)`.

    Args:
      state: a state that contains one or several `AutoSampleState`.
      key: a PRNG key, or an integer seed.

    Returns:
      The state with new keys; where there are several, each gets one split from `key`.

    Raises:
      TypeError: if `key` is neither a key nor an integer.
      ValueError: if there is no `AutoSampleState` in the state.

    Example:
      >>> from ivon_jax import auto_sample, ivon, reseed
      >>> state = auto_sample(ivon(0.1, ess=100), key=0).init(jnp.ones(3))
      >>> bool((reseed(state, 1).key == state.key).all())
      False
    """
    base = jax.random.wrap_key_data(_key_data(key), impl=THREEFRY)
    leaves, treedef = jax.tree.flatten(state, is_leaf=is_auto_sample_state)
    found = [i for i, x in enumerate(leaves) if is_auto_sample_state(x)]
    if not found:
        raise ValueError(
            f"found no AutoSampleState in a state of type {type(state).__name__}: only the "
            "state of auto_sample(tx, key) carries a key."
        )
    keys = jax.random.split(base, len(found)) if len(found) > 1 else [base]
    for i, new in zip(found, keys, strict=True):
        data = jax.random.key_data(new)
        old_shape = jax.tree.leaves(get_field(leaves[i], "key"))[0].shape
        if old_shape != data.shape:
            raise ValueError(
                f"this is a stack of states (key has shape {old_shape}): use "
                "jax.vmap(reseed)(states, keys)."
            )
        # The leaf may sit in a flax.nnx Variable, which is kept.
        new_key = unflatten_like(get_field(leaves[i], "key"), [copy_array(data)])
        # Under shard_map the key of the next draw varies over the axes of the new one.
        old = get_field(leaves[i], "draw_key")
        draw_key = varying_over(jax.tree.leaves(old)[0], varying_axes(jax.typeof(data)))
        leaves[i] = set_fields(leaves[i], key=new_key, draw_key=unflatten_like(old, [draw_key]))
    return treedef.unflatten(leaves)


def _key_data(key: jax.Array | int) -> jax.Array:
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        key = jax.random.key(int(key), impl=THREEFRY)
    return derived_keys(threefry_key(key), _STREAM, 1)[0]


def _with_window(state: IVONState) -> IVONState:
    # Buffers of their own, so that donation does not meet one twice.
    calls, draws = (jnp.zeros([], jnp.int32) for _ in range(2))
    grads, products = (jax.tree.map(jnp.zeros_like, state.mean) for _ in range(2))
    return state._replace(window=Window(calls, draws, grads, products))


def _coordinates_of(state: AutoSampleState, owned: list[jax.Array]) -> list[jax.Array]:
    """Coordinates of θ − m; where θ was rounded, or n' was turned into n, those of the draw."""
    means = jax.tree.leaves(gaussian_mean(state.inner_state))
    noise = [p.astype(m.dtype) - m for p, m in zip(owned, means, strict=True)]
    others = are_turned(gaussian_basis(state.inner_state), owned)
    again = [wide_dtype(p.dtype) != p.dtype or x for p, x in zip(owned, others, strict=True)]
    drawn = current_coordinates(state) if any(again) else noise
    return [d if x else n for d, n, x in zip(drawn, noise, again, strict=True)]


def _drawn_again(state: AutoSampleState, grads: PyTree) -> PyTree:
    """The loop's parameters, for a loop that does not hand them over."""
    asked = "call tx.update(grads, state, params)"
    if any(map(is_lean, find_states(state.inner_state))):
        raise ValueError(f"store_mean=False recovers the mean from the sample: {asked}.")
    own = owned_leaves(state.inner_state)
    owned, others = own.split("grads", grads)
    narrow = any(wide_dtype(g.dtype) != g.dtype for g in owned)
    if narrow or jax.tree.leaves(others):
        raise ValueError(
            f"{asked}: without params auto_sample knows leaves that ivon() owns, in float32 or "
            "float64, and no others."
        )
    means = jax.tree.leaves(gaussian_mean(state.inner_state))
    noise = [jnp.where(state.at_mean, 0, n) for n in current_noise(state)]
    key = jax.random.wrap_key_data(state.draw_key, impl=THREEFRY)
    return unflatten_like(grads, samples(key, means, noise, [g.dtype for g in owned]))


def _check_continues(state: Any, num_samples: int, options: dict[str, bool]) -> None:
    """Refuses what is no state of `auto_sample`, or lacks or has fields that the options do not."""
    if not is_auto_sample_state(state):
        raise TypeError(f"expected the state of auto_sample; got {type(state).__name__}.")
    dtype = jnp.result_type(state.key)
    if dtype != jnp.uint32:
        raise TypeError(
            f"the key in the state of auto_sample is {dtype}, not uint32: the state was cast. Cast "
            "the parameters only, and restore the state as it was."
        )
    restart = (
        "keep the option, or start anew from its mean: params = posterior_mean(state, params); "
        "state = tx.init(params). Curvature, momentum and step count then start again."
    )
    parts = [part for part in find_states(state.inner_state) if jax.tree.leaves(part.hess)]
    made_with = {
        "antithetic": not isinstance(state.mirrored, tuple),
        "store_mean": not any(map(is_lean, parts)) if parts else options["store_mean"],
        "check": not (isinstance(state.expected, tuple) and state.expected == ()),
    }
    for name, there in made_with.items():
        here = options[name]
        if here != there:
            raise ValueError(
                f"this state was made by auto_sample with {name}={there} and cannot be continued "
                f"with {name}={here}: {restart}"
            )
    if num_samples > 1 and not all(isinstance(part.window, Window) for part in parts):
        raise ValueError(
            f"this state was made with num_samples=1 and has no room for the sums over "
            f"num_samples={num_samples}: {restart}"
        )
