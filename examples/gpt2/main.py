"""GPT-2 with AdamW and IVON, on one core or on a mesh of many devices and processes.

    python examples/gpt2.py                                  # tiny, both optimizers, two cores
    python examples/gpt2.py --preset small --optimizer ivon --data openwebtext --steps 100000 \
        --warmup 2000 --batch 480 --micro-batches 3 --samples 8 --mesh data=8

IVON's settings are those published for GPT-2 (`ivon_jax.recipes`). Every micro-batch has posterior
samples of its own (24 in a step above); the gradient of each is clipped to norm 1 before the
product with its noise; weight decay acts on matrices only.

The same command goes on from the newest checkpoint in `--output`, on the same mesh or another.
examples/gpt2.md tells how to start several processes, and what happens when something breaks.
"""

import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from examples.gpt2 import data as gpt2_data
from examples.gpt2 import model as gpt2_model
from examples.gpt2 import options as gpt2_options
from examples.gpt2 import report as gpt2_report
from examples.gpt2 import training as gpt2_training
from examples.gpt2.checkpoints import Checkpoints
from examples.gpt2.data import Corpus
from examples.gpt2.model import Config, Layout
from examples.gpt2.training import Settings, TrainState

MAX_SKIPPED = 5  # logged losses in a row that may be not finite


def start_processes(args: Any) -> None:
    """Joins the other processes, if there are any; before anything else in jax.

    Raises:
      ValueError: if it is not told enough about them.
    """
    manual = (args.coordinator, args.num_processes, args.process_id)
    if None not in manual:
        jax.distributed.initialize(*manual)
    elif manual != (None, None, None):
        raise ValueError("--coordinator, --num-processes and --process-id belong together.")
    elif args.distributed:
        jax.distributed.initialize()


def say(*values: Any) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        tqdm.write(" ".join(map(str, values)))


