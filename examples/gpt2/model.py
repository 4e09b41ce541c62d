"""GPT-2 in Flax linen: layers stacked for a scan, every weight with its mesh axes.

The mesh has three axes: `data` (batch only), `fsdp` (batch, and weights stored in shards) and
`model` (tensor parallel: heads, hidden units, vocabulary). Where it is used, a weight is cast to
the compute dtype and gathered over `fsdp`. Gradients are summed in the compute dtype.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Array = jax.Array
Params = Any
Axis = str | None

MESH_AXES = ("data", "fsdp", "model")


@dataclass(frozen=True)
class Config:
    """Shape of a GPT-2."""

    width: int
    depth: int
    heads: int
    context: int = 1024
    vocabulary: int = 50304  # GPT-2's 50257, rounded up to a multiple of 128
    dtype: str = "bfloat16"  # of activations and of the weights where they are used
    remat: bool = True  # recompute each layer in the backward pass instead of keeping it


PRESETS = {
    "tiny": Config(width=128, depth=4, heads=4, context=128, remat=False),
    "small": Config(width=768, depth=12, heads=12),
    "medium": Config(width=1024, depth=24, heads=16),
    "large": Config(width=1280, depth=36, heads=20),
}


class Layout(NamedTuple):
    """Where arrays live: the mesh, and the axes that the batch of one model is split over."""

    mesh: Mesh
    batch: tuple[str, ...] = ("data", "fsdp")

    def sharding(self, *axes: Axis) -> NamedSharding:
        """A sharding by mesh axes, where "batch" stands for those of the batch."""
        resolved = (self.batch if axis == "batch" else axis for axis in axes)
        return NamedSharding(self.mesh, PartitionSpec(*resolved))

    @property
    def explicit(self) -> bool:
        """Whether shardings are part of the types of arrays."""
        return self.mesh.axis_types[0] == AxisType.Explicit

    def place(self, x: Array, *axes: Axis) -> Array:
        """The array with this sharding."""
        move = jax.sharding.reshard if self.explicit else jax.lax.with_sharding_constraint
        return move(x, self.sharding(*axes))

    def einsum(self, equation: str, x: Array, w: Array, *axes: Axis) -> Array:
        """The product with this sharding."""
        out: Any = {"out_sharding": self.sharding(*axes)} if self.explicit else {}
        return self.place(jnp.einsum(equation, x, w, **out), *axes)

    def lookup(self, table: Array, tokens: Array, *axes: Axis) -> Array:
        """Rows of the table; NaN for tokens that it does not have."""
        out: Any = {"out_sharding": self.sharding(*axes)} if self.explicit else {}
        return self.place(table.at[tokens].get(mode="fill", fill_value=jnp.nan, **out), *axes)


class _Module(nn.Module):
    config: Config
    layout: Layout

    def weight(
        self, name: str, shape: tuple[int, ...], axes: tuple[Axis, ...], std: float = 0.0
    ) -> Array:
        """A float32 parameter stored in shards, in the compute dtype and gathered over `fsdp`."""
        init = nn.with_partitioning(nn.initializers.normal(std), axes)
        # Unboxed by hand: flax would constrain the box's sharding, which Explicit meshes refuse.
        param = _values(self.param(name, init, shape, jnp.float32, unbox=False))
        stored = self.layout.place(param, *axes).astype(self.config.dtype)
        return self.layout.place(stored, *(None if axis == "fsdp" else axis for axis in axes))

    def norm(self, name: str, x: Array) -> Array:
        """Layer normalisation, computed in float32."""
        return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)(x).astype(self.config.dtype)


class Block(_Module):
    """Attention and MLP, each after a layer normalisation and with a residual connection."""

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        """Maps (batch, length, width) to the same; the second value is for `nn.scan`."""
        c, place = self.config, self.layout
        size, wide = c.width // c.heads, 4 * c.width
        small = 0.02 / math.sqrt(2 * c.depth)  # of what is added to the residual connection

        y = self.norm("attention_norm", x)
        axes = ("fsdp", None, "model", None)
        kernel = self.weight("qkv_kernel", (c.width, 3, c.heads, size), axes, 0.02)
        bias = self.weight("qkv_bias", (3, c.heads, size), axes[1:])[None, None]
        qkv = place.einsum("btd,dchk->btchk", y, kernel, "batch", None, *axes[1:]) + bias
        y = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), is_causal=True)
        axes = ("model", None, "fsdp")
        kernel = self.weight("output_kernel", (c.heads, size, c.width), axes, small)
        x = x + place.einsum("bthk,hkd->btd", y, kernel, "batch", None, None)
        x = x + self.weight("output_bias", (c.width,), (None,))[None, None]

        y = self.norm("mlp_norm", x)
        kernel = self.weight("mlp_in_kernel", (c.width, wide), ("fsdp", "model"), 0.02)
        bias = self.weight("mlp_in_bias", (wide,), ("model",))[None, None]
        y = place.einsum("btd,df->btf", y, kernel, "batch", None, "model") + bias
        kernel = self.weight("mlp_out_kernel", (wide, c.width), ("model", "fsdp"), small)
        x = x + place.einsum("btf,fd->btd", jax.nn.gelu(y), kernel, "batch", None, None)
        return x + self.weight("mlp_out_bias", (c.width,), (None,))[None, None], None


class GPT2(_Module):
    """Predicts each token from those before it; input and output share the token embedding."""

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps tokens (batch, length ≤ context) to float32 logits (batch, length, vocabulary)."""
        c, place = self.config, self.layout
        table = self.weight("token_embedding", (c.vocabulary, c.width), ("model", "fsdp"), 0.02)
        positions = self.weight("position_embedding", (c.context, c.width), (None, "fsdp"), 0.01)
        x = place.lookup(table, tokens, "batch", None, None) + positions[None, : tokens.shape[1]]
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: None},
        )
        x, _ = layers(c, place, name="layers")(x, None)
        x = self.norm("final_norm", x)
        logits = place.einsum("btd,vd->btv", x, table, "batch", None, "model")
        return logits.astype(jnp.float32)


