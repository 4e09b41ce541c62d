"""Each script of what a step costs, once and as small as it gets: its tables have their rows."""

from functools import partial

import jax
import pytest

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks._shared.networks import GPT, Bottlenecks, Perceptron
from benchmarks.cost import (
    accelerator,
    compile_time,
    counted_cost,
    models,
    optimizer_step,
    train_step,
    variants,
)
from benchmarks.cost.contenders import BASELINE, CONTENDERS


@pytest.fixture(autouse=True)
def kept_caches(monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests want them


SMALL = {
    optimizer_step: ["--size", "64", "--trees", "one leaf", "--repetitions", "2"],
    train_step: ["--models", "mlp", "--batch-size", "2", "--repetitions", "1"],
    compile_time: ["--trees", "500 leaves of 64", "--models", "mlp", "--repetitions", "1"],
    counted_cost: ["--trees", "one leaf of 32768 x 2048", "--models", "mlp"],
}
TABLES = {optimizer_step: 1, train_step: 1, compile_time: 2, counted_cost: 2}


@pytest.mark.parametrize("script", SMALL, ids=lambda script: script.__name__.split(".")[-1])
def test_a_script_prints_a_row_for_each_contender(script, monkeypatch, capsys):
    # A small tree in place of the one of 500 leaves, and a network without hidden layers.
    monkeypatch.setitem(compile_time.TREES, "500 leaves of 64", lambda: models.many(3, 4))
    network = models.classifier(Perceptron(depth=0), (8, 8, 1))
    monkeypatch.setitem(models.MODELS, "mlp", network)
    names = ["auto_sample", "explicit"]
    script.main([*SMALL[script], "--methods", *names])
    lines = capsys.readouterr().out.splitlines()
    for name in [BASELINE, *names]:
        rows = [line for line in lines if line.startswith(f"{name}  ")]
        assert len(rows) == TABLES[script]
        assert all("nan" not in row for row in rows)


@pytest.mark.slow
def test_the_table_for_accelerators_has_all_sections_and_is_not_measured_twice(
    monkeypatch, capsys, tmp_path
):
    small = accelerator.Networks(GPT(1, 1, 8, 4, 16), 4, Bottlenecks((1,), 2, 10), 8, 4)
    monkeypatch.setattr(accelerator, "SMALL", small)
    argv = ["--results", str(tmp_path / "a.jsonl"), "--millions", "1", "--repetitions", "1"]
    argv += ["--block-seconds", "0.001", "--optimizer-methods", BASELINE, "auto_sample"]
    argv += ["--training-methods", BASELINE]  # one, for these are long to compile
    accelerator.main(argv)
    out = capsys.readouterr().out
    assert "jax finds no accelerator" in out and "nan" not in out
    sections = [line for line in out.splitlines() if line.startswith("## ")]
    assert len(sections) == 1 + 4 + 4
    assert sum(line.startswith("auto_sample  ") for line in out.splitlines()) == 4
    assert sum(line.startswith(f"{BASELINE}  ") for line in out.splitlines()) == 8
    monkeypatch.setattr(accelerator, "measured", None)
    accelerator.main(argv)
    assert (tmp_path / "a.md").read_text().count("```text") == 9 + 1


def test_what_ivon_keeps_is_counted_in_arrays_of_the_parameters_size():
    shapes = models.many(1, 1000)
    kept = {
        name: counted_cost.counted(CONTENDERS[name](), shapes, None)[0]
        for name in (BASELINE, "auto_sample", "auto_sample, lean", "lean, bfloat16 momentum")
    }
    assert list(kept.values()) == ["12.0", "16.0", "12.0", "10.0"]


def test_variants_are_compared_on_three_problems(monkeypatch, capsys):
    monkeypatch.setattr(variants, "RATES", (0.5,))
    monkeypatch.setattr(variants, "Perceptron", partial(Perceptron, depth=0))  # compiles faster
    name = "a pair, in mc_value_and_grad"
    variants.main(["--variants", name, "--seeds", "1", "--gradients", "200"])
    out = capsys.readouterr().out
    assert "nan" not in out.replace("± nan", "")
    assert sum(line.startswith(name) for line in out.splitlines()) == 3
    cells = variants.quadratic(variants.VARIANTS["one sample, lean"], 0.5, 200)  # by auto_sample
    assert len(cells) == 3 and "nan" not in " ".join(cells)
    for title in ("quadratic, rate 0.5", "logistic regression, 4 seeds", "digits, 1 seeds"):
        assert title in out


def test_a_name_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(SystemExit, match=r"'adam' is none of: optax\.adamw, optax\.sgd"):
        optimizer_step.main(["--methods", "adam"])
