"""A posterior as a safetensors file, which other frameworks can read."""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivon_jax._core.basis import Sides
from ivon_jax._core.gaussians import gaussian
from ivon_jax._core.state import Posterior
from ivon_jax._core.trees import Owned, PyTree, without_nnx

FORMAT, WITH_BASIS = "ivon_jax.posterior.v1", "ivon_jax.posterior.v2"


def save(
    path: str | os.PathLike[str], state: PyTree, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a posterior to a safetensors file.

    The tensors are named by the keys of the tree, as in `mean.layer.kernel`; `rows` and `columns`
    in place of `mean` are the matrices of a basis. The file replaces an older one only when
    complete. (To resume training save the optimizer's state, as with Orbax.)

    Args:
      path: the file, usually `*.safetensors`.
      state: a `Posterior`, or an optax or `flax.nnx` state, of which only leaves that IVON owns are
        saved: for a whole model pass `posterior(state, params)`.
      metadata: strings to store beside it, such as the data set and the code's version.

    Raises:
      ImportError: if safetensors is not installed.
      FileNotFoundError: if the folder does not exist.
      TypeError: if `metadata` holds anything but strings.
      ValueError: if two leaves would have the same name, or `metadata` the reserved key.

    Example:
      >>> import tempfile
      >>> from ivon_jax import Posterior, load, save
      >>> q = Posterior({"w": jnp.ones(2)}, {"w": jnp.full(2, 4.0)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save(f"{folder}/q.safetensors", q, {"data": "digits"})
      ...     load(f"{folder}/q.safetensors").precision
      {'w': Array([4., 4.], dtype=float32)}
    """
    safetensors = _safetensors()
    metadata = dict(metadata or {})
    if not all(isinstance(x, str) for pair in metadata.items() for x in pair):
        raise TypeError("metadata must map strings to strings, as safetensors files do.")
    if "ivon_jax" in metadata:
        raise ValueError("the key 'ivon_jax' of metadata is reserved for the format.")
    q = gaussian(state)
    tensors: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}
    parts = {"mean": q.mean, "precision": q.precision}
    own = Owned(q.mean)
    for side in Sides._fields if q.basis else ():
        matrices = [getattr(sides, side) for sides in q.basis]
        parts[side] = own.join(
            [optax.MaskedNode() if isinstance(x, tuple) else x for x in matrices]
        )
    for part, tree in parts.items():
        for name, keys, leaf in _named(part, tree):
            if name in tensors:
                raise ValueError(f"two leaves would be called {name!r}: rename one of their keys.")
            # safetensors would write the memory of a transposed view as it lies there.
            tensors[name] = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
            names[name] = keys
    # Older versions would take the coordinates of a basis for parameters.
    kind = WITH_BASIS if q.basis else FORMAT
    metadata["ivon_jax"] = json.dumps({"format": kind, "paths": names})
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot save {target}: there is no folder {target.parent}.")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()  # with the usual mode, where safetensors would make it private
        mode = (target if target.exists() else temporary).stat().st_mode
        safetensors.save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], like: PyTree | None = None) -> Posterior:
    """Reads a posterior that `save` has written.

    Args:
      path: the file.
      like: a tree of the structure and shapes wanted, such as the parameters (arrays or
        `jax.ShapeDtypeStruct`s); by default nested dictionaries with string keys.

    Returns:
      The `Posterior`, in the dtypes in which it was saved.

    Raises:
      ImportError: if safetensors is not installed.
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, was not written by `save`, or does not fit `like`.
    """
    safetensors = _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    stored = json.loads(metadata.get("ivon_jax", "{}"))
    if stored.get("format") not in (FORMAT, WITH_BASIS):
        raise ValueError(f"{path} was not written by ivon_jax.save (no format {FORMAT!r}).")
    arrays = {name: _exact(name, tensor) for name, tensor in tensors.items()}
    mean, precision = (
        _nested(part, arrays, stored["paths"]) if like is None else _shaped(part, arrays, like)
        for part in ("mean", "precision")
    )
    names = [name.removeprefix("mean") for name, _, _ in _named("mean", mean)]
    basis = tuple(Sides(*(arrays.get(side + x, ()) for side in Sides._fields)) for x in names)
    return gaussian(Posterior(mean, precision, basis if jax.tree.leaves(basis) else ()))


def load_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that were given to `save`.

    Args:
      path: the file.

    Returns:
      A dictionary of strings.

    Raises:
      ImportError: if safetensors is not installed.
      ValueError: if it is not a safetensors file.
    """
    _safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    metadata.pop("ivon_jax", None)
    return metadata


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ImportError("a saved posterior needs safetensors: pip install safetensors") from error
    return safetensors.numpy


def _named(part: str, tree: PyTree) -> list[tuple[str, list[str], Any]]:
    """The name, the keys and the value of each leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(without_nnx(tree))
    keys = [[jax.tree_util.keystr((key,), simple=True) for key in path] for path, _ in leaves]
    return [(".".join([part, *k]), k, leaf) for k, (_, leaf) in zip(keys, leaves, strict=True)]


def _exact(name: str, tensor: np.ndarray) -> jax.Array:
    array = jnp.asarray(tensor)
    if array.dtype != tensor.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype}, which jax would narrow to {array.dtype}: set "
            "jax.config.update('jax_enable_x64', True) first."
        )
    return array


def _shaped(part: str, arrays: dict[str, jax.Array], like: PyTree) -> PyTree:
    leaves = _named(part, like)
    names = [name for name, _, _ in leaves]
    missing = [name for name in names if name not in arrays]
    extra = [x for x in arrays if x.split(".")[0] == part and x not in names]
    if missing or extra:
        lacks = f"it lacks {missing[0]}" if missing else f"it also has {extra[0]}"
        raise ValueError(f"the file does not fit the tree: {lacks}.")
    for name, _, leaf in leaves:
        if arrays[name].shape != jnp.shape(leaf):
            has, wants = arrays[name].shape, jnp.shape(leaf)
            raise ValueError(f"{name} has shape {has} in the file, but {wants} is expected.")
    return jax.tree.structure(without_nnx(like)).unflatten([arrays[name] for name in names])


def _nested(part: str, arrays: dict[str, jax.Array], paths: dict[str, list[str]]) -> PyTree:
    tree: dict[str, Any] = {}
    for name in (x for x in arrays if x.split(".")[0] == part):
        if not paths[name]:
            return arrays[name]
        *outer, last = paths[name]
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = arrays[name]
    return tree
