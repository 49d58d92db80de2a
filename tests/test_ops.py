"""The ops as torch sees them: opcheck, shapes without data, torch.compile and torch.export."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from cases import HEAD_DIM, HEAD_DIM_V, Case, make_case
from plans import CAPACITIES
from reference import assert_close, reference

import flash_mla

ops = torch.ops.flash_mla


def example(device: str, dtype: torch.dtype = torch.bfloat16, **options) -> Case:
    shape = {"batch": 3, "seqlen_q": 2, "seqlens": [100, 0, 70], "causal": True}
    return make_case(**{**shape, **options}, dtype=dtype, device=device)


@pytest.mark.parametrize("num_rows", [1, 128])
def test_opcheck_decode_schedule(device, num_rows):
    seqlens = torch.tensor([100, 0, 7000], dtype=torch.int32, device=device)
    torch.library.opcheck(ops.decode_schedule.default, (seqlens, num_rows, 2))


@pytest.mark.parametrize("options", [{}, {"strided_q": True, "strided_cache": True}], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_opcheck_dense_decode(device, dtype, options):
    case = example(device, dtype, **options)
    torch.library.opcheck(ops.dense_decode.default, case.op_arguments())
    out = torch.zeros(*case.q.shape[:3], HEAD_DIM_V, dtype=dtype, device=device)
    torch.library.opcheck(ops.dense_decode_out.default, case.op_arguments(), {"out": out})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_opcheck_append_kv(device, slot_dtype, dtype):
    tokens = torch.randn(3, HEAD_DIM, dtype=dtype, device=device)
    slots = torch.tensor([70, -1, 2], dtype=slot_dtype, device=device)
    for cache in (
        torch.zeros(2, 64, 1, HEAD_DIM, dtype=dtype, device=device),
        torch.zeros(2, 3, 64, 1, HEAD_DIM, dtype=dtype, device=device)[:, 1],
    ):
        torch.library.opcheck(ops.append_kv.default, (tokens[:, :HEAD_DIM_V], tokens[:, HEAD_DIM_V:], cache, slots))


def test_opcheck_dense_decode_in_float32():
    torch.library.opcheck(ops.dense_decode.default, example("cpu", torch.float32).op_arguments())


@pytest.mark.parametrize(("seqlen_q", "num_heads_q", "num_heads_kv"), [(1, 16, 1), (2, 128, 1), (3, 6, 3)])
def test_fake_results_have_the_shapes_of_real_ones(device, seqlen_q, num_heads_q, num_heads_kv):
    case = example(device, seqlen_q=seqlen_q, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv)
    real = [*case.plan(), *ops.dense_decode(*case.op_arguments())]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = [*case.plan(), *ops.dense_decode(*case.op_arguments())]
    for fake_part, real_part in zip(fake, real, strict=True):
        assert (fake_part.shape, fake_part.stride()) == (real_part.shape, real_part.stride())
        assert (fake_part.dtype, fake_part.device) == (real_part.dtype, real_part.device)


def decode_lazily(q, k_cache, block_table, cache_seqlens, scale):
    metadata, num_splits = flash_mla.get_mla_metadata()
    results = []
    for _ in range(2):  # the second layer uses the plan of the first
        out, lse = flash_mla.flash_mla_with_kvcache(
            q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, metadata, num_splits, scale, causal=True
        )
        results += [out * 2, lse]
    return results


def decode_eagerly(q, k_cache, block_table, cache_seqlens, scale):
    rows = q.shape[1] * q.shape[2] // k_cache.shape[2]
    metadata, num_splits = flash_mla.get_mla_decoding_metadata(cache_seqlens, rows, k_cache.shape[2])
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, metadata, num_splits, scale, causal=True
    )
    return out * 2, lse


def decode_into_out(q, k_cache, block_table, cache_seqlens, scale):
    metadata, num_splits = flash_mla.get_mla_metadata()
    out = torch.zeros(*q.shape[:3], HEAD_DIM_V, dtype=q.dtype, device=q.device)
    result, lse = flash_mla.flash_mla_with_kvcache(
        q, k_cache, block_table, cache_seqlens, HEAD_DIM_V, metadata, num_splits, scale, causal=True, out=out
    )
    return result + out, lse


FUNCTIONS = [decode_lazily, decode_eagerly, decode_into_out]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, None, True], ids=["static", "automatic", "dynamic"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=[function.__name__ for function in FUNCTIONS])
def test_compile_without_graph_breaks(device, function, dynamic):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch, num_heads_q in ((3, 16), (5, 16), (5, 128)):
        case = example(device, batch=batch, num_heads_q=num_heads_q, seqlens=lambda request: request * 50)
        arguments = (case.q, case.k_cache, case.block_table, case.cache_seqlens, case.softmax_scale)
        for actual, expected in zip(compiled(*arguments), function(*arguments), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found (c++)")
def test_compile_with_the_default_backend():
    case = example("cpu")
    arguments = (case.q, case.k_cache, case.block_table, case.cache_seqlens, case.softmax_scale)
    compiled = torch.compile(decode_lazily, fullgraph=True)
    for actual, expected in zip(compiled(*arguments), decode_lazily(*arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_a_schedule_from_outside(device):
    """The plan that the compiled function makes is in the object afterwards, and other functions use it."""

    def layer(schedule, case_tensors, scale):
        return flash_mla.flash_mla_with_kvcache(*case_tensors, HEAD_DIM_V, schedule, None, scale, True)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    case = example(device)
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens)
    schedule, _ = flash_mla.get_mla_metadata()
    expected = ops.dense_decode(*case.op_arguments())
    for function in (compiled, compiled, layer):
        for actual, expected_part in zip(function(schedule, tensors, case.softmax_scale), expected, strict=True):
            assert torch.equal(actual, expected_part)
    for actual, expected_part in zip((schedule.tile_scheduler_metadata, schedule.num_splits), case.plan(), strict=True):
        assert torch.equal(actual, expected_part)
    assert schedule.have_initialized and schedule.config.batch_size == 3


class Layer(torch.nn.Module):
    def forward(self, q, k_cache, block_table, cache_seqlens):
        return tuple(decode_lazily(q, k_cache, block_table, cache_seqlens, 0.05))


def test_export(device):
    case = example(device)
    arguments = (case.q, case.k_cache, case.block_table, case.cache_seqlens)
    exported = torch.export.export(Layer(), arguments)
    for actual, expected in zip(exported.module()(*arguments), Layer()(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_there_are_no_gradients(device):
    """Not on the CPU either, where torch could find some: model code must not come to depend on them."""
    case = example(device)
    q, *others = case.op_arguments()
    q = q.requires_grad_()
    out, lse = ops.dense_decode(q, *others)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that there is no gradient
        (out.sum() + lse.sum()).backward()
    assert q.grad is None
    with torch.no_grad():
        assert not ops.dense_decode(q, *others)[0].requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen_q", [1, 2, 5])
def test_gpu_and_cpu_agree(seqlen_q):
    shape = {"batch": 5, "seqlen_q": seqlen_q, "seqlens": [1, 0, 64, 700, 130], "causal": True}
    case = make_case(**shape, device="cuda")
    out, lse = ops.dense_decode(*case.op_arguments())
    expected = reference(case)
    assert_close(out, lse, *expected)
    cpu_out, cpu_lse = ops.dense_decode(*make_case(**shape).op_arguments())
    assert_close(cpu_out, cpu_lse, *(part.cpu() for part in expected))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
def test_fake_cuda_tensors_need_no_kernels(monkeypatch):
    """Tracing for another machine's GPU takes shapes only."""
    monkeypatch.setattr("flash_mla.schedule.capacity_of", lambda device: CAPACITIES[78])
    with torch._subclasses.FakeTensorMode():
        seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        metadata, num_splits = ops.decode_schedule(seqlens, 16, 1)
        assert metadata.shape == (78, 8) and num_splits.shape == (5,) and metadata.device.type == "cuda"


DEFINE_OTHER_OPS = """
library = torch.library.Library("flash_mla", "DEF")
library.define("other(Tensor a) -> Tensor")
"""


@pytest.mark.parametrize("ours_first", [True, False])
def test_another_library_may_define_ops_in_the_namespace(ours_first):
    """sgl-flash-mla does, in C++, where a second definition of a namespace ends the import."""
    imports = ["import flash_mla\n", DEFINE_OTHER_OPS]
    program = "import torch\n" + "".join(imports if ours_first else reversed(imports))
    program += "assert torch.ops.flash_mla.other and torch.ops.flash_mla.dense_decode\n"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
