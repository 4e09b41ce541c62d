"""The GPT-2 example: network, data, one step on meshes, and the script as a user runs it."""

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("flax", reason='the examples need: pip install -e ".[examples]"')
pytest.importorskip("orbax.checkpoint", reason='the examples need: pip install -e ".[examples]"')

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from benchmarks.tpu.hlo_collectives import Collective, collectives
from examples.gpt2 import data as gpt2_data
from examples.gpt2 import main as gpt2
from examples.gpt2 import model as gpt2_model
from examples.gpt2 import options as gpt2_options
from examples.gpt2 import report as gpt2_report
from examples.gpt2 import training as gpt2_training
from examples.gpt2.model import Config, Layout
from examples.gpt2.training import AdamW, Ivon

SMALL = Config(width=16, depth=2, heads=2, context=8, vocabulary=32, dtype="float32")
CORPUS = gpt2_data.Corpus("numbers", np.arange(1000) % 32, np.arange(100) % 32, 32)


@pytest.fixture(autouse=True)
def promotion():
    """Optax's schedules and AdamW mix integers and floats."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def layout(*shape, kind=AxisType.Auto):
    return Layout(jax.make_mesh(shape, gpt2_model.MESH_AXES, axis_types=(kind,) * 3))


ONE = layout(1, 1, 1)


# --- The network ----------------------------------------------------------------------------------


def test_the_small_preset_has_the_parameters_of_gpt2():
    config = dataclasses.replace(gpt2_model.PRESETS["small"], vocabulary=50257)
    params = jax.tree.leaves(gpt2_model.abstract_params(config, ONE))
    assert sum(np.prod(x.shape) for x in params) == 124_439_808


@pytest.mark.parametrize("preset", gpt2_model.PRESETS)
def test_weight_decay_acts_on_matrices_and_not_on_stacked_vectors(preset):
    params = gpt2_model.abstract_params(gpt2_model.PRESETS[preset], ONE)
    mask = gpt2_model.is_matrix(params)
    matrices = [x.size for x, m in zip(*map(jax.tree.leaves, (params, mask)), strict=True) if m]
    c = gpt2_model.PRESETS[preset]
    blocks = 12 * c.depth * c.width**2
    assert sum(matrices) == blocks + (c.vocabulary + c.context) * c.width


def test_a_token_does_not_see_those_after_it():
    params = gpt2_model.init_params(SMALL, ONE, jax.random.key(0))
    log_likelihoods = jax.jit(gpt2_model.token_log_likelihoods(SMALL, ONE))
    tokens = jnp.arange(9)[None] % 32
    changed = log_likelihoods(params, tokens.at[0, 5].set(31)) - log_likelihoods(params, tokens)
    np.testing.assert_array_equal(changed[0, :4], 0.0)
    assert np.all(changed[0, 4:] != 0.0)


def test_the_flops_are_those_of_the_matrix_products_of_a_step():
    config = dataclasses.replace(SMALL, width=128, heads=2, vocabulary=512, context=64, remat=False)
    config = dataclasses.replace(config, unroll=config.depth)
    params = gpt2_model.abstract_params(config, ONE)
    f = gpt2_model.token_log_likelihoods(config, ONE)
    grad = jax.jit(jax.grad(lambda p, x: f(p, x).sum()))
    cost = grad.lower(params, jax.ShapeDtypeStruct((2, 65), jnp.int32)).compile().cost_analysis()
    # Beside the products there are softmax, norms and embeddings, and attention's masked half.
    assert 1.0 < cost["flops"] / (2 * 64 * config.flops_per_token()) < 1.15


# --- The data -------------------------------------------------------------------------------------


def test_a_batch_depends_on_seed_and_step_only_and_not_on_the_mesh():
    shape = (2, 8, 9)
    meshes = [layout(*s) for s in ((1, 1, 1), (2, 2, 2), (8, 1, 1))]
    batches = [
        gpt2_data.training_batch(CORPUS, 3, 5, shape, x.sharding(None, "batch", None))
        for x in meshes
    ]
    assert all(np.array_equal(batches[0], x) for x in batches[1:])
    sharding = ONE.sharding()
    other = gpt2_data.training_batch(CORPUS, 3, 6, shape, sharding)
    assert not np.array_equal(batches[0], other)
    steps = np.diff(np.asarray(other), axis=-1)
    assert set(np.unique(steps)) <= {1, -31}  # each row is a window of the corpus


def test_token_files_are_mapped_and_their_vocabulary_is_checked(tmp_path):
    for name, count in (("train.bin", 400), ("val.bin", 100)):
        (np.arange(count, dtype=np.uint16) * 150).tofile(tmp_path / name)
    corpus = gpt2_data.load_corpus(tmp_path)
    assert isinstance(corpus.train, np.memmap) and len(corpus.train) == 400
    with pytest.raises(ValueError, match=r"token 5\d{4}.*50304.*--vocabulary"):
        gpt2_data.training_batch(corpus, 0, 0, (1, 64, 9), ONE.sharding())


def test_what_is_not_data_is_refused_with_a_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a text file nor a folder"):
        gpt2_data.load_corpus(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError, match=r"train\.bin is not a flat file of uint16"):
        gpt2_data.load_corpus(tmp_path)
    (tmp_path / "short.txt").write_text("a short text")
    with pytest.raises(ValueError, match=r"short\.txt has 10 tokens, fewer than one window of 128"):
        gpt2_data.load_corpus(tmp_path / "short.txt").check_length(128)


# --- One step -------------------------------------------------------------------------------------


ADAMW = AdamW(1e-3, steps=100, warmup=1)
IVON = Ivon(1000.0, steps=100, warmup=1)


def compiled_step(place, chosen, skip_bad_steps=False):
    trainer = gpt2_training.make_trainer(SMALL, place, chosen, skip_bad_steps)
    params = gpt2_model.abstract_params(SMALL, place)
    abstract = gpt2_training.abstract_state(trainer, params, place)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    step = jax.jit(trainer.step, out_shardings=(shardings, place.sharding()))
    return trainer, shardings, step, abstract


def losses(place, chosen, steps=3):
    trainer, shardings, step, _ = compiled_step(place, chosen)
    with jax.set_mesh(place.mesh):
        params = gpt2_model.init_params(SMALL, place, jax.random.key(0))
        state = jax.jit(trainer.init, out_shardings=shardings)(params, jax.random.key(1))
        found = []
        for i in range(steps):
            sharding = place.sharding(None, "batch", None)
            batch = gpt2_data.training_batch(CORPUS, 0, i, (2, 8, 9), sharding)
            state, loss = step(state, batch)
            found.append(float(loss))
    assert step._cache_size() == 1
    return found


def test_training_is_the_same_on_any_mesh_and_with_explicit_axes():
    chosen = dataclasses.replace(IVON, samples=2)
    expected = losses(ONE, chosen)
    assert expected[-1] < expected[0]
    # A step is clipped to the sign of u, so that rounding in ĝ is not amplified: 1e-4 of a loss
    # of order one is the rounding of sums over eight devices, a thousand times.
    np.testing.assert_allclose(losses(layout(2, 2, 2), chosen), expected, rtol=1e-4)
    explicit = layout(2, 2, 2, kind=AxisType.Explicit)
    np.testing.assert_allclose(losses(explicit, chosen), expected, rtol=1e-4)


def test_the_step_of_ivon_has_the_collectives_of_adamw_and_one_statistic_more_with_own_samples():
    place = layout(2, 2, 2)

    def counted(chosen):
        _, _, step, abstract = compiled_step(place, chosen)
        sharding = place.sharding(None, "batch", None)
        batch = jax.ShapeDtypeStruct((1, 8, 9), jnp.int32, sharding=sharding)
        with jax.set_mesh(place.mesh):
            return step.lower(abstract, batch).compile().as_text()

    adamw = collectives(counted(ADAMW))
    assert adamw and collectives(counted(IVON)) == adamw
    group = collectives(counted(dataclasses.replace(IVON, samples=2)))
    assert {x.kind for x in group} == {x.kind for x in adamw}
    gathered = [sum(n for x, n in c.items() if x.kind == "all-gather") for c in (group, adamw)]
    assert gathered[0] <= gathered[1]
    reduced = [
        sum(n * x.num_bytes() for x, n in c.items() if x.kind == "all-reduce")
        for c in (group, adamw)
    ]
    params = jax.tree.leaves(gpt2_model.abstract_params(SMALL, place))
    shards = sum(np.prod(x.sharding.shard_shape(x.shape)) * 4 for x in params)
    assert 0 < reduced[0] - reduced[1] <= 2.1 * shards


def test_each_micro_batch_has_its_own_sample_and_is_clipped_before_the_mean():
    bound = 1e-3
    chosen = dataclasses.replace(IVON, ess=1e5, clip_norm=bound)
    trainer, shardings, step, _ = compiled_step(ONE, chosen)
    params = gpt2_model.init_params(SMALL, ONE, jax.random.key(0))
    state = jax.jit(trainer.init, out_shardings=shardings)(params, jax.random.key(1))
    once = gpt2_data.training_batch(CORPUS, 0, 0, (1, 8, 9), ONE.sharding())
    norms = []
    for batch in (once, jnp.concatenate([once, once])):
        momentum = step(state, batch)[0].opt_state.momentum
        norms.append(optax.tree.norm(momentum) / (1 - 0.9))
    # Two clipped gradients at different samples are not parallel; one, or two at the same, are.
    np.testing.assert_allclose(norms[0], bound, rtol=1e-5)
    assert 0.1 * bound < norms[1] < 0.99 * bound


@pytest.mark.parametrize(("chosen", "skip"), [(ADAMW, True), (IVON, True), (IVON, False)])
def test_a_gradient_that_is_not_finite_is_skipped_on_request_and_else_visible(chosen, skip):
    batch = jnp.full((1, 2, 9), 3).at[0, 0, 4].set(999)  # no such token: its embedding is NaN
    trainer, shardings, step, _ = compiled_step(ONE, chosen, skip_bad_steps=skip)
    params = gpt2_model.init_params(SMALL, ONE, jax.random.key(0))
    before = jax.jit(trainer.init, out_shardings=shardings)(params, jax.random.key(1))
    state, loss = step(before, batch)
    assert np.isnan(loss) and state.step == 1
    for old, new in zip(*map(jax.tree.leaves, (before[1:], state[1:])), strict=True):
        if skip:
            np.testing.assert_array_equal(new, old)
    assert gpt2_training.is_finite(state) == skip


def test_a_gradient_whose_norm_overflows_is_not_a_step_of_zero():
    large = {"w": jnp.array([3e19, 1.0])}
    assert np.all(np.isnan(gpt2_training.clip_by_norm(large, 1.0)["w"]))
    clipped = gpt2_training.clip_by_norm({"w": jnp.array([3.0, 4.0])}, 1.0)["w"]
    np.testing.assert_allclose(clipped, [0.6, 0.8], rtol=1e-6)


# --- Collectives in HLO ---------------------------------------------------------------------------

HLO = """\
HloModule step

