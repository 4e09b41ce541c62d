"""Counting a compiled step: collectives on CPU devices, and the page's tables from its rows."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("flax", reason='the benchmarks need: pip install -e ".[examples]"')

from benchmarks.tpu import tpu_aot
from benchmarks.tpu.hlo_collectives import Collective, collectives
from examples.gpt2 import model as gpt2_model
from examples.gpt2.model import Config, Layout
from examples.gpt2.training import AdamW, Ivon

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
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
    gather, reduce = Collective("all-gather", ("bf16[1,8]",)), ("f32[4]", "f32[]")
    permute = Collective("collective-permute", ("f32[4]",))
    assert collectives(HLO) == {gather: 12, Collective("all-reduce", reduce): 1, permute: 1}
    assert [x.num_bytes() for x in (gather, permute)] == [16, 16]
    assert Collective("all-gather", ("f8e4m3fn[3]", "pred[2]")).num_bytes() == 5


def test_a_collective_that_nothing_calls_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="found no call of %body"):
        collectives(HLO.replace("body=%body", "body=%other"))


def test_a_compiled_loop_over_devices_has_its_sums_counted():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def f(x, w):
        def step(x, _):
            return jnp.tanh(x @ w), None  # both are split along the axis that is summed over

        return jax.lax.scan(step, x, length=5)[0]

    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "d")))
    w = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, P("d", None)))
    found = collectives(jax.jit(f, out_shardings=x.sharding).lower(x, w).compile().as_text())
    assert found[Collective("all-reduce", ("f32[8,16]",))] == 5


def test_the_step_of_ivon_has_the_collectives_of_adamw_and_one_statistic_more_with_own_samples():
    config = Config(width=16, depth=2, heads=2, context=8, vocabulary=32, dtype="float32")
    mesh = jax.make_mesh((2, 2, 2), gpt2_model.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    place, adamw = Layout(mesh), AdamW(1e-3, steps=100, warmup=1)
    ivon = Ivon(1000.0, steps=100, warmup=1)
    chosen = (adamw, ivon, dataclasses.replace(ivon, samples=2))
    compiled = [tpu_aot.compile_step(config, place, x, 1) for x in chosen]
    base, one, own = (collectives(step.as_text()) for step, _ in compiled)
    assert base and one == base and {x.kind for x in own} == {x.kind for x in base}
    assert tpu_aot.total(own, "all-gather")[0] <= tpu_aot.total(base, "all-gather")[0]
    more = 1e6 * (tpu_aot.total(own, "all-reduce")[1] - tpu_aot.total(base, "all-reduce")[1])
    params = jax.tree.leaves(gpt2_model.abstract_params(config, place))
    shards = sum(np.prod(x.sharding.shard_shape(x.shape)) * 4 for x in params)
    assert 0 < more <= 2.1 * shards
    state_bytes = [size for _, size in compiled]
    assert abs(state_bytes[1] - state_bytes[0]) < 100  # as much memory as AdamW's


def test_the_page_holds_the_tables_of_the_rows(capsys):
    tpu_aot.main(["--results", str(RESULTS / "tpu_aot.jsonl"), "--table"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 60
    assert printed in (RESULTS / "tpu_aot.md").read_text()
