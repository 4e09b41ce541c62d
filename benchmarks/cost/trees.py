"""Parameters of the shapes that optimizers meet."""

from typing import Any

import jax
import jax.numpy as jnp

Shapes = dict[str, tuple[int, ...]]


def one_leaf(size: int) -> Shapes:
    """A single vector."""
    return {"w": (size,)}


def gpt2(size: int, layers: int = 12) -> Shapes:
    """GPT-2's tree of 148 leaves, of the width (128, 256, …) that comes closest to this size."""
    widths = range(128, 1664, 128)
    return min((_gpt2(w, layers) for w in widths), key=lambda shapes: abs(_count(shapes) - size))


def _gpt2(width: int, layers: int) -> Shapes:
    scale = width / 768
    shapes: Shapes = {
        "wte": (round(50_257 * scale), width),
        "wpe": (round(1024 * scale), width),
        "ln_f/scale": (width,),
        "ln_f/bias": (width,),
    }
    block: Shapes = {
        "ln_1/scale": (width,),
        "ln_1/bias": (width,),
        "attn/qkv": (width, 3 * width),
        "attn/qkv_bias": (3 * width,),
        "attn/proj": (width, width),
        "attn/proj_bias": (width,),
        "ln_2/scale": (width,),
        "ln_2/bias": (width,),
        "mlp/fc": (width, 4 * width),
        "mlp/fc_bias": (4 * width,),
        "mlp/proj": (4 * width, width),
        "mlp/proj_bias": (width,),
    }
    for layer in range(layers):
        shapes |= {f"h{layer:02d}/{name}": shape for name, shape in block.items()}
    return shapes


def many(leaves: int, size: int) -> Shapes:
    """Equal small leaves."""
    return {f"w{i:03d}": (size,) for i in range(leaves)}


def _count(shapes: Shapes) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract(shapes)))


def abstract(shapes: Shapes, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The tree without values."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for name, shape in shapes.items()
    }


def filled(shapes: Shapes, value: float) -> dict[str, jax.Array]:
    """The tree with the same number everywhere."""
    return {name: jnp.full(shape, value, jnp.float32) for name, shape in shapes.items()}