%cond (p: (s32[], f32[4])) -> pred[] {
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = bf16[1,8]{1,0} all-gather(%x), channel_id=3, dimensions={1}
  ROOT %again = bf16[1,8]{1,0} all-gather(%x), channel_id=3, dimensions={1}
}

%yes (q: f32[4]) -> f32[4] {
  ROOT %moved = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%q), channel_id=5
}

%no (q: f32[4]) -> f32[4] {
  ROOT %same = f32[4] parameter(0)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %either = f32[4] conditional(%c, %q, %q), branch_computations={%no, %yes}
  %loop = (s32[], f32[4]) while(%t), condition=%cond, body=%body
  ROOT %sum = (f32[4], f32[]) all-reduce(%a, %b), channel_id=4, to_apply=%add
}
"""


def test_a_collective_in_a_loop_counts_as_often_as_it_runs_and_once_per_channel():
    found = collectives(HLO)
    gather, reduce = Collective("all-gather", ("bf16[1,8]",)), ("f32[4]", "f32[]")
    permute = Collective("collective-permute", ("f32[4]",))
    assert found == {gather: 12, Collective("all-reduce", reduce): 1, permute: 1}
    assert [x.num_bytes() for x in (gather, permute)] == [16, 16]
    assert Collective("all-gather", ("f8e4m3fn[3]", "pred[2]")).num_bytes() == 5


def test_a_collective_that_nothing_calls_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="found no call of %body"):
        collectives(HLO.replace("body=%body", "body=%other"))


# --- The script -----------------------------------------------------------------------------------

OPTIONS = [
    *("--steps=4", "--batch=8", "--context=16", "--eval-every=2", "--checkpoint-every=2"),
    *("--log-every=1", "--eval-batches=1", "--eval-samples=2"),
    *("--mesh=data=2,model=2",),
]


def command(folder, *options):
    warnings = ["-W", "error", "-W", "default:The checkpoint of step"]
    return [sys.executable, *warnings, ROOT / "examples" / "gpt2.py", "--output", folder, *options]


def environment(tmp_path, devices):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path.parent / "jax_cache")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | cache


def train(tmp_path, folder, *options):
    done = subprocess.run(
        command(folder, *OPTIONS, *options),
        cwd=tmp_path,
        env=environment(tmp_path, 4),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_optimizers_train_and_end_in_a_table_and_a_figure(tmp_path):
    train(tmp_path, "run", "--optimizer=ivon", "--samples=2")
    printed = train(tmp_path, "run", "--optimizer=adamw")
    for row in ("AdamW", "IVON", "perplexity, averaged", "tokens per second", "FLOP utilisation"):
        assert row in printed
    assert (tmp_path / "run" / "gpt2.png").stat().st_size > 10_000
    complete = gpt2_report.read_metrics(tmp_path / "run" / "ivon" / "metrics.jsonl")
    found = [x["loss"] for x in complete if "loss" in x]
    assert len(found) == 4 and found[-1] < found[0]

    # Killed after step 2, the run goes on bitwise as if it had not been interrupted.
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "ivon" / "checkpoints" / "4")
    assert "goes on from the checkpoint of step 2" in train(
        tmp_path, "killed", "--optimizer=ivon", "--samples=2"
    )
    resumed = gpt2_report.read_metrics(tmp_path / "killed" / "ivon" / "metrics.jsonl")

    def without_times(records):
        dropped = ("tokens_per_second", "mfu_percent", "step_memory_mb")
        kept = [{k: v for k, v in x.items() if k not in dropped} for x in records]
        return [x for x in kept if len(x) > 1]

    assert without_times(resumed) == without_times(complete)


def train_in_two_processes(tmp_path, *options, own=((), ())):
    """Exit codes and output of two processes, each with two devices and options of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    where = [*OPTIONS, *options, f"--coordinator=localhost:{port}", "--num-processes=2"]
    workers = [
        subprocess.Popen(
            command("two", *where, f"--process-id={i}", *own[i]),
            cwd=tmp_path,
            env=environment(tmp_path, 2),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [worker.returncode for worker in workers], errors


@pytest.mark.slow
def test_two_processes_train_bitwise_like_one_with_the_same_mesh(tmp_path):
    train(tmp_path, "one", "--optimizer=ivon", "--samples=2")
    codes, errors = train_in_two_processes(tmp_path, "--optimizer=ivon", "--samples=2")
    assert codes == [0, 0], errors
    files = [tmp_path / name / "ivon" / "metrics.jsonl" for name in ("one", "two")]
    losses = [[x["loss"] for x in gpt2_report.read_metrics(f) if "loss" in x] for f in files]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_processes_with_different_data_end_with_a_reason(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).write_text(f"the {name} text " * 100)
    codes, errors = train_in_two_processes(tmp_path, own=(["--data=first"], ["--data=second"]))
    # The second may be ended by the end of the first before it has said the same.
    assert codes[0] == 1 and codes[1] != 0
    assert "processes [1] have read other data than process 0" in errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "data=3"], "needs 3 devices, but there are 8"),
        (["--mesh", "rows=4"], "'rows=4' is not AXIS=SIZE"),
        (["--mesh", "data=2,data=4"], "'data=4' is not AXIS=SIZE with another axis"),
        (["--mesh", "data=8", "--batch", "6"], "--batch 6 cannot be split"),
        (["--mesh", "model=8"], "model=8 cannot split the model's heads of 4"),
        (["--mesh", "data=8", "--samples", "4"], "--samples 4 cannot be split over data=8"),
        (["--learning-rate", "1"], "--learning-rate would change both optimizers"),
        (["--optimizer", "adamw", "--ess", "1"], "not all of --ess are options of adamw"),
        (["--learning-rate", "-1"], "must be positive"),
        (["--warmup", "300"], "--warmup 300 must be less than --steps 300"),
        (["--process-id", "1"], "--process-id belong together"),
        (["--output", "gs://bucket/run"], "mount the bucket"),
        (["--data", "missing.txt"], "missing.txt is neither a text file"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_reason(tmp_path, capsys, options, message):
    options = ["--mesh", "data=8", "--output", str(tmp_path / "run"), *options]
    with pytest.raises(SystemExit) as error, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpt2.py", *options])
        gpt2.main()
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    args = gpt2_options.parser("").parse_args(
        ["--output", str(tmp_path), "--steps=4", "--batch=2", "--checkpoint-every=1"]
    )
    args.peak_flops = 1e12
    run = gpt2.Run(args, SMALL, ONE, dataclasses.replace(ADAMW, learning_rate=1e38), CORPUS)
    with jax.set_mesh(ONE.mesh), pytest.raises(FloatingPointError, match="--skip-bad-steps"):
        run.train()
    # The rate is 0 in the first step; the second makes parameters of 1e38, the third NaN.
    saved = (tmp_path / "adamw" / "checkpoints").glob("[0-9]*")
    assert sorted(path.name for path in saved) == ["1", "2"]


def documented_commands():
    text = (ROOT / "examples" / "gpt2.md").read_text() + (ROOT / "examples" / "gpt2.py").read_text()
    joined = text.replace("\\\n", " ")
    return re.findall(r"python examples/gpt2\.py([^\n#\"&]*)", joined)


def test_documented_commands_have_options_that_fit():
    commands = documented_commands()
    assert len(commands) >= 8
    for options in commands:
        words = [w for w in options.replace("$i", "0").split() if w not in ("--help", "`")]
        args = gpt2_options.parser("").parse_args(words)
        sizes = args.mesh or {"data": 1, "fsdp": 1, "model": 1}
        place = Layout(jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)))
        config = gpt2_options.model_config(args, CORPUS._replace(vocabulary=50304))
        gpt2_options.check_divisible(args, config, place)
        for name in args.optimizer:
            gpt2_options.optimizer_settings(args, name)