class Run:
    """Training with one optimizer."""

    def __init__(
        self, args: Any, config: Config, layout: Layout, settings: Settings, corpus: Corpus
    ):
        """Compiles nothing yet."""
        self.args, self.config, self.layout, self.settings = args, config, layout, settings
        self.corpus = corpus
        self.name = type(settings).__name__.lower()
        self.folder = args.output / self.name
        self.init_key, self.run_key, self.evaluation_key = jax.random.split(
            jax.random.key(args.seed), 3
        )
        self.trainer = gpt2_training.make_trainer(config, layout, settings, args.skip_bad_steps)
        params = gpt2_model.abstract_params(config, layout)
        self.abstract = gpt2_training.abstract_state(self.trainer, params, layout)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.is_finite = jax.jit(gpt2_training.is_finite, out_shardings=layout.sharding())

    def fresh_state(self) -> TrainState:
        """Parameters and moments before the first step, each device filling its own shards."""
        params = gpt2_model.init_params(self.config, self.layout, self.init_key)
        init = jax.jit(self.trainer.init, out_shardings=self.shardings)
        return init(params, self.run_key)

    def batch(self, step: int) -> jax.Array:
        """The training batch of a step."""
        count = self.args.micro_batches
        shape = (count, self.args.batch // count, self.config.context + 1)
        sharding = self.layout.sharding(None, "batch", None)
        return gpt2_data.training_batch(self.corpus, self.args.seed, step, shape, sharding)

    def compiled_step(self) -> tuple[Callable[..., Any], float]:
        """The training step, and the megabytes that it takes on each device."""
        step = jax.jit(
            self.trainer.step,
            donate_argnums=0,
            out_shardings=(self.shardings, self.layout.sharding()),
        )
        compiled = step.lower(self.abstract, self.batch(0)).compile()
        memory: Any = compiled.memory_analysis()
        total = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        return compiled, total / 1e6

    def train(self) -> None:
        """Trains to the last step, from the newest checkpoint if there is one."""
        description = gpt2_options.run_description(
            self.args, self.config, self.settings, self.corpus
        )
        with Checkpoints(self.folder / "checkpoints", description, self.args.keep) as checkpoints:
            found = checkpoints.restore(self.abstract)
            start, state = (0, self.fresh_state()) if found is None else found[:2]
            if found is not None:
                say(f"{self.name}: goes on from the checkpoint of step {start}")
            if start < self.args.steps:
                self._steps(start, state, checkpoints)

    def _steps(self, start: int, state: TrainState, checkpoints: Checkpoints) -> None:
        args, first = self.args, jax.process_index() == 0
        metrics = gpt2_report.Metrics(self.folder / "metrics.jsonl", start, writes=first)
        evaluate = self._evaluator()
        step_fn, megabytes = self.compiled_step()
        metrics.write(step=start, step_memory_mb=megabytes)
        throughput = gpt2_report.Throughput(
            start,
            args.batch * self.config.context,
            self.config.flops_per_token(),
            args.peak_flops,
        )
        bar = tqdm(
            total=args.steps,
            initial=start,
            desc=gpt2_report.NAMES[self.name],
            disable=None if first else True,
        )
        skipped = 0  # losses in a row that were not finite
        with bar:
            for step in range(start + 1, args.steps + 1):
                state, loss = step_fn(state, self.batch(step - 1))
                bar.update()
                logs, evaluates, saves = (
                    step % every == 0 or step == args.steps
                    for every in (args.log_every, args.eval_every, args.checkpoint_every)
                )
                if not (logs or evaluates or saves):
                    continue
                loss = float(loss)
                metrics.write(step=step, loss=loss, **throughput.count(step))
                bar.set_postfix(loss=f"{loss:.3f}")
                skipped = 0 if math.isfinite(loss) else skipped + 1
                if saves or skipped:  # no bad state takes a good one's place
                    self._check_finite(step, state, skipped)
                if evaluates:
                    metrics.write(step=step, **evaluate(state))
                if saves:
                    checkpoints.save(step, state, {"next_batch": step})
                throughput.restart(step)

    def _check_finite(self, step: int, state: TrainState, skipped: int) -> None:
        if self.is_finite(state) and skipped < MAX_SKIPPED:
            return
        raise FloatingPointError(
            f"loss or state is not finite at step {step}. Earlier checkpoints are kept: the same "
            "command with --skip-bad-steps goes on from the newest and leaves single bad batches "
            "out. If the loss had been rising, begin again in a new --output with a smaller "
            "--learning-rate."
        )

    def _evaluator(self) -> Callable[[TrainState], dict[str, float]]:
        shape = (self.args.batch // self.args.micro_batches, self.config.context + 1)
        batches = gpt2_data.validation_batches(
            self.corpus, self.args.eval_batches, shape, self.layout.sharding("batch", None)
        )
        nll = jax.jit(
            gpt2_training.evaluator(
                self.config, self.layout, self.settings, self.args.eval_samples
            ),
            out_shardings=self.layout.sharding(),
        )

        def evaluate(state: TrainState) -> dict[str, float]:
            key = self.evaluation_key
            parts = [nll(jax.random.fold_in(key, i), state, x) for i, x in enumerate(batches)]
            means = jax.tree.map(lambda *xs: sum(map(float, xs)) / len(xs), *parts)
            losses = ", ".join(f"{value:.4f} ({name})" for name, value in means.items())
            say(f"  step {int(state.step)}, validation loss {losses.replace(' (mean)', '')}")
            return {f"validation_{name}": value for name, value in means.items()} | {
                f"perplexity_{name}": math.exp(min(value, 50.0)) for name, value in means.items()
            }

        return evaluate


def describe(args: Any, config: Config, layout: Layout, corpus: Corpus) -> str:
    """Two lines about model, devices and data."""
    params = jax.tree.leaves(gpt2_model.abstract_params(config, layout))
    count = sum(math.prod(x.shape) for x in params)
    axes = ", ".join(f"{name}={size}" for name, size in layout.mesh.shape.items())
    validation = args.eval_batches * args.batch // args.micro_batches * config.context
    return (
        f"GPT-2 {args.preset}, {count:,} parameters, {config.dtype}, on {jax.device_count()} "
        f"{jax.devices()[0].device_kind} ({axes})\n{corpus.name}, {len(corpus.train):,} tokens for "
        f"training; {validation:,} others for validation, in fixed windows"
    )


def prepare(args: Any) -> list[Run]:
    """Joins the processes, reads the data and sets up the runs.

    Raises:
      ValueError: if options do not fit each other, the data or the devices.
      OSError: if there are no data, or the output cannot be written.
    """
    start_processes(args)
    corpus = gpt2_data.load_corpus(args.data, args.vocabulary)
    gpt2_data.check_same_everywhere(corpus)
    layout = gpt2_options.make_layout(args)
    config = gpt2_options.model_config(args, corpus)
    gpt2_options.check_divisible(args, config, layout)
    settings = [gpt2_options.optimizer_settings(args, name) for name in args.optimizer]
    corpus.check_length(config.context + 1)
    say(describe(args, config, layout, corpus))
    args.peak_flops, source = gpt2_report.peak_flops(args.peak_tflops, config.dtype)
    say(f"Utilisation is relative to {args.peak_flops / 1e12:.3g} TFLOP/s, {source}")
    args.output.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(layout.mesh):
        return [Run(args, config, layout, chosen, corpus) for chosen in settings]


def report(folder: Path) -> None:
    """Prints the table and draws the figure of all runs in the folder."""
    files = {name: folder / name / "metrics.jsonl" for name in gpt2_report.NAMES}
    runs = {name: gpt2_report.read_metrics(path) for name, path in files.items()}
    runs = {name: records for name, records in runs.items() if records}
    print("\n" + gpt2_report.results_table(runs))
    gpt2_report.save_loss_figure(folder / "gpt2.png", runs)


def main() -> None:
    """Trains with each optimizer, and reports.

    An error in one of several processes ends it at once, so that none waits for it.
    """
    parser = gpt2_options.parser(__doc__ or "")
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        runs = prepare(args)
    except (ValueError, OSError) as error:
        if jax.process_count() == 1:
            parser.exit(2, f"{parser.prog}: {error}\n")
        _end_process(error)
    try:
        for run in runs:
            with jax.set_mesh(run.layout.mesh):
                run.train()
    except Exception as error:
        if jax.process_count() == 1:
            raise
        _end_process(error)
    if jax.process_index() == 0:
        report(args.output)
        print(f"Wall-clock time {time.perf_counter() - start:.0f} s, compilation included.")


def _end_process(error: Exception) -> NoReturn:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
