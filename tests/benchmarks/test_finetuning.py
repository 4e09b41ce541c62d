"""The encoder against NumPy, and the fine-tuning command on a small one and made-up sentences."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from benchmarks.evidence.finetuning import (
    choosing,
    data,
    laplace,
    main,
    merging,
    methods,
    questions,
    sensitivity,
)
from examples._shared import minilm
from ivon_jax import metrics

pytestmark = pytest.mark.usefixtures("small_encoder")


def normalised(x, p):
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-12)
    return scaled * p["scale"] + p["bias"]


def bert(params, tokens):
    """One sentence at a time, without padding, as the paper of BERT has it (post-norm, gelu)."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    vectors = []
    for sentence in tokens:
        ids = sentence[sentence > 0]
        x = p["words"]["embedding"][ids] + p["positions"]["embedding"][: len(ids)] + p["segment"]
        x = normalised(x, p["norm"])
        for i in range(minilm.DEPTH):
            layer = p[f"layer_{i}"]
            heads = []
            q, k, v = (dense(x, layer["attention"][n]) for n in ("query", "key", "value"))
            for h in np.split(np.arange(minilm.WIDTH), minilm.HEADS):
                weights = np.exp(q[:, h] @ k[:, h].T / math.sqrt(len(h)))
                heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, h])
            attended = dense(np.concatenate(heads, -1), layer["attention"]["out"])
            x = normalised(x + attended, layer["attention_norm"])
            hidden = dense(x, layer["up"])
            hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
            x = normalised(x + dense(hidden, layer["down"]), layer["norm"])
        vectors.append(x.mean(0))
    return np.stack(vectors)


def test_the_encoder_is_bert_and_does_not_see_its_padding():
    params = minilm.load_encoder()
    tokens = np.array([[3, 5, 7, 0, 0], [4, 4, 9, 12, 30]], np.int32)
    found: Any = minilm.Encoder().apply({"params": params}, tokens)
    np.testing.assert_allclose(found, bert(params, tokens), rtol=1e-4, atol=1e-5)


def test_sentences_come_back_in_their_order():
    lengths = np.random.default_rng(0).integers(1, 49, 70)
    tokens = (np.arange(48) < lengths[:, None]).astype(np.int32)
    found = methods.in_batches(lambda x: jnp.sum(jnp.asarray(x), axis=1), tokens, size=16)
    np.testing.assert_array_equal(found, lengths)


def test_batches_hold_every_sentence_once_an_epoch_cut_to_what_they_need():
    lengths = np.random.default_rng(0).integers(1, 49, 600)
    tokens = (np.arange(48) < lengths[:, None]).astype(np.int32)
    batches = list(data.grouped_batches(tokens, np.random.default_rng(1), 32, epochs=2))
    assert len(batches) == 2 * (600 // 32)
    first = np.concatenate([rows for rows, _ in batches[:18]])
    assert len(set(first.tolist())) == 18 * 32
    # Over the epochs no sentence is left out, however long it is.
    many = data.grouped_batches(tokens[:100], np.random.default_rng(2), 32, epochs=20)
    assert len(set(np.concatenate([rows for rows, _ in many]).tolist())) == 100
    for rows, width in batches:
        assert lengths[rows].max() <= width <= lengths[rows].max() + 7 and width % 8 == 0
    assert np.mean([width for _, width in batches]) < 0.8 * 48


def test_the_last_layers_laplace_approximation_is_the_hessian_of_its_loss():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(20, 3)), rng.normal(size=(3, 4))

    def loss(w):  # of classes first, as the Gaussian has them
        inputs = jnp.concatenate([x, jnp.ones((20, 1))], axis=1)
        return jax.nn.logsumexp(inputs @ w.reshape(3, 4).T, axis=1).sum()

    flat = w.ravel()
    with jax.enable_x64(True):
        inputs = np.concatenate([x, np.ones((20, 1))], axis=1)
        log_probs = np.asarray(jax.nn.log_softmax(inputs @ w.T))
        hessian = jax.hessian(loss)(jnp.asarray(flat))
    last = laplace.fit_last_layer(log_probs, x)
    found = last.eigenvectors * last.eigenvalues @ last.eigenvectors.T
    np.testing.assert_allclose(found, hessian, atol=1e-10)
    entropy: Any = metrics.predictive_entropy
    # A large prior precision leaves the point; a small one makes predictions less sure.
    sure = last.predict(log_probs, x, 1e12)
    np.testing.assert_allclose(sure, log_probs, atol=1e-5)
    unsure = last.predict(log_probs, x, 0.01)
    assert entropy(unsure).mean() > entropy(sure).mean()


