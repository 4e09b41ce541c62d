"""The settings of published runs, ready for `ivon(**recipe.settings)`.

Unless another source is named, they are those of Shen et al., Variational Learning is Effective for
Large Deep Networks, ICML 2024, `arXiv:2402.17641 <https://arxiv.org/abs/2402.17641>`_.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import optax

from ivon_jax._core.optimizer import ivon
from ivon_jax._uses.starting import (
    DECAYS,
    INVERSE_SQUARE_ROOT,
    b2_for,
    ess_for_squared_error,
    hess_init_for,
    matrices,
    rate_from_adamw,
    start,
    start_fine_tuning,
    warmup_schedule,
)

__all__ = [
    "CIFAR",
    "CIFAR_10_LARGE_BATCH",
    "GPT2_125M",
    "GPT2_355M",
    "GPT2_773M",
    "IMAGENET",
    "IWSLT14",
    "LORA",
    "LORA_2B",
    "TINY_IMAGENET",
    "UCI_ENERGY",
    "Recipe",
    "b2_for",
    "ess_for_squared_error",
    "hess_init_for",
    "matrices",
    "rate_from_adamw",
    "start",
    "start_fine_tuning",
]

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
      decay: then "cosine" or "linear" to 0, or "inverse square root", which needs a warmup; cosine
        if not published.
      clip_norm: bound on the global norm of each sample's gradient, before `ivon`, or None.
      test_samples: posterior samples averaged for prediction; None if not published.
      source: where the values were published.
      note: what else to know.

    Raises:
      ValueError: for another `decay`; of `schedule` if the warmup fills the run.
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
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {DECAYS}; got {self.decay!r}.")
        if self.decay == INVERSE_SQUARE_ROOT and not self.warmup:
            raise ValueError(
                f"the {INVERSE_SQUARE_ROOT} counts from the end of a warmup: give one."
            )
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
        return warmup_schedule(self.settings["learning_rate"], num_steps, self.warmup, self.decay)

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
          >>> import jax.numpy as jnp
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


_VISION = {"length": "200 epochs", "warmup": 5 / 200, "test_samples": 64}
CIFAR = Recipe(
    dict(
        learning_rate=0.2,
        ess=5e4,
        hess_init=0.5,
        weight_decay=2e-4,
        b2=0.99999,
    ),
    batch_size=50,
    note="CIFAR-10 and CIFAR-100, ResNet-20 to DenseNet-121 with filter response normalisation.",
    **_VISION,
)
TINY_IMAGENET = Recipe(
    dict(
        learning_rate=0.2,
        ess=2e5,
        hess_init=0.5,
        weight_decay=2e-4,
        b2=0.99999,
    ),
    batch_size=50,
    note="ess is twice the number of training images. The schedule is CIFAR's.",
    **_VISION,
)
IMAGENET = Recipe(
    dict(
        learning_rate=2.5,
        ess=1_281_167,
        hess_init=0.05,
        weight_decay=5e-5,
        b2=0.999995,
    ),
    batch_size=1024,
    note="ResNet-50. The schedule is CIFAR's.",
    **_VISION,
)
CIFAR_10_LARGE_BATCH = Recipe(
    dict(
        learning_rate=0.3,
        ess=5e4,
        hess_init=1.0,
        weight_decay=1e-4,
        b2=0.9999,
    ),
    batch_size=256,
    length="50,000 steps",
    source=THIRD_PARTY,
    note="ResNet-20 with filter response normalisation and SiLU, random crops and flips.",
)


def _gpt2(learning_rate: float) -> Recipe:
    return Recipe(
        dict(
            learning_rate=learning_rate,
            ess=1e10,
            hess_init=1e-3,
            weight_decay=1e-6,
            b2=0.99999,
            mask=matrices,
            clip_radius=1e-3,
        ),
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
    dict(
        learning_rate=0.15,
        ess=1e8,
        hess_init=0.1,
        weight_decay=1e-4,
        b2=0.99999,
        clip_radius=1e-3,
    ),
    batch_size=None,
    length="translation, from scratch",
    warmup=4000,
    decay=INVERSE_SQUARE_ROOT,
    clip_norm=1.0,
    source=THIRD_PARTY,
    note="Transformer-base; 2 Monte Carlo samples in every training step.",
)
UCI_ENERGY = Recipe(
    dict(
        learning_rate=0.02,
        ess=6000,
        hess_init=0.5,
        weight_decay=5e-3,
        b2=0.999,
    ),
    batch_size=8,
    length="60 epochs",
    note="One hidden layer of 50 units; 5 Monte Carlo samples in every training step.",
)
LORA = Recipe(
    dict(
        learning_rate=0.03,
        ess=1e7,
        hess_init=1e-3,
        weight_decay=0.0,
        b2=0.99999,
        clip_radius=1e-3,
        rescale_lr=False,
    ),
    batch_size=4,
    length="10,000 steps",
    decay="linear",
    test_samples=10,
    source=LORA_PAPERS,
    note="Low-rank adapters of Llama-2-7B. Published: ess 1e6 to 1e8, hess_init 3e-4 to 1e-3.",
)
LORA_2B = Recipe(
    dict(
        learning_rate=0.03,
        ess=1e7,
        hess_init=3e-4,
        weight_decay=1e-6,
        b2=0.99999,
        clip_radius=1e-3,
        rescale_lr=False,
    ),
    batch_size=32,
    length="fine-tuning; not published",
    warmup=512,
    clip_norm=1.0,
    source=THIRD_PARTY,
    note="Low-rank adapters of Gemma-2B.",
)
