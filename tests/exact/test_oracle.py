"""The same trajectories as PyTorch's `ivon-opt`, run as an oracle on the oracle's own draws.

The oracle needs an extra: `pip install -e ".[test,oracle]"`, then `pytest -m oracle`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason='needs PyTorch: pip install -e ".[oracle]"')
oracle = pytest.importorskip("ivon", reason='needs ivon-opt: pip install -e ".[oracle]"')

import ivon_jax

pytestmark = pytest.mark.oracle

STEPS = 30
# ess and weight_decay are float32 in our state, hess_init in the oracle's: only numbers that
# float32 holds exactly can agree to float64.
BASE = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "weight_decay": 2.0**-7, "beta2": 0.995}

SETTINGS = {
    "plain": {},
    "defaults": {"hess_init": 1.0, "beta2": 0.99999, "weight_decay": 0.0},
    "clip": {"clip_radius": 0.1},
    "tight_clip": {"clip_radius": 1e-3, "lr": 10.0},
    "no_rescale": {"rescale_lr": False},
    "no_debias": {"debias": False},
    "all_off": {"rescale_lr": False, "debias": False, "weight_decay": 0.0, "clip_radius": 0.2},
    "short_memory": {"beta1": 0.5, "beta2": 0.9},
    "no_momentum": {"beta1": 0.0},
    "strong_prior": {"weight_decay": 2.0, "hess_init": 2.0**-7},
    "cold": {"ess": 2.0**20, "hess_init": 2.0**-7},
}


def problem():
    """A small two-layer regression: inputs, targets and parameters, as NumPy float64."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 4))
    y = np.sin(x @ rng.standard_normal(4))
    params = {"w1": 0.5 * rng.standard_normal((4, 3)), "w2": 0.5 * rng.standard_normal(3)}
    return x, y, params


