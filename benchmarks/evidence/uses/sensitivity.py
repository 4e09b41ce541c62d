"""How well sensitivities agree with true retraining, and wrong labels by two scores.

`python benchmarks/evidence/uses/sensitivity.py` learns 500 digits as examples/sensitivity.py does.

1. Examples, spread evenly over the ranks of the estimate, are removed one at a time, and the model
   is trained again from where it was: by IVON with the same batches and noise, and at the posterior
   mean alone, by L-BFGS on the whole set to a stationary point. The posterior is learned for 60
   epochs, (1−β₂)T = 1.2, and for 1,000: what is left of h₀ makes every estimate too small. For
   softmax regression, which is convex, the exact diagonal and the full covariance show what a form
   costs.
2. A tenth of the labels is wrong. They are looked for where the network resists them (λ = N) and
   where it learns some by heart (λ = 10 N, wider, less decay). Five settings were looked at, width
   16 to 128, decay 1e-4 to 1e-2; nothing was selected by these results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.stats import spearmanr

from benchmarks._shared.journal import parse
from benchmarks._shared.methods import ivon_step, optimizer, scan_epoch
from benchmarks._shared.networks import Perceptron
from examples import sensitivity as example
from examples._shared.reporting import cell, format_table
from examples.sensitivity import BATCH_SIZE, NUM_TRAIN, cross_entropy
from ivon_jax import Eigenbasis, Posterior, posterior, posterior_mean, sensitivity
from ivon_jax.metrics import detection

DECAY = 1e-3
VALUES = dict(learning_rate=0.3, hess_init=0.1, b2=0.999, weight_decay=DECAY, temperature=1.0)
SETTINGS = {
    "λ = N": (example.Network(16), VALUES),
    "λ = 10 N": (example.Network(64), {**VALUES, "weight_decay": 1e-4, "temperature": 0.1}),
}
BASIS = Eigenbasis(decay=0.99)
EPOCHS, LONG = 60, 1000
RETRAINED_SEEDS = 3  # at most, in which examples are removed
STEPS = 2000  # of L-BFGS, at most
AGAIN = 1 / 3  # of the first rate, in the retraining by IVON
REFIT_SHARE = 0.15  # of the steps to the stationary point, without an example
TOLERANCE = 1e-7  # of the gradient's norm; removing one example makes it up to 1e-2

Array = jax.Array
Tree = Any
Apply = Callable[..., Any]
Values = Mapping[str, Any]


@dataclass
class Options:
    """The command line."""

    seeds: int = 8
    examples: int = 60
    """Removed in each of at most three seeds."""


class Weighted(NamedTuple):
    """Examples, and the weight of each in the loss: 0 leaves an example out."""

    images: Array
    labels: Array
    weights: Array


LINEAR = Perceptron(depth=0)  # softmax regression
draw = jax.jit(example.draw_data)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    options = parse(Options, __doc__, argv)
    keys = jax.random.split(jax.random.key(0), options.seeds)
    agreements = [compare_with_truth(options.examples, key) for key in keys[:RETRAINED_SEEDS]]
    print("\n1. Change of the output for an example that is removed, over the examples\n")
    print(agreement_rows(agreements))
    print("\n2. AUROC of finding the wrong labels\n")
    print(wrong_rows(keys))


# --- Training and scores --------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("network", "basis"))
def begin(
    network: nn.Module, values: Values, data: Weighted, key: Array, basis: Eigenbasis | None = None
) -> Tree:
    """IVON's state before training."""
    return tx_of(values, basis, EPOCHS).init(network.init(key, data.images[:1]))


