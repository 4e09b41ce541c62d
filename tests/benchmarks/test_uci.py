"""The UCI benchmark as a user runs it, and its parts against closed forms."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason='the benchmarks need: pip install -e ".[examples]"')

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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


def run(*arguments, folder):
    command = [sys.executable, "-W", "error", BENCHMARKS / "uci.py", *map(str, arguments)]
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what is computed stays the same
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=env)


def test_a_set_in_the_standard_layout_gives_a_table_and_is_not_computed_twice(tmp_path):
    write_set(tmp_path / "toy")
    options = ("--data-dir", tmp_path, "--dataset", "toy", "--steps", 20)
    done = run(*options, "--methods", "adamw", "ivon", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "IVON, 100 samples" in done.stdout and "over AdamW" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "uci.jsonl").read_text().splitlines()]
    results = [r["result"] for r in records if "run" in r]
    assert len(results) == 4
    assert all(np.isfinite(r["log_likelihood"]) and len(r["held_out"]) == 24 for r in results)
    assert all(0 < r["rmse"] < 20 for r in results)  # in units of the target
    again = run("--report", folder=tmp_path)
    assert again.returncode == 0 and "over AdamW" in again.stdout, again.stderr


@pytest.mark.parametrize("damage", ["nothing there", "a word", "overlap", "index"])
def test_damaged_data_are_a_message_and_not_a_traceback(damage, tmp_path):
    folder = tmp_path / "toy"
    if damage != "nothing there":
        write_set(folder)
    if damage == "a word":
        (folder / "data.txt").write_text("1 2 three\n")
    if damage == "overlap":
        (folder / "index_test_0.txt").write_text((folder / "index_train_0.txt").read_text())
    if damage == "index":
        (folder / "index_target.txt").write_text("7\n")
    done = run("--data-dir", tmp_path, "--dataset", "toy", folder=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "toy" in done.stderr


def test_the_likelihood_is_that_of_the_mixture_and_the_noise_the_best_one():
    from benchmarks.evidence.uci.methods import NOISE_LEVELS, best_noise, log_likelihood

    rng = np.random.default_rng(0)
    predicted, y = rng.standard_normal((7, 50)), rng.standard_normal(50)
    densities = np.exp(-0.5 * ((predicted - y) / 0.4) ** 2) / (0.4 * np.sqrt(2 * np.pi))
    expected = np.log(densities.mean(axis=0)).mean()
    with jax.numpy_rank_promotion("allow"):
        got = log_likelihood(jnp.asarray(predicted, "float32"), jnp.asarray(y, "float32"), 0.4)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # Of one prediction the best s² is the mean square.
    residual = np.float32(0.3) * rng.standard_normal(4000).astype("float32")
    with jax.numpy_rank_promotion("allow"):
        noise, _ = best_noise(jnp.zeros((1, 4000)), jnp.asarray(residual))
    step = float(NOISE_LEVELS[1] / NOISE_LEVELS[0])
    assert 1 / step < float(noise) / residual.std() < step


def test_held_out_rows_come_from_the_training_part_alone():
    from benchmarks.evidence.uci.data import hold_out, standardise

    rows = np.arange(50.0)
    splits = [(rows[:40, None], rows[:40], rows[40:, None], rows[40:])]
    x, y, held_x, held_y = hold_out(splits)[0]
    assert len(y) == 32 and len(held_y) == 8
    assert sorted([*y, *held_y]) == list(rows[:40])
    np.testing.assert_array_equal(held_x[:, 0], held_y)
    part = standardise([(x, y, held_x, held_y)])
    assert abs(part.train[0].mean()) < 1e-6 and abs(part.train[1].std() - 1) < 1e-6
    np.testing.assert_allclose(part.test[1][0] * y.std() + y.mean(), held_y, rtol=1e-5)
