"""Low-rank adapters (LoRA) of a small transformer, trained by IVON and by AdamW.

A character-level transformer is pre-trained on the source code of Python's standard library and
adapted to 20 kB of the reference manual, both of which ship with Python. In `make_optimizer`, the
part to copy, IVON owns the adapters, AdamW the gains and biases, and the base matrices stay. Look
at the table: the losses are level, IVON is better calibrated, AdamW makes slightly fewer errors.

    python examples/lora_finetune.py
"""

import itertools
import os
import pydoc_data.topics
import random
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from matplotlib.figure import Figure
from tqdm import tqdm

from examples._shared.reporting import COLORS, cell, format_table, save_figure
from examples._shared.training import classification_loss, train, warmup_cosine
from ivon_jax import auto_sample, ivon, metrics, predict_log_probs

CHARACTERS, CONTEXT, WIDTH, DEPTH, HEADS = 128, 64, 64, 2, 2  # 128 is ASCII
WINDOW = CONTEXT + 1  # characters: each of the first ones predicts the next one
NUM_TRAIN = 20_000  # characters; settings were chosen on those between these and the test
TEST = slice(NUM_TRAIN + 256 * WINDOW, NUM_TRAIN + 768 * WINDOW)
COVERAGES = np.linspace(0.05, 1.0, 20)


GROUPS = {"lora_a": "adapters", "lora_b": "adapters", "scale": "vectors", "bias": "vectors"}


def make_optimizer(method: str, params: Any, num_steps: int, key: jax.Array) -> Any:
    """IVON (or AdamW) for the adapters, AdamW for gains and biases, none for the base matrices.

    With `auto_sample` around it the loop's parameters are a posterior sample of the adapters.
    """
    if method == "IVON":
        settings: Any = {"hess_init": 0.01, "b2": 0.999, "clip_radius": 0.03, "rescale_lr": False}
        adapters = ivon(warmup_cosine(0.1, num_steps), ess=1e6, weight_decay=1e-3, **settings)
    else:
        adapters = optax.adamw(warmup_cosine(0.02, num_steps), b2=0.99, weight_decay=0.3)
    vectors = optax.adamw(warmup_cosine(1e-3, num_steps), weight_decay=0.0)
    owners: Any = {"adapters": adapters, "vectors": vectors, "frozen": optax.set_to_zero()}
    groups = unflatten_dict({path: GROUPS.get(path[-1], "frozen") for path in flatten_dict(params)})
    tx = optax.partition(owners, groups)
    return auto_sample(tx, key) if method == "IVON" else tx


class LoRADense(nn.Module):
    """x ↦ x(W + 2AB); B starts at zero, so that fine-tuning starts at the base network."""

    features: int
    rank: int

    @nn.compact
    def __call__(self, x):  # noqa: D102
        y = nn.Dense(self.features, use_bias=False, name="base")(x)
        if self.rank:
            a = self.param("lora_a", nn.initializers.lecun_normal(), (x.shape[-1], self.rank))
            b = self.param("lora_b", nn.initializers.zeros, (self.rank, self.features))
            y = y + 2.0 * (x @ a @ b)
        return y


class Transformer(nn.Module):
    """Predicts each character from those before it."""

    rank: int = 0  # of the adapters; 0 for the base network

    @nn.compact
    def __call__(self, tokens):
        """Maps tokens (n, length ≤ CONTEXT) to logits (n, length, characters)."""
        positions = nn.Embed(CONTEXT, WIDTH)(jnp.arange(tokens.shape[1]))
        x = nn.Embed(CHARACTERS, WIDTH)(tokens) + positions[None]
        for _ in range(DEPTH):
            projected = LoRADense(3 * WIDTH, self.rank)(nn.LayerNorm()(x))
            heads = jnp.split(projected.reshape(*x.shape[:2], HEADS, -1), 3, axis=-1)
            mixed = jax.nn.dot_product_attention(*heads, is_causal=True)
            x = x + LoRADense(WIDTH, self.rank)(mixed.reshape(x.shape))
            hidden = nn.relu(LoRADense(4 * WIDTH, self.rank)(nn.LayerNorm()(x)))
            x = x + LoRADense(WIDTH, self.rank)(hidden)
        return nn.Dense(CHARACTERS)(nn.LayerNorm()(x))


BASE, ADAPTED = Transformer(), Transformer(rank=8)


