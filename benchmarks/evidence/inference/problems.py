"""Small problems whose posterior NUTS can draw from: a likelihood, a Gaussian prior, and data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.diagnostics import effective_sample_size, potential_scale_reduction
from jax.flatten_util import ravel_pytree
from sklearn import datasets

from examples._shared.datasets import stratified_split

Array = jax.Array
CHAINS = 4
MAX_DOUBLINGS = 8  # of a NUTS trajectory


class Data(NamedTuple):
    """Inputs (n, features) and labels or targets (n,)."""

    x: Array
    y: Array


@dataclass(frozen=True, eq=False)
class Problem:
    """A network with one hidden layer of tanh, or none, and what is observed.

    Outputs are logits, or with `noise` (the standard deviation of observations) the mean of a
    Gaussian. The prior of every weight is N(0, 1/precision).
    """

    train: Data
    test: Data
    hidden: int
    outputs: int
    precision: float
    noise: float | None = None

    def init(self, key: Array) -> Any:
        """Weights of the size that activations keep, biases of zero."""
        sizes = [self.train.x.shape[1], *([self.hidden] if self.hidden else []), self.outputs]
        keys = jax.random.split(key, len(sizes) - 1)
        return [
            (jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n))
            for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
        ]

    def apply(self, params: Any, x: Array, drop: Any = None) -> Array:
        """Log-probabilities (n, classes), or means (n,); `drop` masks the hidden units."""
        *hidden, (kernel, bias) = params
        for w, b in hidden:
            x = jnp.tanh(x @ w + b[None])
        x = x if drop is None else drop(x)
        out = x @ kernel + bias[None]
        return jax.nn.log_softmax(out) if self.noise is None else out[:, 0]

    def loss(self, params: Any, batch: Data, drop: Any = None) -> Array:
        """The mean negative log-likelihood of an example, up to a constant."""
        out = self.apply(params, batch.x, drop)
        if self.noise is None:
            return -jnp.mean(jnp.take_along_axis(out, batch.y[:, None], 1))
        return 0.5 * jnp.mean(((out - batch.y) / self.noise) ** 2)

    def penalised(self, params: Any, batch: Data, drop: Any = None) -> Array:
        """The loss plus the prior's share: its minimum is the mode of the posterior."""
        square = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        return self.loss(params, batch, drop) + 0.5 * self.precision * square / len(self.train.y)


def logistic() -> Problem:
    """Tumours, benign or not, by logistic regression on 30 features."""
    return _classified(datasets.load_breast_cancer(), 0, 2, train_size=400, precision=1.0)


def digits() -> Problem:
    """500 digits of 8x8 pixels, a network with ten hidden units."""
    return _classified(datasets.load_digits(), 10, 10, train_size=500, precision=3.0)


def diabetes() -> Problem:
    """The progress of diabetes, ten features, a network with twenty hidden units."""
    bunch: Any = datasets.load_diabetes()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    x, y = _standardised(bunch.data[order], 300), _standardised(bunch.target[order], 300)
    parts = [
        Data(jnp.asarray(a), jnp.asarray(b)) for a, b in ((x[:300], y[:300]), (x[300:], y[300:]))
    ]
    return Problem(*parts, hidden=20, outputs=1, precision=1.0, noise=0.7)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "logistic": logistic,
    "digits": digits,
    "diabetes": diabetes,
}


def held_out(problem: Problem) -> Problem:
    """The same with a quarter of the training data in the test set's place, to choose settings."""
    n = len(problem.train.y) // 4
    order = np.random.default_rng(1).permutation(len(problem.train.y))
    test, train = (Data(*(x[rows] for x in problem.train)) for rows in np.split(order, [n]))
    fields = problem.hidden, problem.outputs, problem.precision, problem.noise
    return Problem(train, test, *fields)


def _classified(
    bunch: Any, hidden: int, outputs: int, train_size: int, precision: float
) -> Problem:
    labels = bunch.target.astype(np.int32)
    split = stratified_split(bunch.data, labels, len(labels) - train_size)
    x = _standardised(np.concatenate([split[0], split[2]]), train_size)
    train = Data(jnp.asarray(x[:train_size]), jnp.asarray(split[1]))
    test = Data(jnp.asarray(x[train_size:]), jnp.asarray(split[3]))
    return Problem(train, test, hidden, outputs, precision)


def _standardised(x: np.ndarray, train_size: int) -> np.ndarray:
    """Zero mean and unit variance by the training rows; constant columns stay."""
    std = x[:train_size].std(0)
    return ((x - x[:train_size].mean(0)) / np.where(std > 0, std, 1.0)).astype(np.float32)


# --- The reference --------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Predictions of NUTS on the test set, and whether its chains agree about them."""

    outputs: Array  # (chains · draws, n[, classes])
    rhat: float  # the worst of all outputs
    ess: float
    gradients: int
    divergences: int


def run_nuts(problem: Problem, draws: int, seed: int = 0) -> Reference:
    """Draws by four chains, after as many steps of adaptation; every gradient is of all data."""
    start_keys, keys = jax.random.split(jax.random.key(seed), (2, CHAINS))
    example = problem.init(start_keys[0])
    unravel = ravel_pytree(example)[1]

    def log_density(flat: Array) -> Array:
        return -len(problem.train.y) * problem.penalised(unravel(flat), problem.train)

    def chain(start_key: Array, key: Array) -> Any:
        adapt_key, key = jax.random.split(key)
        adaptation = blackjax.window_adaptation(
            blackjax.nuts, log_density, max_num_doublings=MAX_DOUBLINGS
        )
        start = ravel_pytree(problem.init(start_key))[0]
        (state, tuned), _ = adaptation.run(adapt_key, start, draws)  # pyright: ignore[reportCallIssue]
        kernel: Any = blackjax.nuts(log_density, **tuned)

        def step(state: Any, key: Array) -> Any:
            state, info = kernel.step(key, state)
            out = problem.apply(unravel(state.position), problem.test.x)
            return state, (out, info.num_integration_steps, info.is_divergent)

        return jax.lax.scan(step, state, jax.random.split(key, draws))[1]

    outputs, steps, divergent = jax.jit(jax.vmap(chain))(start_keys, keys)
    seen = outputs if problem.noise else jnp.exp(outputs)
    flat = seen.reshape(CHAINS, draws, -1)
    flat = flat[..., flat.std((0, 1)) > 1e-6]  # some probabilities are 1 in every draw
    return Reference(
        outputs.reshape(CHAINS * draws, *outputs.shape[2:]),
        float(jnp.max(jax.vmap(potential_scale_reduction, 2)(flat))),
        float(jnp.min(jax.vmap(effective_sample_size, 2)(flat))),
        int(jnp.sum(steps)),
        int(jnp.sum(divergent)),
    )
