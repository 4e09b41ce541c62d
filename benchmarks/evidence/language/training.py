"""What AdamW and IVON try on text, and how they are trained."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks._shared.methods import estimator_step, plain_step, warmup_cosine
from benchmarks._shared.networks import GPT
from benchmarks.evidence.language.text import CONTEXT
from ivon_jax import Eigenbasis, diagnostics, ivon, recipes

BATCH = 12  # windows
CLIP = optax.clip_by_global_norm(1.0)

Array = jax.Array
PyTree = Any


# --- Settings -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdamW:
    """What is chosen for AdamW."""

    learning_rate: float
    weight_decay: float
    b1: float = 0.9
    b2: float = 0.99

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clipping by the global norm, then AdamW with decay of matrices only."""
        decay = {"weight_decay": self.weight_decay, "mask": recipes.matrices}
        adamw = optax.adamw(warmup_cosine(self.learning_rate, steps), self.b1, self.b2, **decay)
        return optax.chain(CLIP, adamw)


@dataclass(frozen=True)
class Muon:
    """What is chosen for optax's Muon, with AdamW for vectors and embeddings."""

    learning_rate: float
    weight_decay: float
    adam_learning_rate: float = 6e-3

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clipping by the global norm, then Muon with decay of the layers' matrices only."""
        muon = optax.contrib.muon(
            warmup_cosine(self.learning_rate, steps),
            weight_decay=self.weight_decay,
            weight_decay_mask=recipes.matrices,
            adam_learning_rate=warmup_cosine(self.adam_learning_rate, steps),
            muon_weight_dimension_numbers=matrices_of_layers,
        )
        return optax.chain(CLIP, muon)


def matrices_of_layers(params: PyTree) -> PyTree:
    """Which matrices Muon orthogonalizes: all but the embeddings."""

    def numbers(path: Any, x: Array) -> Any:
        in_layer = jax.tree_util.keystr(path).startswith("['layers']")
        return optax.contrib.MuonDimensionNumbers() if in_layer and x.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(numbers, params)


@dataclass(frozen=True)
class Signs:
    """Steps of one length along the signs of the momentum: what IVON does where all is clipped."""

    learning_rate: float

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """Clipping by the global norm, the average of gradients, and its sign."""
        rate = optax.scale_by_learning_rate(warmup_cosine(self.learning_rate, steps))
        return optax.chain(CLIP, optax.ema(0.9), optax.scale_by_sign(), rate)


@dataclass(frozen=True)
class Ivon:
    """What is chosen for IVON, in terms that mean the same in runs of any length."""

    longest: float  # α(h₀+δ)ξ: the longest step of a weight, near what AdamW's rate is
    ess: float
    hess_init: float
    clip_radius: float
    turnover: float  # (1−β₂)T: how often h is replaced
    weight_decay: float = 1e-6

    def arguments(self, steps: int) -> dict[str, Any]:
        """Of `ivon` and of `diagnostics`."""
        peak = self.longest / ((self.hess_init + self.weight_decay) * self.clip_radius)
        return {
            "learning_rate": warmup_cosine(peak, steps),
            "hess_init": self.hess_init,
            "clip_radius": self.clip_radius,
            "b2": 1 - self.turnover / steps,
        }

    def optimizer(self, steps: int) -> optax.GradientTransformationExtraArgs:
        """IVON with a prior on matrices only."""
        decay = {"weight_decay": self.weight_decay, "mask": recipes.matrices}
        return ivon(ess=self.ess, basis=self.basis(), **self.arguments(steps), **decay)

    def basis(self) -> Eigenbasis | None:
        """The coordinates in which the posterior is diagonal."""
        return None


@dataclass(frozen=True)
class EigenIvon(Ivon):
    """The same in an eigenbasis; axes of more than `max_dim` elements are not turned."""

    max_dim: int = 8192

    def basis(self) -> Eigenbasis:
        """That of SOAP, with its frequency."""
        return Eigenbasis(max_dim=self.max_dim)


