"""The optimizers that are compared, each as one training step of the same form."""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.cost.models import Model, PyTree
from ivon_jax import Eigenbasis, auto_sample, ivon, mc_value_and_grad, sample_params

# The cost does not depend on the values, as long as all of them stay finite.
IVON: dict[str, Any] = {"learning_rate": 1e-3, "ess": 1e6}


class Differentiated(NamedTuple):
    """Value and gradient of a loss that can still be had by itself."""

    loss: Callable[[PyTree], jax.Array]

    def __call__(self, params: PyTree) -> tuple[jax.Array, PyTree]:
        """The loss and its gradient."""
        return jax.value_and_grad(self.loss)(params)


T = TypeVar("T")
ValueAndGrad = Callable[[PyTree], tuple[jax.Array, PyTree]]
Step = Callable[[PyTree, Any], tuple[PyTree, jax.Array]]


class Contender(NamedTuple):
    """An optimizer in a training loop."""

    init: Callable[[PyTree], PyTree]  # from parameters to all that is carried, in own buffers
    step: Step  # from what is carried, and value_and_grad, to what is carried next and the loss


# --- The contenders -------------------------------------------------------------------------------


def with_init(tx: Any, step: Step, *more: Any) -> Contender:
    """Carries a copy of the parameters, the optimizer's state, and what else is given."""

    def init(params: PyTree) -> PyTree:
        params = jax.tree.map(jnp.array, params)
        return params, tx.init(params), *(make() for make in more)

    return Contender(init, step)


def plain(tx: optax.GradientTransformationExtraArgs, hess_given: bool = False) -> Contender:
    """A loop that was written for AdamW; or one that hands `ivon` an estimate of h."""

    def step(carry: PyTree, value_and_grad: ValueAndGrad) -> tuple[PyTree, jax.Array]:
        params, state = carry
        loss, grads = value_and_grad(params)
        extra = {"hess": grads} if hess_given else {}
        updates, state = tx.update(grads, state, params, **extra)
        return (optax.apply_updates(params, updates), state), loss

    return with_init(tx, step)


def explicit() -> Contender:
    """The explicit loop of README, with samples in the dtypes of the parameters."""
    tx = ivon(**IVON)

    def step(carry: PyTree, value_and_grad: ValueAndGrad) -> tuple[PyTree, jax.Array]:
        params, state, key = carry
        key, draw_key = jax.random.split(key)
        sample, noise = sample_params(draw_key, state, params)
        loss, grads = value_and_grad(sample)
        updates, state = tx.update(grads, state, params, noise=noise)
        return (optax.apply_updates(params, updates), state, key), loss

    return with_init(tx, step, partial(jax.random.key, 0))


def monte_carlo(num_samples: int) -> Contender:
    """`mc_value_and_grad`, one sample after another, with the state alone carried."""
    tx = ivon(**IVON)

    def init(params: PyTree) -> PyTree:
        return tx.init(params), jax.random.key(0)

    def step(carry: PyTree, value_and_grad: Differentiated) -> tuple[PyTree, jax.Array]:
        state, key = carry
        key, draw_key = jax.random.split(key)
        value, grads, hess = mc_value_and_grad(value_and_grad.loss, num_samples)(draw_key, state)
        return (tx.update(grads, state, hess=hess)[1], key), value

    return Contender(init, step)


def auto(options: dict[str, Any] | None = None, **auto_options: Any) -> Contender:
    """`auto_sample` around `ivon` with some options each."""
    return plain(auto_sample(ivon(**IVON, **(options or {})), 0, **auto_options))


BASELINE = "optax.adamw"
CONTENDERS: dict[str, Callable[[], Contender]] = {
    BASELINE: lambda: plain(optax.adamw(1e-3)),
    "optax.sgd": lambda: plain(optax.sgd(1e-3, momentum=0.9)),
    "auto_sample": auto,
    "auto_sample, lean": partial(auto, store_mean=False),
    "lean, bfloat16 momentum": partial(auto, {"momentum_dtype": jnp.bfloat16}, store_mean=False),
    "antithetic": partial(auto, antithetic=True),
    "explicit": explicit,
    "eigenbasis": partial(auto, {"basis": Eigenbasis()}),
    "eigenbasis to 128": partial(auto, {"basis": Eigenbasis(max_dim=128)}),
    "no draw, h given": lambda: plain(ivon(**IVON), hess_given=True),
}
USUAL = (BASELINE, "auto_sample", "auto_sample, lean", "explicit")


def build(names: Iterable[str]) -> dict[str, Contender]:
    """The named contenders, AdamW first."""
    return {name: make() for name, make in chosen([BASELINE, *names], CONTENDERS).items()}


def chosen(names: Iterable[str], options: Mapping[str, T]) -> dict[str, T]:
    """The named ones of those that can be given on the command line."""
    for name in names:
        if name not in options:
            raise SystemExit(f"{name!r} is none of: {', '.join(options)}")
    return {name: options[name] for name in names}


# --- Programs -------------------------------------------------------------------------------------

Program = tuple[Any, tuple[Any, ...]]  # a jitted function and its abstract arguments


def make_step(contender: Contender) -> Any:
    """A jitted step from given gradients, which also returns the point they would be taken at."""

    @partial(jax.jit, donate_argnums=0)
    def step(carried: PyTree, grads: PyTree) -> PyTree:
        carry, _ = carried
        points = []

        def given(point: PyTree) -> tuple[jax.Array, PyTree]:
            points.append(point)
            return jnp.zeros([]), grads

        new, _ = contender.step(carry, given)
        # The loop's own parameters exist anyway; a sample has to be written.
        return new, () if points[0] is carry[0] else points[0]

    return step


def optimizer_program(contender: Contender, shapes: PyTree, where: Any = None) -> Program:
    """The optimizer's step alone, from given gradients."""
    params = placed(shapes, where)
    carry = placed(jax.eval_shape(contender.init, params), where)
    return make_step(contender), ((carry, () if len(carry) == 2 else params), params)


def training_program(
    contender: Contender, model: Model, batch_size: int, where: Any = None
) -> Program:
    """A whole training step, whose arguments are what is carried and a batch."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.eval_shape(lambda: model.batch(jax.random.key(0), batch_size))
    carry = jax.eval_shape(contender.init, params)

    @partial(jax.jit, donate_argnums=0)
    def step(carry: PyTree, batch: PyTree) -> tuple[PyTree, jax.Array]:
        return contender.step(carry, Differentiated(lambda p: model.loss(p, batch)))

    return step, placed((carry, batch), where)


def placed(tree: PyTree, where: Any) -> PyTree:
    """Abstract arrays on a device; `None` is this machine's."""
    return jax.tree.map(lambda x: x.update(sharding=where), tree)


def kept(carry: PyTree) -> int:
    """Bytes that exist between two steps; counters and keys are left out."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(carry) if x.size > 4)


def target(tpu: str | None) -> Any:
    """The sharding of one device of a TPU topology, or `None` for this machine.

    To be called before anything that starts a backend: libtpu only compiles.
    """
    if tpu is None:
        return None
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit('compiling for TPUs needs libtpu: pip install "jax[tpu]"')
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    jax.config.update("jax_platforms", "cpu")
    print(f"compiled for {tpu} by libtpu {importlib.metadata.version('libtpu')}")
    devices = topologies.get_topology_desc(topology_name=tpu, platform="tpu").devices
    return SingleDeviceSharding(devices[0])
