"""The GPT-2 example: network, data, one step on meshes, and the program as a user runs it."""

import dataclasses
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

pytest.importorskip("flax", reason='the examples need: pip install -e ".[examples]"')
pytest.importorskip("orbax.checkpoint", reason='the examples need: pip install -e ".[examples]"')

import tyro

from examples.gpt2 import data as gpt2_data
from examples.gpt2 import main as gpt2
from examples.gpt2 import model as gpt2_model
from examples.gpt2 import options as gpt2_options
from examples.gpt2 import report as gpt2_report
from examples.gpt2 import training as gpt2_training
from examples.gpt2.model import Config, Layout
from examples.gpt2.training import AdamW, Ivon

ROOT = Path(__file__).parents[2]
SMALL = Config(width=16, depth=2, heads=2, context=8, vocabulary=32, dtype="float32", remat=False)
CORPUS = gpt2_data.Corpus("numbers", np.arange(1000) % 32, np.arange(100) % 32, 32)
ADAMW = AdamW(1e-3, steps=100, warmup=1)
IVON = Ivon(1000.0, steps=100, warmup=1)
CLIPPED = dataclasses.replace(IVON, ess=1e5, clip_norm=1e-3)


def layout(*shape, kind=AxisType.Auto):
    return Layout(jax.make_mesh(shape, gpt2_model.MESH_AXES, axis_types=(kind,) * 3))


ONE = layout(1, 1, 1)


# --- Network and data -----------------------------------------------------------------------------


def test_parameters_are_gpt2s_and_weight_decay_acts_on_matrices_only():
    config = dataclasses.replace(gpt2_model.PRESETS["small"], vocabulary=50257)
    params = jax.tree.leaves(gpt2_model.abstract_params(config, ONE))
    assert sum(x.size for x in params) == 124_439_808
    for c in gpt2_model.PRESETS.values():
        params = gpt2_model.abstract_params(c, ONE)
        chosen = jax.tree.map(lambda x, m: x.size * m, params, gpt2_model.is_matrix(params))
        blocks = 12 * c.depth * c.width**2  # stacked vectors have two axes as well
        assert sum(jax.tree.leaves(chosen)) == blocks + (c.vocabulary + c.context) * c.width


def test_a_token_does_not_see_those_after_it():
    params = gpt2_model.init_params(SMALL, ONE, jax.random.key(0))
    log_likelihoods = jax.jit(gpt2_model.token_log_likelihoods(SMALL, ONE))
    tokens = jnp.arange(9)[None] % 32
    changed = log_likelihoods(params, tokens.at[0, 5].set(31)) - log_likelihoods(params, tokens)
    assert np.all(changed[0, :4] == 0.0) and np.all(changed[0, 4:] != 0.0)


def test_a_batch_depends_on_seed_and_step_only_and_not_on_the_mesh():
    def batch(place, step=5):
        sharding = place.sharding(None, "batch", None)
        return np.asarray(gpt2_data.training_batch(CORPUS, 3, step, (2, 8, 9), sharding))

    chex.assert_trees_all_equal(*(batch(layout(*s)) for s in ((1, 1, 1), (2, 2, 2), (8, 1, 1))))
    assert not np.array_equal(batch(ONE), batch(ONE, step=6))
    assert set(np.unique(np.diff(batch(ONE)))) <= {1, -31}  # each row is a window of the corpus


def test_what_is_not_data_is_refused_with_a_reason(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"train\.bin is not a flat file of uint16"):
        gpt2_data.load_corpus(tmp_path)
    for name, count in (("train.bin", 400), ("val.bin", 100)):
        (np.arange(count, dtype=np.uint16) * 150).tofile(tmp_path / name)
    corpus = gpt2_data.load_corpus(tmp_path)
    assert isinstance(corpus.train, np.memmap) and len(corpus.train) == 400
    with pytest.raises(ValueError, match=r"token 5\d{4}.*50304.*--vocabulary"):
        gpt2_data.training_batch(corpus, 0, 0, (1, 64, 9), ONE.sharding())
    with pytest.raises(FileNotFoundError, match="nor a folder with train"):
        gpt2_data.load_corpus(tmp_path / "train.bin")
    (tmp_path / "short.txt").write_text("a short text")
    with pytest.raises(ValueError, match=r"short\.txt has 10 tokens, fewer than one window of 128"):
        gpt2_data.load_corpus(tmp_path / "short.txt").check_length(128)
    two = lambda x, tiled: np.concatenate([x, x + np.uint32(1)])  # noqa: E731
    monkeypatch.setattr(gpt2_data.multihost_utils, "process_allgather", two)
    with pytest.raises(ValueError, match=r"processes \[1\] have read other data than process 0"):
        gpt2_data.check_same_everywhere(CORPUS)


# --- One step -------------------------------------------------------------------------------------