def texts() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """ASCII codes: the source code, the manual to train on, inputs and labels to test on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    source = "\n".join(path.read_text(errors="replace") for path in files)[:4_000_000]
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(0).shuffle(topics)
    parts = (part.strip("\n") for topic in topics for part in topic.split("\n\n"))
    manual = "\n\n".join(dict.fromkeys(filter(str.strip, parts)))  # topics repeat paragraphs
    codes = (np.frombuffer(x.encode("ascii", "replace"), np.uint8) for x in (source, manual))
    source, manual = (jnp.asarray(x, jnp.int32) for x in codes)
    test = manual[TEST].reshape(-1, WINDOW)
    return source, manual[:NUM_TRAIN], test[:, :-1], test[:, 1:]


def learn(network: Any, tx: Any, params: Any, tokens: Any, key: Any, steps: int, batch_size: int):
    """Trains on random windows of the text; returns parameters and optimizer state."""
    starts = jax.random.randint(key, (steps * batch_size,), 0, len(tokens) - CONTEXT)
    windows = tokens[starts[:, None] + jnp.arange(WINDOW)[None]]
    loss_fn, data = classification_loss(network.apply), (windows[:, :-1], windows[:, 1:])
    how = {"epochs": 1, "batch_size": batch_size, "progress": False}
    return train(tx, loss_fn, params, data, key=jax.random.key(0), **how)


def pretrain(tokens: jax.Array, key: jax.Array, steps: int) -> Any:
    """Parameters of the base network."""
    init_key, key = jax.random.split(key)
    params = jax.jit(BASE.init)(init_key, tokens[None, :CONTEXT])
    tx = optax.adamw(warmup_cosine(4e-3, steps), b2=0.98, weight_decay=0.1)
    return learn(BASE, tx, params, tokens, key, steps, batch_size=32)[0]


@partial(jax.jit, static_argnames=("method", "steps"))
def finetune(method: str, base: Any, tokens: jax.Array, key: jax.Array, steps: int) -> Any:
    """Parameters and optimizer state of the adapted network."""
    init_key, noise_key, data_key = jax.random.split(key, 3)
    fresh = ADAPTED.init(init_key, tokens[None, :CONTEXT])
    params = unflatten_dict(flatten_dict(fresh) | flatten_dict(base))
    tx = make_optimizer(method, params, steps, noise_key)
    return learn(ADAPTED, tx, params, tokens, data_key, steps, batch_size=16)


@partial(jax.jit, static_argnames="network")
def predict(network: Any, params: Any, tokens: jax.Array, state: Any = None) -> jax.Array:
    """Log-probabilities of the characters that follow, with a state averaged over the posterior."""
    if state is None:
        return jax.nn.log_softmax(network.apply(params, tokens))
    average = predict_log_probs(network.apply, num_samples=10)
    return average(jax.random.key(0), state, tokens, params=params)


def risk(predicted: np.ndarray, labels: jax.Array) -> np.ndarray:
    """Error in % of the most confident predictions, at `COVERAGES`."""
    wrong = np.ravel(predicted.argmax(-1) != labels)[np.argsort(-predicted.max(-1), axis=None)]
    kept = np.round(COVERAGES * wrong.size).astype(int)
    return 100 * np.cumsum(wrong)[kept - 1] / kept


def main(
    seeds: int = 3,
    pretrain_steps: int = 800,
    steps: int = 300,
    figure: Path = Path("lora_finetune.png"),
) -> None:
    """Pre-trains, adapts, prints the table and writes the figure."""
    source, manual, inputs, labels = texts()
    with tqdm(total=2 * seeds, unit="adaptation") as bar:
        base = pretrain(source, jax.random.key(0), pretrain_steps)
        found = {"base": [np.asarray(predict(BASE, base, inputs))], "AdamW": [], "IVON": []}
        for seed, method in itertools.product(range(seeds), ("AdamW", "IVON")):
            tuned = finetune(method, base, manual, jax.random.key(seed), steps)
            params, state = tuned if method == "IVON" else (tuned[0], None)
            found[method].append(np.asarray(predict(ADAPTED, params, inputs, state)))
            bar.update()
    rows = [["", "loss, nats", "ECE, %", "error, %", "at 90 % coverage", "at 50 %"]]
    drawn = Figure(figsize=(7, 4.6), layout="constrained")
    ax = drawn.subplots()
    for name, predicted in found.items():
        loss = cell([float(metrics.nll(x, labels)) for x in predicted], 4)
        ece = cell([100 * float(metrics.ece(x, labels)) for x in predicted], 2)
        risks = np.array([risk(x, labels) for x in predicted])
        rows.append([name, loss, ece, *(cell(risks[:, at], 2) for at in (-1, -3, -11))])
        ax.plot(100 * COVERAGES, risks.mean(axis=0), color=COLORS.get(name, "0.3"), label=name)
    print("\n" + format_table(rows))
    ax.set(xlabel="most confident predictions kept, %", ylabel="error, %")
    ax.legend(frameon=False)
    save_figure(drawn, figure)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
