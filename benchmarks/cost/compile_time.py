"""Times tracing, lowering and compilation of the optimizer's step and of whole training steps.

    pip install -e ".[examples]"
    python benchmarks/compile_time.py                # about two minutes on two cores

Contenders take turns; caches are cleared before each. Numbers are medians over the turns.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.measuring import environment, format_table, ratio_cell
from benchmarks.cost import models
from benchmarks.cost.contenders import BASELINE, CONTENDERS, Contender, build
from benchmarks.cost.optimizer_step import make_step
from benchmarks.cost.trees import Shapes, abstract, gpt2, many, one_leaf

PyTree = Any
TREES: dict[str, Shapes] = {
    "one leaf of 1e7": one_leaf(10_000_000),
    "gpt2 of 1e7, 148 leaves": gpt2(10_000_000),
    "500 leaves of 64": many(500, 64),
}
Program = tuple[Any, tuple[Any, ...]]  # a jitted function and its arguments


def optimizer_program(contender: Contender, shapes: Shapes) -> Program:
    """The step of optimizer_step.py and abstract arguments."""
    params = abstract(shapes)
    carry = jax.eval_shape(contender.init, params)
    return make_step(contender), ((carry, () if len(carry) == 2 else params), params)


class Differentiated:
    """Value and gradient of a loss that can still be had by itself."""

    def __init__(self, loss: Callable[[PyTree], jax.Array]):
        self.loss = loss

    def __call__(self, params: PyTree) -> tuple[jax.Array, PyTree]:
        """The loss and its gradient."""
        return jax.value_and_grad(self.loss)(params)


def training_program(contender: Contender, model: models.Model, batch_size: int) -> Program:
    """A whole training step and abstract arguments."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: model.batch(jax.random.key(0), batch_size))
    carry = jax.eval_shape(contender.init, params)

    @partial(jax.jit, donate_argnums=0)
    def step(carry: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        return contender.step(carry, Differentiated(lambda p: model.loss(p, batch)))

    return step, (carry, batch)


def seconds(program: Callable[[], Program]) -> tuple[float, float]:
    """Seconds to trace and lower, and to compile."""
    jax.clear_caches()
    function, arguments = program()
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def rows(programs: dict[str, Callable[[], Program]], repetitions: int) -> list[list[str]]:
    """A table's rows; the first program is the baseline."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for program in programs.values():  # what jax loads and traces once is not counted
        seconds(program)
        break
    for _ in range(repetitions):
        for name, program in programs.items():
            taken[name].append(seconds(program))
    measured = {name: np.array(x) for name, x in taken.items()}
    base = next(iter(measured.values()))
    return [
        [
            name,
            *(f"{x:.2f}" for x in np.median(values, axis=0)),
            ratio_cell(values[:, 1] / base[:, 1]),
            ratio_cell(values.sum(axis=1) / base.sum(axis=1)),
        ]
        for name, values in measured.items()
    ]


def main() -> None:
    """Prints a table for each tree and model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    methods = [BASELINE, "auto_sample", "auto_sample, lean", "explicit"]
    add("--methods", nargs="+", choices=CONTENDERS, default=methods)
    add("--models", nargs="*", choices=models.MODELS, default=["mlp", "resnet20", "gpt10m"])
    add("--peer", type=Path, help="ivon.py of the authors' JAX implementation")
    add("--repetitions", type=int, default=3, help="turns of each contender (default: 3)")
    args = parser.parse_args()
    print(environment())
    contenders = build(args.methods, args.peer)
    header = ["", "trace and lower, s", "compile, s", "ratio, compile", "ratio, both [quartiles]"]
    for tree, shapes in TREES.items():
        programs = {n: partial(optimizer_program, c, shapes) for n, c in contenders.items()}
        print(f"\nOptimizer alone, {tree}\n")
        print(format_table([header, *rows(programs, args.repetitions)]), flush=True)
    for name in args.models:
        model = models.MODELS[name]()
        programs = {n: partial(training_program, c, model, 8) for n, c in contenders.items()}
        leaves = len(jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
        print(f"\nWhole training step, {name}, {leaves} leaves\n")
        print(format_table([header, *rows(programs, args.repetitions)]), flush=True)


if __name__ == "__main__":
    jnp.zeros(1).block_until_ready()  # starts the backend
    main()
