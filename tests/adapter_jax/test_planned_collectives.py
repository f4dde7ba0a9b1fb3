"""The exchanges that are read out of compiled programs: of jax on four CPU devices, and of texts as the TPU compiler writes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from polyaccel.planned.report import Collective
from polyaccel_jax.planning.hlo import collectives_of


def text_of(function, *args, in_specs, out_specs):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return jax.jit(mapped).lower(*args).compile().as_text()


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


CUT, WHOLE = PartitionSpec("fsdp"), PartitionSpec()
CASES = {
    "all-gather": (
        lambda w: lax.all_gather(w, "fsdp", tiled=True),
        CUT,
        WHOLE,
        Collective("all-gather", 2, 1, 512, 256),
    ),
    "all-reduce": (lambda w: lax.psum(w, ("data", "fsdp")), WHOLE, WHOLE, Collective("all-reduce", 4, 1, 512, 768)),
    "reduce-scatter": (
        lambda w: lax.psum_scatter(w, "fsdp", tiled=True),
        WHOLE,
        CUT,
        Collective("reduce-scatter", 2, 1, 512, 256),
    ),
    "collective-permute": (
        lambda w: lax.ppermute(w, "data", [(0, 1), (1, 0)]),
        WHOLE,
        WHOLE,
        Collective("collective-permute", 4, 1, 512, 512),
    ),
    "all-to-all": (
        lambda w: lax.all_to_all(w, "fsdp", 0, 1, tiled=True),
        WHOLE,
        PartitionSpec(None, "fsdp"),
        Collective("all-to-all", 2, 1, 512, 256),
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_an_exchange_is_found_with_its_bytes_and_its_group(kind):
    function, in_specs, out_specs, expected = CASES[kind]
    assert collectives_of(text_of(function, array(16, 8), in_specs=(in_specs,), out_specs=out_specs)) == (expected,)


def test_an_exchange_in_a_loop_counts_as_often_as_the_loop_runs():
    def looped(w):
        return lax.scan(lambda carry, _: (lax.psum(jnp.sin(carry), "fsdp"), None), w, length=5)[0]

    (found,) = collectives_of(text_of(looped, array(16, 8), in_specs=(WHOLE,), out_specs=WHOLE))
    assert found == Collective("all-reduce", 2, 5, 5 * 512, 5 * 512)


def test_a_program_of_one_device_exchanges_nothing():
    assert collectives_of(jax.jit(jnp.sin).lower(array(4)).compile().as_text()) == ()


TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (input.1: bf16[1024,512]) -> bf16[128,512] {
  %input.1 = bf16[1024,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.3 = bf16[1024,512]{1,0:T(8,128)(2,1)} all-reduce(%input.1), channel_id=3, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %dynamic-slice.2 = bf16[128,512]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.3, %at), dynamic_slice_sizes={128,512}
}

%async_computation (param: f32[8,16]) -> f32[8,16] {
  %param = f32[8,16]{1,0} parameter(0)
  ROOT %all-to-all.1 = f32[8,16]{1,0} all-to-all(%param), channel_id=4, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
}

ENTRY %main.9_spmd (param.0: bf16[128,512]) -> bf16[128,512] {
  %param.0 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather-start = (bf16[128,512]{1,0:T(8,128)(2,1)S(1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}) \
all-gather-start(%param.0), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %all-gather-done = bf16[1024,512]{1,0:T(8,128)(2,1)} all-gather-done(%all-gather-start)
  %collective-permute-start = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %collective-permute-done = f32[8,16]{1,0} collective-permute-done(%collective-permute-start)
  %all-to-all-start = ((f32[8,16]{1,0}), f32[8,16]{1,0}, s32[]{:S(2)}) async-start(%y), calls=%async_computation
  %all-to-all-done = f32[8,16]{1,0} async-done(%all-to-all-start)
  ROOT %fusion.7 = bf16[128,512]{1,0:T(8,128)(2,1)} fusion(%all-gather-done), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_started_and_fused_exchanges_of_the_tpu_compiler_count_once():
    whole = 1024 * 512 * 2
    assert collectives_of(TPU) == (
        Collective("all-gather", 8, 1, whole, whole * 7 // 8),
        Collective("reduce-scatter", 8, 1, whole, whole * 7 // 8),
        Collective("all-to-all", 4, 1, 512, 384),
        Collective("collective-permute", 8, 1, 512, 512),
    )


STEPS = """HloModule jit_step, is_scheduled=true, num_partitions=8

%fused_computation.464 (param_0: bf16[32,256]) -> bf16[256,256] {
  %param_0 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.87 = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%async_collective_fusion.290 (param_1: bf16[32,256]) -> bf16[256,256] {
  %param_1 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.89 = bf16[256,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_1), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%fused_computation.470 (param_2: bf16[32,256]) -> bf16[256,256] {
  %param_2 = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.95 = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%param_2), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="1"}
}

ENTRY %main.93_spmd (param: bf16[32,256]) -> bf16[256,256] {
  %param = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  %fusion.289 = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%param), kind=kCustom, calls=%fused_computation.464
  %fusion.290 = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%param), kind=kCustom, calls=%async_collective_fusion.290
  ROOT %fusion.291 = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%param), kind=kCustom, calls=%fused_computation.470
}
"""


def test_the_steps_of_one_exchange_that_run_beside_other_work_count_once():
    whole = 256 * 256 * 2
    assert collectives_of(STEPS) == (Collective("all-gather", 8, 2, 2 * whole, 2 * whole * 7 // 8),)
