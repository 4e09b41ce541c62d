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

from ivon_jax._core.checks import check_number, check_positive, is_concrete
from ivon_jax._core.optimizer import ivon
from ivon_jax._core.trees import PyTree

IVON_PAPER = "arXiv:2402.17641"
LORA_PAPERS = "arXiv:2411.04421, arXiv:2506.14280"
THIRD_PARTY = "a public configuration by others than the authors of IVON"


@dataclass(frozen=True, eq=False)
class Recipe:
    """A published run.

    Attributes:
      settings: keyword arguments of `ivon`; `learning_rate` is the peak.
      batch_size: examples (sequences for a language model) per step; None if not published.
      length: how long the run was.
      warmup: share of the run in which the rate rises linearly from 0, or a number of steps.
      decay: then "cosine" or "linear" to 0, or "inverse square root"; cosine if not published.
      clip_norm: bound on the global norm of each sample's gradient, before `ivon`, or None.
      test_samples: posterior samples averaged for prediction; None if not published.
      source: where the values were published.
      note: what else to know.
    """

    settings: Mapping[str, Any]
    batch_size: int | None
    length: str
    warmup: float = 0.0
    decay: str = "cosine"
    clip_norm: float | None = None
    test_samples: int | None = None
    source: str = IVON_PAPER
    note: str = ""

    def __post_init__(self):
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))

    def schedule(self, num_steps: int) -> optax.Schedule:
        """The learning rate over a run of `num_steps` steps: linear warmup, then decay.

        Example:
          >>> from ivon_jax import ivon, recipes
          >>> schedule = recipes.CIFAR.schedule(10_000)
          >>> tx = ivon(**{**recipes.CIFAR.settings, "learning_rate": schedule})
          >>> print(schedule(250))
          0.2
        """
        return _schedule(self.settings["learning_rate"], num_steps, self.warmup, self.decay)

    def optimizer(
        self, num_steps: int, ess: float | None = None, **overrides: Any
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of the run: clipping by the global norm where it had one, then `ivon`.

        For stacked gradients or `hess=` clip each sample's, by `mc_value_and_grad`.

        Args:
          num_steps: length of your run in steps, for the schedule.
          ess: number of terms of your training set (examples, or tokens); the run's by default.
          **overrides: further arguments of `ivon`, in place of the run's. A `prior` replaces its
            weight decay and mask.

        Example:
          >>> from ivon_jax import auto_sample, recipes
          >>> tx = auto_sample(recipes.GPT2_125M.optimizer(10_000, ess=1e9), key=0)
          >>> state = tx.init({"kernel": jnp.ones((2, 2))})
        """
        new = {"learning_rate": self.schedule(num_steps)} | ({} if ess is None else {"ess": ess})
        if overrides.get("prior") is not None:
            new |= {"weight_decay": None, "mask": None}
        tx = ivon(**{**self.settings, **new, **overrides})
        if self.clip_norm is None:
            return tx
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), tx)


def _schedule(peak: float, num_steps: int, warmup: float, decay: str) -> optax.Schedule:
    """Linear warmup over a share of the run, or over a number of steps above 1, then decay."""
    num_steps = check_positive("num_steps", num_steps)
    steps = round(warmup * num_steps) if warmup < 1 else round(warmup)
    rest = max(num_steps - steps, 1)

    def inverse_square_root(count: Any) -> jax.Array:
        # join_schedules asks for counts before the boundary too.
        return peak * jnp.sqrt(steps / (steps + jnp.maximum(count, 0)))

    after: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "inverse square root": inverse_square_root,
    }
    if not steps:
        return after[decay]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, steps), after[decay]], [steps])


def start(
    params: PyTree,
    *,
    num_examples: float,
    num_steps: int,
    learning_rate: float = 0.1,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Settings of `ivon` to start from on a problem without a recipe.

    The rate rises over a twentieth of the run and falls to 0 along a cosine; ess is N/τ. Tune the
    rate first (0.1, 0.3, 1), then the temperature (1, 0.1).

    Args:
      params: initial parameters, drawn at random.
      num_examples: N, the number of terms that the mean loss averages over in the training set.
      num_steps: T, the length of the whole run in steps.
      learning_rate: peak of α.
      temperature: τ; below 1 the posterior is narrower than Bayes' ("cold").

    Returns:
      Keyword arguments of `ivon`: `learning_rate` (a schedule), `ess`, `hess_init` and `b2`.

    Raises:
      ValueError: if a number is out of its range, or the parameters are all zero or not finite.
      TypeError: if the parameters are traced.

    Example:
      >>> from ivon_jax import ivon, recipes
      >>> params = {"kernel": jnp.full((3, 2), 0.1)}
      >>> settings = recipes.start(params, num_examples=10_000, num_steps=2_000)
      >>> settings["ess"], settings["hess_init"], settings["b2"]
      (10000.0, 0.16, 0.999)
      >>> state = ivon(**settings).init(params)
    """
    rate, number, tau = _positive(
        learning_rate=learning_rate, num_examples=num_examples, temperature=temperature
    )
    ess = number / tau
    return {
        "learning_rate": _schedule(rate, num_steps, 0.05, "cosine"),
        "ess": ess,
        "hess_init": hess_init_for(params, ess),
        "b2": b2_for(num_steps),
    }


def rate_from_adamw(
    learning_rate: float, hess_init: float, clip_radius: float, weight_decay: float = 0.0
) -> float:
    """The α under which a clipped step of IVON is as long as one of AdamW: lr/((h₀+δ)ξ).

    A parameter moves at most α(h₀+δ)ξ in a step; AdamW's steps are about as long as its rate.

    Args:
      learning_rate: AdamW's (peak) rate.
      hess_init: h₀.
      clip_radius: ξ, finite.
      weight_decay: δ.

    Returns:
      A value for `learning_rate`.

    Raises:
      ValueError: if a number is out of its range.

    Example:
      >>> from ivon_jax import recipes
      >>> print(f"{recipes.rate_from_adamw(3e-4, hess_init=1e-3, clip_radius=1e-3):.0f}")
      300
    """
    lr, h0, xi = _positive(
        learning_rate=learning_rate, hess_init=hess_init, clip_radius=clip_radius
    )
    return lr / ((h0 + float(check_number("weight_decay", weight_decay, low=0.0))) * xi)


def matrices(params: PyTree) -> PyTree:
    """A mask of the leaves with two or more axes: decay matrices, not vectors.

    (Where layers are stacked for a scan, vectors have two axes too: write a mask by name then.)

    Example:
      >>> from ivon_jax import recipes
      >>> recipes.matrices({"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 2))})
      {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda x: jnp.ndim(x) >= 2, params)


def hess_init_for(params: PyTree, ess: float, *, noise: float = 0.25) -> float:
    """An h₀ under which a posterior starts a quarter as wide as the weights are large.

    h₀ = 1/(λ (noise · r)²), where r is the root mean square of the matrices (leaves with two or
    more axes; all leaves if there are none). With usual initial weights, σ/r is about 0.05 to 0.15
    in published runs on images, and 0.015 for GPT-2.

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
      >>> from ivon_jax import recipes
      >>> recipes.hess_init_for({"kernel": jnp.full((3, 2), 0.1)}, ess=10_000)
      0.16
    """
    ess, noise = _positive(ess=ess, noise=noise)
    leaves = jax.tree.leaves(params)
    if not is_concrete(*leaves) or any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        raise TypeError("params are traced or abstract: the initial values are needed, before jit.")
    leaves = [x for x in map(jnp.asarray, leaves) if jnp.issubdtype(x.dtype, jnp.floating)]
    leaves = [x for x in leaves if x.ndim >= 2] or leaves
    size = sum(x.size for x in leaves)
    square = float(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)) / max(size, 1)
    if not 0 < square < math.inf:
        raise ValueError("params must hold finite weights other than zero, drawn at random.")
    return float(f"{1 / (ess * noise**2 * square):.3g}")


def b2_for(num_steps: int) -> float:
    """β₂ = 1 − 2/T for a run of T steps: e⁻² of the initial curvature is left at its end.

    Published runs on images and text have (1−β₂)T of 1 to 2. Where it is much larger the curvature
    of weights that get no gradient is forgotten, their posterior widens, and training diverges.

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


def _positive(**numbers: float) -> list[float]:
    return [float(check_number(k, x, low=0.0, open_low=True)) for k, x in numbers.items()]


def _settings(*values: float, **others: Any) -> dict[str, Any]:
    names = ("learning_rate", "ess", "hess_init", "weight_decay", "b2")
    return {**dict(zip(names, values, strict=True)), **others}


_VISION = {"length": "200 epochs", "warmup": 5 / 200, "test_samples": 64}
CIFAR = Recipe(
    _settings(0.2, 5e4, 0.5, 2e-4, 0.99999),
    batch_size=50,
    note="CIFAR-10 and CIFAR-100, ResNet-20 to DenseNet-121 with filter response normalisation.",
    **_VISION,
)
TINY_IMAGENET = Recipe(
    _settings(0.2, 2e5, 0.5, 2e-4, 0.99999),
    batch_size=50,
    note="ess is twice the number of training images. The schedule is CIFAR's.",
    **_VISION,
)
IMAGENET = Recipe(
    _settings(2.5, 1_281_167, 0.05, 5e-5, 0.999995),
    batch_size=1024,
    note="ResNet-50. The schedule is CIFAR's.",
    **_VISION,
)
CIFAR_10_LARGE_BATCH = Recipe(
    _settings(0.3, 5e4, 1.0, 1e-4, 0.9999),
    batch_size=256,
    length="50,000 steps",
    source=THIRD_PARTY,
    note="ResNet-20 with filter response normalisation and SiLU, random crops and flips.",
)


def _gpt2(learning_rate: float) -> Recipe:
    return Recipe(
        _settings(learning_rate, 1e10, 1e-3, 1e-6, 0.99999, mask=matrices, clip_radius=1e-3),
        batch_size=480,
        length="100,000 steps of 480 sequences of 1,024 tokens, 2,000 of them warmup",
        warmup=0.02,
        clip_norm=1.0,
        note="Every micro-batch on every device draws fresh noise.",
    )


GPT2_125M = _gpt2(300.0)
GPT2_355M = _gpt2(200.0)
GPT2_773M = _gpt2(150.0)
IWSLT14 = Recipe(
    _settings(0.15, 1e8, 0.1, 1e-4, 0.99999, clip_radius=1e-3),
    batch_size=None,
    length="translation, from scratch",
    warmup=4000,
    decay="inverse square root",
    clip_norm=1.0,
    source=THIRD_PARTY,
    note="Transformer-base; 2 Monte Carlo samples in every training step.",
)
UCI_ENERGY = Recipe(
    _settings(0.02, 6000, 0.5, 5e-3, 0.999),
    batch_size=8,
    length="60 epochs",
    note="One hidden layer of 50 units; 5 Monte Carlo samples in every training step.",
)
LORA = Recipe(
    _settings(0.03, 1e7, 1e-3, 0.0, 0.99999, clip_radius=1e-3, rescale_lr=False),
    batch_size=4,
    length="10,000 steps",
    decay="linear",
    test_samples=10,
    source=LORA_PAPERS,
    note="Low-rank adapters of Llama-2-7B. Published: ess 1e6 to 1e8, hess_init 3e-4 to 1e-3.",
)
LORA_2B = Recipe(
    _settings(0.03, 1e7, 3e-4, 1e-6, 0.99999, clip_radius=1e-3, rescale_lr=False),
    batch_size=32,
    length="fine-tuning; not published",
    warmup=512,
    clip_norm=1.0,
    source=THIRD_PARTY,
    note="Low-rank adapters of Gemma-2B.",
)
