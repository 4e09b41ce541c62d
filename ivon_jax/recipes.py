"""The settings of published runs, ready for `ivon(**recipe.settings)`.

Unless another source is named, they are those of Shen et al., Variational Learning is Effective for
Large Deep Networks, ICML 2024, `arXiv:2402.17641 <https://arxiv.org/abs/2402.17641>`_.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ivon_jax._checks import check_number, check_positive, is_concrete

PyTree = Any

IVON_PAPER = "arXiv:2402.17641"
LORA_PAPERS = "arXiv:2411.04421, arXiv:2506.14280"


@dataclass(frozen=True, eq=False)
class Recipe:
    """A published run.

    Attributes:
      settings: keyword arguments of `ivon`; `learning_rate` is the peak.
      batch_size: examples (sequences for a language model) per step.
      length: how long the run was.
      warmup: share of the run in which the rate rises linearly from 0.
      decay: "cosine" or "linear" to 0 afterwards; cosine where the source names no schedule.
      clip_norm: bound on the global norm of each sample's gradient, applied before the product
        with the noise (an `optax.clip_by_global_norm` before `ivon`), or None.
      test_samples: posterior samples averaged for prediction, or None where the source names no
        number.
      source: where the values were published.
      note: what else to know.
    """

    settings: Mapping[str, Any]
    batch_size: int
    length: str
    warmup: float
    decay: str
    clip_norm: float | None
    test_samples: int | None
    source: str
    note: str = ""

    def __post_init__(self):
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def schedule(self, num_steps: int) -> optax.Schedule:
        """The learning rate over a run of `num_steps` steps: linear warmup, then decay to 0.

        Example:
          >>> from ivon_jax import ivon, recipes
          >>> recipe = recipes.CIFAR
          >>> settings = {**recipe.settings, "learning_rate": recipe.schedule(10_000)}
          >>> tx = ivon(**settings)
          >>> print(settings["learning_rate"](250))
          0.2
        """
        num_steps = check_positive("num_steps", num_steps)
        peak = self.settings["learning_rate"]
        warmup = round(self.warmup * num_steps)
        rest = max(num_steps - warmup, 1)
        if self.decay == "cosine":
            decay = optax.cosine_decay_schedule(peak, rest)
        else:
            decay = optax.linear_schedule(peak, 0.0, rest)
        if not warmup:
            return decay
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def matrices(params: PyTree) -> PyTree:
    """A mask of the leaves with two or more axes: decay matrices, not vectors.

    (Where layers are stacked for a scan, vectors have two axes too: write a mask by name then.)

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import recipes
      >>> recipes.matrices({"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))})
      {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)


def hess_init_for(params: PyTree, ess: float, *, noise: float = 0.25) -> float:
    """An h₀ under which a posterior starts a quarter as wide as the weights are large.

    h₀ = 1/(λ (noise · r)²), where r is the root mean square of the matrices (leaves with two or
    more axes; of all leaves if there are none). `benchmarks/robustness.py` compares it with
    other values of h₀ on handwritten digits. By the sizes of usual initial weights, published runs
    on images start at about 0.05 to 0.15, and GPT-2 at 0.015.

    Args:
      params: initial parameters, drawn at random.
      ess: λ, as `ivon` is given it.
      noise: initial σ over r, without weight decay.

    Returns:
      A value for `hess_init`.

    Raises:
      ValueError: if the parameters are all zero or not finite, or a number is not positive.
      TypeError: if the parameters are traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from ivon_jax import recipes
      >>> recipes.hess_init_for({"kernel": jnp.full((3, 2), 0.1)}, ess=10_000)
      0.16
    """
    ess, noise = (
        float(check_number(name, x, low=0.0, open_low=True))
        for name, x in (("ess", ess), ("noise", noise))
    )
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(params)]
    if not is_concrete(*leaves):
        raise TypeError("params are traced: call hess_init_for before jit, on the initial values.")
    leaves = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    leaves = [x for x in leaves if x.ndim >= 2] or leaves
    size = sum(x.size for x in leaves)
    square = float(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)) / max(size, 1)
    if not 0 < square < math.inf:
        raise ValueError("params must hold finite weights other than zero, drawn at random.")
    return float(f"{1 / (ess * noise**2 * square):.3g}")