def tx_of(values: Values, basis: Eigenbasis | None, epochs: int) -> Any:
    """IVON for a run of so many epochs."""
    num_steps = epochs * (NUM_TRAIN // BATCH_SIZE)
    return optimizer("ivon", {**values, "basis": basis}, num_steps, NUM_TRAIN)


@partial(jax.jit, static_argnames=("network", "basis", "epochs"))
def fit(
    network: nn.Module,
    values: Values,
    data: Weighted,
    state: Tree,
    key: Array,
    epochs: int,
    basis: Eigenbasis | None = None,
) -> Tree:
    """Continues IVON from a state."""
    apply: Apply = network.apply

    def loss_fn(params: Tree, batch: Weighted) -> Array:
        return jnp.mean(batch.weights * cross_entropy(apply(params, batch.images), batch.labels))

    step = ivon_step(loss_fn, tx_of(values, basis, epochs))

    def epoch(carry: Tree, key: Array) -> tuple[Tree, None]:
        return scan_epoch(step, BATCH_SIZE, data, carry, key), None

    keys = jax.random.split(key, epochs)
    return jax.lax.scan(epoch, (posterior_mean(state), state), keys)[0][1]


@partial(jax.jit, static_argnames="network")
def losses_of(network: nn.Module, params: Tree, data: Weighted) -> Array:
    """The loss of every example."""
    apply: Apply = network.apply
    return cross_entropy(apply(params, data.images), data.labels)


def objective(network: nn.Module, data: Weighted, params: Tree) -> Array:
    """Loss of all examples plus prior, per example: (Σ w_i ℓ_i)/N + δ‖θ‖²/2."""
    loss = jnp.mean(data.weights * losses_of(network, params, data))
    return loss + 0.5 * DECAY * optax.tree.norm(params, squared=True)


@partial(jax.jit, static_argnames="network")
def minimise(network: nn.Module, data: Weighted, params: Tree, steps: int) -> Tree:
    """Minimises `objective` by L-BFGS on the whole set, in at most so many steps."""
    vector, unravel = ravel_pytree(params)

    def loss(vector: Array) -> Array:
        return objective(network, data, unravel(vector))

    tx = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(loss)

    def unfinished(carry: Any) -> Array:
        count, _, state = carry
        size = optax.tree.norm(optax.tree.get(state, "grad"))
        return (count < steps) & ((count == 0) | (size > TOLERANCE))

    def step(carry: Any) -> Any:
        count, vector, state = carry
        value, grad = value_and_grad(vector, state=state)
        updates, state = tx.update(grad, state, vector, value=value, grad=grad, value_fn=loss)
        return count + 1, optax.apply_updates(vector, updates), state

    return unravel(jax.lax.while_loop(unfinished, step, (0, vector, tx.init(vector)))[1])


@partial(jax.jit, static_argnames="network")
def sensitivities(network: nn.Module, q: Posterior, data: Weighted) -> Any:
    """What `sensitivity` says of every example."""
    apply: Apply = network.apply
    return sensitivity(apply, cross_entropy)(q, data.images, targets=data.labels)


# --- The estimate and the truth -------------------------------------------------------------------

MODELS = (
    "network, 60 epochs, IVON again",
    "- at the mean",
    "network, 1,000 epochs, at the mean",
    "- in an eigenbasis",
    "softmax regression, at the mean",
    "- in its eigenbasis",
    "- with the exact diagonal",
    "- with the full covariance",
)


Changes = tuple[Any, Any]  # of the outputs for M examples left out, (M, K): estimated, and true


def compare_with_truth(count: int, key: Array) -> list[Changes]:
    """Removes examples and compares, in the order of `MODELS`."""
    data_key, init_key, train_key, again_key = jax.random.split(key, 4)
    drawn = draw(data_key)
    data = Weighted(drawn.images, drawn.true_labels, jnp.ones(NUM_TRAIN))

    network: nn.Module = SETTINGS["λ = N"][0]
    begun = begin(network, VALUES, data, init_key)
    state = fit(network, VALUES, data, begun, train_key, EPOCHS)
    # The schedule starts anew, and with it the debiasing of the momentum.
    momentum = jax.tree.map(jnp.zeros_like, state.momentum)
    start = state._replace(count=jnp.zeros_like(state.count), momentum=momentum)
    values = {**VALUES, "learning_rate": AGAIN * VALUES["learning_rate"]}

    def again(weights: Array) -> Posterior:
        changed = data._replace(weights=weights)
        return posterior(fit(network, values, changed, start, again_key, EPOCHS))

    q = posterior(state)
    rows = spread(network, q, data, count)
    _, by_ivon = agreement(network, data, rows, again)
    _, early = agreement(network, data, rows, without_noise(network, q, data))

    def in_turn(network: nn.Module, basis: Eigenbasis | None) -> tuple[Tree, Changes, np.ndarray]:
        start = begin(network, VALUES, data, init_key, basis)
        q = posterior(fit(network, VALUES, data, start, train_key, LONG, basis))
        rows = spread(network, q, data, count)
        return *agreement(network, data, rows, without_noise(network, q, data)), rows

    (_, at_mean, _), (_, turned, _) = (in_turn(network, basis) for basis in (None, BASIS))
    mean, diagonal, rows = in_turn(LINEAR, None)
    _, turned_linear, _ = in_turn(LINEAR, BASIS)
    exact = [(x[rows], diagonal[1]) for x in exact_changes(data, mean)]
    return [by_ivon, early, at_mean, turned, diagonal, turned_linear, *exact]


def spread(network: nn.Module, q: Posterior, data: Weighted, count: int) -> np.ndarray:
    """Rows whose sensitivities are spread evenly over the ranks."""
    order = np.argsort(sensitivities(network, q, data).score)
    return order[np.linspace(0, NUM_TRAIN - 1, count).round().astype(int)]


def without_noise(network: nn.Module, q: Posterior, data: Weighted) -> Callable[[Array], Posterior]:
    """Retrains by going on from a stationary point of the whole set."""
    fitted = minimise(network, data, q.mean, STEPS)
    few = max(1, round(REFIT_SHARE * STEPS))
    return lambda weights: q._replace(
        mean=minimise(network, data._replace(weights=weights), fitted, few)
    )


def agreement(
    network: nn.Module, data: Weighted, rows: np.ndarray, retrain: Callable[[Array], Posterior]
) -> tuple[Tree, Changes]:
    """The mean retrained with all examples, and the estimate beside what retraining does."""
    outputs: Apply = jax.jit(network.apply)
    q = retrain(data.weights)
    base = outputs(q.mean, data.images)
    changes = [
        outputs(retrain(data.weights.at[row].set(0.0)).mean, data.images)[row] - base[row]
        for row in rows
    ]
    estimate = sensitivities(network, q, data).deviation[rows]
    return q.mean, (np.asarray(estimate), np.stack(changes))


@jax.jit
def exact_changes(data: Weighted, params: Tree) -> tuple[Array, Array]:
    """Changes of softmax regression by the Hessian's diagonal, and by all of it.

    In coordinates z, θ = m + L z with LLᵀ the covariance, the posterior is N(0, I): `sensitivity`
    is that of the full covariance, although a `Posterior` is diagonal.
    """
    mean, unravel = ravel_pytree(params)
    hessian = jax.hessian(lambda v: objective(LINEAR, data, unravel(v)))(mean)
    factor = jnp.linalg.cholesky(NUM_TRAIN * hessian)
    root = jax.scipy.linalg.solve_triangular(factor, jnp.eye(len(mean)), lower=True).T

    def apply_z(z: Array, images: Array) -> Any:
        return LINEAR.apply(unravel(mean + root @ z), images)

    diagonal = Posterior(params, unravel(NUM_TRAIN * jnp.diag(hessian)))
    q = Posterior(jnp.zeros_like(mean), jnp.ones_like(mean))
    found = sensitivity(apply_z, cross_entropy, data_batch_size=20)
    full = found(q, data.images, targets=data.labels).deviation
    return sensitivities(LINEAR, diagonal, data).deviation, full


def agreement_rows(seeds: Sequence[Sequence[Changes]]) -> str:
    """Models and ways of retraining as rows: ranks and sizes of the changes."""
    rows = [["", "Spearman's correlation", "true / estimated size, median"]]
    for label, *found in zip(MODELS, *seeds, strict=True):
        sizes = [[np.linalg.norm(x, axis=-1) for x in each] for each in found]
        ranks = [spearmanr(*each).statistic for each in sizes]  # pyright: ignore
        ratios = [np.median(truth / np.maximum(estimate, 1e-30)) for estimate, truth in sizes]
        rows.append([label, cell(ranks, 2), cell(ratios, 2)])
    return format_table(rows)


# --- Wrong labels ---------------------------------------------------------------------------------


SCORES = ("sensitivity", "training loss")


def wrong_rows(keys: Array) -> str:
    """Scores as rows, settings as columns."""
    rows = [["", *SETTINGS], *([score] for score in SCORES)]
    for network, values in SETTINGS.values():
        found = []
        for data_key, init_key, train_key in map(partial(jax.random.split, num=3), keys):
            drawn = draw(data_key)
            data = Weighted(drawn.images, drawn.labels, jnp.ones(NUM_TRAIN))
            begun = begin(network, values, data, init_key)
            state = fit(network, values, data, begun, train_key, EPOCHS)
            # Whatever λ was in training, the variance must be that of plain Bayes, λ = N.
            q = posterior(state, temperature=1 / values["temperature"])
            losses = losses_of(network, q.mean, data)
            scores = (np.asarray(x) for x in (sensitivities(network, q, data).score, losses))
            wrong = np.asarray(drawn.labels != drawn.true_labels)
            found.append([detection(score[~wrong], score[wrong]).auroc for score in scores])
        for row, aurocs in zip(rows[1:], np.transpose(found), strict=True):
            row.append(cell(aurocs, 3))
    return format_table(rows)


if __name__ == "__main__":
    main()
