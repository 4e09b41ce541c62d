"""Drawing parameters from the posterior."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ivon_jax._core.axes import whole_first_axis, zeros_of
from ivon_jax._core.basis import are_turned, in_coordinates, in_parameters
from ivon_jax._core.compiler import kept_on_cpu, materialized
from ivon_jax._core.gaussians import gaussian
from ivon_jax._core.noise import THREEFRY, displaced, gaussian_noise, samples
from ivon_jax._core.state import Posterior
from ivon_jax._core.trees import Owned, PyTree, cast, place, unflatten_like, wide_zeros


def key_words(key: Any) -> jax.Array:
    """The uint32 words of a single typed or raw key."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        batch, words = key.shape, jax.random.key_data(key)
    elif dtype == jnp.uint32 and key.ndim >= 1 and key.shape[-1] in (2, 4):
        batch, words = key.shape[:-1], jnp.asarray(key)
    else:
        found = type(key).__name__ if dtype is None else f"{dtype} of shape {key.shape}"
        raise TypeError(f"key must be a PRNG key such as jax.random.key(0); got {found}.")
    if batch:
        raise ValueError(
            f"key must be a single key, but this is a batch of shape {batch}. For several samples: "
            "jax.vmap(sample_params, (0, None))(keys, state)."
        )
    return words.ravel()


def threefry_key(key: Any) -> jax.Array:
    """A threefry key, whose draws are the same for any sharding, from any single key.

    The words of a wider key are folded in, so that different keys stay different.
    """
    words = key_words(key)
    threefry = jax.random.wrap_key_data(words[:2], impl=THREEFRY)
    for word in words[2:]:
        threefry = jax.random.fold_in(threefry, word)
    return threefry


def sample_params(
    key: jax.Array, state: PyTree, params: PyTree | None = None
) -> tuple[PyTree, PyTree]:
    """Draws parameters θ = m + n from the posterior, n = ε/√(λ(h+δ)), ε ~ N(0, I).

    With a basis these are the coordinates of n = Q_L n' Q_Rᵀ.

    The draws are the same for any sharding, number of devices, and key implementation with the same
    key data. For several samples, `jax.vmap` over the keys.

    Args:
      key: a typed or raw PRNG key.
      state: an `IVONState`, any nested optax or `flax.nnx` state with one or several, or a
        `Posterior`.
      params: the parameters; if given, leaves that IVON does not own are taken from it, with zero
        noise, and the sample has its structure and dtypes. Otherwise they are `optax.MaskedNode`.

    Returns:
      The sample θ, and the noise n for `update`, in the dtype of the mean: exact, before θ was
      rounded. Dtypes below float32 round up or down at random, so that E[θ | n] = m + n. Under
      `jit` on accelerators the noise is drawn again there, not kept in memory.

    Raises:
      TypeError: if `key` is not a key.
      ValueError: if it is a batch, `state` has no `IVONState`, or `params` does not fit it.

    Example:
      >>> from ivon_jax import ivon, sample_params
      >>> state = ivon(0.1, ess=100).init({"w": jnp.ones(3)})
      >>> sample, noise = sample_params(jax.random.key(0), state)
      >>> bool(jnp.array_equal(sample["w"], state.mean["w"] + noise["w"]))
      True
    """
    q = ParameterGaussian(gaussian(state, params), params)
    key = threefry_key(key)
    noise = q.draw(key)
    later = kept_on_cpu(noise, jax.random.key_data(key), q.draw_again)
    return q.sample_of(key, noise), q.tree(later)


