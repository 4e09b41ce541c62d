"""IVON in place of AdamW in an equinox loop, on scikit-learn's handwritten digits.

Look at the two calls of `train`: the loop does not know which optimizer it runs. AdamW predicts
with its weights, IVON with the average over 64 networks drawn from the posterior it has learned.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
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
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @eqx.filter_value_and_grad
    def loss_and_grad(model, x, y):
        logits = jax.vmap(model)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def train(tx, model):
        @eqx.filter_jit
        def step(model, state, rows):
            _, grads = loss_and_grad(model, x[rows], y[rows])
            updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
            return eqx.apply_updates(model, updates), state

        state = tx.init(params)
        for epoch in trange(epochs):
            order = jax.random.permutation(jax.random.key(epoch), len(x))
            for rows in order.reshape(-1, batch_size):
                model, state = step(model, state, rows)
        return model, state

    # Rates: the best of (1e-3, 3e-3, 1e-2) and (0.1, 0.3, 1) on held-out training images.
    adamw, _ = train(optax.adamw(optax.cosine_decay_schedule(1e-3, num_steps)), model)
    settings = recipes.start(params, num_examples=len(x), num_steps=num_steps, learning_rate=1.0)
    _, state = train(auto_sample(ivon(**settings), key=1), model)
    point = jax.nn.log_softmax(jax.vmap(adamw)(test_x))
    predict = predict_log_probs(lambda params, x: jax.vmap(eqx.combine(params, static))(x), 64)
    averaged = predict(jax.random.key(2), state, test_x, params=params)
    print("      accuracy      NLL      ECE")
    for name, log_probs in {"AdamW": point, "IVON": averaged}.items():
        scores = (f(log_probs, test_y) for f in (metrics.accuracy, metrics.nll, metrics.ece))
        print(f"{name:<5}" + "".join(f"{score:9.4f}" for score in scores))


if __name__ == "__main__":
    main()
