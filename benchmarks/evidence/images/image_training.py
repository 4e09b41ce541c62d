"""Networks, optimizers, training and prediction for `image_classification.py`.

`make_ivon_step` and `make_plain_step` are the two training loops' bodies, side by side: IVON takes
its gradient at a sample from the posterior and hands the noise of that sample to the update. All
else (network, initialisation, batches, schedule, number of gradient evaluations) is shared.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ivon_jax import Posterior, ivon, posterior, posterior_mean, sample_params
from ivon_jax._core.optimizer import PRECISION_FLOOR

METHODS = ("sgd", "adamw", "ivon")
WARMUP_SHARE = 0.05  # of the steps
IMAGES_AT_ONCE = 500  # bounds the memory of prediction
NUM_CLASSES = 10

Array = jax.Array
Params = Any
Values = Mapping[str, Any]  # hyperparameters by name
Carry = tuple[Params, Any]  # parameters and optimizer state
Data = tuple[Array, Array]  # images and labels
Step = Callable[[Array, Params, Any, Any], tuple[Params, Any, Array]]


# --- Networks -------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two hidden layers, for images of one channel."""

    width: int = 128

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        x = (2.0 * images - 1.0).reshape(len(images), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(NUM_CLASSES)(x)


class ConvNet(nn.Module):
    """A small convolutional network; group normalisation keeps it a function of one image.

    Batch normalisation would carry statistics of one set of weights over to posterior samples.
    """

    features: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps images (n, height, width, channels) in [0, 1] to logits (n, 10)."""
        x = 2.0 * images - 1.0
        for features in self.features:
            for _ in range(2):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(num_groups=8)(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(NUM_CLASSES)(x.mean(axis=(1, 2)))


def make_model(image_shape: tuple[int, ...]) -> nn.Module:
    """A perceptron for grey images, the convolutional network for colour."""
    return MLP() if image_shape[-1] == 1 else ConvNet()


# --- Optimizers and steps -------------------------------------------------------------------------


def make_optimizer(
    method: str, values: Values, num_steps: int, num_train: int
) -> optax.GradientTransformationExtraArgs:
    """All three get linear warmup, cosine decay to zero, and weight decay on every parameter."""
    warmup = min(max(1, round(WARMUP_SHARE * num_steps)), num_steps - 1)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, num_steps)
    decay = values["weight_decay"]

    def schedule(count):
        return values["learning_rate"] * shape(count)

    if method == "sgd":
        tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule, momentum=0.9))
    elif method == "adamw":
        tx = optax.adamw(schedule, weight_decay=decay)
    elif method == "ivon":
        tx = ivon(
            schedule,
            # Temperature 1 is plain Bayes, which weighs every training example once.
            ess=num_train / values["temperature"],
            hess_init=values["hess_init"],
            b2=values["b2"],
            weight_decay=decay,
            precision_floor=values.get("precision_floor", PRECISION_FLOOR),
        )
    else:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    return optax.with_extra_args_support(tx)


def make_step(method: str, model: nn.Module, tx: optax.GradientTransformationExtraArgs) -> Step:
    """The training step of a method; its loss is the mean cross-entropy per example."""

    def loss_fn(params, batch):
        images, labels = batch
        logits: Any = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    make = make_ivon_step if method == "ivon" else make_plain_step
    return make(loss_fn, tx)


def make_ivon_step(loss_fn: Callable, tx: optax.GradientTransformationExtraArgs) -> Step:
    """One step of IVON: the gradient is taken at a sample, the update moves the mean."""

    def step(key, params, state, batch):
        sample, noise = sample_params(key, state)
        loss, grads = jax.value_and_grad(loss_fn)(sample, batch)
        updates, state = tx.update(grads, state, params, noise=noise)
        return optax.apply_updates(params, updates), state, loss

    return step


def make_plain_step(loss_fn: Callable, tx: optax.GradientTransformationExtraArgs) -> Step:
    """One step of SGD or AdamW; the key is not used."""

    def step(key, params, state, batch):
        del key
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


# --- Training -------------------------------------------------------------------------------------


class Trainer(NamedTuple):
    """A method ready to run: `init` draws parameters and state, `run_epoch` is compiled.

    Both take the hyperparameters last, so that one compilation serves a whole grid of them.
    """

    init: Callable[[Array, Values], Carry]
    run_epoch: Callable[[Data, Carry, Array, Values], Carry]
    epochs: int


class Trained(NamedTuple):
    """What training leaves behind, and the wall-clock seconds of each epoch."""

    params: Params
    state: Any
    seconds: list[float]


def make_trainer(
    method: str,
    values: Values,
    model: nn.Module,
    data: Data,
    epochs: int,
    batch_size: int,
) -> Trainer:
    """Compiles a method's epoch, so that no later timing contains the compiler.

    Of `values` only the names matter here.
    """
    num_train = len(data[1])
    num_steps = epochs * (num_train // batch_size)
    image = data[0][:1]

    def optimizer(values):
        return make_optimizer(method, values, num_steps, num_train)

    @jax.jit
    def init(key, values):
        params = model.init(key, image)
        return params, optimizer(values).init(params)

    def step(values):
        return make_step(method, model, optimizer(values))

    key = jax.random.key(0)
    carry = init(key, values)
    if isinstance(model, ConvNet) and jax.default_backend() == "cpu":
        # XLA's CPU code for the gradient of a convolution is some 30 times slower inside a loop.
        one_step = jax.jit(
            lambda data, carry, inputs, values: step_on_rows(step(values), data, carry, inputs),
            donate_argnums=1,
        )
        inputs = (key, jnp.arange(batch_size))
        compiled_step = one_step.lower(data, carry, inputs, values).compile()
        run_epoch = partial(loop_epoch, compiled_step, batch_size)
    else:
        epoch = jax.jit(
            lambda data, carry, key, values: scan_epoch(step(values), batch_size, data, carry, key),
            donate_argnums=1,
        )
        run_epoch = epoch.lower(data, carry, key, values).compile()
    return Trainer(init, run_epoch, epochs)


def step_on_rows(
    step: Step, data: Data, carry: Carry, inputs: tuple[Array, Array]
) -> tuple[Carry, Array]:
    """One step on the examples in the given rows of the data, in the form that scan takes."""
    (params, state), (key, rows) = carry, inputs
    params, state, loss = step(key, params, state, (data[0][rows], data[1][rows]))
    return (params, state), loss


def scan_epoch(step: Step, batch_size: int, data: Data, carry: Carry, key: Array) -> Carry:
    """Runs one shuffled pass over the data as a single computation."""
    inputs = shuffled_batches(key, len(data[1]), batch_size)
    carry, _ = jax.lax.scan(partial(step_on_rows, step, data), carry, inputs)
    return carry


def loop_epoch(
    compiled_step: Callable, batch_size: int, data: Data, carry: Carry, key: Array, values: Values
) -> Carry:
    """Runs the same pass as `scan_epoch`, step by step."""
    for inputs in zip(*shuffled_batches(key, len(data[1]), batch_size), strict=True):
        carry, _ = compiled_step(data, carry, inputs, values)
    return carry


def shuffled_batches(key: Array, num_examples: int, batch_size: int) -> tuple[Array, Array]:
    """Draws a key and the rows of each batch; an incomplete last batch is left out."""
    num_batches = num_examples // batch_size
    order_key, noise_key = jax.random.split(key)
    order = jax.random.permutation(order_key, num_examples)[: num_batches * batch_size]
    return jax.random.split(noise_key, num_batches), order.reshape(num_batches, batch_size)


class SeedKeys(NamedTuple):
    """The keys of one seed, the same for all methods."""

    init: Array
    epochs: Array
    predict: Array


def seed_keys(seed: int) -> SeedKeys:
    """Splits a seed into independent keys."""
    return SeedKeys(*jax.random.split(jax.random.key(seed), 3))


def train(
    trainer: Trainer,
    values: Values,
    data: Data,
    seed: int,
    on_epoch: Callable[[], object] = lambda: None,
) -> Trained:
    """Trains from one seed: all methods share its initial weights and its order of examples."""
    init_key, epochs_key, _ = seed_keys(seed)
    carry = trainer.init(init_key, values)
    seconds = []
    for key in jax.random.split(epochs_key, trainer.epochs):
        start = time.perf_counter()
        carry = jax.block_until_ready(trainer.run_epoch(data, carry, key, values))
        seconds.append(time.perf_counter() - start)
        on_epoch()
    params, state = carry
    return Trained(params, state, seconds)


# --- Prediction -----------------------------------------------------------------------------------


def predict(model: nn.Module, params: Params, images: Array) -> Array:
    """Returns log-probabilities (n, 10), computed for a bounded number of images at once."""

    def log_probs(image):
        return jax.nn.log_softmax(model.apply(params, image[None])[0])

    return jax.lax.map(log_probs, images, batch_size=IMAGES_AT_ONCE)


def predict_samples(
    model: nn.Module, num_samples: int, key: Array, q: Posterior, images: Array
) -> Array:
    """Returns the log-probabilities of each posterior sample, (num_samples, n, 10)."""

    def one_sample(key):
        sample, _ = sample_params(key, q)
        return predict(model, sample, images)

    return jax.lax.map(one_sample, jax.random.split(key, num_samples))


def average(log_probs: Array) -> Array:
    """Averages probabilities over axis 0: logsumexp_s log p_s - log S, in the log domain."""
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(len(log_probs))


class Predictor(NamedTuple):
    """Compiled predictions of one network: at given parameters, and of posterior samples."""

    at: Callable[[Params, Array], Array]
    samples: Callable[[Array, Posterior, Array], Array]


def make_predictor(model: nn.Module, num_samples: int) -> Predictor:
    """Binds the network and the number of posterior samples."""
    return Predictor(
        at=jax.jit(partial(predict, model)),
        samples=jax.jit(partial(predict_samples, model, num_samples)),
    )


def predictions(
    method: str, trained: Trained, predictor: Predictor, images: Array, seed: int
) -> tuple[Array, Array | None]:
    """Log-probabilities at the point a method reports and, for IVON, those of its samples."""
    if method != "ivon":
        return predictor.at(trained.params, images), None
    at_mean = predictor.at(posterior_mean(trained.state), images)
    q = posterior(trained.state)
    return at_mean, predictor.samples(seed_keys(seed).predict, q, images)
