"""What is trained of the encoder and how, and what a fitted network predicts."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks._shared.methods import warmup_cosine
from benchmarks._shared.tuning import Grid
from benchmarks.evidence.finetuning.data import Sentences, grouped_batches, width
from examples._shared import minilm
from examples._shared.training import classification_loss
from ivon_jax import (
    Posterior,
    auto_sample,
    ivon,
    posterior,
    predict_at_mean,
    predict_samples,
    recipes,
)

Array = jax.Array
EPOCHS, BATCH_SIZE, RANK, DROPOUT = 4, 32, 8, 0.1
HESS_INIT, CLIP_RADIUS, WEIGHT_DECAY = 1e-2, 1e-2, 1e-5  # of IVON

# Nine settings each (of IVON a step of 1e-4 was tried as well); adapters and gains take longer
# steps. `step` is α(h₀+δ)ξ, the longest step, which is what AdamW's rate is; `sigma` is the initial
# σ, which ess keeps.
FULL_RATES = (1e-5, 1.5e-5, 2e-5, 3e-5, 5e-5, 7e-5, 1e-4, 2e-4, 5e-4)
FEW_RATES = (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3, 5e-3)
IVON_FULL: Grid = {"step": (1.5e-5, 2e-5, 3e-5), "sigma": (0.003, 0.005, 0.008)}
CHOSEN = {"step": 2e-5, "sigma": 0.005}  # of IVON_FULL, by 1,000 labels of SST-2
IVON_FEW: Grid = {"step": (3e-4, 1e-3, 3e-3), "sigma": (0.005, 0.01, 0.02)}


def grid(method: str, scope: str) -> Grid:
    """The settings that are tried."""
    if method == "ivon":
        return IVON_FULL if scope == "full" else IVON_FEW
    return {"learning_rate": FULL_RATES if scope == "full" else FEW_RATES}


class Scope(NamedTuple):
    """What is trained, at its initial values, and the pretrained parameters that it adapts."""

    start: Any
    base: Any


def make_scope(name: str, num_classes: int, key: Array) -> Scope:
    """All but the embeddings ("full"), low-rank adapters ("lora"), or gains and head ("head")."""
    head = {
        "kernel": 0.02 * jax.random.normal(key, (minilm.WIDTH, num_classes)),
        "bias": jnp.zeros(num_classes),
    }
    base = {"params": {"encoder": minilm.load_encoder(), "head": head}}
    params: dict[Any, Any] = flatten_dict(base)
    kept = {path: x for path, x in params.items() if _is_trained(name, path)}
    trained = unflatten_dict(kept)
    if name == "lora":
        trained = {"params": trained["params"] | minilm.adapters(base, RANK, key)["params"]}
    return Scope(trained, base)


def _is_trained(scope: str, path: tuple[str, ...]) -> bool:
    if "head" in path:
        return True
    embedding = not any(part.startswith("layer_") for part in path)
    return {"full": not embedding, "lora": False, "head": path[-2].endswith("norm")}[scope]


def logits(num_classes: int, trained: Any, base: Any, tokens: Array, key: Any = None) -> Any:
    """The network's logits (n, classes); with a key dropout acts."""
    network = minilm.Classifier(num_classes, 0.0 if key is None else DROPOUT)
    return network.apply(
        minilm.adapted(base, trained), tokens, rngs={} if key is None else {"dropout": key}
    )


@jax.jit
def features(trained: Any, base: Any, tokens: Array) -> Any:
    """The vectors (n, WIDTH) that the head sees."""
    params = minilm.adapted(base, trained)["params"]["encoder"]
    return minilm.Encoder().apply({"params": params}, tokens)


def settings_of(values: Mapping[str, Any], num_steps: int, prior: Any = None) -> dict[str, Any]:
    """Arguments of `ivon`; the prior is that of `WEIGHT_DECAY` unless there is another."""
    decay = WEIGHT_DECAY if prior is None else 0.0
    rate = values["step"] / ((HESS_INIT + decay) * CLIP_RADIUS)
    return {
        "learning_rate": warmup_cosine(rate, num_steps),
        "ess": 1 / (values["sigma"] ** 2 * HESS_INIT),
        "hess_init": HESS_INIT,
        "weight_decay": WEIGHT_DECAY if prior is None else None,
        "prior": prior,
        "clip_radius": CLIP_RADIUS,
        "b2": recipes.b2_for(num_steps),
    }


