"""Every input that is rejected: the error's type, and that its message begins with the argument's name."""

from __future__ import annotations

import re

import pytest
import torch
from cases import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, Case, make_case

import flash_mla
from flash_mla import flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata
from flash_mla.schedule import CPU_NUM_SMS

BF16 = torch.bfloat16


def example(device: str, **options) -> Case:
    shape = {"batch": 3, "seqlen_q": 2, "num_heads_q": 16, "seqlens": [100, 0, 70]}
    return make_case(**{**shape, **options}, device=device)


def arguments_of(case: Case) -> dict[str, object]:
    metadata, num_splits = case.plan()
    return {
        "q": case.q,
        "k_cache": case.k_cache,
        "block_table": case.block_table,
        "cache_seqlens": case.cache_seqlens,
        "tile_scheduler_metadata": metadata,
        "num_splits": num_splits,
        "softmax_scale": 0.1,
        "causal": False,
    }


def call_api(arguments: dict[str, object]):
    return flash_mla_with_kvcache(head_dim_v=HEAD_DIM_V, **arguments)


def call_op(arguments: dict[str, object]):
    return torch.ops.flash_mla.dense_decode(**arguments)


def with_odd_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape in rows of 577 elements."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype, device=tensor.device)
    return wide[..., :-1]


