"""What is trained of the encoder, by AdamW and by IVON, and what a fitted network predicts."""

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
from examples._shared import minilm
from examples._shared.training import classification_loss, train
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
EPOCHS, BATCH_SIZE, RANK = 4, 32, 8
HESS_INIT, CLIP_RADIUS, WEIGHT_DECAY = 1e-2, 1e-2, 1e-5  # of IVON

# Nine settings each. `step` is α(h₀+δ)ξ, the longest step, which is what AdamW's rate is; `sigma`
# is the initial σ, which ess keeps.
GRIDS: dict[str, Grid] = {
    "adamw": {"learning_rate": (1e-5, 1.5e-5, 2e-5, 3e-5, 5e-5, 7e-5, 1e-4, 2e-4, 5e-4)},
    "ivon": {"step": (2e-5, 3e-5, 1e-4), "sigma": (0.003, 0.005, 0.008)},
}


class Scope(NamedTuple):
    """What is trained: its initial values, and the network that they stand for."""

    start: dict
    build: Callable[[Any], Any]


def make_scope(name: str, num_classes: int, key: Array) -> Scope:
    """All but the embeddings ("full"), low-rank adapters ("lora"), or gains and head ("head")."""
    head = {
        "kernel": 0.02 * jax.random.normal(key, (minilm.WIDTH, num_classes)),
        "bias": jnp.zeros(num_classes),
    }
    params: dict[Any, Any] = flatten_dict(
        {"params": {"encoder": minilm.load_encoder(), "head": head}}
    )
    kept = {path: x for path, x in params.items() if _is_trained(name, path)}
    if name == "lora":
        adapted = [p for p in params if p[-2:] in (("query", "kernel"), ("value", "kernel"))]
        for i, path in enumerate(adapted):
            rows, columns = params[path].shape
            a = jax.random.normal(jax.random.fold_in(key, i), (rows, RANK)) / rows**0.5
            kept |= {(*path, "a"): a, (*path, "b"): jnp.zeros((RANK, columns))}

    def build(trained: Any) -> Any:
        flat: dict[Any, Any] = flatten_dict(trained)
        new = {path: flat.get(path, x) for path, x in params.items()}
        for path in flat:
            if path[-1] == "a":
                base = path[:-1]
                new[base] = params[base] + 2.0 * flat[path] @ flat[(*base, "b")]
        return unflatten_dict(new)

    return Scope(unflatten_dict(kept), build)


def _is_trained(scope: str, path: tuple[str, ...]) -> bool:
    if "head" in path:
        return True
    embedding = not any(part.startswith("layer_") for part in path)
    return {"full": not embedding, "lora": False, "head": path[-2].endswith("norm")}[scope]


def settings_of(values: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Arguments of `ivon`."""
    rate = values["step"] / ((HESS_INIT + WEIGHT_DECAY) * CLIP_RADIUS)
    return {
        "learning_rate": warmup_cosine(rate, num_steps),
        "ess": 1 / (values["sigma"] ** 2 * HESS_INIT),
        "hess_init": HESS_INIT,
        "weight_decay": WEIGHT_DECAY,
        "clip_radius": CLIP_RADIUS,
        "b2": recipes.b2_for(num_steps),
    }


@partial(jax.jit, static_argnames=("method", "build", "num_classes", "num_steps"))
def fit(
    method: str,
    build: Callable[[Any], Any],
    num_classes: int,
    num_steps: int,
    start: Any,
    data: Any,
    key: Array,
    values: Mapping[str, Any],
) -> Any:
    """Trains; returns the parameters of AdamW, or the posterior of IVON."""
    apply = make_apply(num_classes, build)
    noise_key, shuffle_key = jax.random.split(key)
    if method == "adamw":
        schedule = warmup_cosine(values["learning_rate"], num_steps)
        tx = optax.adamw(schedule, weight_decay=0.01)
    else:
        tx = ivon(**settings_of(values, num_steps))
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
    tx = auto_sample(tx, noise_key) if method == "ivon" else tx
    how = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "progress": False}
    params, state = train(tx, classification_loss(apply), start, data, key=shuffle_key, **how)
    return params if method == "adamw" else posterior(state)


def make_apply(num_classes: int, build: Callable[[Any], Any]) -> Callable[..., Any]:
    """Logits from what is trained."""
    return lambda trained, tokens: minilm.Classifier(num_classes).apply(build(trained), tokens)


class Predictor:
    """Log-probabilities of a network at a point and at samples, compiled once per length."""

    def __init__(self, apply: Callable[..., Any], num_samples: int):
        self._point = jax.jit(lambda params, x: jax.nn.log_softmax(apply(params, x)))
        self._mean = jax.jit(predict_at_mean(lambda p, x: jax.nn.log_softmax(apply(p, x))))
        self._samples = jax.jit(
            predict_samples(lambda p, x: jax.nn.log_softmax(apply(p, x)), num_samples)
        )

    def __call__(self, fitted: Any, key: Array, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """At the "point" (n, classes), and of a posterior at "samples" (S, n, classes)."""
        if not isinstance(fitted, Posterior):
            return {"point": in_batches(partial(self._point, fitted), tokens)}
        samples = partial(self._samples, key, fitted)
        return {
            "point": in_batches(partial(self._mean, fitted), tokens),
            "samples": in_batches(samples, tokens, axis=1),
        }


def in_batches(
    f: Callable[[np.ndarray], Array], tokens: np.ndarray, size: int = 64, axis: int = 0
) -> np.ndarray:
    """`f` on sentences of about one length at a time, without most of the padding."""
    lengths = (tokens > 0).sum(1)
    order = np.argsort(lengths, kind="stable")
    parts = []
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        width = min(-(-int(lengths[rows].max()) // 8) * 8, tokens.shape[1])
        filled = np.resize(rows, size)  # the last batch repeats itself, so that shapes are few
        out = np.asarray(f(tokens[filled, :width]))
        parts.append(out.take(range(len(rows)), axis))
    return np.concatenate(parts, axis).take(np.argsort(order), axis)
