"""GPT-2 with AdamW and IVON, on one core or on a mesh of many devices and processes.

    python examples/gpt2/main.py                                  # tiny, both optimizers, two cores

The same command goes on from the newest checkpoint in `--output`, on the same mesh or another.
examples/gpt2/README.md tells how to start several processes, and what happens when something
breaks. To copy: training.py, a step with either optimizer, and `Run._steps` below, the loop.
"""

import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import tyro
from tqdm import tqdm

from examples.gpt2 import data as gpt2_data
from examples.gpt2 import model as gpt2_model
from examples.gpt2 import options as gpt2_options
from examples.gpt2 import report as gpt2_report
from examples.gpt2 import training as gpt2_training
from examples.gpt2.checkpoints import Checkpoints
from examples.gpt2.data import Corpus
from examples.gpt2.model import Config, Layout
from examples.gpt2.options import Options
from examples.gpt2.training import Settings, TrainState

MAX_NOT_FINITE = 5  # logged losses in a row


def start_processes(options: Options) -> None:
    """Joins the other processes, if there are any; before anything else in jax."""
    by_hand = (options.coordinator, options.num_processes, options.process_id)
    if None not in by_hand:
        jax.distributed.initialize(*by_hand)
    elif by_hand != (None, None, None):
        raise ValueError("--coordinator, --num-processes and --process-id belong together.")
    elif options.distributed:
        jax.distributed.initialize()


def say(text: str) -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        tqdm.write(text)


