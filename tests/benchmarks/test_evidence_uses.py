"""The evidence on the uses of the posterior, on the smallest settings: the tables are there."""

import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')


from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._shared.networks import Perceptron
from ivon_jax import Moments


def rows_of(printed):
    """The rows of the printed tables by their first column."""
    cells = [line.split("  ") for line in printed.splitlines() if line.strip()]
    return {cell[0]: [x for x in cell[1:] if x] for cell in cells}


def test_sensitivity(capsys, monkeypatch):
    from benchmarks.evidence.uses import sensitivity

    monkeypatch.setattr(sensitivity, "EPOCHS", 2)
    monkeypatch.setattr(sensitivity, "LONG", 2)
    monkeypatch.setattr(sensitivity, "STEPS", 10)
    one = {"λ = N": (sensitivity.LINEAR, sensitivity.VALUES)}  # so that all is compiled once
    monkeypatch.setattr(sensitivity, "SETTINGS", one)
    sensitivity.main(["--seeds", "1", "--examples", "2"])
    rows = rows_of(capsys.readouterr().out)
    assert all(len(rows[model]) == 2 for model in sensitivity.MODELS)
    assert all(len(rows[score]) == 1 for score in sensitivity.SCORES)


def test_leave_one_out(capsys, monkeypatch):
    from benchmarks.evidence.uses import leave_one_out

    monkeypatch.setattr(
        leave_one_out.example, "HELD_OUT", 0
    )  # so that both runs are the same program
    monkeypatch.setattr(leave_one_out.example, "Network", partial(Perceptron, depth=0))
    leave_one_out.main(["--seeds", "1", "--epochs", "10"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows["leave-one-out, second order"]) == 3
    assert len(rows["a fifth held out, then all learned"]) == 3


def test_continual(capsys, monkeypatch):
    from benchmarks.evidence.uses import continual

    settings = dict([next(iter(continual.example.SETTINGS.items()))])
    monkeypatch.setattr(continual.example, "SETTINGS", settings)
    # The other methods are the example's, whose own test covers them.
    monkeypatch.setattr(continual.example, "learn_in_turn", lambda *_: np.ones((1, 5, 5)))
    continual.main(["--seeds", "1", "--steps", "20"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows["Permuted digits: EWC"]) == 3


@pytest.mark.slow
def test_regression_1d(capsys, monkeypatch):
    pytest.importorskip("blackjax", reason='NUTS needs: pip install -e ".[hmc]"')
    from benchmarks.evidence.uses import regression_1d

    def fitted(steps, problem, start, key):  # by the example, whose own test covers that
        ones = jnp.ones_like(problem.test_x)
        return Moments(ones, ones, ones)

    monkeypatch.setattr(regression_1d.example, "fit_adamw", fitted)
    monkeypatch.setattr(regression_1d.example, "fit_ivon", fitted)
    monkeypatch.setattr(regression_1d.example, "fit_mixture", fitted)
    regression_1d.main(["--seeds", "1", "--steps", "2", "--draws", "4"])
    rows = rows_of(capsys.readouterr().out)
    assert len(rows["clusters"]) == len(rows["std of f gap"]) == 7


def test_mixtures_average_probabilities_over_disjoint_groups(capsys, monkeypatch):
    from benchmarks.evidence.uses import mixtures

    rng = np.random.default_rng(0)
    log_probs = jax.nn.log_softmax(jnp.asarray(rng.standard_normal((11, 797, 10)), jnp.float32))
    sets = dict.fromkeys(mixtures.example.SETS, log_probs)
    monkeypatch.setattr(mixtures.example, "compare", lambda *_: ({"IVON": sets}, None))
    groups = mixtures.grouped(sets, 5)
    assert len(groups) == 2
    expected = np.log(np.exp(log_probs[5:10]).mean(0))
    np.testing.assert_allclose(groups[1]["letters"], expected, rtol=1e-4, atol=1e-5)
    mixtures.main(["--seeds", "11"])
    printed = capsys.readouterr().out
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith("IVON")] == [
        ["IVON", str(size)] for size in mixtures.SIZES
    ]
    with pytest.raises(SystemExit, match="at least 10"):
        mixtures.main(["--seeds", "3"])


def test_the_temperature_that_was_put_in_is_found(capsys, monkeypatch):
    from benchmarks.evidence.uses import temperature_scaling as scaling

    def predicted(data, seeds, epochs):
        """Log-probabilities that are twice too sharp for labels drawn from the true ones."""
        del epochs
        labels = jnp.asarray(data.test_labels)
        confident = jnp.zeros((len(labels), 10)).at[:, 0].set(jnp.log(0.5) - jnp.log(0.5 / 9))
        right = jnp.arange(len(labels)) % 2 == 0
        first = jnp.where(right, labels, (labels + 1) % 10)
        true = jnp.stack([jnp.roll(x, k) for x, k in zip(confident, first, strict=True)])
        sharp = jax.nn.log_softmax(2 * true)
        return {"IVON": {"test images": jnp.stack([sharp] * seeds)}}, None

    monkeypatch.setattr(scaling.example, "compare", predicted)
    scaling.main(["--seeds", "2"])
    rows = [x.split() for x in capsys.readouterr().out.splitlines() if x.startswith("IVON")]
    assert rows[0][1] == "1" and rows[1][1] == "2.00" and float(rows[1][4]) < float(rows[0][2])
