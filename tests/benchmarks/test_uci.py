"""The UCI benchmark as a user runs it, and its parts against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.journal import Journal
from benchmarks.evidence.uci import main as uci
from benchmarks.evidence.uci import methods
from benchmarks.evidence.uci.data import hold_out, standardise


def write_set(folder, rows=60, splits=2):
    folder.mkdir()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 2))
    y = 100 + 10 * x[:, 0] + rng.standard_normal(rows)
    np.savetxt(folder / "data.txt", np.column_stack([x, y]))
    np.savetxt(folder / "index_features.txt", [0, 1])
    np.savetxt(folder / "index_target.txt", [2])
    for k in range(splits):
        order = rng.permutation(rows)
        np.savetxt(folder / f"index_train_{k}.txt", order[rows // 10 :])
        np.savetxt(folder / f"index_test_{k}.txt", order[: rows // 10])


def test_a_set_in_the_standard_layout_gives_a_table_and_is_not_computed_twice(
    tmp_path, monkeypatch, capsys
):
    write_set(tmp_path / "toy")
    # A linear model compiles faster; the network is tested with divergence.
    monkeypatch.setattr(methods, "init", lambda key, features: {"w": jnp.zeros(features)})
    monkeypatch.setattr(methods, "apply", lambda params, x, *_: x @ params["w"])
    monkeypatch.setattr(methods, "SAMPLES", 4)
    monkeypatch.setattr(uci, "STEPS", 20)
    monkeypatch.setattr(uci, "GRIDS", {name: methods.GRIDS[name] for name in ("adamw", "ivon")})
    path = tmp_path / "uci.jsonl"
    options = ["--data", str(tmp_path / "toy"), "--results", str(path)]
    uci.main(options)
    out = capsys.readouterr().out
    assert "IVON, 100 samples" in out and "over AdamW" in out
    results = [x for _, x in Journal(path).select(dataset="toy")]
    assert len(results) == 4
    assert all(np.isfinite(r["log_likelihood"]) for r in results)
    assert all(0 < r["rmse"] < 20 for r in results)  # in units of the target
    monkeypatch.setattr(uci, "evaluate", lambda *_: pytest.fail("it is there"))
    uci.main(options)
    uci.main(["--results", str(path), "--report"])
    assert capsys.readouterr().out.count("over AdamW") == 2 * out.count("over AdamW")


def test_a_set_that_is_not_there_is_a_message_and_not_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match="looked for data"):
        uci.main(["--data", str(tmp_path / "toy"), "--results", str(tmp_path / "uci.jsonl")])


def test_the_likelihood_is_that_of_the_mixture_and_the_noise_the_best_one():
    rng = np.random.default_rng(0)
    predicted, y = rng.standard_normal((7, 50)), rng.standard_normal(50)
    densities = np.exp(-0.5 * ((predicted - y) / 0.4) ** 2) / (0.4 * np.sqrt(2 * np.pi))
    expected = np.log(densities.mean(axis=0)).mean()
    got = methods.log_likelihood(*(jnp.asarray(x, "float32") for x in (predicted, y, 0.4)))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # Of one prediction the best s² is the mean square.
    residual = np.float32(0.3) * rng.standard_normal(4000).astype("float32")
    noise, _ = methods.best_noise(jnp.zeros((1, 4000)), jnp.asarray(residual))
    step = float(methods.NOISE_LEVELS[1] / methods.NOISE_LEVELS[0])
    assert 1 / step < float(noise) / residual.std() < step


def test_held_out_rows_come_from_the_training_part_alone():
    rows = np.arange(50.0)
    splits = [(rows[:40, None], rows[:40], rows[40:, None], rows[40:])]
    x, y, held_x, held_y = hold_out(splits)[0]
    assert len(y) == 32 and len(held_y) == 8
    assert sorted([*y, *held_y]) == list(rows[:40])
    np.testing.assert_array_equal(held_x[:, 0], held_y)
    part = standardise([(x, y, held_x, held_y)])
    assert abs(part.train[0].mean()) < 1e-6 and abs(part.train[1].std() - 1) < 1e-6
    np.testing.assert_allclose(part.test[1][0] * y.std() + y.mean(), held_y, rtol=1e-5)
