"""IVON in place of AdamW in a Flax nnx loop, on scikit-learn's handwritten digits.

Look at the two calls of `train`: `nnx.Optimizer` takes IVON as it takes AdamW, and its `opt_state`
holds the learned posterior, from which 64 networks are drawn to predict.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

from ivon_jax import auto_sample, ivon, metrics, predict_log_probs, recipes


def main(epochs: int = 50, batch_size: int = 50) -> None:
    """Trains with both optimizers and prints a table."""
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 8 - 1, digits, train_size=1000, random_state=0)
    x, test_x, y, test_y = map(jnp.asarray, split)
    num_steps = epochs * (len(x) // batch_size)

    def make_model():
        rngs = nnx.Rngs(0)
        first, second = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 128, rngs=rngs)
        return nnx.Sequential(first, nnx.relu, second, nnx.relu, nnx.Linear(128, 10, rngs=rngs))

    def loss_fn(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def step(model, optimizer, rows):
        optimizer.update(model, nnx.grad(loss_fn)(model, x[rows], y[rows]))

    def train(tx):
        model = make_model()
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for epoch in trange(epochs):
            order = jax.random.permutation(jax.random.key(epoch), len(x))
            for rows in order.reshape(-1, batch_size):
                step(model, optimizer, rows)
        return model, optimizer

    graphdef, params, rest = nnx.split(make_model(), nnx.Param, ...)
    # Rates: the best of (1e-3, 3e-3, 1e-2) and (0.1, 0.3, 1) on held-out training images.
    adamw, _ = train(optax.adamw(optax.cosine_decay_schedule(1e-3, num_steps)))
    settings = recipes.start(params, num_examples=len(x), num_steps=num_steps, learning_rate=1.0)
    _, optimizer = train(auto_sample(ivon(**settings), key=1))
    predict = predict_log_probs(lambda params, x: nnx.merge(graphdef, params, rest)(x), 64)
    averaged = predict(jax.random.key(2), optimizer.opt_state, test_x, params=params)
    print("      accuracy      NLL      ECE")
    for name, log_probs in {"AdamW": jax.nn.log_softmax(adamw(test_x)), "IVON": averaged}.items():
        scores = (f(log_probs, test_y) for f in (metrics.accuracy, metrics.nll, metrics.ece))
        print(f"{name:<5}" + "".join(f"{score:9.4f}" for score in scores))


if __name__ == "__main__":
    main()
