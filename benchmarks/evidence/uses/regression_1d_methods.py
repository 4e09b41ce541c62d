"""The network, the data and the methods of `regression_1d.py`: IVON, AdamW and NUTS.

One prior and one likelihood serve all of them: N(0, 1) for every weight, and known noise. Scales
that would otherwise be prior variances of layers are factors inside `network`, so that IVON's one
`weight_decay` says the same as NUTS's log-density.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import optax

from ivon_jax import Moments, Posterior, ivon, posterior, prior_of, sample_params

WIDTH = 16
NUM_WEIGHTS = 3 * WIDTH + 1
INPUT_SCALE, OUTPUT_SCALE = 2.0, 1.5
NOISE = 0.1  # standard deviation of an observation, known to all methods
NUM_TRAIN = 40
EDGES = (1.0, 2.0, 3.0)  # of the gap, the two clusters and the outside, in |x|
NUM_TEST = 301  # evenly spaced
WARMUP_SHARE = 0.05  # of the training steps
MEMBERS = 5  # of an ensemble
MAX_DOUBLINGS = 8  # of a NUTS trajectory

Array = jax.Array
Params = Any
Values = Mapping[str, Any]  # hyperparameters by name
Apply = Callable[[Params, Array], Array]


# --- Network and data -----------------------------------------------------------------------------


def network(weights: Array, x: Array) -> Array:
    """Maps inputs (n,) to function values (n,) by one hidden tanh layer.

    The weights are one vector, and no tree of layers, because all methods then compile faster.
    """
    slope, bias, out = weights[: 3 * WIDTH].reshape(3, 1, WIDTH)
    hidden = jnp.tanh(INPUT_SCALE * (x[:, None] * slope + bias))
    return hidden @ out[0] * (OUTPUT_SCALE / math.sqrt(WIDTH)) + weights[-1]


def draw_weights(key: Array) -> Array:
    """Draws the network's weights from the prior N(0, I)."""
    return jax.random.normal(key, (NUM_WEIGHTS,))


class Problem(NamedTuple):
    """One data set: training points in the two clusters, test points everywhere."""

    x: Array
    y: Array
    test_x: Array
    test_f: Array  # the true function
    test_y: Array  # with noise


def draw_problem(key: Array) -> Problem:
    """Draws a true function from the prior, and observations of it."""
    function_key, place_key, train_key, test_key = jax.random.split(key, 4)
    truth = draw_weights(function_key)
    distance = jax.random.uniform(place_key, (NUM_TRAIN,), minval=EDGES[0], maxval=EDGES[1])
    x = jnp.where(jnp.arange(NUM_TRAIN) < NUM_TRAIN // 2, -distance, distance)
    test_x = jnp.linspace(-EDGES[2], EDGES[2], NUM_TEST)
    test_f = network(truth, test_x)
    y = network(truth, x) + NOISE * jax.random.normal(train_key, x.shape)
    return Problem(x, y, test_x, test_f, test_f + NOISE * jax.random.normal(test_key, test_x.shape))


def regions(x: Array) -> dict[str, Array]:
    """Masks of the clusters, the gap between them, and what lies beyond them."""
    distance = jnp.abs(x)
    return {
        "clusters": (distance >= EDGES[0]) & (distance <= EDGES[1]),
        "gap": distance < EDGES[0],
        "outside": distance > EDGES[1],
    }


def loss_fn(apply_fn: Apply, params: Params, x: Array, y: Array) -> Array:
    """The mean negative log-likelihood per point, up to a constant."""
    return jnp.mean((apply_fn(params, x) - y) ** 2) / (2 * NOISE**2)


# --- Training -------------------------------------------------------------------------------------


def schedule(learning_rate: Any, steps: int) -> Callable[[Any], Any]:
    """Linear warmup and cosine decay to zero."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, round(WARMUP_SHARE * steps), steps)
    return lambda count: learning_rate * shape(jnp.asarray(count, jnp.float32))


def train_ivon(
    apply_fn: Apply, x: Array, y: Array, steps: int, values: Values, params: Params, key: Array
) -> Any:
    """Returns IVON's state after full-batch steps of one sample each."""
    tx = ivon(
        schedule(values["learning_rate"], steps),
        ess=len(x),  # λ = N: plain Bayes
        hess_init=values["hess_init"],
        b2=values["b2"],
        weight_decay=1 / len(x),  # λδ = 1, the precision of the prior
    )

    def step(carry: Any, key: Array) -> tuple[Any, None]:
        params, state = carry
        sample, noise = sample_params(key, state)
        grads = jax.grad(lambda sample: loss_fn(apply_fn, sample, x, y))(sample)
        updates, state = tx.update(grads, state, params, noise=noise)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))
    return carry[1]


