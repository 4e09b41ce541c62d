"""A pretrained transformer learns to sort sentences by IVON, and says when it is unsure.

MiniLM-L6 (`_shared/minilm.py` says how to install it) gets low-rank adapters and a head, in which
IVON learns a posterior. By default the sentences are first lines of docstrings and the labels the
libraries that they come from; `--train-file FILE --test-file FILE` takes your own, on each line a
label, a space and a sentence. Look at three things: averaging over the posterior improves the NLL
and the calibration; with a threshold chosen on held-out sentences the network leaves the hard ones
to somebody else, so that its errors stay below a bound; and these are hard indeed.

    python examples/finetune_text.py
"""

import importlib
import inspect
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from scipy.stats import beta

from examples._shared import minilm
from examples._shared.reporting import format_table
from examples._shared.training import classification_loss, train, warmup_cosine
from ivon_jax import (
    auto_sample,
    ivon,
    metrics,
    posterior,
    predict_at_mean,
    predict_log_probs,
    recipes,
)

MODULES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.random", "numpy.ma", "numpy.polynomial.polynomial"),
    "scipy": ("scipy.stats", "scipy.signal", "scipy.optimize", "scipy.linalg", "scipy.ndimage"),
    "matplotlib": ("matplotlib.pyplot", "matplotlib.axes", "matplotlib.text", "matplotlib.ticker"),
    "scikit-learn": ("sklearn.metrics", "sklearn.ensemble", "sklearn.svm", "sklearn.cluster"),
}
LENGTH, BATCH_SIZE, RANK = 24, 32, 8  # LENGTH in tokens
TEMPERATURES = (0.5, 1.0, 2.0)  # of the posterior


def make_optimizer(learning_rate: float, sigma: float, num_steps: int, key: jax.Array) -> Any:
    """IVON with steps as long as AdamW's at this rate, and an initial standard deviation σ."""
    h0, radius = 1e-2, 1e-2
    rate = recipes.rate_from_adamw(learning_rate, hess_init=h0, clip_radius=radius)
    settings: Any = {"hess_init": h0, "clip_radius": radius, "b2": recipes.b2_for(num_steps)}
    tx = ivon(warmup_cosine(rate, num_steps), ess=1 / (sigma**2 * h0), weight_decay=0.0, **settings)
    return auto_sample(tx, key)


def load_docstrings() -> list[tuple[str, str]]:
    """Pairs of a library and the first paragraph of a docstring, each once."""
    found = {}
    for library, modules in MODULES.items():
        for module in map(importlib.import_module, modules):
            public = [getattr(module, name) for name in dir(module) if name[0] != "_"]
            classes = filter(inspect.isclass, public)
            methods = [getattr(c, name, None) for c in classes for name in dir(c) if name[0] != "_"]
            for thing in filter(callable, public + methods):
                if (getattr(thing, "__module__", None) or "").startswith(module.__name__[:5]):
                    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
                    if text.count(" ") >= 4 and "->" not in text and "(" not in text:
                        found.setdefault(text, library)
    return [(library, text) for text, library in found.items()]


