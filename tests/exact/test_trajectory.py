"""Whole trajectories equal the equations, written a second time in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivon_jax import ivon
from ivon_jax._core.optimizer import PRECISION_FLOOR

STEPS = 20
PARAMS = {"b": np.array([0.3, -1.2]), "w": np.linspace(-1.5, 2.0, 6).reshape(3, 2)}
CURVATURE = {"b": np.array([0.4, 1.7]), "w": np.linspace(0.2, 3.0, 6).reshape(3, 2)}
DEFAULTS = {"learning_rate": 0.1, "ess": 30.0, "b2": 0.99, "hess_init": 0.7, "weight_decay": 0.01}


def decayed(count):
    return 0.2 / (1.0 + 0.3 * jnp.asarray(count, float))


SETTINGS = {
    "plain": {},
    "clip": {"clip_radius": 0.9},
    "floor": {"precision_floor": 0.9, "hess_init": 1.5},
    "floor_and_masked_prior": {
        "precision_floor": 0.8,
        "weight_decay": 0.3,
        "mask": {"b": False, "w": True},
    },
    "no_rescale": {"rescale_lr": False},
    "no_debias": {"debias": False},
    "clip_no_rescale_no_debias": {"clip_radius": 0.4, "rescale_lr": False, "debias": False},
    "flat_prior": {"weight_decay": 0.0},
    "masked_prior": {"weight_decay": 0.3, "mask": {"b": False, "w": True}},
    "callable_mask": {"weight_decay": 0.3, "mask": lambda p: jax.tree.map(lambda x: x.ndim > 1, p)},
    "strong_prior": {"weight_decay": 2.0, "hess_init": 0.05},
    "schedule": {"learning_rate": decayed},
    "no_momentum": {"b1": 0.0},
    "long_momentum": {"b1": 0.999},
    "no_hess_memory": {"b2": 0.0, "weight_decay": 3.0},
    "short_hess_memory": {"b2": 0.9, "clip_radius": 0.5},
    "default_b2": {"b2": 0.99999},
    "integers": {"ess": 7, "hess_init": 2, "weight_decay": 1, "b1": 0, "b2": 0, "clip_radius": 1},
}


def gradient(theta, curvature, xp):
    """Gradient of ½aθ² − cos(3θ)/6 − θ: curved, and not quadratic."""
    return curvature * theta + 0.5 * xp.sin(3.0 * theta) - 1.0


def as_float32(x):
    """λ and δ are float32 in the state whatever the parameters are: round them likewise."""
    return float(np.float32(x))


class Reference:
    """The equations of the paper, literally, in float64, for the two leaves of PARAMS."""

    def __init__(self, **settings):
        self.count = 0
        self.clipped = []
        self.floored = []
        self._read(settings)
        self.mean = dict(PARAMS)
        self.hess = {k: np.full(m.shape, float(self.hess_init)) for k, m in PARAMS.items()}
        self.momentum = {k: np.zeros(m.shape) for k, m in PARAMS.items()}

    def _read(self, settings):
        values = {"b1": 0.9, "clip_radius": np.inf, "rescale_lr": True, "debias": True}
        values |= {"precision_floor": PRECISION_FLOOR}
        values |= {"mask": None} | DEFAULTS | settings
        mask = values["mask"](PARAMS) if callable(values["mask"]) else values["mask"]
        decay = as_float32(values["weight_decay"])
        self.delta = {k: decay if mask is None or mask[k] else 0.0 for k in PARAMS}
        self.ess = as_float32(values["ess"])
        for name in (
            "learning_rate",
            "b1",
            "b2",
            "hess_init",
            "clip_radius",
            "precision_floor",
            "rescale_lr",
        ):
            setattr(self, name, values[name])
        self.debias = values["debias"]

    def step(self, *, noise=None, hess_hat=None, **new_settings):
        """One step; `new_settings` hold from now on, the noise was drawn under the old ones."""
        old_ess, old_delta = self.ess, self.delta
        if new_settings:
            self._read(new_settings)
        lr = self.learning_rate
        lr = float(lr(self.count)) if callable(lr) else lr
        self.count += 1
        for k in PARAMS:
            m, h, d_old, d_new = self.mean[k], self.hess[k], old_delta[k], self.delta[k]
            samples = m + (np.zeros_like(m)[None] if noise is None else noise[k])
            grads = np.array([gradient(s, CURVATURE[k], np) for s in samples])
            if hess_hat is None:
                estimate = old_ess * (h + d_old) * np.mean(noise[k] * grads, axis=0)
            else:
                estimate = np.mean(hess_hat[k], axis=0)
            g = self.b1 * self.momentum[k] + (1 - self.b1) * np.mean(grads, axis=0)
            d = (1 - self.b2) * (estimate - h)
            h = h + d + 0.5 * d**2 / (h + d_old)
            assert np.all(h + d_new > 10 * PRECISION_FLOOR * (self.hess_init + d_new))
            floor = self.precision_floor * (self.hess_init + d_new)
            self.floored.append(np.mean(h + d_new < floor))
            h = np.maximum(h, floor - d_new)
            g_bar = g / (1 - self.b1**self.count) if self.debias else g
            direction = (g_bar + d_new * m) / (h + d_new)
            u = np.clip(direction, -self.clip_radius, self.clip_radius)
            self.clipped.append(np.mean(u != direction))
            alpha = lr * (self.hess_init + d_new) if self.rescale_lr else lr
            self.mean[k], self.hess[k], self.momentum[k] = m - alpha * u, h, g

    def noise(self, normals):
        """Injected noise ε/√(λ(h+δ)) for both sides, under the stored λ and δ."""
        return {
            k: e / np.sqrt(self.ess * (self.hess[k] + self.delta[k])) for k, e in normals.items()
        }


def normals(seed, samples):
    """ε for all steps, (STEPS, S, *shape)."""
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal((STEPS, samples or 1, *m.shape)) for k, m in PARAMS.items()}


def at(tree, t):
    return {k: x[t] for k, x in tree.items()}


def apply(tx, state, params, samples, dtype, *, noise=None, hess_hat=None):
    """One step of the package on the same statistics; unstacked when `samples` is None."""

    def given(tree):
        pick = (lambda x: x[0]) if samples is None else (lambda x: x)
        return {k: jnp.asarray(pick(x), dtype) for k, x in tree.items()}

    curvature = {k: jnp.asarray(x, dtype) for k, x in CURVATURE.items()}
    if noise is None:
        shape = () if samples is None else (samples,)
        points = {k: jnp.broadcast_to(m, (*shape, *m.shape)) for k, m in state.mean.items()}
        extra = {"hess": given(hess_hat)}
    else:
        extra = {"noise": given(noise)}
        stacked = state.mean if samples is None else {k: m[None] for k, m in state.mean.items()}
        points = {
            k: jnp.broadcast_to(m, extra["noise"][k].shape) + extra["noise"][k]
            for k, m in stacked.items()
        }
    slopes = {
        k: jnp.broadcast_to(c if samples is None else c[None], points[k].shape)
        for k, c in curvature.items()
    }
    grads = jax.tree.map(lambda p, c: gradient(p, c, jnp), points, slopes)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def assert_follows(state, params, reference, rtol):
    """Relative to the size of each leaf, because elements of m and g pass through zero."""
    for name, tree in [("mean", params), *((n, getattr(state, n)) for n in ("mean", "hess"))]:
        for k, expected in getattr(reference, name).items():
            scale = np.max(np.abs(expected))
            np.testing.assert_allclose(tree[k], expected, rtol=0, atol=rtol * scale, err_msg=name)
    for k, expected in reference.momentum.items():
        np.testing.assert_allclose(
            state.momentum[k], expected, rtol=0, atol=rtol * max(1.0, np.max(np.abs(expected)))
        )


def run(settings, samples, dtype, rtol, statistic="noise"):
    settings = DEFAULTS | settings
    reference = Reference(**settings)
    tx = ivon(**settings)
    params = {k: jnp.asarray(x, dtype) for k, x in PARAMS.items()}
    state = tx.init(params)
    injected = normals(0, samples)
    for t in range(STEPS):
        if statistic == "noise":
            now = {"noise": reference.noise(at(injected, t))}
        else:  # Around 1.5, near the true curvature; some are negative.
            now = {"hess_hat": {k: 1.5 + e for k, e in at(injected, t).items()}}
        reference.step(**now)
        params, state = apply(tx, state, params, samples, dtype, **now)
        assert_follows(state, params, reference, rtol)
    assert state.count == STEPS
    return reference


# float64 rounding is 1.1e-16 and some 30 operations enter each of 20 contracting steps:
# 1e-12 leaves a factor of ten. Any error in an equation, in 1−β₂ or in λ is ≥ 1e-8.
FLOAT64_RTOL = 1e-12
# float32 rounding is 6e-8: the same count of operations, 20·30·6e-8 = 3.6e-5 at the worst.
FLOAT32_RTOL = 3.6e-5


@pytest.mark.parametrize(
    ("name", "samples"), [*((n, s) for n in SETTINGS for s in (None, 3)), ("plain", 1), ("clip", 1)]
)
def test_trajectory_in_float64_is_the_equations(name, samples):
    with jax.enable_x64(True):
        reference = run(SETTINGS[name], samples, jnp.float64, FLOAT64_RTOL)
    if "clip_radius" in SETTINGS[name]:
        assert 0.02 < np.mean(reference.clipped) < 0.95, "the clip must act, but not always"
    if "precision_floor" in SETTINGS[name]:
        assert 0.02 < np.mean(reference.floored) < 0.98, "the floor must act, but not always"


@pytest.mark.parametrize(("name", "samples"), [*((n, 3) for n in SETTINGS), ("plain", None)])
def test_trajectory_in_float32_is_the_equations(name, samples):
    run(SETTINGS[name], samples, jnp.float32, FLOAT32_RTOL)


@pytest.mark.parametrize("samples", [None, 1, 3])
@pytest.mark.parametrize("name", ["plain", "masked_prior", "short_hess_memory", "no_debias"])
def test_trajectory_with_a_given_hess_is_the_equations(name, samples):
    with jax.enable_x64(True):
        run(SETTINGS[name], samples, jnp.float64, FLOAT64_RTOL, statistic="hess_hat")


@pytest.mark.parametrize(
    ("changing", "mask"),
    [
        ({"ess": lambda t: 10.0 * 1.2**t}, None),
        ({"weight_decay": lambda t: 0.5 / (1 + t)}, {"b": True, "w": False}),
        (
            {
                "ess": lambda t: 50.0 - t,
                "weight_decay": lambda t: 0.01 * t,
                "b2": lambda t: 1 - 0.5**t,
            },
            None,
        ),
    ],
    ids=["ess", "masked_decay", "all"],
)
def test_changed_ess_and_decay_act_on_the_step_and_the_stored_ones_on_the_noise(changing, mask):
    """ĥ and the old precision use the λ and δ under which the noise was drawn."""
    injected = normals(2, None)
    with jax.enable_x64(True):
        now = DEFAULTS | {"mask": mask} | {k: f(0) for k, f in changing.items()}
        reference = Reference(**now)
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = ivon(**now).init(params)
        for t in range(STEPS):
            # Step 0 already differs from init.
            now |= {k: f(t + 1) for k, f in changing.items()}
            noise = reference.noise(at(injected, t))
            reference.step(noise=noise, **now)
            params, state = apply(ivon(**now), state, params, None, jnp.float64, noise=noise)
            assert_follows(state, params, reference, FLOAT64_RTOL)
        assert state.ess == np.float32(now["ess"])


def test_under_jit_and_scan_the_trajectory_is_the_same():
    """One compiled scan over the steps: fused, and with a traced step count."""
    settings = DEFAULTS | SETTINGS["schedule"] | {"clip_radius": 0.5}
    injected = normals(0, 3)
    with jax.enable_x64(True):
        reference, tx, noise = Reference(**settings), ivon(**settings), []
        for t in range(STEPS):
            noise.append(reference.noise(at(injected, t)))
            reference.step(noise=noise[-1])
        noise = jax.tree.map(lambda *x: jnp.stack(x), *noise)
        params = jax.tree.map(jnp.asarray, PARAMS)

        def step(carry, now):
            params, state = apply(tx, carry[1], carry[0], 3, jnp.float64, noise=now)
            return (params, state), None

        scan = jax.jit(lambda carry, noise: jax.lax.scan(step, carry, noise)[0])
        params, state = scan((params, tx.init(params)), noise)
        assert_follows(state, params, reference, FLOAT64_RTOL)


def hess_after(b2, hats, dtype):
    """h after one given ĥ per step, by the package."""
    tx = ivon(0.0, ess=10.0, b2=b2, weight_decay=0.0)
    state = tx.init(jnp.zeros(hats.shape[1], dtype))

    def step(state, hat):
        return tx.update(jnp.zeros_like(hat), state, hess=hat)[1], None

    return jax.jit(lambda s, x: jax.lax.scan(step, s, x)[0])(state, jnp.asarray(hats, dtype)).hess


def naive_hess_after(b2, hats, one_minus_b2):
    """β₂h + (1−β₂)ĥ + ½(1−β₂)²(ĥ−h)²/h with everything in float32."""
    h, b2, rate = np.ones(hats.shape[1], np.float32), np.float32(b2), np.float32(one_minus_b2)
    for hat in hats.astype(np.float32):
        h = b2 * h + rate * hat + np.float32(0.5) * (rate * (hat - h)) ** 2 / h
    return h


@pytest.mark.parametrize("loc", [0.0, 1.0, 3.0])
def test_float32_hess_over_ten_thousand_steps_is_as_good_as_its_last_bits(loc):
    """The grouped form with 1−β₂ in double precision, against the textbook form in float32.

    h+d rounds once per step by at most ε/2·h (rms ε/√12): over 10⁴ steps the sum of
    independent roundings has rms 100·3.4e-8·h; 5 of those bound 64 elements. The textbook
    form has in addition an error of 10⁴·1.4e-8 = 1.4e-4 from β₂ rounded to float32.
    """
    b2, steps = 0.99999, 10_000
    hats = loc + np.random.default_rng(3).standard_normal((steps, 64))
    # Both precisions see the same numbers.
    hats = hats.astype(np.float32).astype(np.float64)
    with jax.enable_x64(True):
        exact = np.asarray(hess_after(b2, hats, jnp.float64))
    expected = np.ones(64)
    for hat in hats:
        d = (1 - b2) * (hat - expected)
        expected = expected + d + 0.5 * d**2 / expected
    np.testing.assert_allclose(exact, expected, rtol=1e-12)

    error = np.abs(np.asarray(hess_after(b2, hats, jnp.float32), np.float64) / expected - 1)
    assert np.max(error) < 5 * 100 * 3.4e-8
    rms = np.sqrt(np.mean(error**2))
    for one_minus_b2 in (1 - b2, np.float32(1) - np.float32(b2)):
        naive_error = naive_hess_after(b2, hats, one_minus_b2) / expected - 1
        assert np.sqrt(np.mean(naive_error**2)) > 15 * rms