def b2_for(num_steps: int) -> float:
    """β₂ = 1 − 2/T for a run of T steps: e⁻² of the initial curvature is left at its end.

    The published runs on images and text have (1−β₂)T of 1 to 2. Where it is much larger the
    curvature of weights that get no gradient is forgotten, their posterior widens, and training
    diverges (over-long runs in `benchmarks/images.py`).

    Args:
      num_steps: T, the length of the whole run.

    Returns:
      A value for `b2`.

    Raises:
      ValueError: if the number is not a positive integer.

    Example:
      >>> from ivon_jax import recipes
      >>> recipes.b2_for(2_000), recipes.b2_for(200_000)
      (0.999, 0.99999)
    """
    return 1.0 - 2.0 / max(check_positive("num_steps", num_steps), 20)  # at least 0.9


def _vision(
    learning_rate: float,
    ess: float,
    hess_init: float,
    weight_decay: float,
    b2: float,
    batch_size: int,
    note: str,
) -> Recipe:
    return Recipe(
        settings={
            "learning_rate": learning_rate,
            "ess": ess,
            "hess_init": hess_init,
            "weight_decay": weight_decay,
            "b2": b2,
        },
        batch_size=batch_size,
        length="200 epochs",
        warmup=5 / 200,
        decay="cosine",
        clip_norm=None,
        test_samples=64,
        source=IVON_PAPER,
        note=note,
    )


def _gpt2(learning_rate: float) -> Recipe:
    return Recipe(
        settings={
            "learning_rate": learning_rate,
            "ess": 1e10,
            "hess_init": 1e-3,
            "weight_decay": 1e-6,
            "mask": matrices,
            "b2": 0.99999,
            "clip_radius": 1e-3,
        },
        batch_size=480,
        length="100,000 steps of 480 sequences of 1,024 tokens, 2,000 of them warmup",
        warmup=0.02,
        decay="cosine",
        clip_norm=1.0,
        test_samples=None,
        source=IVON_PAPER,
        note="Every micro-batch on every device draws fresh noise.",
    )


CIFAR = _vision(
    0.2,
    5e4,
    0.5,
    2e-4,
    0.99999,
    50,
    "CIFAR-10 and CIFAR-100, ResNet-20 to DenseNet-121 with filter response normalisation.",
)
TINY_IMAGENET = _vision(
    0.2,
    2e5,
    0.5,
    2e-4,
    0.99999,
    50,
    "ess is twice the number of training images. The schedule is CIFAR's.",
)
IMAGENET = _vision(
    2.5, 1_281_167, 0.05, 5e-5, 0.999995, 1024, "ResNet-50. The schedule is CIFAR's."
)
GPT2_125M = _gpt2(300.0)
GPT2_355M = _gpt2(200.0)
GPT2_773M = _gpt2(150.0)
UCI_ENERGY = Recipe(
    settings={
        "learning_rate": 0.02,
        "ess": 6000,
        "hess_init": 0.5,
        "weight_decay": 5e-3,
        "b2": 0.999,
    },
    batch_size=8,
    length="60 epochs",
    warmup=0.0,
    decay="cosine",
    clip_norm=None,
    test_samples=None,
    source=IVON_PAPER,
    note="One hidden layer of 50 units; 5 Monte Carlo samples in every training step.",
)
LORA = Recipe(
    settings={
        "learning_rate": 0.03,
        "ess": 1e7,
        "hess_init": 1e-3,
        "weight_decay": 0.0,
        "b2": 0.99999,
        "clip_radius": 1e-3,
        "rescale_lr": False,
    },
    batch_size=4,
    length="10,000 steps",
    warmup=0.0,
    decay="linear",
    clip_norm=None,
    test_samples=10,
    source=LORA_PAPERS,
    note="Low-rank adapters of Llama-2-7B. Published: ess 1e6 to 1e8, hess_init 3e-4 to 1e-3.",
)
