"""Sampling inside the optimizer, for training loops that cannot pass the noise."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivon_jax._axes import varying_axes, varying_over
from ivon_jax._checks import check_positive
from ivon_jax._fusion import rounded
from ivon_jax._trees import Slots, copy_array, get_field, has_fields, set_fields, wide_dtype
from ivon_jax._window import Draw
from ivon_jax.optimizer import difference
from ivon_jax.sampling import THREEFRY, PosteriorNoise, threefry_key
from ivon_jax.state import IVONState, Posterior, Window, find_states, gaussian, is_ivon_state

PyTree = Any


class AutoSampleState(NamedTuple):
    """State of `auto_sample`.

    Attributes:
      key: data of the key for the draws to come, uint32 of shape (2,).
      draw_key: data of the key with which the loop's current parameters were drawn.
      calls: number of calls in the current window of `mc_samples`, int32.
      at_mean: whether the loop's current parameters are the mean and not a sample, bool.
      inner_state: state of the wrapped transformation.
    """

    key: jax.Array
    draw_key: jax.Array
    calls: jax.Array
    at_mean: jax.Array
    inner_state: optax.OptState


def auto_sample(
    tx: optax.GradientTransformation, key: jax.Array | int, mc_samples: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Keeps the training loop's parameters at a posterior sample.

    One line turns a loop that was written for AdamW into variational learning:
    `optax.apply_updates(params, updates)` lands on the *next* sample θ' = m' + n',
    and the noise of the current one is recovered as θ − m (regenerated from the key
    for parameters below float32). Evaluate, and save for evaluation, with
    `posterior_mean(state)` or `sample_params`, not with the loop's parameters.

    The first gradient is taken at the mean; it moves the mean but not `hess`.

    Args:
      tx: `ivon(...)`, or a transformation that contains it, such as
        `optax.chain(optax.clip_by_global_norm(1.0), ivon(...))`. Wrap once, around
        `optax.partition`: two wrappers with the same key would share draws.
      key: a PRNG key, or an integer seed. The state carries a copy of its data.
      mc_samples: number of calls, each with its own sample, whose ĝ and n⊙ĝ are averaged
        before the mean moves. Schedules inside `ivon` count steps of the mean; those of
        `optax.inject_hyperparams` count calls.

    Returns:
      A transformation whose `update(grads, state, params)` needs the loop's parameters.

    Raises:
      TypeError: if `key` is neither a key nor an integer.
      ValueError: if `mc_samples` is not a positive integer; in `init`, if `tx` contains no
        `ivon()`; in `update`, if `params` is missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
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
    mc_samples = check_positive("mc_samples", mc_samples)
    key_data = _key_data(key)
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> AutoSampleState:
        inner_state = inner.init(params)
        find_states(inner_state)
        if mc_samples > 1:
            inner_state = _map_states(_with_window, inner_state)
        return AutoSampleState(
            key=copy_array(key_data),
            draw_key=copy_array(key_data),
            calls=jnp.zeros([], jnp.int32),
            at_mean=jnp.array(True),
            inner_state=inner_state,
        )

    def update(
        grads: PyTree, state: AutoSampleState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, AutoSampleState]:
        if params is None:
            raise ValueError(
                "auto_sample needs the loop's parameters, which are the sample: call "
                "tx.update(grads, state, params)."
            )
        if {"noise", "hess"} & extra_args.keys():
            raise ValueError(
                "auto_sample draws its own noise: leave noise= and hess= out, or use the "
                "transformation inside it with sample_params."
            )
        calls = state.calls + 1
        draw = Draw(
            noise=_current_noise(state, params),
            at_sample=jnp.logical_not(state.at_mean),
            closes=calls == mc_samples,
        )
        updates, inner_state = inner.update(
            grads, state.inner_state, params, noise=draw, **extra_args
        )
        next_key, draw_key = jax.random.split(jax.random.wrap_key_data(state.key, impl=THREEFRY))
        updates = _move_to_sample(draw_key, gaussian(inner_state), params, updates)
        return updates, AutoSampleState(
            key=jax.random.key_data(next_key),
            draw_key=jax.random.key_data(draw_key),
            calls=jnp.where(draw.closes, 0, calls),
            at_mean=jnp.zeros_like(state.at_mean),
            inner_state=inner_state,
        )

    # optax types a state as any tree of arrays.
    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def reseed(state: PyTree, key: jax.Array | int) -> PyTree:
    """Gives the `auto_sample` inside a state a stream of its own, from the next draw on.

    For ensemble members or devices that start from one `init`:
    `jax.vmap(reseed)(states, keys)`.

    Args:
      state: a state that contains one or several `AutoSampleState`.
      key: a PRNG key, or an integer seed.

    Returns:
      The state with new keys; where there are several, each gets one split from `key`.

    Raises:
      TypeError: if `key` is neither a key nor an integer.
      ValueError: if there is no `AutoSampleState` in the state.

    Example:
      >>> import jax.numpy as jnp
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
        new_key = jax.tree.map(lambda _, data=data: copy_array(data), get_field(leaves[i], "key"))
        # Under shard_map the key of the next draw varies over the axes of the new one.
        axes = varying_axes(jax.typeof(data))
        draw_key = jax.tree.map(
            lambda x, axes=axes: varying_over(x, axes), get_field(leaves[i], "draw_key")
        )
        leaves[i] = set_fields(leaves[i], key=new_key, draw_key=draw_key)
    return treedef.unflatten(leaves)


