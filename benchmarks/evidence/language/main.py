"""AdamW and IVON on characters of text: validation loss, wall time and calibration.

A GPT of four layers, four heads and width 128 reads 64 characters and is trained for 2,000 steps of
12 windows, without biases or dropout: nanoGPT's configuration for a CPU, whose published validation
loss on Tiny Shakespeare is 1.88. The last tenth of the text is for validation. `--tune` compares
six settings of each optimizer on the last twentieth of the text *before* that, after shorter runs
on what comes earlier; nothing is chosen on the validation part.

The default run (three seeds of each optimizer) takes 25 minutes on two cores, `--tune` 8 minutes.
"""

import argparse
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Journal, evidence_parser, read_journal
from benchmarks._shared.measuring import interleaved, jax_loop, ratios
from benchmarks.evidence.language import model
from benchmarks.evidence.language import report as language_report
from benchmarks.evidence.language.settings import CHOSEN, GRIDS, METHODS
from benchmarks.evidence.language.training import Ivon, Settings, State, make_training
from examples._shared.reporting import positive
from examples.gpt2.data import standard_library
from ivon_jax import metrics, predict_log_probs

POINTS = 20  # of the curve at the mean; the average over samples is taken at every fourth
CURVE_WINDOWS = 160
FINAL_WINDOWS = 480
TUNE_WINDOWS = 480
TUNE_STEPS = 0.15  # share of the steps of a final run
SAMPLES = 16
DATA_BATCH = 32  # windows evaluated at a time


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    text: model.Text
    steps: int
    seeds: int

    def run(self, part: str, settings: Settings | None = None, seed: int = 0) -> dict[str, Any]:
        """What identifies a run."""
        name = {} if settings is None else {"settings": repr(settings)}
        return {
            "part": part,
            "text": self.text.name,
            "digest": self.text.digest,
            **name,
            "steps": self.steps,
            "seed": seed,
        }


def train(
    settings: Settings, tokens: np.ndarray, vocabulary: int, steps: int, seed: int, points: int
) -> Iterator[tuple[int, State]]:
    """Yields (steps done, state) at `points` places of one run."""
    init, advance = make_training(settings, vocabulary, steps)
    key, data = jax.random.key(seed), jnp.asarray(tokens)
    state = init(jax.random.fold_in(key, 0))
    places = np.unique(np.linspace(0, steps, points + 1).round().astype(int))
    for before, place in itertools.pairwise(places):
        state = advance(jax.random.fold_in(key, 1), data, state, int(place - before))
        yield int(place), state


def at_mean(state: State, windows: jax.Array) -> jax.Array:
    """Log-probabilities of the next characters at the parameters."""
    chunks = [
        _log_probs(state.params, windows[start : start + DATA_BATCH, :-1])
        for start in range(0, len(windows), DATA_BATCH)
    ]
    return jnp.concatenate(chunks)


_log_probs = jax.jit(model.log_probs)
_averaged = jax.jit(predict_log_probs(model.logits, SAMPLES, data_batch_size=DATA_BATCH))


def at_samples(state: State, windows: jax.Array) -> jax.Array:
    """Log-probabilities averaged over posterior samples."""
    return _averaged(jax.random.key(0), state.opt_state, windows[:, :-1])