Settings = AdamW | Muon | Ivon | Signs
# IVON's nine lie around what was best of 17 tried by hand in runs of 500 steps, by the same 5 % of
# the text; three of the nine have ess, h₀ and clip radius as they were published, for GPT-2 (twice)
# and for translation (IWSLT).
TRIED: dict[str, tuple[Settings, ...]] = {
    "AdamW": tuple(
        AdamW(rate, decay) for rate in (3e-3, 6e-3, 1.2e-2) for decay in (0.01, 0.1, 0.5)
    ),
    "IVON": (
        Ivon(1e-3, ess=1e10, hess_init=1e-3, clip_radius=1e-3, turnover=0.02),
        Ivon(1e-3, ess=1e8, hess_init=1e-3, clip_radius=1e-3, turnover=2.0),
        Ivon(1e-3, ess=1e8, hess_init=0.1, clip_radius=1e-3, turnover=2.0),
        Ivon(1e-3, ess=1e9, hess_init=0.1, clip_radius=1e-3, turnover=2.0),
        Ivon(2e-3, ess=1e9, hess_init=0.1, clip_radius=1e-3, turnover=1.0),
        Ivon(2e-3, ess=1e9, hess_init=0.1, clip_radius=1e-3, turnover=2.0),
        Ivon(2e-3, ess=1e9, hess_init=0.1, clip_radius=1e-3, turnover=5.0),
        Ivon(3e-3, ess=3e9, hess_init=0.1, clip_radius=1e-3, turnover=2.0),
        Ivon(4e-3, ess=1e10, hess_init=0.1, clip_radius=1e-3, turnover=2.0),
    ),
    "IVON, eigenbasis": (
        EigenIvon(1e-3, ess=1e8, hess_init=0.01, clip_radius=1e-3, turnover=2.0),
        EigenIvon(1e-3, ess=1e8, hess_init=0.1, clip_radius=1e-3, turnover=5.0),
        EigenIvon(2e-3, ess=1e8, hess_init=0.01, clip_radius=1e-3, turnover=2.0),
        EigenIvon(4e-3, ess=1e8, hess_init=0.01, clip_radius=1e-3, turnover=2.0),
        EigenIvon(4e-3, ess=1e8, hess_init=0.1, clip_radius=1e-3, turnover=2.0),
        EigenIvon(2e-3, ess=1e8, hess_init=0.1, clip_radius=1e-3, turnover=5.0),
        EigenIvon(4e-3, ess=1e8, hess_init=0.1, clip_radius=1e-3, turnover=5.0),
        EigenIvon(4e-3, ess=1e8, hess_init=0.1, clip_radius=1e-3, turnover=5.0, max_dim=128),
        EigenIvon(2e-3, ess=1e8, hess_init=0.01, clip_radius=1e-3, turnover=2.0, max_dim=128),
    ),
    "Muon": (  # fewer than the others: what it reaches is at least this
        *(Muon(5e-3, decay) for decay in (0.01, 0.1, 0.5)),
        *(Muon(1e-2, decay) for decay in (0.01, 0.1)),
    ),
    "signs": tuple(Signs(rate) for rate in (5e-4, 1e-3, 2e-3)),
}


# --- Training -------------------------------------------------------------------------------------


class State(NamedTuple):
    """What a run carries from step to step; with IVON the parameters are the posterior mean."""

    step: Array
    params: PyTree
    opt_state: PyTree


Advance = Callable[[Array, Array, State, int], State]


def make_training(
    settings: Settings, network: GPT, steps: int
) -> tuple[Callable[[Array], State], Advance]:
    """`init(key)`, and `advance(key, tokens, state, count)`, which runs `count` steps at once."""
    if not isinstance(settings, Ivon):
        tx = settings.optimizer(steps)
        step = plain_step(network.loss, tx)
    else:  # whose gradients are clipped before they meet their noise
        tx = settings.optimizer(steps)
        clip = lambda grads: CLIP.update(grads, optax.EmptyState())[0]  # noqa: E731
        step = estimator_step(network.loss, tx, grad_transform=clip)

    def init(key: Array) -> State:
        params = network.init(key)
        return State(jnp.zeros([], jnp.int32), params, tx.init(params))

    def one(key: Array, tokens: Array, state: State) -> State:
        batch_key, noise_key = jax.random.split(jax.random.fold_in(key, state.step))
        starts = jax.random.randint(batch_key, (BATCH, 1), 0, len(tokens) - CONTEXT)
        windows = tokens[starts + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
        return State(state.step + 1, *step(noise_key, state.params, state.opt_state, windows)[:2])

    def advance(key: Array, tokens: Array, state: State, count: Array | int) -> State:
        return jax.lax.fori_loop(0, count, lambda _, state: one(key, tokens, state), state)

    return init, jax.jit(advance, donate_argnums=2)


def train(
    settings: Settings, network: GPT, tokens: np.ndarray, steps: int, seed: int, points: int
) -> Iterator[tuple[int, State]]:
    """Yields (steps done, state) at `points` places of one run."""
    init, advance = make_training(settings, network, steps)
    key, data = jax.random.key(seed), jnp.asarray(tokens)
    state = init(jax.random.fold_in(key, 0))
    places = np.unique(np.linspace(0, steps, points + 1).round().astype(int))
    for before, place in itertools.pairwise(places):
        state = advance(jax.random.fold_in(key, 1), data, state, int(place - before))
        yield int(place), state


def numbers(settings: Ivon, state: State, steps: int) -> Mapping[str, float]:
    """What is known of h: its percentiles over h₀, and shares of weights."""
    found = diagnostics(state.opt_state, settings.arguments(steps))
    h = {f"h/h₀ p{p}": found[f"hess/p{p}"] / settings.hess_init for p in (1, 25, 50, 75, 99)}
    shares = {name: found[f"hess/{name}"] for name in ("moved", "inflated")}
    return {k: float(x) for k, x in {**h, **shares, "clipped": found["update/clipped"]}.items()}