def optimizer(
    method: str, values: Mapping[str, Any], num_steps: int, key: Array, prior: Any = None
) -> Any:
    """Gradients clipped to norm 1, then IVON with its sampling, or AdamW."""
    if method != "ivon":
        tx = optax.adamw(warmup_cosine(values["learning_rate"], num_steps), weight_decay=0.01)
        return optax.chain(optax.clip_by_global_norm(1.0), tx)
    tx = ivon(**settings_of(values, num_steps, prior))
    return auto_sample(optax.chain(optax.clip_by_global_norm(1.0), tx), key)


@partial(jax.jit, static_argnames=("method", "num_classes", "num_steps"), donate_argnames="carry")
def step(
    method: str,
    num_classes: int,
    num_steps: int,
    carry: Any,
    base: Any,
    batch: Any,
    key: Any,
    values: Any,
    prior: Any = None,
) -> Any:
    """One step; compiled once for each width of `batch`."""
    params, state, count = carry
    noise_key, drop_key = jax.random.split(key)
    drop = jax.random.fold_in(drop_key, count) if method == "dropout" else None
    apply = lambda trained, tokens: logits(num_classes, trained, base, tokens, drop)  # noqa: E731
    grads = jax.grad(classification_loss(apply))(params, batch)
    tx = optimizer(method, values, num_steps, noise_key, prior)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, count + 1


def fit(
    method: str,
    num_classes: int,
    scope: Scope,
    data: Sentences,
    key: Array,
    values: Mapping[str, Any],
    epochs: int = EPOCHS,
    prior: Posterior | None = None,
) -> Any:
    """Trains; returns the parameters of AdamW, or the posterior of IVON under a prior."""
    step_key, shuffle_key = jax.random.split(key)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(shuffle_key)))
    num_steps = epochs * (len(data.labels) // BATCH_SIZE)
    tx = optimizer(method, values, num_steps, jax.random.split(step_key)[0], prior)
    start = jax.tree.map(jnp.array, scope.start)
    carry: Any = (start, jax.jit(tx.init)(start), jnp.zeros((), jnp.int32))
    for rows, wide in grouped_batches(data.tokens, rng, BATCH_SIZE, epochs):
        batch = data.tokens[rows, :wide], data.labels[rows]
        carry = step(
            method, num_classes, num_steps, carry, scope.base, batch, step_key, values, prior
        )
    params, state, _ = carry
    return posterior(state) if method == "ivon" else params


class Predictor:
    """Log-probabilities of a network at a point and at samples, compiled once per width."""

    def __init__(self, num_classes: int, num_samples: int):
        def apply(params: Any, base: Any, tokens: Array, key: Any = None) -> Array:
            return jax.nn.log_softmax(logits(num_classes, params, base, tokens, key))

        def dropped(params: Any, base: Any, tokens: Array, key: Array) -> Array:
            return jax.lax.map(
                lambda k: apply(params, base, tokens, k), jax.random.split(key, num_samples)
            )

        self._point, self._dropped = jax.jit(apply), jax.jit(dropped)
        self._mean = jax.jit(predict_at_mean(apply))
        self._samples = jax.jit(predict_samples(apply, num_samples))

    def __call__(
        self, method: str, fitted: Any, base: Any, key: Array, tokens: np.ndarray
    ) -> dict[str, np.ndarray]:
        """At the "point" (n, classes), and of a posterior or of dropout at "samples" (S, n, …)."""
        if isinstance(fitted, Posterior):
            point, samples = (
                partial(self._mean, fitted, base),
                partial(self._samples, key, fitted, base),
            )
        else:
            point = partial(self._point, fitted, base)
            samples = lambda x: self._dropped(fitted, base, x, key)  # noqa: E731
        found = {"point": in_batches(point, tokens)}
        if method != "adamw":
            found["samples"] = in_batches(samples, tokens, axis=1)
        return found


def in_batches(
    f: Callable[[np.ndarray], Array], tokens: np.ndarray, size: int = 64, axis: int = 0
) -> np.ndarray:
    """`f` on sentences of about one length at a time, without most of the padding."""
    lengths = (tokens > 0).sum(1)
    order = np.argsort(lengths, kind="stable")
    parts = []
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        filled = np.resize(rows, size)  # the last batch repeats itself, so that shapes are few
        out = np.asarray(f(tokens[filled, : width(lengths[rows], tokens.shape[1])]))
        parts.append(out.take(range(len(rows)), axis))
    return np.concatenate(parts, axis).take(np.argsort(order), axis)