@jax.jit
def _scores(log_probs: jax.Array, labels: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    scores = {
        "loss": metrics.nll(log_probs, labels),
        "accuracy": metrics.accuracy(log_probs, labels),
        "ece": metrics.ece(log_probs, labels),
        "brier": metrics.brier(log_probs, labels),
    }
    return scores, metrics.calibration_bins(log_probs, labels)


def scored(log_probs: jax.Array, windows: jax.Array) -> dict[str, Any]:
    """Metrics, and the bins of the reliability diagram."""
    scores, bins = _scores(log_probs, windows[:, 1:])
    return {
        **{name: float(x) for name, x in scores.items()},
        "bins": {
            "count": np.asarray(bins.count).tolist(),
            "confidence": np.nan_to_num(np.asarray(bins.confidence, float)).round(5).tolist(),
            "accuracy": np.nan_to_num(np.asarray(bins.accuracy, float)).round(5).tolist(),
        },
    }


def loss_of(log_probs: jax.Array, windows: jax.Array) -> float:
    """Mean cross-entropy per character."""
    return float(_scores(log_probs, windows[:, 1:])[0]["loss"])


def final_run(plan: Plan, settings: Settings, seed: int) -> dict[str, Any]:
    """Trains on nine tenths of the text and evaluates on the last tenth, on the way and after."""
    text, bayesian = plan.text, isinstance(settings, Ivon)
    curve_windows = model.fixed_windows(text.validation, CURVE_WINDOWS)
    curve, averaged, state = [], [], None
    steps = train(settings, text.train, text.vocabulary, plan.steps, seed, POINTS)
    for number, (step, state) in enumerate(steps, start=1):
        curve.append((step, round(loss_of(at_mean(state, curve_windows), curve_windows), 5)))
        if bayesian and not number % 4:
            loss = loss_of(at_samples(state, curve_windows), curve_windows)
            averaged.append((step, round(loss, 5)))
    assert state is not None
    windows = model.fixed_windows(text.validation, FINAL_WINDOWS)
    result = {"curve": curve, "mean": scored(at_mean(state, windows), windows)}
    if bayesian:
        result["curve_averaged"] = averaged
        result["averaged"] = scored(at_samples(state, windows), windows)
    return result


def tuning_run(plan: Plan, settings: Settings) -> dict[str, Any]:
    """A shorter run, on and evaluated on parts that validation has no share in."""
    text = plan.text
    steps = max(1, round(TUNE_STEPS * plan.steps))
    [(_, state)] = train(settings, text.fit, text.vocabulary, steps, 0, points=1)
    windows = model.fixed_windows(text.tune, TUNE_WINDOWS)
    return {"loss": loss_of(at_mean(state, windows), windows), "steps": steps}


def timing(plan: Plan, chosen: Mapping[str, Settings]) -> dict[str, Any]:
    """Median seconds per step of both, in turn in this process, and the ratio of neighbours."""
    functions, tokens, key = {}, jnp.asarray(plan.text.train), jax.random.key(0)
    for name, settings in chosen.items():
        init, advance = make_training(settings, plan.text.vocabulary, plan.steps)

        def ten_steps(state: State, advance: Any = advance) -> State:
            return advance(key, tokens, state, 10)

        functions[name] = jax_loop(ten_steps, init(key))
    measured = interleaved(functions, repetitions=15, block_seconds=1.0)
    return {
        "seconds": {name: float(np.median(x.seconds)) / 10 for name, x in measured.items()},
        "ratio": ratios(measured[METHODS[-1]].ratio),
    }


def tune(plan: Plan, journal: Journal) -> None:
    """Compares the settings of both grids."""
    for settings in (s for name in METHODS for s in GRIDS[name]):
        journal.compute(plan.run("tune", settings), lambda s=settings: tuning_run(plan, s))
    for name, best in chosen_settings(plan, journal).items():
        print(f"{name}: {best}")


def chosen_settings(plan: Plan, journal: Journal) -> dict[str, Settings]:
    """The best of each grid if the results hold a whole sweep, else those of the source."""
    chosen = {}
    for name in METHODS:
        losses = {}
        for settings in GRIDS[name]:
            for _, result in journal.select(**plan.run("tune", settings)):
                losses[settings] = math.inf if math.isnan(result["loss"]) else result["loss"]
        complete = len(losses) == len(GRIDS[name])
        chosen[name] = min(losses, key=losses.__getitem__) if complete else CHOSEN[name]
    return chosen


def compare(plan: Plan, journal: Journal) -> None:
    """Trains with the chosen settings and several seeds."""
    chosen = chosen_settings(plan, journal)
    pair = {"both": " against ".join(map(repr, chosen.values()))}
    journal.compute({**plan.run("timing"), **pair}, lambda: timing(plan, chosen))
    for seed in range(plan.seeds):
        for settings in chosen.values():
            run = plan.run("final", settings, seed)
            journal.compute(run, lambda s=settings, seed=seed: final_run(plan, s, seed))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    lines = (__doc__ or "").split("\n\n")
    parser = evidence_parser(lines[0] + " " + lines[-1].strip(), "language")
    parser.add_argument(
        "--text",
        type=Path,
        help="a text file, read as bytes; without it, the source of Python's standard library",
    )
    parser.add_argument("--steps", type=positive, default=2000, help="steps of a run")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each optimizer")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="compare six settings of each optimizer in runs of 15 %% of the steps; afterwards "
        "the command takes the best from the same results, without a sweep those in "
        "language_settings.py",
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Computes what is missing, or reports."""
    args = parse()
    if args.report:
        return language_report.report(read_journal(args.results))
    if args.text is None:
        text = model.make_text("Python's standard library", standard_library())
    else:
        text = model.make_text(args.text.name, model.read_text(args.text))
    plan = Plan(text, args.steps, args.seeds)
    total = sum(map(len, GRIDS.values())) if args.tune else 2 * args.seeds + 1
    (tune if args.tune else compare)(plan, Journal(args.results, total))
    return None


if __name__ == "__main__":
    main()