@pytest.mark.parametrize("scope", ["full", "lora", "head"])
def test_a_scope_starts_at_the_pretrained_network_and_trains_its_part(scope):
    made = methods.make_scope(scope, 2, jax.random.key(0))
    built = minilm.adapted(made.base, made.start)["params"]
    jax.tree.map(np.testing.assert_array_equal, built["encoder"], minilm.load_encoder())
    count = sum(x.size for x in jax.tree.leaves(made.start))
    head, width, layers = 8 * 2 + 2, 8, 2
    layer = 4 * (width**2 + width) + 2 * width * 12 + 12 + width + 4 * width
    expected = {
        "full": layers * layer,
        "lora": layers * 2 * 16 * 8,
        "head": (2 * layers + 1) * 2 * width,
    }
    assert count == head + expected[scope]


def test_dropout_acts_only_with_a_key():
    made = methods.make_scope("full", 2, jax.random.key(0))
    tokens = jnp.array([[3, 5, 7, 0], [4, 4, 9, 12]])
    one, two, none, again = (
        methods.logits(2, made.start, made.base, tokens, key)
        for key in (jax.random.key(0), jax.random.key(1), None, None)
    )
    assert jnp.abs(one - two).max() > 1e-4 and jnp.abs(one - none).max() > 1e-4
    np.testing.assert_array_equal(none, again)


@pytest.mark.slow
def test_the_command_chooses_tests_and_reports(tmp_path, monkeypatch, capsys):
    write_sentences(tmp_path, (*data.FILES["sst2"], *data.UNFAMILIAR["sst2"].values()), 70)
    grids = {
        "adamw": {"learning_rate": (1e-3, 3e-3, 1e-2)},
        "dropout": {"learning_rate": (3e-3,)},
        "ivon": {"step": (1e-2,), "sigma": (0.01,)},
    }
    monkeypatch.setattr(methods, "grid", lambda method, scope: grids[method])
    results = tmp_path / "finetuning.jsonl"
    argv = ["--data", str(tmp_path), "--labels", "64", "--seeds", "2", "--results", str(results)]
    main.main(argv)
    page = results.with_suffix(".md").read_text()
    assert "sst2, 64 labels, full" in page and "(chosen" in page
    rows = {line.split("  ")[0] for line in page.splitlines()}
    assert rows.issuperset(main.WAYS.values())
    written = results.read_text()
    main.main(argv)  # nothing is computed again
    assert results.read_text() == written
    assert "questions, disagreement" in capsys.readouterr().out


def write_sentences(folder, names, count):
    rng = np.random.default_rng(0)
    for name in names:
        labels = rng.integers(0, 2, count)
        lines = [f"{y} {'good fine' if y else 'bad poor'} {rng.integers(9)} film" for y in labels]
        if name.startswith("yelp"):
            lines = ["\t".join(reversed(line.split(" ", 1))) for line in lines]
        (folder / name).write_text("\n".join([*lines, "1"]))  # a line without a sentence


