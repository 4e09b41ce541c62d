"""AdamW, Muon and IVON on characters of text: loss, calibration, wall time, and what h does.

    python benchmarks/evidence/language/main.py --text tinyshakespeare.txt
    python benchmarks/evidence/language/main.py --report       # tables and figure
    python benchmarks/evidence/language/main.py --text OTHER --chosen-in A.jsonl --results B.jsonl

A GPT of four layers, four heads and width 128 reads 64 characters and is trained for 2,000 steps of
12 windows, without biases or dropout: nanoGPT's configuration for a CPU. AdamW, IVON and IVON in an
eigenbasis try nine settings each, Muon five, with the first seed, from the same initial weights,
with the same batches, schedule and clipping; what has the lowest loss on 5 % of the text (of IVON:
averaged over samples) is run with the other seeds as well. Losses are of the last 10 %. Steps in
the eigenbasis, and of Muon, take longer: their runs are repeated with as many steps as take AdamW's
time. Steps along the signs of the momentum show what IVON does where all its steps are clipped. A
run takes three to four minutes on one core, in the eigenbasis seven, and all of them four hours.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks._shared.comparing import best_of
from benchmarks._shared.journal import Evidence, Journal, command, read_journal
from benchmarks._shared.measuring import interleaved, jax_loop, ratios
from benchmarks._shared.networks import GPT
from benchmarks.evidence.language.report import steps_in_time, tuning_loss, write_report
from benchmarks.evidence.language.text import Text, fixed_windows, read_text
from benchmarks.evidence.language.training import (
    TRIED,
    Ivon,
    Settings,
    State,
    make_training,
    numbers,
    train,
)
from ivon_jax import metrics, predict_log_probs
from ivon_jax import posterior as posterior_of

AT_EQUAL_TIME = ("IVON, eigenbasis", "Muon")
POINTS = 20  # of the curve at the mean; the average over samples is taken at every fifth
CURVE_WINDOWS = 160
FINAL_WINDOWS = 480
SAMPLES = 8
DATA_BATCH = 32  # windows evaluated at a time


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("language.jsonl")
    text: Path | None = None
    """A text file, read as bytes; it may be compressed (.xz)."""
    chosen_in: Path | None = None
    """A journal of another text: what was chosen there is run here, and nothing is tried."""
    steps: int = 2000
    seeds: int = 3


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """Tries all settings, repeats the chosen ones, and times a step of these."""
    if options.text is None:
        raise SystemExit("give the text to learn: --text FILE, such as Tiny Shakespeare")
    text, steps = read_text(options.text), options.steps
    chosen = chosen_elsewhere(options.chosen_in) if options.chosen_in else {}
    number = 0 if chosen else sum(map(len, TRIED.values()))
    number += (len(chosen or TRIED) + len(AT_EQUAL_TIME)) * options.seeds + 1
    journal = Journal(options.results, number)
    named = {"text": text.name, "digest": text.digest, "steps": steps}

    def run(name: str, settings: Settings, seed: int) -> Any:
        which = {"part": "run", **named, "method": name, "values": vars(settings), "seed": seed}
        return journal.compute(which, partial(one_run, text, settings, steps, seed))

    for name, tried in () if chosen else TRIED.items():
        losses = [tuning_loss(run(name, x, 0)) for x in tried]
        chosen[name] = best_of(tried, losses)
    for seed in range(options.seeds):
        for name, settings in chosen.items():
            run(name, settings, seed)
    all_chosen = {name: vars(x) for name, x in chosen.items()}
    timed = {"part": "timing", **named, "chosen": all_chosen}
    times = journal.compute(timed, partial(timing, text, chosen, steps))
    for name, settings in chosen.items():
        shorter = steps_in_time(times, name, steps)
        for seed in range(options.seeds if name in AT_EQUAL_TIME else 0):
            which = {"method": name, "values": vars(settings), "seed": seed}
            which = {"part": "equal time", **named, **which, "shorter": shorter}
            journal.compute(which, partial(one_run, text, settings, shorter, seed))


def chosen_elsewhere(path: Path) -> dict[str, Settings]:
    """What each method has chosen on another text."""
    timed = read_journal(path).select(part="timing")
    if not timed:
        raise SystemExit(f"{path}: nothing is chosen there yet, let that command finish first")
    chosen = timed[-1][0]["chosen"].items()
    return {name: type(TRIED[name][0])(**x) for name, x in chosen if name in TRIED}


def one_run(text: Text, settings: Settings, steps: int, seed: int) -> dict[str, Any]:
    """Losses on the way and at the end, of the part that chooses and of the last tenth."""
    network, ivon = text.network, settings if isinstance(settings, Ivon) else None
    some = fixed_windows(text.validation, CURVE_WINDOWS)
    found: dict[str, Any] = {"curve": []} | ({"averages": [], "h": []} if ivon else {})
    state: Any = None
    reached = train(settings, network, text.train, steps, seed, POINTS)
    for point, (step, state) in enumerate(reached, start=1):
        found["curve"].append((step, loss(at_mean(network, state, some), some)))
        if ivon and not point % 5:
            found["averages"].append((step, loss(at_samples(network, state, some), some)))
            found["h"].append((step, numbers(ivon, state, steps)))
    ways = {"point": at_mean} | ({"samples": at_samples} if ivon else {})
    for part in ("tuning", "validation"):
        windows = fixed_windows(getattr(text, part), FINAL_WINDOWS)
        found[part] = {k: scored(way(network, state, windows), windows) for k, way in ways.items()}
    return found


def timing(text: Text, chosen: dict[str, Any], steps: int) -> dict[str, Any]:
    """Median seconds per step, in turn in this process, and the ratios to AdamW's of neighbours."""
    functions, tokens, key = {}, jax.numpy.asarray(text.train), jax.random.key(0)
    for name, settings in chosen.items():
        init, advance = make_training(settings, text.network, steps)

        def ten_steps(state: State, advance: Any = advance) -> State:
            return advance(key, tokens, state, 10)

        functions[name] = jax_loop(ten_steps, init(key))
    measured = interleaved(functions, repetitions=15, block_seconds=1.0)
    return {
        "seconds": {name: float(np.median(x)) / 10 for name, x in measured.items()},
        "ratio": {name: ratios(x / measured["AdamW"]) for name, x in measured.items()},
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
    return predict(jax.random.key(0), posterior_of(state.opt_state), windows[:, :-1])


@jax.jit
def _scores(log_probs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    names = ("nll", "accuracy", "ece", "brier")
    return {name: getattr(metrics, name)(log_probs, labels) for name in names}


def scored(log_probs: jax.Array, windows: jax.Array) -> dict[str, float]:
    """Metrics of predictions of the next characters."""
    return {name: float(x) for name, x in _scores(log_probs, windows[:, 1:]).items()}


def loss(log_probs: jax.Array, windows: jax.Array) -> float:
    """Mean cross-entropy per character, to five digits."""
    return round(scored(log_probs, windows)["nll"], 5)


main = command(Options, __doc__, compute, write_report)

if __name__ == "__main__":
    main()