def read(path: Path) -> list[tuple[str, str]]:
    """Pairs of a label and a sentence."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise SystemExit(f"error: cannot read {path}: {error.strerror}") from None
    parts = (line.strip().partition(" ") for line in lines)
    return [(label, text) for label, _, text in parts if text]


def main(
    train_file: Path | None = None,
    test_file: Path | None = None,
    labels: int = 600,
    held_out: int = 300,
    epochs: int = 6,
    learning_rate: float = 2e-3,
    sigma: float = 0.02,
    risk: float = 0.05,
    seed: int = 0,
) -> None:
    """Fine-tunes, calibrates, abstains and shows the five most uncertain sentences.

    Args:
      train_file: `label sentence` on each line; docstrings by default.
      test_file: the same, to test on; by default what is left of the others, up to 600.
      labels: sentences to train on.
      held_out: sentences that choose the posterior's temperature and the threshold.
      epochs: passes through the sentences.
      learning_rate: AdamW's; IVON takes steps as long.
      sigma: initial standard deviation of the posterior.
      risk: errors that are accepted among the sentences that are answered.
      seed: of the split, the adapters and the noise.
    """
    pairs = read(train_file) if train_file else load_docstrings()
    pairs = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    rest = read(test_file) if test_file else pairs[labels + held_out :]
    if min(labels // BATCH_SIZE, held_out, epochs) < 1 or min(learning_rate, sigma) <= 0:
        raise SystemExit(f"--labels is at least {BATCH_SIZE}, and all numbers are positive")
    if len(pairs) < labels + held_out or not rest:
        raise SystemExit(
            f"{len(pairs)} sentences are too few for --labels and --held-out, and a test"
        )
    rest = [rest[i] for i in np.random.default_rng(seed).permutation(len(rest))]
    pairs = pairs[: labels + held_out] + rest[:600]
    names = sorted({label for label, _ in pairs})
    tokens = jnp.asarray(minilm.tokenize([text for _, text in pairs], LENGTH))
    classes = jnp.array([names.index(label) for label, _ in pairs])
    parts = np.split(np.arange(len(pairs)), [labels, labels + held_out])
    training, held, test = ((tokens[rows], classes[rows]) for rows in parts)

    init_key, noise_key, shuffle_key, test_key = jax.random.split(jax.random.key(seed), 4)
    network = minilm.Classifier(len(names))
    head = 0.02 * jax.random.normal(init_key, (minilm.WIDTH, len(names)))
    layers = {"kernel": head, "bias": jnp.zeros(len(names))}
    base = {"params": {"encoder": minilm.load_encoder(), "head": layers}}
    adapters = minilm.adapters(base, RANK, init_key)["params"]
    start = {"params": {"head": layers, **adapters}}

    def apply(trained, tokens) -> Any:
        return network.apply(minilm.adapted(base, trained), tokens)

    tx = make_optimizer(learning_rate, sigma, epochs * (labels // BATCH_SIZE), noise_key)
    how: Any = {"epochs": epochs, "batch_size": BATCH_SIZE}
    loss_fn = classification_loss(apply)
    _, state = train(tx, loss_fn, start, training, key=shuffle_key, **how)

    at_mean = jax.jit(predict_at_mean(lambda p, x: jax.nn.log_softmax(apply(p, x))))
    average = jax.jit(predict_log_probs(apply, num_samples=16, data_batch_size=100))
    tempered = {t: posterior(state, temperature=t) for t in TEMPERATURES}
    nll = {t: metrics.nll(average(test_key, q, held[0]), held[1]) for t, q in tempered.items()}
    chosen = min(nll, key=lambda t: float(nll[t]))
    sampled = average(test_key, tempered[chosen], test[0])
    rows = [["", "accuracy, %", "NLL", "ECE, %"]]
    for name, x in (("mean", at_mean(state, test[0])), ("16 samples", sampled)):
        numbers = metrics.accuracy(x, test[1]), metrics.nll(x, test[1]), metrics.ece(x, test[1])
        rows.append(
            [name, f"{100 * numbers[0]:.1f}", f"{numbers[1]:.3f}", f"{100 * numbers[2]:.1f}"]
        )
    print(f"\n{labels} sentences to train on, {len(test[1])} to test; {', '.join(names)}")
    print(f"temperature of the posterior, of {TEMPERATURES}, by held-out sentences: {chosen:g}\n")
    print(format_table(rows))

    held_out_probs = average(test_key, tempered[chosen], held[0])
    threshold = threshold_for(risk, held_out_probs, held[1])
    answered = np.asarray(jnp.exp(sampled.max(-1)) >= threshold)
    wrong = np.asarray(sampled.argmax(-1) != test[1])
    print(
        f"\nTo make less than {risk:.0%} errors, with a confidence of 90 %, it answers where its "
        f"probability is {threshold:.2f} or more:"
    )
    print(f"{share(answered):.0%} of the test sentences, {share(wrong[answered]):.1%} errors there")
    print(f"({share(wrong):.1%} in all, {share(wrong[~answered]):.0%} in those left).")

    print("\nThe five most uncertain sentences:\n")
    for i in np.argsort(-metrics.predictive_entropy(sampled))[:5]:
        two = np.argsort(-sampled[i])[:2]
        guess = ", ".join(f"{names[c]} {jnp.exp(sampled[i, c]):.2f}" for c in two)
        print(f"  {pairs[labels + held_out + i][1][:90]}\n    {guess}; it is {names[test[1][i]]}")


def share(marked: np.ndarray) -> float:
    """The share that is marked; 0 of none."""
    return float(marked.sum() / max(len(marked), 1))


def threshold_for(risk: float, log_probs: Any, labels: Any, confidence: float = 0.9) -> float:
    """The probability from which on at most this share of new answers is wrong, infinite if none.

    With this confidence: each of the thresholds that a bisection visits is judged by an upper bound
    of its error rate (Clopper & Pearson), as in Geifman & El-Yaniv (2017).
    """
    _, risks = map(np.asarray, metrics.risk_coverage(log_probs, labels))
    best, high = 0, len(risks) + 1  # of the surest ones: so many are safe, so many are not
    number = math.ceil(math.log2(high))
    while high - best > 1:
        middle = (best + high) // 2
        wrong = round(middle * float(risks[middle - 1]))
        bound = beta.ppf(1 - (1 - confidence) / number, wrong + 1, middle - wrong)
        best, high = (middle, high) if bound <= risk else (best, middle)
    surest = np.sort(np.exp(np.asarray(log_probs).max(-1)))[::-1]
    return float(surest[best - 1]) if best else math.inf


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
