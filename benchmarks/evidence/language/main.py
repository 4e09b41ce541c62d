"""AdamW and IVON on characters of text: validation loss, wall time and calibration.

A GPT of four layers, four heads and width 128 reads 64 characters and is trained for 2,000 steps of
12 windows, without biases or dropout: nanoGPT's configuration for a CPU, whose published validation
loss on Tiny Shakespeare is 1.88. The last tenth of the text is for validation; nothing was chosen
on it.

`python benchmarks/evidence/language/main.py --text tinyshakespeare.txt` (three seeds of each
optimizer) takes 25 minutes on two cores.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, command
from benchmarks._shared.measuring import interleaved, jax_loop, ratios
from benchmarks._shared.networks import GPT
from benchmarks.evidence.language.report import write_report
from benchmarks.evidence.language.training import (
    CHOSEN,
    Ivon,
    Settings,
    State,
    Text,
    fixed_windows,
    make_training,
    read_text,
)
from ivon_jax import metrics, predict_log_probs

POINTS = 20  # of the curve at the mean; the average over samples is taken at every fourth
CURVE_WINDOWS = 160
FINAL_WINDOWS = 480
SAMPLES = 16
DATA_BATCH = 32  # windows evaluated at a time


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("language.jsonl")
    text: Path | None = None
    """A text file, read as bytes."""
    steps: int = 2000
    seeds: int = 3


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """Times a step of both optimizers, and trains with several seeds."""
    if options.text is None:
        raise SystemExit("give the text to learn: --text FILE, such as Tiny Shakespeare")
    text, steps = read_text(options.text), options.steps
    journal = Journal(options.results, 2 * options.seeds + 1)
    named = {"text": text.name, "digest": text.digest, "steps": steps}
    both = " against ".join(map(repr, CHOSEN.values()))
    run = {"part": "timing", **named, "seed": 0, "both": both}
    journal.compute(run, partial(timing, text, steps))
    for seed, settings in itertools.product(range(options.seeds), CHOSEN.values()):
        run = {"part": "final", **named, "settings": repr(settings), "seed": seed}
        journal.compute(run, partial(final_run, text, settings, steps, seed))


def final_run(text: Text, settings: Settings, steps: int, seed: int) -> dict[str, Any]:
    """Trains on nine tenths of the text and evaluates on the last tenth, on the way and after."""
    bayesian, network = isinstance(settings, Ivon), text.network
    some = fixed_windows(text.validation, CURVE_WINDOWS)
    curve, averaged, state = [], [], None
    reached = train(settings, network, text.train, steps, seed, POINTS)
    for number, (step, state) in enumerate(reached, start=1):
        curve.append((step, round(loss(at_mean(network, state, some), some), 5)))
        if bayesian and not number % 4:
            averaged.append((step, round(loss(at_samples(network, state, some), some), 5)))
    windows = fixed_windows(text.validation, FINAL_WINDOWS)
    assert state is not None
    result = {"curve": curve, "mean": scored(at_mean(network, state, windows), windows)}
    if bayesian:
        result["curve_averaged"] = averaged
        result["averaged"] = scored(at_samples(network, state, windows), windows)
    return result


def train(
    settings: Settings, network: GPT, tokens: np.ndarray, steps: int, seed: int, points: int
) -> Iterator[tuple[int, State]]:
    """Yields (steps done, state) at `points` places of one run."""
    init, advance = make_training(settings, network, steps)
    key, data = jax.random.key(seed), jnp.asarray(tokens)
    state = init(jax.random.fold_in(key, 0))
    places = np.unique(np.linspace(0, steps, points + 1).round().astype(int))
    for before, place in itertools.pairwise(places):
        state = advance(jax.random.fold_in(key, 1), data, state, int(place - before))
        yield int(place), state


def timing(text: Text, steps: int) -> dict[str, Any]:
    """Median seconds per step of both, in turn in this process, and the ratio of neighbours."""
    functions, tokens, key = {}, jnp.asarray(text.train), jax.random.key(0)
    for name, settings in CHOSEN.items():
        init, advance = make_training(settings, text.network, steps)

        def ten_steps(state: State, advance: Any = advance) -> State:
            return advance(key, tokens, state, 10)

        functions[name] = jax_loop(ten_steps, init(key))
    measured = interleaved(functions, repetitions=15, block_seconds=1.0)
    return {
        "seconds": {name: float(np.median(x.seconds)) / 10 for name, x in measured.items()},
        "ratio": ratios(measured["IVON"].ratio),
    }


# --- Scores ---------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="network")
def at_mean(network: GPT, state: State, windows: jax.Array) -> jax.Array:
    """Log-probabilities of the next characters at the parameters."""

    def one(window: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(network.apply(state.params, window[None, :-1])[0])

    return jax.lax.map(one, windows, batch_size=DATA_BATCH)


@partial(jax.jit, static_argnames="network")
def at_samples(network: GPT, state: State, windows: jax.Array) -> jax.Array:
    """Log-probabilities averaged over posterior samples."""
    predict = predict_log_probs(network.apply, SAMPLES, data_batch_size=DATA_BATCH)
    return predict(jax.random.key(0), state.opt_state, windows[:, :-1])


@jax.jit
def _scores(log_probs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    names = {"loss": "nll", "accuracy": "accuracy", "ece": "ece", "brier": "brier"}
    return {name: getattr(metrics, metric)(log_probs, labels) for name, metric in names.items()}


def scored(log_probs: jax.Array, windows: jax.Array) -> dict[str, float]:
    """Metrics of predictions of the next characters."""
    return {name: float(x) for name, x in _scores(log_probs, windows[:, 1:]).items()}


def loss(log_probs: jax.Array, windows: jax.Array) -> float:
    """Mean cross-entropy per character."""
    return scored(log_probs, windows)["loss"]


main = command(Options, __doc__, compute, write_report)

if __name__ == "__main__":
    main()