@functools.cache
def prepared(place, chosen, skip_bad_steps=False, remat=False):
    """The step, to be compiled, and a state to begin with."""
    config = dataclasses.replace(SMALL, remat=remat)
    trainer = gpt2_training.make_trainer(config, place, chosen, skip_bad_steps)
    params = gpt2_model.abstract_params(SMALL, place)
    abstract = gpt2_training.abstract_state(trainer, params, place)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if not remat:
        params = gpt2_model.init_params(SMALL, place, jax.random.key(0))
        state = jax.jit(trainer.init, out_shardings=shardings)(params, jax.random.key(1))
    else:
        state = jax.device_put(prepared(ONE, chosen)[1], shardings)
    return jax.jit(trainer.step, out_shardings=(shardings, place.sharding())), state


def losses(place, chosen, remat=False):
    step, state = prepared(place, chosen, remat=remat)
    found, sharding = [], place.sharding(None, "batch", None)
    with jax.set_mesh(place.mesh):
        for i in range(3):
            batch = gpt2_data.training_batch(CORPUS, 0, i, (2, 8, 9), sharding)
            state, loss = step(state, batch)
            found.append(float(loss))
    assert step._cache_size() == 1
    return found


def test_training_is_the_same_on_any_mesh_with_explicit_axes_and_layers_recomputed():
    chosen = dataclasses.replace(IVON, samples=2)
    expected = losses(ONE, chosen)
    assert expected[-1] < expected[0]
    # A step is clipped to the sign of u, so that rounding in ĝ is not amplified: 1e-4 of a loss
    # of order one is the rounding of sums over eight devices, a thousand times.
    found = losses(layout(2, 2, 2, kind=AxisType.Explicit), chosen, remat=True)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_each_micro_batch_has_its_own_sample_and_is_clipped_before_the_mean():
    step, state = prepared(ONE, CLIPPED)
    once = gpt2_data.training_batch(CORPUS, 0, 0, (1, 8, 9), ONE.sharding())
    norms = []
    for batch in (once, jnp.concatenate([once, once])):
        momentum = step(state, batch)[0].opt_state.momentum
        norms.append(optax.tree.norm(momentum) / (1 - 0.9))
    # Two clipped gradients at different samples are not parallel; one, or two at the same, are.
    np.testing.assert_allclose(norms[0], CLIPPED.clip_norm, rtol=1e-5)
    assert 0.1 < norms[1] / CLIPPED.clip_norm < 0.99


@pytest.mark.parametrize("skip", [True, False])
def test_a_gradient_that_is_not_finite_is_skipped_on_request_and_else_visible(skip):
    batch = jnp.full((1, 8, 9), 3).at[0, 0, 4].set(999)  # no such token: its embedding is NaN
    step, before = prepared(ONE, CLIPPED, skip_bad_steps=skip)
    state, loss = step(before, batch)
    assert np.isnan(loss) and state.step == 1
    if skip:
        chex.assert_trees_all_equal(state[1:], before[1:])
    assert gpt2_training.is_finite(state) == skip


def test_a_gradient_whose_norm_overflows_is_not_a_step_of_zero():
    large = {"w": jnp.array([3e19, 1.0])}
    assert np.all(np.isnan(gpt2_training.clip_by_norm(large, 1.0)["w"]))
    clipped = gpt2_training.clip_by_norm({"w": jnp.array([3.0, 4.0])}, 1.0)["w"]
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)


# --- The program ----------------------------------------------------------------------------------

OPTIONS = [
    *("--steps=8", "--batch=8", "--context=16", "--eval-every=8", "--checkpoint-every=1"),
    *("--log-every=1", "--eval-batches=1", "--eval-samples=2", "--samples=2"),
    *("--optimizer=ivon", "--mesh=data=2,model=2"),
]