class ParameterGaussian:
    """A Gaussian whose mean and samples have structure and dtypes of the parameters, if given."""

    def __init__(self, q: Posterior, params: PyTree | None = None):
        self._own = Owned(q.mean)
        self.precision = self._own.checked("the precision", q.precision)
        self._basis = q.basis
        self._params = params
        self._dtypes = [m.dtype for m in self._own.leaves]
        if params is not None:
            self._dtypes = [p.dtype for p in self._own.checked("params", params)]
        for path, m, p in zip(self._own.paths, self._own.leaves, self._dtypes, strict=True):
            if jnp.issubdtype(m.dtype, jnp.floating) != jnp.issubdtype(p, jnp.floating):
                raise TypeError(f"params are {p} at {place(path)}, where the mean is {m.dtype}.")

    def draw(self, key: jax.Array, sign: jax.Array | float = 1.0) -> list[jax.Array]:
        """n = ±ε/√precision, ε ~ N(0, I), for each owned leaf; zero where it is infinite.

        With a basis ε/√precision are coordinates, which are turned into n.
        """
        # A CPU would draw once more wherever it uses a sample, and for every example of a batch.
        noise = gaussian_noise(key, self.precision, sign)
        return materialized(in_parameters(self._basis, noise))

    def tree_in_coordinates(self, tree: PyTree) -> PyTree:
        """A tree like the sample, with the owned leaves in coordinates."""
        owned, others = self._own.split("the gradients", tree)
        turned = self._own.join(self.in_coordinates(owned), others)
        return unflatten_like(tree, jax.tree.leaves(turned))

    def in_coordinates(self, leaves: list[jax.Array]) -> list[jax.Array]:
        """The coordinates of owned leaves, which may have further axes in front."""
        return in_coordinates(self._basis, leaves)

    def in_parameters(self, coordinates: list[jax.Array]) -> list[jax.Array]:
        """The owned leaves with these coordinates."""
        return in_parameters(self._basis, coordinates)

    def draw_again(self, key_data: jax.Array) -> list[jax.Array]:
        """The draw once more, from the data of its key."""
        return self.draw(jax.random.wrap_key_data(key_data, impl=THREEFRY))

    def sample_with_noise(
        self, key: jax.Array, sign: jax.Array | float
    ) -> tuple[PyTree, Callable[[], list[jax.Array]]]:
        """θ = m ± n in the parameters' dtypes, and how to compute ±n' where it is used.

        n' is θ − m, or a draw again where θ is rounded, or n' has been turned into n.
        """
        means, noise = self._own.leaves, self.draw(key, sign)
        moved = samples(key, means, noise, self._dtypes)

        def displacement() -> list[jax.Array]:
            others = are_turned(self._basis, noise)
            exact = [
                jnp.issubdtype(m.dtype, jnp.floating)
                and x.dtype == m.dtype == n.dtype
                and not turned
                for x, m, n, turned in zip(moved, means, noise, others, strict=True)
            ]
            # Behind a barrier: XLA would keep the first draw through forward and backward pass.
            data = jax.lax.optimization_barrier(jax.random.key_data(key))
            data = jax.random.wrap_key_data(data, impl=THREEFRY)
            again = noise if all(exact) else gaussian_noise(data, self.precision, sign)
            return [
                x - m if is_exact else n
                for x, m, n, is_exact in zip(moved, means, again, exact, strict=True)
            ]

        return self._like_params(moved), displacement

    def draw_sample(self, key: jax.Array) -> PyTree:
        """m + n in the parameters' dtypes."""
        return self.sample_of(key, self.draw(key))

    def sample_of(self, key: jax.Array, noise: list[jax.Array]) -> PyTree:
        """m + n in the parameters' dtypes, for noise drawn with this key."""
        return self._like_params(samples(key, self._own.leaves, noise, self._dtypes))

    def displaced(self, shift: list[jax.Array]) -> PyTree:
        """m + any shift, in the parameters' dtypes."""
        return self._like_params(list(map(displaced, self._own.leaves, shift)))

    def mean(self) -> PyTree:
        """m, in the parameters' dtypes."""
        return self._like_params(self._own.leaves)

    def _like_params(self, leaves: list[jax.Array]) -> PyTree:
        leaves = list(map(cast, leaves, self._dtypes))
        if self._params is None:
            return self._own.join(leaves)
        return self._own.fill(leaves, self._params, lambda x: x)

    def tree(self, leaves: list[jax.Array]) -> PyTree:
        """The leaves as a tree, with zeros where IVON does not own the parameter."""
        if self._params is None:
            return self._own.join(leaves)
        return self._own.fill(leaves, self._params, wide_zeros)


def one_or_many(at_sample: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`jax.vmap(at_sample)`; a single sample is evaluated without a batch axis, which is faster."""

    def at_samples(*members: Any) -> PyTree:
        if len(jax.tree.leaves(members)[0]) > 1:
            return jax.vmap(at_sample)(*members)
        out = at_sample(*jax.tree.map(lambda x: x[0], members))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], out)

    return at_samples


def fold_in_groups(
    group: Callable[[PyTree], tuple[PyTree, PyTree]],
    merge: Callable[[PyTree, PyTree], PyTree],
    members: PyTree,
    size: int | None,
    start: Callable[[Any], jax.Array] = zeros_of,
) -> tuple[PyTree, PyTree]:
    """Goes through samples in groups of `size` (one by default), so that memory does not grow.

    `group` maps members (samples on axis 0) to what `merge` merges, and to what is kept of each of
    them on axis 0; so does this function, of all. `start(aval)` is the neutral element of `merge`.
    """
    number = len(jax.tree.leaves(members)[0])
    size = min(size or 1, number)
    groups, rest = divmod(number, size)
    if groups == 1 and not rest:
        return group(members)
    full = groups * size
    members = jax.tree.map(whole_first_axis, members)
    first = jax.tree.map(lambda x: x[:size], members)
    total = jax.tree.map(start, jax.eval_shape(group, first)[0])

    def add(total: PyTree, members: PyTree) -> tuple[PyTree, PyTree]:
        result, kept = group(members)
        return merge(total, result), kept

    grouped = jax.tree.map(lambda x: x[:full].reshape(groups, size, *x.shape[1:]), members)
    total, kept = jax.lax.scan(add, total, grouped)
    kept = jax.tree.map(lambda x: x.reshape(full, *x.shape[2:]), kept)
    if rest:
        total, last = add(total, jax.tree.map(lambda x: x[full:], members))
        kept = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), kept, last)
    return total, kept
