"""What IVON costs on the GPU or TPU at hand, in one table.

    python benchmarks/cost/accelerator.py --results accelerator.jsonl    # estimated: eight minutes

The optimizer alone, draws alone, and whole training steps in bfloat16 of GPT-2 small and ResNet-50,
each against AdamW: time, bytes per second against those of a copy, peak memory, seconds to compile,
and the host's time per step. Without an accelerator everything is reduced, which takes three
minutes, tests the script and says nothing about accelerators. Started again it goes on from there.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.journal import Evidence, Journal, command, grouped, write_tables
from benchmarks._shared.measuring import interleaved, ratio_cell
from benchmarks._shared.networks import GPT, Bottlenecks
from benchmarks.cost import contenders
from benchmarks.cost.contenders import BASELINE, CONTENDERS
from benchmarks.cost.models import Model, PyTree, classifier, count, gpt2, language_model, many
from ivon_jax import Posterior, sample_params

METHODS = (BASELINE, "auto_sample", "auto_sample, lean", "antithetic", "explicit")
LEAN = "auto_sample, lean"  # refuses parameters below float32


class Networks(NamedTuple):
    """Whole training steps."""

    gpt: GPT
    windows: int
    resnet: Bottlenecks
    pixels: int
    images: int


GPT2_SMALL = GPT(12, 12, 768, 1024, vocabulary=50_257, biases=True)
FULL = Networks(GPT2_SMALL, 8, Bottlenecks(), 224, 64)
SMALL = Networks(
    GPT(2, 2, 128, 64, vocabulary=512, biases=True), 4, Bottlenecks((1, 1, 1, 1), 8, 10), 32, 4
)


@dataclass(frozen=True)
class Options(Evidence):
    """The command line."""

    results: Path = Path("accelerator.jsonl")
    optimizer_methods: tuple[str, ...] = METHODS
    training_methods: tuple[str, ...] = METHODS[:3]
    millions: tuple[int, ...] = (100, 350)
    """Parameters of the optimizer alone; 350 needs 40 GB."""
    repetitions: int = 7
    """Turns of each contender."""
    block_seconds: float = 0.2
    """Length of a turn."""


def compute(options: Options) -> None:
    """Measures what the journal does not have yet."""
    device, scale = jax.devices()[0], 1_000_000
    networks = FULL
    if device.platform == "cpu":
        print("jax finds no accelerator: everything is reduced, and runs on this CPU.")
        networks, scale = SMALL, 10_000
    contenders.chosen((*options.optimizer_methods, *options.training_methods), CONTENDERS)
    journal = Journal(options.results)

    def measure(section: str, programs: dict[str, Callable[[], Program]], items: int) -> None:
        turns = f"{options.repetitions} turns of {options.block_seconds:g} s"
        shared = {"device": device.device_kind, "section": section, "turns": turns}
        runs = [{**shared, "method": method} for method in programs]

        def work(missing: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            chosen = [programs[run["method"]] for run in missing]
            return [{"items": items, **x} for x in measured(chosen, options)]

        journal.compute_all(runs, work)

    numbers = [scale * n for n in options.millions]
    measure(f"draws, {numbers[0] / 1e6:.3g}M", draws(numbers[0]), numbers[0])
    for number in numbers:
        for tree, shapes in (("one leaf", many(1, number)), ("GPT-2's tree", gpt2(number))):
            for dtype in (jnp.float32, jnp.bfloat16):
                typed = jax.tree.map(lambda x, t=dtype: x.update(dtype=t), shapes)
                wide = dtype == jnp.float32
                methods = [m for m in options.optimizer_methods if wide or m != LEAN]
                section = f"optimizer, {tree}, {count(shapes) / 1e6:.3g}M, {dtype.__name__}"
                measure(section, {m: partial(optimizer, m, typed) for m in methods}, count(shapes))
    tokens = networks.windows * networks.gpt.context
    gpt = language_model(networks.gpt)
    resnet = classifier(networks.resnet, (networks.pixels, networks.pixels, 3))
    models = (
        (f"GPT-2 small, {tokens} tokens", gpt, networks.windows, tokens),
        (f"ResNet-50, {networks.images} images", resnet, networks.images, networks.images),
    )
    for name, model, batch, items in models:
        for parts in (1, 4):
            section = f"{name}, {parts} micro-batch{'es' if parts > 1 else ''}"
            make = partial(training, model=in_bfloat16(model), batch_size=batch, parts=parts)
            measure(section, {m: partial(make, m) for m in options.training_methods}, items)


class Program(NamedTuple):
    """A compiled step `carry, *args -> carry`, and what it starts from."""

    step: Any
    carry: PyTree
    args: tuple[Any, ...] = ()


def draws(number: int) -> dict[str, Callable[[], Program]]:
    """A copy, and samples in two dtypes: all write an array once, the copy reads one as well."""

    def copy(x: jax.Array) -> jax.Array:
        return x + 1

    def sample(carry: tuple[jax.Array, jax.Array], q: Posterior) -> tuple[jax.Array, jax.Array]:
        key, params = carry
        key, draw_key = jax.random.split(key)
        return key, sample_params(draw_key, q, params)[0]

    shape = jax.ShapeDtypeStruct((number,), jnp.float32)
    q = Posterior(shape, shape)

    def drawn(dtype: Any) -> Program:
        params = jnp.zeros(number, dtype)
        return Program(jax.jit(sample, donate_argnums=0), (jax.random.key(0), params), (ones(q),))

    return {
        "copy": lambda: Program(jax.jit(copy, donate_argnums=0), jnp.zeros(number)),
        "sample, float32": lambda: drawn(jnp.float32),
        "sample, bfloat16": lambda: drawn(jnp.bfloat16),
    }


def optimizer(method: str, shapes: PyTree) -> Program:
    """The update alone and `optax.apply_updates`, from given gradients."""
    contender = CONTENDERS[method]()
    params = ones(shapes)
    carry = contender.init(params)
    point = () if len(carry) == 2 else jax.tree.map(jnp.copy, params)
    return Program(contenders.make_step(contender), (carry, point), (params,))


def training(method: str, model: Model, batch_size: int, parts: int) -> Program:
    """A whole step, with one sample and the gradients of several micro-batches."""
    contender, key = CONTENDERS[method](), jax.random.key(0)
    batch = model.batch(key, batch_size)

    def value_and_grad(params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        at = jax.value_and_grad(model.loss)
        if parts == 1:
            return at(params, batch)

        def add(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, at(params, part)), None

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(parts, len(x) // parts, *x.shape[1:])

        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, jax.tree.map(split, batch))
        return jax.tree.map(lambda x: x / parts, total)

    def step(carry: PyTree, batch: PyTree) -> PyTree:
        return contender.step(carry, partial(value_and_grad, batch=batch))[0]

    carry = contender.init(model.init(key))
    return Program(jax.jit(step, donate_argnums=0), carry, (batch,))


def ones(shapes: PyTree) -> PyTree:
    """Arrays of these shapes and dtypes."""
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def in_bfloat16(model: Model) -> Model:
    """The model with its arithmetic in bfloat16; parameters and their gradients stay float32."""

    def narrow(tree: PyTree) -> PyTree:
        floating = partial(jnp.issubdtype, arg2=jnp.floating)
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if floating(x.dtype) else x, tree)

    def loss(params: PyTree, batch: PyTree) -> jax.Array:
        return model.loss(narrow(params), narrow(batch)).astype(jnp.float32)

    return model._replace(loss=loss)


def measured(programs: list[Callable[[], Program]], options: Options) -> list[dict[str, Any]]:
    """What a compiler counts, and seconds per step in turns of one process."""
    results: list[dict[str, Any]] = []
    loops = {}
    for i, make in enumerate(programs):
        program = make()
        start = time.perf_counter()
        compiled = program.step.lower(program.carry, *program.args).compile()
        seconds = time.perf_counter() - start
        memory = compiled.memory_analysis()
        kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
        results.append(
            {
                "compile": seconds,
                "bytes": compiled.cost_analysis()["bytes accessed"],
                "peak": kept - memory.alias_size_in_bytes + memory.temp_size_in_bytes,
                "host": [],
            }
        )
        loops[str(i)] = loop(compiled, program, results[i]["host"])
    timings = interleaved(loops, options.repetitions, options.block_seconds)
    for result, seconds in zip(results, timings.values(), strict=True):
        result["seconds"] = list(seconds)
    return results


def loop(compiled: Any, program: Program, host: list[float]) -> Callable[[int], None]:
    """Runs so many steps, and notes the time per step until the last one was only asked for."""
    box = [program.carry]

    def run(calls: int) -> None:
        start = time.perf_counter()
        for _ in range(calls):
            box[0] = compiled(box[0], *program.args)
        host.append((time.perf_counter() - start) / calls)
        jax.block_until_ready(box[0])

    return run


def report(journal: Journal) -> None:
    """Prints the tables, and writes them beside the results."""
    tables: dict[str, list[list[str]]] = {}
    for (device, section, turns), runs in grouped(
        journal.select(), "device", "section", "turns"
    ).items():
        _, copied = journal.select(device=device, turns=turns, method="copy")[0]
        # XLA counts one read and one write.
        bandwidth = copied["bytes"] / np.median(copied["seconds"])
        base = np.array(runs[0][1]["seconds"])  # AdamW's, or the copy's
        rows = []
        for run, result in runs:
            seconds = np.array(result["seconds"])
            speed = result["bytes"] / np.median(seconds)
            rows.append(
                [
                    run["method"],
                    f"{np.median(seconds) * 1e3:.3g}",
                    # Turn by turn, or, of what was added later, against the median.
                    ratio_cell(seconds / (base if len(base) == len(seconds) else np.median(base))),
                    f"{result['items'] / np.median(seconds):.3g}",
                    f"{speed / 1e9:.0f}",
                    f"{100 * speed / bandwidth:.0f}",
                    f"{result['peak'] / 1e6:,.0f}",
                    f"{result['compile']:.1f}",
                    f"{np.median(result['host'][2:]) * 1e6:.0f}",  # after compiling and calibrating
                ]
            )
        header = ["", "ms per step", f"ratio to {runs[0][0]['method']} [quartiles]"]
        header += ["items per s", "GB/s", "% of copy", "peak MB", "compile, s", "host, µs"]
        tables[f"{device}: {section}, {turns}"] = [header, *rows]
    write_tables(journal, "IVON on an accelerator", tables, NOTES)


NOTES = """Items are parameters, tokens or images. GB/s are the bytes that the compiler counts over
the time, and the next column their share of what the copy reaches (more where data stay in a
cache). Peak is the compiler's:
arguments, results that are not written over them, and temporaries. The host's time is what a step
takes until it is only asked for."""

main = command(Options, __doc__, compute, report)

if __name__ == "__main__":
    main()