def is_auto_sample_state(node: Any) -> bool:
    """Whether a node is an `AutoSampleState`, or the mapping that `flax.nnx.state` makes of it."""
    return has_fields(node, AutoSampleState, AutoSampleState._fields)


def _key_data(key: jax.Array | int) -> jax.Array:
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        key = jax.random.key(int(key), impl=THREEFRY)
    return jax.random.key_data(threefry_key(key))


def _map_states(f: Any, state: PyTree) -> PyTree:
    return jax.tree.map(lambda x: f(x) if is_ivon_state(x) else x, state, is_leaf=is_ivon_state)


def _with_window(state: IVONState) -> IVONState:
    def zeros() -> PyTree:
        return jax.tree.map(jnp.zeros_like, state.mean)

    def zero() -> jax.Array:
        return jnp.zeros([], jnp.int32)

    return state._replace(window=Window(zero(), zero(), zeros(), zeros()))


def _current_noise(state: AutoSampleState, params: PyTree) -> PyTree:
    """θ − m, or for leaves below float32, which rounding has moved, the draw itself."""
    q = gaussian(state.inner_state)
    slots = Slots(q.mean)
    owned, _ = slots.split("params", params)
    slots.check_shapes("params", owned)
    narrow = [wide_dtype(p.dtype) != p.dtype for p in owned]
    noise = [p.astype(m.dtype) - m for p, m in zip(owned, slots.leaves, strict=True)]
    if any(narrow):
        drawn = PosteriorNoise(q).draw(jax.random.wrap_key_data(state.draw_key, impl=THREEFRY))
        noise = [d if low else n for d, n, low in zip(drawn, noise, narrow, strict=True)]
    return slots.join(noise)


def _move_to_sample(key: jax.Array, q: Posterior, params: PyTree, updates: PyTree) -> PyTree:
    """Replaces the owned leaves of `updates` by the next sample minus `params`."""
    slots = Slots(q.mean)
    owned, _ = slots.split("params", params)
    _, others = slots.split("updates", updates)
    noise = PosteriorNoise(q).draw(key)
    moves = [
        difference(m + rounded(n), p, p.dtype) for m, n, p in zip(slots.leaves, noise, owned, strict=True)
    ]
    pure = slots.join(moves, others)
    return jax.tree.unflatten(jax.tree.structure(updates), jax.tree.leaves(pure))