def start(folder, *options, devices=4):
    """A process of the program, in the folder."""
    env = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # The last of two equal flags counts; the others compile quickly.
    count = f"--xla_force_host_platform_device_count={devices}"
    env["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {count}"
    command = [sys.executable, "-W", "error", "-W", "default:The checkpoint of step"]
    command += [ROOT / "examples" / "gpt2" / "main.py", *OPTIONS, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=os.environ | env, **pipes)


def run_one(folder, *options):
    """What a process prints that runs to its end."""
    process = start(folder, *options)
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return printed


def start_two(folder, *options, own=((), ())):
    """Two processes with two devices each and options of their own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        where = [f"--coordinator=localhost:{probe.getsockname()[1]}", "--num-processes=2", *options]
    return [start(folder, *where, f"--process-id={i}", *own[i], devices=2) for i in range(2)]


def run_two(folder, *options, own=((), ())):
    """Exit codes and errors of two processes that run to their end."""
    both = start_two(folder, *options, own=own)
    try:
        errors = [process.communicate(timeout=600)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], errors


def records(folder):
    """What was measured, without times and memory."""
    found = gpt2_report.read_metrics(folder / "ivon" / "metrics.jsonl")
    dropped = ("tokens_per_second", "step_memory_mb")
    kept = [{k: v for k, v in x.items() if k not in dropped} for x in found]
    return [x for x in kept if len(x) > 1]


def newest(folder):
    """The last step that is completely saved."""
    names = (path.name for path in folder.glob("ivon/checkpoints/*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("complete")
    run_one(folder, "--output=run")
    return folder / "run"


def test_both_optimizers_end_in_one_table_and_figure(complete, tmp_path, capsys):
    folder = shutil.copytree(complete, tmp_path / "run")
    options = [x for x in OPTIONS if x != "--samples=2"]
    options += ["--optimizer=adamw", "--steps=2", "--mesh=data=2,model=4"]
    gpt2.main([*options, f"--output={folder}"])
    printed = capsys.readouterr().out
    for row in ("AdamW .* IVON", "validation loss, averaged", "tokens per second", "MB per device"):
        assert re.search(row, printed)
    assert (folder / "gpt2.png").stat().st_size > 10_000
    found = [x["loss"] for x in records(complete) if "loss" in x]
    assert len(found) == 8 and found[-1] < found[0]


def test_two_processes_train_bitwise_like_one_which_goes_on_when_they_are_killed(
    complete, tmp_path
):
    both = start_two(tmp_path, "--output=run")
    try:
        deadline = time.monotonic() + 300
        while newest(tmp_path / "run") < 4:
            for process in both:
                assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        for process in both:
            process.kill()
    for process in both:
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    printed = run_one(tmp_path, "--output=run")
    step = re.search(r"goes on from the checkpoint of step (\d)", printed)
    assert step is not None and 4 <= int(step[1]) < 8
    assert records(tmp_path / "run") == records(complete)


@pytest.mark.slow
def test_two_processes_agree_on_what_to_continue_and_end_where_data_differ(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "run")
    arrays = (folder / "ivon" / "checkpoints" / "8" / "state").rglob("*")
    largest = max((x for x in arrays if x.is_file()), key=os.path.getsize)
    os.truncate(largest, 9)
    codes, errors = run_two(tmp_path, "--output=run")
    assert codes == [0, 0], errors
    assert "step 8 in" in errors[0] and "step 7 is used" in errors[0]
    assert records(folder) == records(complete)
    for name in ("first", "second"):
        (tmp_path / name).write_text(f"the {name} text " * 100)
    codes, errors = run_two(tmp_path, own=(["--data=first"], ["--data=second"]))
    # The second may be ended by the end of the first before it has said the same.
    assert codes[0] == 1 and codes[1] != 0
    assert "processes [1] have read other data than process 0" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_any_time_goes_on(complete, tmp_path, seed):
    moments, last = random.Random(seed), 0
    for _ in range(3):
        process = start(tmp_path, "--output=run")
        while process.poll() is None and newest(tmp_path / "run") == last:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        assert "Traceback" not in process.communicate()[1]
        last = newest(tmp_path / "run")
    run_one(tmp_path, "--output=run")
    assert records(tmp_path / "run") == records(complete)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    options = gpt2_options.Options(output=tmp_path, steps=4, batch=2, checkpoint_every=1)
    chosen = dataclasses.replace(ADAMW, learning_rate=1e38)
    run = gpt2.Run(options, SMALL, ONE, chosen, CORPUS)
    with jax.set_mesh(ONE.mesh), pytest.raises(FloatingPointError, match="--skip-bad-steps"):
        run.train()
    # The rate is 0 in the first step; the second makes parameters of 1e38, the third NaN.
    saved = (tmp_path / "adamw" / "checkpoints").glob("[0-9]*")
    assert sorted(path.name for path in saved) == ["1", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "data=3"], "needs 3 devices, but there are 8"),
        (["--mesh", "rows=4"], "--mesh rows=4 is not AXIS=SIZE,"),
        (["--mesh", "data=2,data=4"], "is not AXIS=SIZE"),
        (["--batch", "6"], "--batch 6 cannot be split"),
        (["--mesh", "model=8"], "model=8 cannot split the model's heads of 4"),
        (["--samples", "4"], "--samples 4 cannot be split over data=8"),
        (["--learning-rate", "1"], "--learning-rate would change both optimizers"),
        (["--optimizer", "adamw", "--ess", "1"], "not all of --ess are options of adamw"),
        (["--optimizer", "ivon", "--b2", "1"], "b2"),
        (["--learning-rate", "-1"], "--learning-rate must be positive"),
        (["--warmup", "300"], "--warmup 300 must be less than --steps 300"),
        (["--process-id", "1"], "--process-id belong together"),
        (["--output", "gs://bucket/run"], "mount the bucket"),
        (["--data", "missing.txt"], "missing.txt is neither a text file nor a folder"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        gpt2.main(["--output", str(tmp_path / "run"), *options])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_documented_commands_have_options_that_fit():
    text = (ROOT / "examples" / "gpt2" / "README.md").read_text() + str(gpt2.__doc__)
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = re.findall(r"python examples/gpt2/main\.py([^\n#\"&`]*)", joined)
    assert len(commands) >= 8
    for words in commands:
        words = [w for w in words.replace("$i", "0").split() if w != "--help"]
        options = tyro.cli(gpt2_options.Options, args=words)
        options.check()
        sizes = gpt2_options.mesh_sizes(options.mesh or "data=1")
        config = gpt2_options.model_config(options, CORPUS._replace(vocabulary=50304))
        gpt2_options.check_divisible(options, config, sizes)
        for name in options.optimizer:
            gpt2_options.optimizer_settings(options, name)