def train_adamw(
    apply_fn: Apply, x: Array, y: Array, steps: int, values: Values, params: Params
) -> Params:
    """Returns the weights after as many full-batch steps of AdamW."""
    tx = optax.adamw(schedule(values["learning_rate"], steps), weight_decay=values["weight_decay"])

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(lambda params: loss_fn(apply_fn, params, x, y))(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
    return carry[0]


def free_energy(
    apply_fn: Apply, x: Array, y: Array, state: Any, key: Array, num_samples: int = 1000
) -> Array:
    """What IVON minimises: λE_q[loss] + KL(q‖prior), the first term from samples."""

    def loss(key: Array) -> Array:
        sample, _ = sample_params(key, state)
        return loss_fn(apply_fn, sample, x, y)

    losses = jax.vmap(loss)(jax.random.split(key, num_samples))
    return len(x) * jnp.mean(losses) + kl_divergence(posterior(state), prior_of(state))


def kl_divergence(q: Posterior, p: Posterior) -> Array:
    """KL(q‖p) of two diagonal Gaussians."""

    def leaf(m: Array, s: Array, m0: Array, s0: Array) -> Array:
        ratio = s0 / s
        return 0.5 * jnp.sum(ratio - 1 - jnp.log(ratio) + s0 * (m - m0) ** 2)

    return sum(jax.tree.leaves(jax.tree.map(leaf, *q, *p)), jnp.zeros([]))


# --- Predictions ----------------------------------------------------------------------------------


def moments_of(functions: Array) -> Moments:
    """Mean and variance over equally likely functions on axis 0, with the noise on top."""
    variance = jnp.var(functions, axis=0)
    return Moments(jnp.mean(functions, axis=0), variance + NOISE**2, variance)


def mixture(members: Moments) -> Moments:
    """Mean and variance of a mixture of equally likely predictions on axis 0."""
    between = jnp.var(members.mean, axis=0)
    return Moments(
        jnp.mean(members.mean, axis=0),
        jnp.mean(members.variance, axis=0) + between,
        jnp.mean(members.model_variance, axis=0) + between,
    )


class Chains(NamedTuple):
    """Function values (chains, draws, n) and the number of divergent transitions."""

    functions: Array
    divergences: Array


def run_nuts(
    apply_fn: Apply, x: Array, y: Array, inputs: Array, draws: int, starts: Params, key: Array
) -> Chains:
    """Draws functions at `inputs` from the posterior by NUTS, after as many steps of adaptation.

    Args:
      apply_fn: the network.
      x: training inputs.
      y: training targets.
      inputs: where the functions are wanted.
      draws: number of draws per chain.
      starts: weights with the chains on axis 0.
      key: a PRNG key.
    """

    def log_density(params: Params) -> Array:
        log_prior = -0.5 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        return log_prior - len(x) * loss_fn(apply_fn, params, x, y)

    def chain(start: Params, key: Array) -> Chains:
        adapt_key, key = jax.random.split(key)
        adaptation = blackjax.window_adaptation(
            blackjax.nuts, log_density, max_num_doublings=MAX_DOUBLINGS
        )
        (state, tuned), _ = adaptation.run(adapt_key, start, draws)  # pyright: ignore[reportCallIssue]
        kernel: Any = blackjax.nuts(log_density, **tuned)

        def step(state: Any, key: Array) -> tuple[Any, Chains]:
            state, info = kernel.step(key, state)
            return state, Chains(apply_fn(state.position, inputs), info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(key, draws))[1]

    num_chains = len(jax.tree.leaves(starts)[0])
    chains = jax.vmap(chain)(starts, jax.random.split(key, num_chains))
    return chains._replace(divergences=jnp.sum(chains.divergences))
