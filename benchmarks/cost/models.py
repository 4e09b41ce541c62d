"""Losses of small and middling networks, and the trees of parameters that optimizers meet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks._shared.networks import GPT, RESNET20, Perceptron
from examples._shared.training import classification_loss

Array = jax.Array
PyTree = Any


# --- Networks -------------------------------------------------------------------------------------


class Model(NamedTuple):
    """A network, its loss and data of the shape it takes."""

    init: Callable[[Array], PyTree]
    loss: Callable[[PyTree, PyTree], Array]  # the mean per example or token
    batch: Callable[[Array, int], PyTree]  # so many random examples
    batch_size: int  # the usual number

    def describe(self) -> tuple[int, int]:
        """Numbers of parameters and of leaves."""
        params = jax.eval_shape(self.init, jax.random.key(0))
        return count(params), len(jax.tree.leaves(params))


def classifier(network: nn.Module, shape: tuple[int, ...]) -> Model:
    """Of images of a shape into ten classes."""

    def init(key: Array) -> PyTree:
        return network.init(key, jnp.zeros((1, *shape)))

    def batch(key: Array, size: int) -> tuple[Array, Array]:
        image_key, label_key = jax.random.split(key)
        images = jax.random.uniform(image_key, (size, *shape))
        return images, jax.random.randint(label_key, (size,), 0, 10)

    return Model(init, classification_loss(network.apply), batch, 64)


def language_model(gpt: GPT) -> Model:
    """Of windows of tokens."""

    def batch(key: Array, size: int) -> Array:
        return jax.random.randint(key, (size, gpt.context + 1), 0, gpt.vocabulary)

    return Model(gpt.init, gpt.loss, batch, 4)


MODELS: dict[str, Model] = {
    "mlp": classifier(Perceptron(128, depth=1), (8, 8, 1)),
    "mlp1m": classifier(Perceptron(960), (8, 8, 1)),
    "resnet20": classifier(RESNET20, (32, 32, 3)),
    "gpt1m": language_model(GPT(4, 4, 128, 64, vocabulary=65)),
    "gpt10m": language_model(GPT(6, 6, 384, 256, vocabulary=65, biases=True)),
    "gpt2-small": language_model(GPT(12, 12, 768, 1024, vocabulary=50_257, biases=True)),
}
"""Networks of 9,610, 1.0M, 0.27M, 0.8M, 10.8M and 124M parameters."""


# --- Trees of parameters, without values ----------------------------------------------------------


def many(leaves: int, size: int) -> PyTree:
    """Equal vectors."""
    return [jax.ShapeDtypeStruct((size,), jnp.float32)] * leaves


def gpt2(size: int) -> PyTree:
    """GPT-2's tree of 148 leaves, of the width (128, 256, …) that comes closest to this size."""

    def tree(width: int) -> PyTree:
        network = GPT(12, 1, width, 1024, round(50_257 * width / 768), biases=True)
        return jax.eval_shape(network.init, jax.random.key(0))

    trees = [tree(width) for width in range(128, 1664, 128)]
    return min(trees, key=lambda shapes: abs(count(shapes) - size))


def count(tree: PyTree) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(tree))