def with_strided_rows(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)
    return wide[..., 0]


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape and strides, one element behind an aligned address."""
    flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view(tensor.shape)


BAD_TENSORS = [
    ("q", "float64", TypeError, lambda q: q.double()),
    ("q", "dim", ValueError, lambda q: q[0]),
    ("q", "head-dim", ValueError, lambda q: q[..., :512]),
    ("q", "no-tokens", ValueError, lambda q: q[:, :0]),
    ("q", "no-heads", ValueError, lambda q: q[:, :, :0]),
    ("q", "odd-strides", ValueError, with_odd_strides),
    ("q", "strided-rows", ValueError, with_strided_rows),
    ("q", "misaligned", ValueError, misaligned),
    ("k_cache", "other-dtype", TypeError, lambda k: k.half()),
    ("k_cache", "float32", TypeError, lambda k: k.float()),
    ("k_cache", "dim", ValueError, lambda k: k.flatten(1, 2)),
    ("k_cache", "page-size", ValueError, lambda k: k[:, :32]),
    ("k_cache", "head-dim", ValueError, lambda k: k[..., :512]),
    ("k_cache", "no-pages", ValueError, lambda k: k[:0]),
    ("k_cache", "odd-strides", ValueError, with_odd_strides),
    ("k_cache", "strided-rows", ValueError, with_strided_rows),
    ("k_cache", "misaligned", ValueError, misaligned),
    ("block_table", "int64", TypeError, lambda t: t.long()),
    ("block_table", "float32", TypeError, lambda t: t.float()),
    ("block_table", "dim", ValueError, lambda t: t.flatten()),
    ("block_table", "batch", ValueError, lambda t: t[:2]),
    ("block_table", "strided-rows", ValueError, with_strided_rows),
    ("cache_seqlens", "int64", TypeError, lambda t: t.long()),
    ("cache_seqlens", "dim", ValueError, lambda t: t[:, None]),
    ("cache_seqlens", "batch", ValueError, lambda t: t[:2]),
    ("cache_seqlens", "strided", ValueError, with_strided_rows),
    ("tile_scheduler_metadata", "int64", TypeError, lambda t: t.long()),
    ("tile_scheduler_metadata", "dim", ValueError, lambda t: t.flatten()),
    ("tile_scheduler_metadata", "workers", ValueError, lambda t: t[:-1]),
    ("tile_scheduler_metadata", "columns", ValueError, lambda t: t[:, :4].contiguous()),
    ("tile_scheduler_metadata", "strided", ValueError, with_strided_rows),
    ("num_splits", "int64", TypeError, lambda t: t.long()),
    ("num_splits", "dim", ValueError, lambda t: t[:, None]),
    ("num_splits", "batch", ValueError, lambda t: t[:-1]),
]


def refuse_float32(case: Case) -> None:
    for call in (call_api, call_op):
        arguments = arguments_of(case)
        with pytest.raises(TypeError, match=r"^q must have dtype torch.bfloat16 or torch.float16, got .*[Ff]loat"):
            call(arguments)


@pytest.mark.gpu
def test_the_kernels_take_no_float32():
    refuse_float32(example("cuda", dtype=torch.float32))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
def test_the_kernels_take_no_float32_without_data(monkeypatch):
    """What the CPU takes is refused while tracing for a GPU."""
    monkeypatch.setattr("flash_mla.schedule.num_sms_of", lambda device: CPU_NUM_SMS)
    with torch._subclasses.FakeTensorMode():
        refuse_float32(example("cuda", dtype=torch.float32))


@pytest.mark.parametrize("call", [call_api, call_op], ids=["api", "op"])
@pytest.mark.parametrize(
    ("name", "error", "spoil"),
    [pytest.param(name, error, spoil, id=f"{name}-{what}") for name, what, error, spoil in BAD_TENSORS],
)
def test_bad_tensor(device, call, name, error, spoil):
    arguments = arguments_of(example(device))
    arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=rf"^{name} .*, got "):
        call(arguments)


@pytest.mark.parametrize(
    ("name", "error", "spoil"),
    [
        pytest.param(name, error, spoil, id=f"{name}-{what}")
        for name, what, error, spoil in BAD_TENSORS
        if name in ("q", "k_cache", "block_table", "cache_seqlens")
    ],
)
def test_bad_tensor_with_a_lazy_schedule(device, name, error, spoil):
    arguments = arguments_of(example(device))
    arguments[name] = spoil(arguments[name])
    arguments["tile_scheduler_metadata"], arguments["num_splits"] = get_mla_metadata()
    with pytest.raises(error, match=rf"^{name} .*, got "):
        call_api(arguments)


@pytest.mark.parametrize("plan", ["tensors", "schedule"])
@pytest.mark.parametrize("name", ["q", "k_cache", "block_table", "cache_seqlens"])
def test_not_a_tensor(device, name, plan):
    for value in ([[1, 2]], None):
        arguments = arguments_of(example(device))
        arguments[name] = value
        if plan == "schedule":
            arguments["tile_scheduler_metadata"], arguments["num_splits"] = get_mla_metadata()
        # For what only the op looks at, torch words the message.
        with pytest.raises((TypeError, RuntimeError), match=rf"\b{name}\b"):
            call_api(arguments)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_softmax_scale(device, scale):
    arguments = {**arguments_of(example(device)), "softmax_scale": scale}
    for call in (call_api, call_op):
        with pytest.raises(ValueError, match=r"^softmax_scale must be finite and not negative, got"):
            call(arguments)


def test_more_rows_than_can_be_counted(device):
    """2**30 rows of a request, all of them one row in memory."""
    arguments = arguments_of(example(device))
    arguments["q"] = arguments["q"][:, :1, :1].expand(3, 2**15, 2**15, HEAD_DIM)
    with pytest.raises(ValueError, match=r"^q has too many rows per request, got "):
        call_op(arguments)


def test_cache_without_heads(device):
    arguments = arguments_of(example(device))
    arguments["k_cache"] = arguments["k_cache"][:, :, :0]
    for plan in (arguments["tile_scheduler_metadata"], arguments["num_splits"]), get_mla_metadata():
        arguments["tile_scheduler_metadata"], arguments["num_splits"] = plan
        with pytest.raises(ValueError, match=r"^q must have a multiple of the 0 heads of k_cache, got 16"):
            call_api(arguments)


@pytest.mark.parametrize("num_heads_q", [15, 1])
def test_head_counts_that_do_not_divide(device, num_heads_q):
    arguments = arguments_of(example(device, num_heads_kv=2))
    arguments["q"] = arguments["q"][:, :, :num_heads_q]
    with pytest.raises(ValueError, match=rf"^q must have a multiple of the 2 heads of k_cache, got {num_heads_q}"):
        call_op(arguments)
    arguments["tile_scheduler_metadata"], arguments["num_splits"] = get_mla_metadata()
    with pytest.raises(ValueError, match=rf"^q must have a multiple of the 2 heads of k_cache, got {num_heads_q}"):
        call_api(arguments)


def test_plan_for_other_head_counts(device):
    arguments = arguments_of(example(device))
    wider = example(device, num_heads_q=128)
    arguments["tile_scheduler_metadata"], arguments["num_splits"] = wider.plan()
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata must have shape .*num_workers"):
        call_api(arguments)


def test_plan_for_another_batch(device):
    arguments = arguments_of(example(device))
    arguments["num_splits"] = example(device, batch=4, seqlens=3).plan()[1]
    with pytest.raises(ValueError, match=r"^num_splits must have shape \(batch_size \+ 1,\) = \[4\], got \[5\]"):
        call_api(arguments)


@pytest.mark.parametrize("head_dim_v", [576, 256, 0, None])
def test_head_dim_v(device, head_dim_v):
    with pytest.raises(ValueError, match=rf"^head_dim_v must be 512, got {head_dim_v}"):
        flash_mla_with_kvcache(head_dim_v=head_dim_v, **arguments_of(example(device)))


def test_metadata_tensor_without_num_splits(device):
    with pytest.raises(ValueError, match=r"^num_splits must be the tensor .* got None"):
        call_api({**arguments_of(example(device)), "num_splits": None})


def test_schedule_with_num_splits(device):
    with pytest.raises(ValueError, match=r"^num_splits must be None .* got Tensor"):
        call_api({**arguments_of(example(device)), "tile_scheduler_metadata": get_mla_metadata()[0]})


@pytest.mark.parametrize("value", [None, 5, "plan", get_mla_metadata()])
def test_metadata_of_another_type(device, value):
    with pytest.raises(TypeError, match=rf"^tile_scheduler_metadata must be .* got {type(value).__name__}"):
        call_api({**arguments_of(example(device)), "tile_scheduler_metadata": value, "num_splits": None})


UNSUPPORTED = {
    "is_fp8_kvcache": True,
    "indices": torch.zeros(3, 2, 64, dtype=torch.int32),
    "attn_sink": torch.zeros(16),
    "extra_k_cache": torch.zeros(2, PAGE_SIZE, 1, HEAD_DIM, dtype=BF16),
    "extra_indices_in_kvcache": torch.zeros(3, 2, 64, dtype=torch.int32),
    "topk_length": torch.zeros(3, dtype=torch.int32),
    "extra_topk_length": torch.zeros(3, dtype=torch.int32),
    "enable_batch_invariant": True,
    "descale_q": torch.ones(1),
    "descale_k": torch.ones(1),
    "kv_format": "packed",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_argument(device, name):
    with pytest.raises(NotImplementedError, match=rf"^{name}: .* is not implemented"):
        call_api({**arguments_of(example(device)), name: UNSUPPORTED[name]})


@pytest.mark.parametrize("name", ["q", "k_cache"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=["fp8", "bytes"])
def test_one_byte_queries(device, name, dtype):
    arguments = arguments_of(example(device))
    arguments["q"] = torch.zeros_like(arguments["q"], dtype=dtype)
    arguments["k_cache"] = torch.zeros_like(arguments["k_cache"], dtype=dtype)
    with pytest.raises(NotImplementedError, match=rf"^q must have dtype .* got {re.escape(str(dtype))}"):
        call_api(arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_mla_sparse_fwd", (None, None, None, 0.1)),
        ("get_mla_metadata_dense_fp8", (torch.zeros(3, dtype=torch.int32), 16, 1)),
        ("flash_mla_with_kvcache_fp8", (None, None, None, None, HEAD_DIM_V, None, None)),
    ],
)
def test_functions_that_are_not_there(name, arguments):
    with pytest.raises(NotImplementedError, match=rf"^{name} is not implemented"):
        getattr(flash_mla, name)(*arguments)


@pytest.mark.parametrize(
    ("error", "spoil"),
    [
        (TypeError, lambda out: out.half()),
        (ValueError, lambda out: out[..., :256]),
        (ValueError, lambda out: out[0]),
        (ValueError, lambda out: out[:2]),
        (ValueError, with_odd_strides),
        (ValueError, with_strided_rows),
        (ValueError, misaligned),
    ],
    ids=["dtype", "head-dim", "dim", "batch", "odd-strides", "strided-rows", "misaligned"],
)
def test_bad_out(device, error, spoil):
    out = torch.zeros(3, 2, 16, HEAD_DIM_V, dtype=BF16, device=device)
    with pytest.raises(error, match=r"^out .*, got "):
        call_api({**arguments_of(example(device)), "out": spoil(out)})


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits", "out"]
)
def test_tensor_on_another_device(name):
    arguments = arguments_of(example("cuda"))
    arguments["out"] = torch.zeros(3, 2, 16, HEAD_DIM_V, dtype=BF16, device="cuda")
    arguments[name] = arguments[name].cpu()
    with pytest.raises(ValueError, match=rf"^{name} must be on cuda:0, where q is, got cpu"):
        call_api(arguments)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
@pytest.mark.parametrize(
    "name", ["k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits", "out"]
)
def test_tensor_on_another_device_without_data(name, monkeypatch):
    """The same for tensors that have shapes only, which needs no GPU."""
    monkeypatch.setattr("flash_mla.schedule.num_sms_of", lambda device: CPU_NUM_SMS)
    with torch._subclasses.FakeTensorMode():
        arguments = arguments_of(example("cuda"))
        arguments["out"] = torch.zeros(3, 2, 16, HEAD_DIM_V, dtype=BF16, device="cuda")
        arguments[name] = torch.empty_like(arguments[name], device="cpu")
        with pytest.raises(ValueError, match=rf"^{name} must be on cuda:0, where q is, got cpu"):
            torch.ops.flash_mla.dense_decode_out(**arguments)


@pytest.mark.gpu
def test_lengths_on_another_device_with_a_lazy_schedule():
    arguments = arguments_of(example("cuda"))
    arguments["cache_seqlens"] = arguments["cache_seqlens"].cpu()
    arguments["tile_scheduler_metadata"], arguments["num_splits"] = get_mla_metadata()
    with pytest.raises(ValueError, match=r"^cache_seqlens must be on cuda:0"):
        call_api(arguments)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "cache_seqlens", {"cache_seqlens": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "cache_seqlens", {"cache_seqlens": torch.zeros(3, 1, dtype=torch.int32)}),
        (ValueError, "cache_seqlens", {"cache_seqlens": torch.zeros(6, dtype=torch.int32)[::2]}),
        (ValueError, "cache_seqlens", {"cache_seqlens": torch.zeros(24 * 1024 + 1, dtype=torch.int32)}),
        (TypeError, "cache_seqlens", {"cache_seqlens": None}),
        (TypeError, "cache_seqlens", {"seqlens_k": torch.zeros(3, dtype=torch.int32)}),
        (ValueError, "num_rows_per_head_kv", {"num_q_tokens_per_head_k": 0}),
        (TypeError, "num_q_tokens_per_head_k", {"num_q_tokens_per_head_k": None}),
        (TypeError, "num_q_tokens_per_head_k", {"num_heads_per_head_k": 16}),
        (ValueError, "num_heads_kv", {"num_heads_k": 0}),
        (TypeError, "num_heads_k", {"num_heads_k": None}),
        (ValueError, "num_heads_q", {"num_heads_k": 3, "num_heads_q": 16}),
        (ValueError, "num_q_tokens_per_head_k", {"num_q_tokens_per_head_k": 15, "num_heads_q": 16}),
        (NotImplementedError, "is_fp8_kvcache", {"is_fp8_kvcache": True}),
        (NotImplementedError, "topk", {"topk": 2048}),
    ],
)
def test_bad_planning(device, error, name, arguments):
    good = {"cache_seqlens": torch.zeros(3, dtype=torch.int32), "num_q_tokens_per_head_k": 32, "num_heads_k": 1}
    moved = {
        key: value.to(device).as_strided(value.shape, value.stride()) if value.is_contiguous() else value
        for key, value in {**good, **arguments}.items()
        if isinstance(value, torch.Tensor)
    }
    with pytest.raises(error, match=rf"^{name}\b"):
        get_mla_decoding_metadata(**{**good, **arguments, **moved})


def test_cpu_reports_requests_that_exceed_their_table():
    """On the CPU this costs nothing, so it is always checked."""
    case = example("cpu")
    case.cache_seqlens[2] = 100_000
    with pytest.raises(ValueError, match=r"^cache_seqlens must be at most 128.*got 100000 for request 2"):
        call_op(arguments_of(case))


@pytest.mark.parametrize("name", ["q", "k_cache", "num_splits"])
def test_shapes_are_checked_without_data_too(name):
    """torch.compile finds wrong shapes while it traces."""
    arguments = arguments_of(example("cpu"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        arguments[name] = arguments[name][:, None]
        with pytest.raises(ValueError, match=rf"^{name} must have shape"):
            call_op(arguments)