def token_log_likelihoods(config: Config, layout: Layout) -> Callable[[Params, Array], Array]:
    """`f(params, windows)`: log p of tokens 1… of each window given those before, in nats."""
    model = GPT2(config, layout)

    def log_likelihoods(params: Params, windows: Array) -> Array:
        logits: Any = model.apply({"params": params}, windows[:, :-1])
        # A sum over the vocabulary instead of an indexed read, for it may be split over `model`.
        labels = jax.nn.one_hot(windows[:, 1:], config.vocabulary, dtype=logits.dtype)
        return jnp.sum(labels * logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    return log_likelihoods


@functools.cache
def abstract_params(config: Config, layout: Layout) -> Params:
    """Shapes, dtypes and shardings of the parameters."""
    boxed = jax.eval_shape(lambda: _boxed(config, layout, jax.random.key(0)))
    shardings = nn.get_sharding(boxed, layout.mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), _values(boxed), shardings
    )


def init_params(config: Config, layout: Layout, key: Array) -> Params:
    """GPT-2's initialisation, each device filling its own shards."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, layout))
    init = jax.jit(lambda k: _values(_boxed(config, layout, k)), out_shardings=shardings)
    return init(key)


def _boxed(config: Config, layout: Layout, key: Array) -> Params:
    rows = math.prod(layout.mesh.shape[axis] for axis in layout.batch)
    tokens = layout.place(jnp.zeros((rows, config.context), jnp.int32), "batch", None)
    return GPT2(config, layout).init(key, tokens)["params"]


def _values(boxed: Params) -> Params:
    return meta.map_axis_meta(operator.attrgetter("value"), boxed)


def is_matrix(params: Params) -> Params:
    """A mask of kernels and embeddings; stacked for the scan, vectors have two axes as well."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key.endswith(("kernel", "embedding")), params
    )
