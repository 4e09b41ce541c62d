"""AdamW and IVON on characters of text: validation loss, wall time and calibration.

A GPT of four layers, four heads and width 128 reads 64 characters and is trained for 2,000 steps of
12 windows, without biases or dropout: nanoGPT's configuration for a CPU, whose published validation
loss on Tiny Shakespeare is 1.88. The last tenth of the text is for validation. `--tune` compares
six settings of each optimizer on the last twentieth of the text *before* that, after shorter runs
on what comes earlier; nothing is chosen on the validation part. After a whole sweep the command
takes the best of its results, without one the settings in the source.

`python benchmarks/evidence/language/main.py --text tinyshakespeare.txt` (three seeds of each
optimizer) takes 25 minutes on two cores, `--tune` 8 minutes.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, parse, read_journal
from benchmarks._shared.measuring import interleaved, jax_loop, ratios
from benchmarks._shared.networks import GPT
from benchmarks.evidence.language.report import write_report
from benchmarks.evidence.language.training import (
    CHOSEN,
    GRIDS,
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
FINAL_WINDOWS = TUNE_WINDOWS = 480
TUNE_STEPS = 0.15  # share of the steps of a final run
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
    tune: bool = False
    """Compare six settings of each optimizer in runs of 15 % of the steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text is None and not self.report:
            raise SystemExit("give the text to learn: --text FILE, such as Tiny Shakespeare")


def main(argv: Sequence[str] | None = None) -> None:
    """Computes what is missing, and reports."""
    options = parse(Options, __doc__, argv)
    if options.text is not None and not options.report:
        text = read_text(options.text)
        total = sum(map(len, GRIDS.values())) if options.tune else 2 * options.seeds + 1
        study = Study(text, options.steps, options.seeds, Journal(options.results, total))
        study.tune() if options.tune else study.compare()
    write_report(read_journal(options.results))


@dataclass(frozen=True)
class Study:
    """A text and how it is learned."""

    text: Text
    steps: int
    seeds: int
    journal: Journal

    def run(self, part: str, settings: Settings | None = None, seed: int = 0) -> dict[str, Any]:
        """What identifies a run."""
        name = {} if settings is None else {"settings": repr(settings)}
        text = {"text": self.text.name, "digest": self.text.digest}
        return {"part": part, **text, **name, "steps": self.steps, "seed": seed}

    def tune(self) -> None:
        """Compares the settings of both grids."""
        for settings in (settings for grid in GRIDS.values() for settings in grid):
            work = partial(tuning_run, self.text, settings, max(1, round(TUNE_STEPS * self.steps)))
            self.journal.compute(self.run("tune", settings), work)
        for name, best in self.chosen().items():
            print(f"{name}: {best}")

    def chosen(self) -> dict[str, Settings]:
        """The best of each grid if the results hold a whole sweep, else those of the source."""
        chosen = {}
        for name, grid in GRIDS.items():
            losses = {}
            for settings in grid:
                for _, result in self.journal.select(**self.run("tune", settings)):
                    losses[settings] = math.inf if math.isnan(result["loss"]) else result["loss"]
            complete = len(losses) == len(grid)
            chosen[name] = min(losses, key=losses.__getitem__) if complete else CHOSEN[name]
        return chosen

    def compare(self) -> None:
        """Trains with the chosen settings and several seeds."""
        chosen = self.chosen()
        pair = {"both": " against ".join(map(repr, chosen.values()))}
        time = partial(timing, self.text, chosen, self.steps)
        self.journal.compute({**self.run("timing"), **pair}, time)
        for seed, settings in itertools.product(range(self.seeds), chosen.values()):
            work = partial(final_run, self.text, settings, self.steps, seed)
            self.journal.compute(self.run("final", settings, seed), work)


# --- Runs -----------------------------------------------------------------------------------------


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


def tuning_run(text: Text, settings: Settings, steps: int) -> dict[str, Any]:
    """A shorter run, on and evaluated on parts that validation has no share in."""
    [(_, state)] = train(settings, text.network, text.fit, steps, 0, points=1)
    windows = fixed_windows(text.tune, TUNE_WINDOWS)
    return {"loss": loss(at_mean(text.network, state, windows), windows), "steps": steps}


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


def timing(text: Text, chosen: Mapping[str, Settings], steps: int) -> dict[str, Any]:
    """Median seconds per step of both, in turn in this process, and the ratio of neighbours."""
    functions, tokens, key = {}, jnp.asarray(text.train), jax.random.key(0)
    for name, settings in chosen.items():
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
def _scores(log_probs: jax.Array, labels: jax.Array) -> tuple[dict[str, jax.Array], Any]:
    names = {"loss": "nll", "accuracy": "accuracy", "ece": "ece", "brier": "brier"}
    scores = {name: getattr(metrics, metric)(log_probs, labels) for name, metric in names.items()}
    return scores, metrics.calibration_bins(log_probs, labels)


def scored(log_probs: jax.Array, windows: jax.Array) -> dict[str, Any]:
    """Metrics, and the bins of the reliability diagram."""
    scores, bins = _scores(log_probs, windows[:, 1:])
    shares = {
        name: np.nan_to_num(np.asarray(getattr(bins, name), float)).round(5).tolist()
        for name in ("confidence", "accuracy")
    }
    count = np.asarray(bins.count).tolist()
    return {**{k: float(x) for k, x in scores.items()}, "bins": {"count": count, **shares}}


def loss(log_probs: jax.Array, windows: jax.Array) -> float:
    """Mean cross-entropy per character."""
    return float(_scores(log_probs, windows[:, 1:])[0]["loss"])


if __name__ == "__main__":
    main()
