"""Adapters, groups of the optimizer, texts and abstention of the example; and the script itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flax", reason='the examples need: pip install -e ".[examples]"')

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from benchmarks.evidence.uses import lora_data, lora_finetune, lora_report
from benchmarks.evidence.uses.lora_model import (
    ADAPTER_SCALE,
    LoRADense,
    Transformer,
    add_adapters,
    loss_fn,
)
from ivon_jax import posterior

SMALL = {"vocabulary": 7, "context": 6, "width": 8, "depth": 1}
BASE, ADAPTED = Transformer(**SMALL), Transformer(**SMALL, rank=2)
apply_base = jax.jit(BASE.apply)
TOKENS = jnp.array([[0, 3, 6, 1, 2, 5], [4, 4, 0, 1, 6, 2]])


@pytest.fixture(scope="module")
def base():
    return jax.jit(BASE.init)(jax.random.key(0), TOKENS)


@pytest.fixture(scope="module")
def adapted_params(base):
    return jax.jit(add_adapters, static_argnums=1)(jax.random.key(1), ADAPTED, base)


def as_numpy(tree):
    return {path: np.asarray(x) for path, x in flatten_dict(tree).items()}


# --- The network ----------------------------------------------------------------------------------


def test_an_adapter_adds_a_scaled_product_of_low_rank_to_the_matrix():
    rng = np.random.default_rng(0)
    w, a, b, x = (rng.normal(size=s).astype("f4") for s in [(5, 4), (5, 2), (2, 4), (3, 5)])
    params = {"params": {"base": {"kernel": w}, "lora_a": a, "lora_b": b}}
    y = LoRADense(4, rank=2).apply(params, jnp.asarray(x))
    np.testing.assert_allclose(y, x @ (w + ADAPTER_SCALE * a @ b), rtol=1e-5, atol=1e-5)


def test_the_adapted_network_starts_as_the_base_network(base, adapted_params):
    before = Transformer(**SMALL).apply(base, TOKENS)
    np.testing.assert_array_equal(
        Transformer(**SMALL, rank=2).apply(adapted_params, TOKENS), before
    )
    new = set(flatten_dict(adapted_params)) - set(flatten_dict(base))
    assert {path[-1] for path in new} == {"lora_a", "lora_b"}
    assert len(new) == 8  # two for each of four matrices


@pytest.mark.parametrize("position", range(6))
def test_a_prediction_depends_on_the_characters_before_it_alone(position, base):
    logits = apply_base(base, TOKENS)
    changed = apply_base(base, TOKENS.at[:, position].set((TOKENS[:, position] + 1) % 7))
    differs = np.abs(np.asarray(logits - changed)).max(axis=(0, 2)) > 1e-6
    np.testing.assert_array_equal(differs, np.arange(6) >= position)


# --- The optimizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_two_steps(adapted_params):
    """The parameters after two steps of each method, with the parameters as gradients."""
    after = {}
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam and schedules need it
        for method, values in lora_finetune.VALUES.items():
            tx = lora_finetune.make_optimizer(method, values, adapted_params, 20, jax.random.key(2))
            update = jax.jit(tx.update)
            params, state = adapted_params, tx.init(adapted_params)
            for _ in range(2):
                updates, state = update(adapted_params, state, params)
                params = optax.apply_updates(params, updates)
            after[method] = as_numpy(params)
    return after


@pytest.mark.parametrize("method", ["adamw", "ivon"])
def test_base_matrices_stay_and_the_adapters_move(method, adapted_params, after_two_steps):
    before, after = as_numpy(adapted_params), after_two_steps[method]
    for path in before:
        if path[-1] in ("kernel", "embedding"):
            np.testing.assert_array_equal(before[path], after[path])
        elif path[-1] == "lora_a":
            assert not np.any(before[path] == after[path])


def test_gains_and_biases_move_alike_under_both_methods(adapted_params, after_two_steps):
    before = as_numpy(adapted_params)
    for path, leaf in after_two_steps["adamw"].items():
        if path[-1] in ("scale", "bias"):
            np.testing.assert_array_equal(leaf, after_two_steps["ivon"][path])
        if path[-1] == "scale":  # gradients of the biases are zero here
            assert not np.any(leaf == before[path])


def test_the_posterior_is_that_of_the_adapters(adapted_params):
    values = lora_finetune.VALUES["ivon"]
    tx = lora_finetune.make_optimizer("ivon", values, adapted_params, 20, jax.random.key(2))
    precision = as_numpy(posterior(tx.init(adapted_params), adapted_params).precision)
    initial = values["ess"] * (lora_finetune.FIXED["hess_init"] + values["weight_decay"])
    for path, leaf in precision.items():
        adapter = path[-1].startswith("lora_")
        np.testing.assert_allclose(leaf, initial if adapter else np.inf, rtol=1e-6)


def test_the_loss_is_the_mean_over_characters(base):
    probs = np.asarray(jax.nn.softmax(apply_base(base, TOKENS)[:, :-1]))
    terms = [-np.log(probs[i, t, TOKENS[i, t + 1]]) for i in range(2) for t in range(5)]
    loss = jax.jit(loss_fn, static_argnums=0)(BASE, base, TOKENS)
    np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)


# --- The texts ------------------------------------------------------------------------------------


def test_windows_are_pieces_of_the_text():
    size = lora_finetune.WINDOW
    tokens = jnp.arange(size + 3)
    windows = np.asarray(lora_finetune.random_windows(jax.random.key(0), tokens, 200))
    np.testing.assert_array_equal(np.unique(windows[:, 0]), np.arange(4))
    np.testing.assert_array_equal(windows - windows[:, :1], np.tile(np.arange(size), (200, 1)))
    cut = lora_finetune.all_windows(np.arange(3 * size))
    np.testing.assert_array_equal(cut[2], np.arange(2 * size, 3 * size))


def test_characters_outside_the_alphabet_become_question_marks():
    text = "a~ Z\n\té\x00"
    decoded = "".join(lora_data.ALPHABET[i] for i in lora_data.encode(text))
    assert decoded == "a~ Z\n ??"


def test_a_paragraph_is_kept_where_it_comes_first():
    topics = ["one\n\ntwo\n\n\nthree\n", "two\n\nfour", "\n\n"]
    assert lora_data.unique_paragraphs(topics) == "one\n\ntwo\n\nthree\n\nfour"


def test_held_out_parts_repeat_no_long_paragraph_of_the_training_part():
    parts = lora_data.manual(**lora_finetune.MANUAL_SIZES)
    text = ["".join(lora_data.ALPHABET[i] for i in part) for part in parts]
    assert [len(part) for part in text] == list(lora_finetune.MANUAL_SIZES.values())
    seen, *held_out = (set(part.split("\n\n")[1:-1]) for part in text)
    assert len(seen) > 20
    assert not any(seen & part for part in held_out)


def test_a_manual_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="characters"):
        lora_data.manual(10**8, 1, 1)


# --- Abstention -----------------------------------------------------------------------------------


def test_risk_coverage_is_the_error_of_the_most_confident():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=(5, 8))
    labels = rng.integers(0, 4, size=(5, 8))
    ranked = sorted(
        (-probs[i, j].max(), probs[i, j].argmax() != labels[i, j])
        for i in range(5)
        for j in range(8)
    )
    expected = [np.mean([wrong for _, wrong in ranked[:k]]) for k in range(1, 41)]
    risk = lora_report.risk_coverage(np.log(probs), labels)
    np.testing.assert_allclose(risk, expected)
    scores = lora_report.score(jnp.asarray(np.log(probs), jnp.float32), jnp.asarray(labels))
    assert scores.area == pytest.approx(np.mean(expected))
    assert scores.risk[-1] == pytest.approx(np.mean(probs.argmax(-1) != labels))
    true = np.take_along_axis(probs, labels[..., None], axis=-1)
    assert scores.loss == pytest.approx(-np.mean(np.log(true)), rel=1e-5)


@pytest.mark.parametrize(("coverage", "kept"), [(1.0, 10), (0.7, 7), (0.71, 8), (0.1, 1)])
def test_a_coverage_keeps_a_share_rounded_up(coverage, kept):
    risk = np.arange(1, 11) / 10
    assert lora_report.at_coverage(risk, coverage) == kept / 10


# --- The script -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_script_prints_a_table_and_writes_a_figure(tmp_path):
    options = ("--seeds", 1, "--steps", 10, "--pretrain-steps", 2, "--samples", 2)
    command = [sys.executable, "-W", "error", EXAMPLES / "lora_finetune.py", *map(str, options)]
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling is nearly all of it
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, env=quick
    )
    assert done.returncode == 0, done.stderr
    for word in ("loss, nats", "ECE", "coverage", "no adaptation", "AdamW", "IVON, 2 samples"):
        assert word in done.stdout
    assert (tmp_path / "lora_finetune.png").stat().st_size > 10_000


def test_steps_that_do_not_divide_into_checkpoints_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        lora_finetune.main(["--steps", "15"])
    assert "multiple of 10" in capsys.readouterr().err