@dataclass
class Run:
    """Training with one optimizer."""

    options: Options
    config: Config
    layout: Layout
    settings: Settings
    corpus: Corpus

    def __post_init__(self) -> None:
        skip, layout = self.options.skip_bad_steps, self.layout
        self.name = type(self.settings).__name__.lower()
        self.folder = self.options.output / self.name
        keys = jax.random.split(jax.random.key(self.options.seed), 3)
        self.init_key, self.run_key, self.evaluation_key = keys
        self.trainer = gpt2_training.make_trainer(self.config, layout, self.settings, skip)
        params = gpt2_model.abstract_params(self.config, layout)
        self.abstract = gpt2_training.abstract_state(self.trainer, params, layout)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.is_finite = jax.jit(gpt2_training.is_finite, out_shardings=layout.sharding())

    def batch(self, step: int) -> jax.Array:
        """The training batch of a step."""
        count = self.options.micro_batches
        shape = (count, self.options.batch // count, self.config.context + 1)
        sharding = self.layout.sharding(None, "batch", None)
        return gpt2_data.training_batch(self.corpus, self.options.seed, step, shape, sharding)

    def compiled_step(self) -> tuple[Callable[..., Any], float]:
        """The training step, and the megabytes that it takes on each device."""
        out = (self.shardings, self.layout.sharding())
        step = jax.jit(self.trainer.step, donate_argnums=0, out_shardings=out)
        compiled = step.lower(self.abstract, self.batch(0)).compile()
        memory: Any = compiled.memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return compiled, (kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes) / 1e6

    def train(self) -> None:
        """Trains to the last step, from the newest checkpoint if there is one."""
        run = gpt2_options.run_description(self.options, self.config, self.settings, self.corpus)
        with Checkpoints(self.folder / "checkpoints", run, self.options.keep) as checkpoints:
            found = checkpoints.restore(self.abstract)
            if found is None:  # each device fills its own shards
                params = gpt2_model.init_params(self.config, self.layout, self.init_key)
                init = jax.jit(self.trainer.init, out_shardings=self.shardings)
                start, state = 0, init(params, self.run_key)
            else:
                start, state = found
                say(f"{self.name}: goes on from the checkpoint of step {start}")
            if start < self.options.steps:
                self._steps(start, state, checkpoints)

    def _steps(self, start: int, state: TrainState, checkpoints: Checkpoints) -> None:
        options = self.options
        evaluate = self._evaluator()
        step_fn, megabytes = self.compiled_step()
        write = gpt2_report.metrics_writer(self.folder / "metrics.jsonl", start)
        write(step=start, step_memory_mb=megabytes)
        tokens = options.batch * self.config.context  # per step
        seconds, since = 0.0, time.perf_counter()  # without compilation, evaluation and saving
        hidden = jax.process_index() > 0 or None  # None: where it is no terminal
        bar = tqdm(total=options.steps, initial=start, desc=self.name, disable=hidden)
        not_finite = 0  # losses in a row
        with bar:
            for step in range(start + 1, options.steps + 1):
                state, loss = step_fn(state, self.batch(step - 1))
                bar.update()
                logs, evaluates, saves = (
                    step % every == 0 or step == options.steps
                    for every in (options.log_every, options.eval_every, options.checkpoint_every)
                )
                if not (logs or evaluates or saves):
                    continue
                loss = float(loss)
                seconds += time.perf_counter() - since
                rate = (step - start) * tokens / seconds
                write(step=step, loss=loss, tokens_per_second=rate)
                bar.set_postfix(loss=f"{loss:.3f}")
                not_finite = 0 if math.isfinite(loss) else not_finite + 1
                bad = not_finite >= MAX_NOT_FINITE
                if bad or ((saves or not_finite) and not self.is_finite(state)):
                    raise FloatingPointError(  # so that no bad state takes a good one's place
                        f"loss or state is not finite at step {step}. Earlier checkpoints are "
                        "kept: the same command with --skip-bad-steps goes on from the newest and "
                        "leaves single bad batches out. If the loss had been rising, begin again "
                        "in a new --output with a smaller --learning-rate."
                    )
                if evaluates:
                    write(step=step, **evaluate(state))
                if saves:
                    checkpoints.save(step, state)
                since = time.perf_counter()

    def _evaluator(self) -> Callable[[TrainState], dict[str, float]]:
        options, key = self.options, self.evaluation_key
        shape = (options.batch // options.micro_batches, self.config.context + 1)
        batches = gpt2_data.validation_batches(
            self.corpus, options.eval_batches, shape, self.layout.sharding("batch", None)
        )
        nll = jax.jit(
            gpt2_training.evaluator(self.config, self.layout, self.settings, options.eval_samples),
            out_shardings=self.layout.sharding(),
        )

        def evaluate(state: TrainState) -> dict[str, float]:
            parts = [nll(jax.random.fold_in(key, i), state, x) for i, x in enumerate(batches)]
            means = jax.tree.map(lambda *xs: sum(map(float, xs)) / len(xs), *parts)
            losses = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
            say(f"  step {int(state.step)}, {losses}")
            return means

        return evaluate


def prepare(options: Options) -> list[Run]:
    """Joins the processes, reads the data and sets up the runs; compiles none of them yet.

    What does not fit is a ValueError or an OSError.
    """
    options.check()
    start_processes(options)
    corpus = gpt2_data.load_corpus(options.data, options.vocabulary)
    gpt2_data.check_same_everywhere(corpus)
    layout = gpt2_options.make_layout(options)
    config = gpt2_options.model_config(options, corpus)
    gpt2_options.check_divisible(options, config, dict(layout.mesh.shape))
    chosen = [gpt2_options.optimizer_settings(options, name) for name in options.optimizer]
    corpus.check_length(config.context + 1)
    count = sum(x.size for x in jax.tree.leaves(gpt2_model.abstract_params(config, layout)))
    axes = ", ".join(f"{name}={size}" for name, size in layout.mesh.shape.items())
    say(
        f"GPT-2 {options.preset}, {count:,} parameters, {config.dtype}, on {jax.device_count()} "
        f"{jax.devices()[0].device_kind} ({axes})\n{corpus.name}, {len(corpus.train):,} tokens"
    )
    with jax.set_mesh(layout.mesh):
        runs = [Run(options, config, layout, settings, corpus) for settings in chosen]
    options.output.mkdir(parents=True, exist_ok=True)
    return runs


def main(args: Sequence[str] | None = None) -> None:
    """Trains with each optimizer, and reports."""
    options = tyro.cli(Options, args=args, description=(__doc__ or "").splitlines()[0])
    start = time.perf_counter()
    runs: list[Run] = []
    try:
        runs = prepare(options)
        for run in runs:
            with jax.set_mesh(run.layout.mesh):
                run.train()
    except Exception as error:
        if jax.process_count() > 1:  # ends this process at once, lest the others wait for it
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(1)
        if runs or not isinstance(error, ValueError | OSError):
            raise
        print(f"main.py: {error}", file=sys.stderr)
        sys.exit(2)
    if jax.process_index() == 0:
        gpt2_report.report(options.output)
        print(f"Wall-clock time {time.perf_counter() - start:.0f} s, compilation included.")


if __name__ == "__main__":
    main()
