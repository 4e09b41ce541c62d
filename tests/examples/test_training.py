import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tqdm")

from examples._shared.training import train
from ivon_jax import auto_sample, ivon, posterior_mean

DATA = jnp.arange(8.0)


def loss_fn(params, batch):
    return jnp.mean((batch - params) ** 2)


def run(tx, key, **options):
    settings = {"epochs": 50, "batch_size": 4, "progress": False} | options
    return train(tx, loss_fn, jnp.zeros(()), DATA, key=key, **settings)


def test_both_kinds_of_optimizer_find_the_mean():
    params, _ = run(optax.adamw(0.1, weight_decay=0.0), jax.random.key(0))
    assert abs(params - 3.5) < 0.5
    _, state = run(auto_sample(ivon(0.1, ess=1000), 0), jax.random.key(0))
    assert abs(posterior_mean(state) - 3.5) < 0.5


def test_seeds_in_one_program_are_the_seeds_one_by_one():
    def fit(key):
        noise_key, key = jax.random.split(key)
        return posterior_mean(run(auto_sample(ivon(0.1, ess=10), noise_key), key, epochs=3)[1])

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(fit)(keys)
    assert len(np.unique(together)) == 3
    np.testing.assert_allclose(together, jnp.stack([fit(key) for key in keys]), rtol=1e-5)


def test_the_bar_counts_epochs_whatever_the_number_of_seeds(capsys):
    keys = jax.random.split(jax.random.key(0), 3)
    jax.vmap(lambda key: run(optax.sgd(0.1), key, epochs=4, progress=True, label="SGD"))(keys)
    assert "SGD: 100%" in capsys.readouterr().err


def test_too_large_a_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size is 9, but there are 8 examples"):
        run(optax.sgd(0.1), jax.random.key(0), batch_size=9)