def torch_loss(params, x, y):
    return 0.5 * torch.mean((torch.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2)


def jax_loss(params, x, y):
    return 0.5 * jnp.mean((jnp.tanh(x @ params["w1"]) @ params["w2"] - y) ** 2)


def run_oracle(settings, samples, seed=0):
    """Means after each step, the noise of every sample (STEPS, S, ...), and the final h."""
    torch.manual_seed(seed)
    x, y, start = problem()
    x, y = torch.tensor(x), torch.tensor(y)
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    optimizer = oracle.IVON(params.values(), mc_samples=samples, **settings)
    means, noises = [], []
    for _ in range(STEPS):
        mean = {k: p.detach().clone().numpy() for k, p in params.items()}
        drawn = []
        for _ in range(samples):
            with optimizer.sampled_params(train=True):
                drawn.append({k: p.detach().numpy() - mean[k] for k, p in params.items()})
                optimizer.zero_grad()
                torch_loss(params, x, y).backward()
        optimizer.step()
        noises.append({k: np.stack([n[k] for n in drawn]) for k in params})
        means.append({k: p.detach().clone().numpy() for k, p in params.items()})
    stack = lambda trees: {k: np.stack([t[k] for t in trees]) for k in params}  # noqa: E731
    return stack(means), stack(noises), optimizer.param_groups[0]["hess"].numpy()


def run_ours(settings, samples, noises):
    """Our means and final h on the oracle's noise, compiled as one scan."""
    rename = {"lr": "learning_rate", "beta1": "b1", "beta2": "b2"}
    tx = ivon_jax.ivon(**{rename.get(k, k): v for k, v in settings.items()})
    x, y, params = jax.tree.map(jnp.asarray, problem())

    def step(carry, noise):
        params, state = carry
        points = jax.tree.map(lambda m, n: m[None] + n, state.mean, noise)
        grads = jax.vmap(jax.grad(jax_loss), (0, None, None))(points, x, y)
        if samples == 1:
            grads, noise = jax.tree.map(lambda a: a[0], (grads, noise))
        updates, state = tx.update(grads, state, params, noise=noise)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    scan = jax.jit(lambda carry, noises: jax.lax.scan(step, carry, noises))
    (_, state), means = scan((params, tx.init(params)), jax.tree.map(jnp.asarray, noises))
    return means, state.hess


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_trajectory_equals_that_of_ivon_opt(name, samples):
    settings = BASE | SETTINGS[name]
    means, noises, hess = run_oracle(settings, samples)
    with jax.enable_x64(True):
        our_means, our_hess = run_ours(settings, samples, noises)
    # The oracle's noise is known as θ−m, to 1e-16·|θ|/σ with σ ≥ 1e-2: relative 1e-14, which
    # 30 steps may multiply. Any difference of definition is larger than 1e-6.
    for k, expected in means.items():
        np.testing.assert_allclose(our_means[k], expected, rtol=1e-11, atol=1e-12)
        assert np.max(np.abs(expected[-1] - expected[0])) > 1e-3, "it must have moved"
    flat = np.concatenate([np.ravel(our_hess[k]) for k in means])
    np.testing.assert_allclose(flat, hess, rtol=1e-11, atol=1e-12)
    assert np.max(np.abs(hess - settings["hess_init"])) > 1e-5, "it must have moved"


def test_the_oracle_draws_from_the_posterior_that_we_state():
    """One large leaf: standardised by our 1/√(λ(h+δ)), the oracle's draws have variance 1."""
    size = 100_000
    leaf = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    settings = {"ess": 50.0, "hess_init": 0.25, "weight_decay": 0.125}
    torch.manual_seed(0)
    with oracle.IVON([leaf], lr=0.1, **settings).sampled_params(train=False):
        draws = leaf.detach().clone().numpy()
    with jax.enable_x64(True):
        state = ivon_jax.ivon(0.1, **settings).init(jnp.zeros(size))
        precision = np.asarray(ivon_jax.posterior(state).precision)
    z = draws * np.sqrt(precision)
    # The variance of `size` squares is 2/size.
    assert abs(np.mean(z**2) - 1) < 5 * np.sqrt(2 / size)


@pytest.mark.parametrize("samples", [1, 4])
def test_the_gradsq_estimate_with_scale_ess_equals_that_of_ivon_opt(samples):
    """PyTorch's ĥ = λ·mean(ĝ²) is our `estimator_scale=λ`, given here as hess=."""
    settings = BASE | {"hess_init": 0.5}
    torch.manual_seed(1)
    x, y, start = problem()
    params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    optimizer = oracle.IVON(params.values(), mc_samples=samples, hess_approx="gradsq", **settings)
    mean = {k: p.detach().clone().numpy() for k, p in params.items()}
    points = []
    for _ in range(samples):
        with optimizer.sampled_params(train=True):
            points.append({k: p.detach().clone().numpy() for k, p in params.items()})
            optimizer.zero_grad()
            torch_loss(params, torch.tensor(x), torch.tensor(y)).backward()
    optimizer.step()
    with jax.enable_x64(True):
        tx = ivon_jax.ivon(
            settings["lr"],
            settings["ess"],
            hess_init=settings["hess_init"],
            b2=settings["beta2"],
            weight_decay=settings["weight_decay"],
        )
        state = tx.init(jax.tree.map(jnp.asarray, mean))
        stacked = {k: jnp.stack([jnp.asarray(p[k]) for p in points]) for k in mean}
        grads = jax.vmap(jax.grad(jax_loss), (0, None, None))(
            stacked, jnp.asarray(x), jnp.asarray(y)
        )
        hess = jax.tree.map(lambda g: settings["ess"] * g**2, grads)
        _, state = tx.update(grads, state, hess=hess)
    for k, p in params.items():
        np.testing.assert_allclose(state.mean[k], p.detach().numpy(), rtol=1e-11, atol=1e-12)
    flat = np.concatenate([np.ravel(state.hess[k]) for k in params])
    np.testing.assert_allclose(flat, optimizer.param_groups[0]["hess"].numpy(), rtol=1e-11)
