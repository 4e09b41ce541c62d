"""Training by IVON on few handwritten digits, for `sensitivity.py` and `leave_one_out.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.evidence.images.image_training import NUM_CLASSES, make_ivon_step, shuffled_batches
from examples._shared.datasets import load_small_digits
from ivon_jax import ivon, posterior_mean

Array = jax.Array
PyTree = Any
Apply = Callable[..., Any]  # flax types the outputs of `apply` as any tree

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Digits(NamedTuple):
    """Images (n, 8, 8, 1) in [0, 1] and labels (n,) of the fixed split of `datasets.py`."""

    images: Array
    labels: Array
    test_images: Array
    test_labels: Array


def load_digits() -> Digits:
    """The 1,000 training and 797 test digits that ship inside scikit-learn."""
    return Digits(*map(jnp.asarray, load_small_digits()[:4]))


def wrong_labels(key: Array, labels: Array, share: float) -> Array:
    """Labels of which about the given share is replaced by another class, drawn evenly."""
    where_key, class_key = jax.random.split(key)
    wrong = jax.random.uniform(where_key, labels.shape) < share
    others = (labels + jax.random.randint(class_key, labels.shape, 1, NUM_CLASSES)) % NUM_CLASSES
    return jnp.where(wrong, others, labels)


class SoftmaxRegression(nn.Module):
    """A linear classifier, whose loss is convex."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        return nn.Dense(NUM_CLASSES)((2.0 * images - 1.0).reshape(len(images), -1))


class SmoothMLP(nn.Module):
    """Two hidden layers of tanh; unlike with ReLUs, retraining finds a stationary point."""

    width: int = 16

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        x = (2.0 * images - 1.0).reshape(len(images), -1)
        for _ in range(2):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(NUM_CLASSES)(x)


class Weighted(NamedTuple):
    """Examples, and the weight of each in the loss: 0 leaves an example out."""

    images: Array
    labels: Array
    weights: Array


def unweighted(images: Array, labels: Array) -> Weighted:
    """Examples that all count once."""
    return Weighted(images, labels, jnp.ones(len(labels)))


class Recipe(NamedTuple):
    """Hyperparameters of `ivon`, and the length of the training.

    Attributes:
      learning_rate: peak, or constant, rate.
      cosine: whether it is warmed up over 5 % of the steps and decays to zero.
      temperature: τ in λ = N/τ.
    """

    epochs: int
    learning_rate: float
    cosine: bool = True
    weight_decay: Any = 1e-3
    temperature: float = 1.0
    hess_init: float = 0.1
    b2: float = 0.999
    batch_size: int = 50


def make_ivon(recipe: Recipe, num_train: int) -> optax.GradientTransformationExtraArgs:
    """IVON by the recipe."""
    steps = recipe.epochs * (num_train // recipe.batch_size)
    rate = recipe.learning_rate
    shape = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    return ivon(
        # The schedule does floating-point arithmetic with the count.
        (lambda count: shape(jnp.asarray(count, jnp.float32))) if recipe.cosine else rate,
        ess=num_train / recipe.temperature,
        hess_init=recipe.hess_init,
        b2=recipe.b2,
        weight_decay=recipe.weight_decay,
    )


def run_epochs(apply: Apply, recipe: Recipe, data: Weighted, state: PyTree, keys: Array) -> PyTree:
    """Continues IVON from a state of `make_ivon` for one epoch per key, all of it one computation.

    An example of weight 0 is skipped where the others keep their batches, so that runs with the
    same keys share the order of the examples and the noise, whatever the weights.
    """

    def loss_fn(params: PyTree, batch: Weighted) -> Array:
        losses = cross_entropy(apply(params, batch.images), batch.labels)
        return jnp.mean(batch.weights * losses)

    step = make_ivon_step(loss_fn, make_ivon(recipe, len(data.labels)))

    def on_rows(state: PyTree, inputs: tuple[Array, Array]) -> tuple[PyTree, Array]:
        key, rows = inputs
        batch = jax.tree.map(lambda x: x[rows], data)
        _, state, loss = step(key, posterior_mean(state), state, batch)
        return state, loss

    def epoch(state: PyTree, key: Array) -> tuple[PyTree, Array]:
        inputs = shuffled_batches(key, len(data.labels), recipe.batch_size)
        return jax.lax.scan(on_rows, state, inputs)

    return jax.lax.scan(epoch, state, keys)[0]


@partial(jax.jit, static_argnames=("model", "recipe"))
def train(model: nn.Module, recipe: Recipe, data: Weighted, key: Array) -> PyTree:
    """Trains from a fresh initialisation and returns the optimizer's state."""
    init_key, epochs_key = jax.random.split(key)
    state = make_ivon(recipe, len(data.labels)).init(model.init(init_key, data.images[:1]))
    return run_epochs(model.apply, recipe, data, state, jax.random.split(epochs_key, recipe.epochs))


def nll(apply: Apply, params: PyTree, images: Array, labels: Array) -> Array:
    """Mean negative log-likelihood at given parameters."""
    return cross_entropy(apply(params, images), labels).mean()
