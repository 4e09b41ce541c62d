"""Against other implementations: the authors' `ivon-opt` and PyTorch's AdamW, and ours and optax's.

    pip install -e ".[examples,oracle]"
    python benchmarks/evidence/implementations/main.py             # some 4 minutes on two cores
    python benchmarks/evidence/implementations/main.py --report    # tables

Both sides train the same perceptron on scikit-learn's digits from the same weights, with the same
batches, settings and number of gradients; only IVON's noise differs. Test NLL is compared by seed,
and a training step is timed in turn, in one process.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._shared.journal import Evidence, Journal, command, write_tables
from benchmarks._shared.measuring import interleaved, jax_loop, ratio_cell
from benchmarks._shared.methods import Array, Batch, step_of, warmup_cosine
from benchmarks._shared.tuning import described
from examples._shared.datasets import load_small_digits
from examples._shared.reporting import cell, mean_and_error
from ivon_jax import ivon, metrics, posterior, predict_log_probs

SIZES = (64, 128, 128, 10)
EPOCHS = 30
BATCH_SIZE = 50
SAMPLES = 64  # of the posterior
REPETITIONS = 40  # of the timing
SIDES = ("jax", "torch")
NAMES = {
    ("ivon", "jax"): "ivon_jax",
    ("ivon", "torch"): "ivon-opt (PyTorch)",
    ("adamw", "jax"): "optax AdamW",
    ("adamw", "torch"): "PyTorch AdamW",
}
ERRORS = 2.0  # standard errors that make a difference
METRICS = {  # label, factor, decimals
    "nll": ("NLL", 1, 4),
    "nll_samples": ("NLL, samples", 1, 4),
    "accuracy": ("accuracy, %", 100, 2),
    "accuracy_samples": ("accuracy, %, samples", 100, 2),
}
Rows = list[Sequence[str]]
Pairs = list[tuple[dict, dict]]  # results of both sides with the same seed
Carry = tuple[Any, Any, Array]  # parameters, optimizer state, key


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("implementations.jsonl")
    seeds: int = 30


# --- What both sides are given -------------------------------------------------------------------


class Task:
    """The digits of scikit-learn and a perceptron, the same for all implementations."""

    def __init__(self):
        data = load_small_digits()
        self.images, self.test_images = (
            (2 * images - 1).reshape(len(images), -1)
            for images in (data.train_images, data.test_images)
        )
        self.labels, self.test_labels = data.train_labels.astype(np.int64), data.test_labels
        self.num_train, self.samples = len(self.labels), SAMPLES
        self.num_steps = EPOCHS * (self.num_train // BATCH_SIZE)

    def weights(self, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Initial weights (inputs, outputs) and biases of every layer."""
        rng = np.random.default_rng(seed)
        return [
            ((rng.standard_normal((a, b)) / np.sqrt(a)).astype("float32"), np.zeros(b, "float32"))
            for a, b in itertools.pairwise(SIZES)
        ]

    def batches(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All batches of a run, in order."""
        rng = np.random.default_rng((seed, 1))
        for _ in range(EPOCHS):
            order = rng.permutation(self.num_train)
            for rows in order.reshape(-1, BATCH_SIZE):
                yield self.images[rows], self.labels[rows]


class Setting(NamedTuple):
    """An optimizer, its hyperparameters, and whether its rate is constant."""

    optimizer: str
    constant: bool
    values: dict[str, float]

    def schedule(self, task: Task) -> Callable[[Any], Any]:
        """The rate of a step: constant, or warmup and a cosine to zero."""
        rate = self.values["learning_rate"]
        if self.constant:
            return optax.constant_schedule(rate)
        return warmup_cosine(rate, task.num_steps)


IVON = {"hess_init": 0.5, "b2": 0.999, "weight_decay": 1e-4}
SETTINGS = {
    "IVON, cosine": Setting("ivon", False, {"learning_rate": 0.5, **IVON}),
    "IVON, constant rate": Setting("ivon", True, {"learning_rate": 0.2, **IVON}),
    "AdamW, cosine": Setting("adamw", False, {"learning_rate": 1e-2, "weight_decay": 0.1}),
    "AdamW, constant rate": Setting("adamw", True, {"learning_rate": 2e-3, "weight_decay": 0.1}),
}


# --- Our side: ivon_jax, and optax's AdamW --------------------------------------------------------


@jax.jit
def log_probs(params: list, images: Array) -> Array:
    """Log-probabilities of the perceptron."""
    *hidden, (last, last_bias) = params
    for weight, bias in hidden:
        images = jax.nn.relu(images @ weight + bias[None])
    return jax.nn.log_softmax(images @ last + last_bias[None])


def mean_loss(params: list, batch: Batch) -> Array:
    """Mean cross-entropy per example."""
    return -jnp.take_along_axis(log_probs(params, batch[0]), batch[1][:, None], axis=1).mean()


class Trainer:
    """A setting, compiled once for all seeds."""

    as_array = staticmethod(jnp.asarray)

    def __init__(self, setting: Setting, task: Task):
        self.task, self.variational = task, setting.optimizer == "ivon"
        values: dict[str, Any] = {**setting.values, "learning_rate": setting.schedule(task)}
        self.tx = ivon(ess=task.num_train, **values) if self.variational else optax.adamw(**values)
        self.update = step_of(setting.optimizer, mean_loss, self.tx)

    def start(self, seed: int) -> Carry:
        """Before the first step."""
        params = jax.tree.map(jnp.asarray, self.task.weights(seed))
        return params, self.tx.init(params), jax.random.key(seed)

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, carry: Carry, images: Array, labels: Array) -> Carry:
        """One training step."""
        params, state, key = carry
        key, draw_key = jax.random.split(key)
        params, state, _ = self.update(draw_key, params, state, (images, labels))
        return params, state, key

    def predict(self, carry: Carry, images: Array) -> list[Array]:
        """Log-probabilities by the weights or mean and, for IVON, averaged over samples."""
        params, state, key = carry
        point = log_probs(params, images)
        if not self.variational:
            return [point]
        return [point, predict_log_probs(log_probs, SAMPLES)(key, posterior(state), images)]


# --- Runs -----------------------------------------------------------------------------------------


def compute(options: Options) -> None:
    """All runs of both sides, in turn, and the timing."""
    try:
        from benchmarks.evidence.implementations import torch_side
    except ModuleNotFoundError as error:
        package = "ivon-opt" if error.name == "ivon" else error.name
        message = f'error: {package} is not installed; run: pip install -e ".[examples,oracle]"'
        raise SystemExit(message) from None
    task = Task()
    journal = Journal(options.results, 1 + options.seeds * len(SETTINGS) * len(SIDES))
    trainers = {
        (name, side): trainer(setting, task)
        for name, setting in SETTINGS.items()
        for side, trainer in zip(SIDES, (Trainer, torch_side.Trainer), strict=True)
    }

    def timing() -> dict[str, Any]:
        """Seconds per training step of every implementation, interleaved."""
        loops = {
            NAMES[SETTINGS[name].optimizer, side]: jax_loop(
                trainer.step, trainer.start(0), *map(trainer.as_array, next(task.batches(0)))
            )
            for (name, side), trainer in trainers.items()
            if SETTINGS[name].constant
        }
        found = interleaved(loops, REPETITIONS)
        seconds = {name: x.tolist() for name, x in found.items()}
        return {"seconds": seconds, "versions": torch_side.versions()}

    what = {"task": "timing", "repetitions": REPETITIONS, "batch_size": BATCH_SIZE}
    journal.compute(what, timing)
    for seed in range(options.seeds):
        for (name, side), trainer in trainers.items():
            work = partial(train_and_score, trainer, task, seed)
            journal.compute({**run_of(name, side), "seed": seed}, work)


def run_of(name: str, side: str) -> dict[str, Any]:
    """What identifies the runs of a setting on one side."""
    sizes = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "samples": SAMPLES}
    values = dict(SETTINGS[name].values)
    return {"task": "train", "setting": name, "side": side, "values": values, **sizes}


def train_and_score(trainer: Any, task: Task, seed: int) -> dict[str, float]:
    """One run: NLL and accuracy of the weights, or of the mean and of the averaged samples."""
    batches = [tuple(map(trainer.as_array, batch)) for batch in task.batches(seed)]
    trainer.step(trainer.start(seed), *batches[0])  # compiles, the first time
    carry = jax.block_until_ready(trainer.start(seed))
    start = time.perf_counter()
    for batch in batches:
        carry = trainer.step(carry, *batch)
    jax.block_until_ready(carry)
    scored = {"seconds": time.perf_counter() - start}
    labels = jnp.asarray(task.test_labels)
    predicted = trainer.predict(carry, trainer.as_array(task.test_images))
    for suffix, log_probs in zip(("", "_samples"), predicted, strict=False):
        scored["nll" + suffix] = float(metrics.nll(jnp.asarray(log_probs), labels))
        scored["accuracy" + suffix] = float(metrics.accuracy(jnp.asarray(log_probs), labels))
    return scored


# --- Report ---------------------------------------------------------------------------------------


def report(journal: Journal) -> None:
    """Writes the tables."""
    pairs = {name: found for name in SETTINGS if (found := paired(journal, name))}
    if not pairs:
        raise SystemExit(f"{journal.path} has no runs of both sides yet")
    seconds: Rows = [("whole runs", "ours or optax, s", "PyTorch, s", "PyTorch / ours")]
    for name, found in pairs.items():
        ours, theirs = np.array([[result["seconds"] for result in pair] for pair in found]).T
        seconds.append((name, cell(ours, 2), cell(theirs, 2), ratio_cell(theirs / ours)))
    tables = {
        "IVON: test images": comparison("ivon", pairs),
        "AdamW: test images": comparison("adamw", pairs),
        "Seconds": seconds,
        "A training step": timing_rows(journal),
        "Settings": [("", "settings"), *((n, described(s.values)) for n, s in SETTINGS.items())],
    }
    versions = ", ".join(journal.select(task="timing")[-1][1]["versions"])
    notes = (
        f"1,000 training and 797 test digits of scikit-learn, a perceptron 64-128-128-10, "
        f"{EPOCHS} epochs in batches of {BATCH_SIZE}, ess = 1,000, {SAMPLES} "
        f"posterior samples; {min(map(len, pairs.values()))} seeds, mean ± standard error. A seed "
        "has the same initial weights and batches on both sides; IVON's noise is each side's own. "
        "Differences are ours less PyTorch's, paired by seed: 'the same' is within two standard "
        "errors. The cosine begins with a warmup of 5 % of the steps. Both sides run step by step, "
        "forward and backward pass included; a step is timed in turn with the others. Beside it: "
        f"{versions}."
    )
    write_tables(journal, "Against other implementations", tables, notes)


def paired(journal: Journal, name: str) -> Pairs:
    """Results of a setting for all seeds that both sides have."""
    ours, theirs = (
        {run["seed"]: result for run, result in journal.select(**run_of(name, side))}
        for side in SIDES
    )
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def comparison(optimizer: str, pairs: Mapping[str, Pairs]) -> Rows:
    """By setting and metric: both sides, the paired difference, and what follows."""
    names = [NAMES[optimizer, side] for side in SIDES]
    rows: Rows = [("", *names, "difference by seed", "in errors", "verdict")]
    for name, found in pairs.items():
        if SETTINGS[name].optimizer != optimizer:
            continue
        for metric in (metric for metric in METRICS if metric in found[0][0]):
            label, factor, decimals = METRICS[metric]
            where = f"{label}, mean" if optimizer == "ivon" and "samples" not in metric else label
            ours, theirs = factor * np.array([[x[metric] for x in pair] for pair in found]).T
            mean, error = mean_and_error(ours - theirs)
            ratio = float(mean / error) if mean else 0.0
            cells = cell(ours, decimals), cell(theirs, decimals), cell(ours - theirs, decimals + 1)
            verdict = "the same" if abs(ratio) <= ERRORS else "different"
            verdict = "not known" if np.isnan(ratio) else verdict
            rows.append((f"{name}: {where}", *cells, f"{ratio:.1f}", verdict))
    return rows


def timing_rows(journal: Journal) -> Rows:
    """Median time of a step, and its ratio to ours of the same kind, turn by turn."""
    rows: Rows = [("", "median, µs", "time / ours or optax [quartiles]")]
    measured = journal.select(task="timing")[-1][1]["seconds"]
    for (optimizer, _), name in NAMES.items():
        seconds = np.array(measured[name])
        ratio = seconds / np.array(measured[NAMES[optimizer, "jax"]])
        rows.append((name, f"{1e6 * np.median(seconds):.0f}", ratio_cell(ratio)))
    return rows


main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
