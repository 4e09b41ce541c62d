"""GPT-2 with AdamW and IVON, on one core or on a mesh of many devices and processes.

    python examples/gpt2.py                                  # tiny, both optimizers, two cores
    python examples/gpt2.py --preset small --optimizer ivon --data openwebtext --batch 480 \
        --micro-batches 5 --steps 100000 --warmup 2000 --mesh data=8

IVON's settings are those published for GPT-2 (`ivon_jax.recipes`): every micro-batch has a sample
of its own, whose gradient is clipped to norm 1 before the product with the noise; weight decay acts
on matrices only. `--samples group` gives each index of the mesh axis `data` a sample of its own.

The same command goes on from the newest checkpoint in `--output`, on the same mesh or another.
examples/gpt2.md tells how to start several processes, and what happens when something breaks.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import gpt2_data
import gpt2_model
import gpt2_options
import gpt2_report
import gpt2_training
import jax
from checkpoints import Checkpoints
from gpt2_data import Corpus
from gpt2_model import Config, Layout
from gpt2_training import Settings, TrainState
from tqdm import tqdm


def start_processes(args: Any) -> None:
    """Joins the other processes, if there are any; before anything else in jax."""
    if args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
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
        self.folder = args.output / settings.optimizer
        self.trainer = gpt2_training.make_trainer(config, layout, settings)
        self.params = gpt2_model.abstract_params(config, layout)
        self.abstract = gpt2_training.abstract_state(self.trainer, self.params, layout)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self.step_fn = jax.jit(
            self.trainer.step, donate_argnums=0, out_shardings=(self.shardings, layout.sharding())
        )

        self.is_finite = jax.jit(gpt2_training.is_finite, out_shardings=layout.sharding())

    def fresh_state(self) -> TrainState:
        """Parameters and moments before the first step, each device filling its own shards."""
        init_key, run_key = jax.random.split(jax.random.key(self.args.seed))
        params = gpt2_model.init_params(self.config, self.layout, init_key)
        return jax.jit(self.trainer.init, out_shardings=self.shardings)(params, run_key)

    def batch(self, step: int) -> jax.Array:
        """The training batch of a step."""
        count = self.args.micro_batches
        shape = (count, self.args.batch // count, self.config.context + 1)
        sharding = self.layout.sharding(None, "batch", None)
        return gpt2_data.training_batch(self.corpus, self.args.seed, step, shape, sharding)

    def train(self) -> None:
        """Trains to the last step, from the newest checkpoint if there is one."""
        description = gpt2_options.run_description(
            self.args, self.config, self.settings, self.corpus
        )
        with Checkpoints(self.folder / "checkpoints", description, self.args.keep) as checkpoints:
            found = checkpoints.restore(self.abstract)
            start, state = (0, self.fresh_state()) if found is None else found[:2]
            if found is not None:
                say(f"{self.settings.optimizer}: goes on from the checkpoint of step {start}")
            self._steps(start, state, checkpoints)

    def _steps(self, start: int, state: TrainState, checkpoints: Checkpoints) -> None:
        args = self.args
        metrics = gpt2_report.Metrics(
            self.folder / "metrics.jsonl", start, writes=jax.process_index() == 0
        )
        evaluate = self._evaluator()
        throughput = _Throughput(args, self.config)
        bar = tqdm(
            total=args.steps,
            initial=start,
            desc=gpt2_report.NAMES[self.settings.optimizer],
            disable=None if jax.process_index() == 0 else True,
        )
        with bar:
            for step in range(start + 1, args.steps + 1):
                state, loss = self.step_fn(state, self.batch(step - 1))
                bar.update()
                if step % args.log_every == 0 or step == args.steps:
                    loss = float(loss)
                    metrics.write(step=step, loss=loss, **throughput.record(step))
                    bar.set_postfix(loss=f"{loss:.3f}")
                    if not math.isfinite(loss):
                        self._check_finite(step, state)
                if step % args.eval_every == 0 or step == args.steps:
                    metrics.write(step=step, **evaluate(state))
                    throughput.pause()
                if step % args.checkpoint_every == 0 or step == args.steps:
                    self._check_finite(step, state)  # no bad state takes a good one's place
                    checkpoints.save(step, state, {"next_batch": step})
                    throughput.pause()

    def _check_finite(self, step: int, state: TrainState) -> None:
        if self.is_finite(state):
            return
        raise FloatingPointError(
            f"the state is not finite at step {step}. Earlier checkpoints are kept. Start again "
            "with a smaller --learning-rate in a new --output, or with --skip-bad-steps 5 if "
            "single batches are to blame."
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
            key = jax.random.key(self.args.seed)
            parts = [nll(jax.random.fold_in(key, i), state, x) for i, x in enumerate(batches)]
            means = jax.tree.map(lambda *xs: sum(map(float, xs)) / len(xs), *parts)
            for name, value in means.items():
                label = "" if self.settings.optimizer == "adamw" else f" {name}"
                say(f"  validation loss{label}: {value:.4f}")
            return {f"validation_{name}": value for name, value in means.items()} | {
                f"perplexity_{name}": math.exp(min(value, 50.0)) for name, value in means.items()
            }

        return evaluate


class _Throughput:
    """Tokens per second and utilisation between two records, without compilation and pauses."""

    def __init__(self, args: Any, config: Config):
        self._tokens = args.batch * config.context
        self._flops = config.flops_per_token()
        self._peak = args.peak_flops
        self._since: tuple[int, float] | None = None

    def pause(self) -> None:
        """Leaves out the time until the next record."""
        self._since = None

    def record(self, step: int) -> dict[str, float]:
        """The rates since the last call, if there was no pause."""
        now = time.perf_counter()
        since, self._since = self._since, (step, now)
        if since is None:
            return {}
        rate = (step - since[0]) * self._tokens / (now - since[1])
        return {"tokens_per_second": rate, "mfu_percent": 100 * rate * self._flops / self._peak} | (
            gpt2_report.peak_memory()
        )


def describe(config: Config, layout: Layout, corpus: Corpus) -> str:
    """One line about model, devices and data."""
    params = jax.tree.leaves(gpt2_model.abstract_params(config, layout))
    count = sum(math.prod(x.shape) for x in params)
    axes = ", ".join(f"{name}={size}" for name, size in layout.mesh.shape.items())
    return (
        f"{count:,} parameters, {config.dtype}, on {jax.device_count()} "
        f"{jax.devices()[0].device_kind} ({axes}); {corpus.name}: {len(corpus.train):,} tokens for "
        "training."
    )


def main() -> None:
    """Trains with each optimizer, prints the table and draws the figure."""
    args = gpt2_options.parser(__doc__ or "").parse_args()
    start_processes(args)
    corpus = gpt2_data.load_corpus(args.data, args.vocabulary)
    layout = gpt2_options.make_layout(args)
    config = gpt2_options.model_config(args, corpus)
    gpt2_options.check_divisible(args, config, layout)
    corpus.check_length(config.context + 1)
    say(f"GPT-2 {args.preset}, {describe(config, layout, corpus)}")
    args.peak_flops, source = gpt2_report.peak_flops(args.peak_tflops)
    say(f"Utilisation is relative to {args.peak_flops / 1e12:.3g} TFLOP/s, {source}.")
    with jax.set_mesh(layout.mesh):
        for optimizer in args.optimizer:
            settings = gpt2_options.optimizer_settings(args, optimizer)
            Run(args, config, layout, settings, corpus).train()
    if jax.process_index() == 0:
        runs = {
            name: gpt2_report.read_metrics(args.output / name / "metrics.jsonl")
            for name in args.optimizer
        }
        print("\n" + gpt2_report.results_table(runs))
        gpt2_report.save_loss_figure(args.output / "gpt2.png", runs)


if __name__ == "__main__":
    main()