@pytest.mark.slow
def test_merging_reports_every_rule(tmp_path, monkeypatch):
    names = [name for files, *_ in merging.KINDS.values() for name in files]
    write_sentences(tmp_path, names, 100)
    kinds = {name: (files[0], 64, 16, 20) for name, files in merging.KINDS.items()}
    monkeypatch.setattr(merging, "KINDS", kinds)
    monkeypatch.setattr(merging, "WEIGHTS", (0.5, 1.0))
    results = tmp_path / "merging.jsonl"
    merging.main(["--data", str(tmp_path), "--seeds", "1", "--results", str(results)])
    page = results.with_suffix(".md").read_text()
    rows = {line.split("  ")[0] for line in page.splitlines()}
    expected = {"films alone", "then products", "then restaurants", "average", "joint training"}
    assert rows >= expected | {
        "task arithmetic",
        "Fisher information",
        "IVON's precisions",
        "the same without h₀",
    }


@pytest.mark.slow
def test_sensitivity_reports_shares_lengths_and_sentences(tmp_path, monkeypatch):
    write_sentences(tmp_path, data.FILES["sst2"], 80)
    monkeypatch.setattr(sensitivity, "SHARES", (0.0, 0.2))
    monkeypatch.setattr(sensitivity, "EPOCHS", (1,))
    results = tmp_path / "sensitivity.jsonl"
    argv = ["--data", str(tmp_path), "--labels", "64", "--seeds", "1", "--results", str(results)]
    sensitivity.main(argv)
    page = results.with_suffix(".md").read_text()
    assert "leave-one-out, ess = N" in page and "variance" in page and "nan" not in page
    assert page.count("good fine") + page.count("bad poor") == sensitivity.SHOWN


def test_margins_of_reviews_and_others_are_compared(tmp_path, capsys, monkeypatch):
    names = (*data.FILES["sst2"], *data.UNFAMILIAR["sst2"].values())
    write_sentences(tmp_path, names, 70)
    monkeypatch.setattr(methods, "CHOSEN", {"step": 0.01, "sigma": 0.1})
    questions.main(["--data", str(tmp_path), "--labels", "64", "--seeds", "1"])
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0] for line in printed.splitlines()}
    assert rows >= {"margin of reviews", "margin of products", "AUROC, disagreement"}


def test_a_margin_that_samples_only_shrink_leaves_its_detection_alone():
    point = np.array([0.2, -0.4, 3.0, -4.0])
    found = {
        "reviews": (point[2:], np.stack([0.5 * point[2:]] * 3)),
        "questions": (point[:2], np.stack([0.5 * point[:2]] * 3)),
    }
    spread = questions.spreads(found)["margin of reviews"]
    np.testing.assert_allclose(list(spread.values())[:3], [3.5, 1.75, 0.0])
    aurocs = [row["questions"] for row in questions.detections(found).values()]
    assert aurocs[:3] == [1.0, 1.0, 1.0]


def test_every_criterion_chooses_what_to_label(tmp_path, monkeypatch):
    write_sentences(tmp_path, data.FILES["sst2"], 120)
    monkeypatch.setattr(choosing, "SIZES", (32, 64))
    monkeypatch.setattr(choosing, "MIN_STEPS", 2)
    monkeypatch.setattr(methods, "EPOCHS", 1)
    results = tmp_path / "choosing.jsonl"
    choosing.main(["--data", str(tmp_path), "--seeds", "1", "--results", str(results)])
    page = results.with_suffix(".md").read_text()
    rows = [line.split() for line in page.splitlines()]
    for criterion in choosing.CRITERIA:
        accuracies, losses = (row for row in rows if row[:1] == [criterion])
        assert len(accuracies) == len(losses) == 3
    assert "nan" not in page


def test_disagreement_chooses_where_samples_contradict_each_other():
    log_probs = np.log([[[0.5, 0.5], [0.99, 0.01]], [[0.5, 0.5], [0.01, 0.99]]])
    rng = np.random.default_rng(0)
    assert np.argmax(choosing.CRITERIA["BALD"](log_probs, rng)) == 1
    entropy = np.asarray(choosing.CRITERIA["entropy"](log_probs, rng))
    np.testing.assert_allclose(entropy, np.log(2), rtol=1e-5)


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(SystemExit, match=r"no_such_package not installed.*pip install"):
        minilm.need("numpy", "no_such_package")
