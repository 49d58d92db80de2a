"""A table of wrong calls of the decode: what is changed in right arguments, and the error that it must give.

Arguments of GPU calls are checked by compiled code, those of CPU calls in Python; both have to say the same. The
compiled checks need no GPU: the implementation for CUDA is also called with CPU tensors here, and gets no further.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, Case, make_case
from torch import Tensor

import flash_mla

BF16, FP16 = torch.bfloat16, torch.float16
OUT_SHAPE = (3, 2, 16, HEAD_DIM_V)

Arguments = dict[str, Any]
Caller = Callable[[Arguments], Any]


def example(device: str) -> Case:
    return make_case(batch=3, seqlen_q=2, num_heads_q=16, seqlens=[100, 0, 70], device=device)


def arguments_of(case: Case) -> Arguments:
    """Those of the op, by name."""
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


# The ways in which a call comes.
def call_api(arguments: Arguments) -> Any:
    return flash_mla.flash_mla_with_kvcache(**{"head_dim_v": HEAD_DIM_V, **arguments})


def call_lazily(arguments: Arguments, schedule: object = None) -> Any:
    schedule = flash_mla.get_mla_metadata()[0] if schedule is None else schedule
    return call_api({**arguments, "tile_scheduler_metadata": schedule, "num_splits": None})


def call_op(arguments: Arguments) -> Any:
    op = torch.ops.flash_mla.dense_decode_out if "out" in arguments else torch.ops.flash_mla.dense_decode
    return op(**arguments)


def call_compiled_checks(arguments: Arguments) -> Any:
    op = torch.ops.flash_mla.dense_decode_out if "out" in arguments else torch.ops.flash_mla.dense_decode
    return op.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), **arguments)


EVERY_CALLER = (call_api, call_lazily, call_op, call_compiled_checks)
OF_THE_API = (call_api, call_lazily)
# With a plan from outside.
WITH_PLAN = (call_api, call_op, call_compiled_checks)
# How many workers there have to be, compiled code asks the GPU.
WITH_PLAN_ON_A_DEVICE = (call_api, call_op)


@dataclass(frozen=True)
class Rejection:
    name: str
    error: type[Exception]
    message: str  # all of it; # stands for a number, @ for a device
    change: Callable[[Arguments], Arguments]  # makes right arguments wrong
    callers: tuple[Caller, ...] = EVERY_CALLER

    def matches(self, error: Exception) -> bool:
        pattern = re.escape(self.message).replace(r"\#", r"-?\d+").replace("@", r"[\w:]+")
        return type(error) is self.error and re.fullmatch(pattern, str(error)) is not None


# What is wrong with a tensor.
def with_odd_strides(tensor: Tensor) -> Tensor:
    """The same shape in rows that are one element longer."""
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1, dtype=tensor.dtype, device=tensor.device)
    return wide[..., :-1]


def with_strided_rows(tensor: Tensor) -> Tensor:
    wide = torch.zeros(*tensor.shape, 2, dtype=tensor.dtype, device=tensor.device)
    return wide[..., 0]


def misaligned(tensor: Tensor) -> Tensor:
    """The same shape and strides, one element behind an aligned address."""
    flat = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return flat[1:].view(tensor.shape)


def elsewhere(tensor: Tensor) -> Tensor:
    """On another device."""
    return tensor.cpu() if tensor.is_cuda else tensor.to("meta")


def new_out(arguments: Arguments) -> Tensor:
    return torch.zeros(OUT_SHAPE, dtype=BF16, device=arguments["q"].device)


def with_out_over(name: str) -> Callable[[Arguments], Arguments]:
    """The argument of this name, and an out that begins with the 16 bytes in which that ends."""

    def change(arguments: Arguments) -> Arguments:
        tensor = arguments[name].contiguous()
        size = tensor.numel() * tensor.element_size()
        begin = (size - 1) // 16 * 16
        out = new_out(arguments)
        memory = torch.zeros(begin + out.numel() * out.element_size(), dtype=torch.uint8, device=out.device)
        own = memory[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return {**arguments, name: own, "out": memory[begin:].view(BF16).view(OUT_SHAPE)}

    return change


def tensor(
    name: str,
    what: str,
    error: type[Exception],
    message: str,
    spoil: Callable[[Tensor], Any],
    callers: tuple[Caller, ...] = EVERY_CALLER,
) -> Rejection:
    return Rejection(
        f"{name}-{what}",
        error,
        f"{name} {message}",
        lambda arguments: {**arguments, name: spoil(arguments[name])},
        callers,
    )


def out(what: str, error: type[Exception], message: str, spoil: Callable[[Tensor], Tensor]) -> Rejection:
    return Rejection(
        f"out-{what}", error, f"out {message}", lambda arguments: {**arguments, "out": spoil(new_out(arguments))}
    )


def value(name: str, error: type[Exception], message: str, wrong: Any, callers: tuple[Caller, ...]) -> Rejection:
    return Rejection(
        f"{name}-{wrong}", error, f"{name} {message}", lambda arguments: {**arguments, name: wrong}, callers
    )


def unsupported(name: str, feature: str, wrong: Any) -> Rejection:
    given = "a Tensor" if isinstance(wrong, Tensor) else repr(wrong)
    message = f"{name}: {feature} is not implemented; expected None or False, got {given}"
    return Rejection(name, NotImplementedError, message, lambda arguments: {**arguments, name: wrong}, OF_THE_API)


def one_byte_elements(dtype: torch.dtype) -> Rejection:
    def change(arguments: Arguments) -> Arguments:
        return {**arguments, **{name: torch.zeros_like(arguments[name], dtype=dtype) for name in ("q", "k_cache")}}

    message = f"q must have dtype torch.bfloat16 or torch.float16, got {dtype}"
    return Rejection(f"q-{dtype}".replace("torch.", ""), NotImplementedError, message, change, OF_THE_API)


DTYPES_OF_Q = "must have dtype torch.bfloat16 or torch.float16, got"
Q_SHAPE = "must have shape (batch_size, seqlen_q, num_heads_q, head_dim) = [-1, -1, -1, 576], got"
CACHE_SHAPE = "must have shape (num_blocks, page_size, num_heads_kv, head_dim) = [-1, 64, -1, 576], got"
TABLE_SHAPE = "must have shape (batch_size, max_blocks_per_request) = [3, -1], got"
LENGTHS_SHAPE = "must have shape (batch_size,) = [3], got"
METADATA_SHAPE = "must have shape (num_plan_rows, 8), as planned for these head counts and seqlen_q, = [#, 8], got"
SPLITS_SHAPE = "must have shape (batch_size + 1,) = [4], got"
RESULT_SHAPE = "must have shape (batch_size, seqlen_q, num_heads_q, head_dim_v) = [3, 2, 16, 512], got"
ALIGNMENT = "must be aligned to 16 bytes, got an address that is not"
STRIDES = "must have strides that are multiples of 8 elements, got strides"
ROWS = "must be contiguous in its last dimension, got strides"
CONTIGUOUS = "must be contiguous, got strides"
DEVICE = "must be on @, where q is, got @"
OWN_PLACES = "must have a place of its own for every element, got strides"
PLAN = "must be what get_mla_metadata or get_mla_decoding_metadata returned, got"

REJECTIONS = [
    tensor("q", "float64", TypeError, f"{DTYPES_OF_Q} torch.float64", Tensor.double),
    tensor("q", "int32", TypeError, f"{DTYPES_OF_Q} torch.int32", Tensor.int),
    tensor("q", "complex64", TypeError, f"{DTYPES_OF_Q} torch.complex64", lambda q: q.to(torch.complex64)),
    one_byte_elements(torch.float8_e4m3fn),
    one_byte_elements(torch.float8_e5m2),
    one_byte_elements(torch.uint8),
    tensor("q", "no-dims", ValueError, f"{Q_SHAPE} []", lambda q: q[0, 0, 0, 0]),
    tensor("q", "3-dims", ValueError, f"{Q_SHAPE} [2, 16, 576]", lambda q: q[0]),
    tensor("q", "5-dims", ValueError, f"{Q_SHAPE} [1, 3, 2, 16, 576]", lambda q: q[None]),
    tensor("q", "head-dim", ValueError, f"{Q_SHAPE} [3, 2, 16, 512]", lambda q: q[..., :512]),
    tensor("q", "no-head-dim", ValueError, f"{Q_SHAPE} [3, 2, 16, 0]", lambda q: q[..., :0]),
    tensor("q", "no-tokens", ValueError, "must have at least one token per request, got 0", lambda q: q[:, :0]),
    tensor("q", "no-heads", ValueError, "must have a multiple of the 1 heads of k_cache, got 0", lambda q: q[:, :, :0]),
    tensor(
        "q",
        "too-many-rows",
        ValueError,
        "has too many rows per request, got 32768 tokens of 32768 heads",
        lambda q: q[:, :1, :1].expand(3, 2**15, 2**15, HEAD_DIM),
    ),
    tensor("q", "odd-strides", ValueError, f"{STRIDES} [#, #, 577, 1]", with_odd_strides),
    tensor("q", "strided-rows", ValueError, f"{ROWS} [#, #, 1152, 2]", with_strided_rows),
    tensor("q", "expanded-rows", ValueError, f"{ROWS} [#, #, #, 0]", lambda q: q[..., :1].expand(q.shape)),
    tensor("q", "misaligned", ValueError, ALIGNMENT, misaligned),
    tensor("k_cache", "other-dtype", TypeError, "must have dtype torch.bfloat16, got torch.float16", Tensor.half),
    tensor("k_cache", "float32", TypeError, "must have dtype torch.bfloat16, got torch.float32", Tensor.float),
    tensor("k_cache", "3-dims", ValueError, f"{CACHE_SHAPE} [#, 1, 576]", lambda k: k.flatten(0, 1)),
    tensor("k_cache", "5-dims", ValueError, f"{CACHE_SHAPE} [1, #, 64, 1, 576]", lambda k: k[None]),
    tensor("k_cache", "page-size", ValueError, f"{CACHE_SHAPE} [#, 32, 1, 576]", lambda k: k[:, :32]),
    tensor("k_cache", "head-dim", ValueError, f"{CACHE_SHAPE} [#, 64, 1, 512]", lambda k: k[..., :512]),
    tensor(
        "k_cache", "no-pages", ValueError, "must have at least one page, got shape [0, 64, 1, 576]", lambda k: k[:0]
    ),
    Rejection(
        "k_cache-no-heads",
        ValueError,
        "q must have a multiple of the 0 heads of k_cache, got 16",
        lambda arguments: {**arguments, "k_cache": arguments["k_cache"][:, :, :0]},
    ),
    Rejection(
        "k_cache-too-many-heads",
        ValueError,
        "q must have a multiple of the 3 heads of k_cache, got 16",
        lambda arguments: {**arguments, "k_cache": arguments["k_cache"].expand(-1, -1, 3, -1)},
    ),
    tensor("k_cache", "odd-strides", ValueError, f"{STRIDES} [#, 577, 577, 1]", with_odd_strides),
    tensor("k_cache", "strided-rows", ValueError, f"{ROWS} [#, #, #, 2]", with_strided_rows),
    tensor("k_cache", "misaligned", ValueError, ALIGNMENT, misaligned),
    tensor("k_cache", "elsewhere", ValueError, DEVICE, elsewhere),
    tensor("block_table", "int64", TypeError, "must have dtype torch.int32, got torch.int64", Tensor.long),
    tensor("block_table", "float32", TypeError, "must have dtype torch.int32, got torch.float32", Tensor.float),
    tensor("block_table", "bool", TypeError, "must have dtype torch.int32, got torch.bool", Tensor.bool),
    tensor("block_table", "1-dim", ValueError, f"{TABLE_SHAPE} [6]", lambda table: table.flatten()),
    tensor("block_table", "3-dims", ValueError, f"{TABLE_SHAPE} [3, 2, 1]", lambda table: table[..., None]),
    tensor("block_table", "smaller-batch", ValueError, f"{TABLE_SHAPE} [2, 2]", lambda table: table[:2]),
    tensor("block_table", "no-batch", ValueError, f"{TABLE_SHAPE} [0, 2]", lambda table: table[:0]),
    tensor("block_table", "strided-rows", ValueError, f"{ROWS} [4, 2]", with_strided_rows),
    tensor("block_table", "transposed", ValueError, f"{ROWS} [1, 3]", lambda table: table.t().contiguous().t()),
    tensor("block_table", "elsewhere", ValueError, DEVICE, elsewhere),
    tensor("cache_seqlens", "int64", TypeError, "must have dtype torch.int32, got torch.int64", Tensor.long),
    tensor("cache_seqlens", "int16", TypeError, "must have dtype torch.int32, got torch.int16", Tensor.short),
    tensor("cache_seqlens", "no-dims", ValueError, f"{LENGTHS_SHAPE} []", lambda lengths: lengths[0]),
    tensor("cache_seqlens", "2-dims", ValueError, f"{LENGTHS_SHAPE} [3, 1]", lambda lengths: lengths[:, None]),
    tensor("cache_seqlens", "smaller-batch", ValueError, f"{LENGTHS_SHAPE} [2]", lambda lengths: lengths[:2]),
    tensor("cache_seqlens", "larger-batch", ValueError, f"{LENGTHS_SHAPE} [6]", lambda lengths: lengths.repeat(2)),
    tensor("cache_seqlens", "strided", ValueError, f"{CONTIGUOUS} [2]", with_strided_rows),
    tensor("cache_seqlens", "expanded", ValueError, f"{CONTIGUOUS} [0]", lambda lengths: lengths[:1].expand(3)),
    tensor("cache_seqlens", "elsewhere", ValueError, DEVICE, elsewhere),
    tensor(
        "tile_scheduler_metadata",
        "int64",
        TypeError,
        "must have dtype torch.int32, got torch.int64",
        Tensor.long,
        WITH_PLAN,
    ),
    tensor(
        "tile_scheduler_metadata",
        "1-dim",
        ValueError,
        f"{METADATA_SHAPE} [#]",
        lambda plan: plan.flatten(),
        WITH_PLAN_ON_A_DEVICE,
    ),
    tensor(
        "tile_scheduler_metadata",
        "workers",
        ValueError,
        f"{METADATA_SHAPE} [#, 8]",
        lambda plan: plan[:-1],
        WITH_PLAN_ON_A_DEVICE,
    ),
    tensor(
        "tile_scheduler_metadata",
        "columns",
        ValueError,
        f"{METADATA_SHAPE} [#, 4]",
        lambda plan: plan[:, :4].contiguous(),
        WITH_PLAN_ON_A_DEVICE,
    ),
    tensor("tile_scheduler_metadata", "strided", ValueError, f"{CONTIGUOUS} [16, 2]", with_strided_rows, WITH_PLAN),
    tensor("tile_scheduler_metadata", "misaligned", ValueError, ALIGNMENT, misaligned, WITH_PLAN),
    tensor("tile_scheduler_metadata", "elsewhere", ValueError, DEVICE, elsewhere, WITH_PLAN),
    tensor("num_splits", "int64", TypeError, "must have dtype torch.int32, got torch.int64", Tensor.long, WITH_PLAN),
    tensor("num_splits", "2-dims", ValueError, f"{SPLITS_SHAPE} [4, 1]", lambda n: n[:, None], WITH_PLAN_ON_A_DEVICE),
    tensor("num_splits", "smaller-batch", ValueError, f"{SPLITS_SHAPE} [3]", lambda n: n[:-1], WITH_PLAN_ON_A_DEVICE),
    tensor(
        "num_splits", "larger-batch", ValueError, f"{SPLITS_SHAPE} [8]", lambda n: n.repeat(2), WITH_PLAN_ON_A_DEVICE
    ),
    tensor("num_splits", "elsewhere", ValueError, DEVICE, elsewhere, WITH_PLAN),
    out("dtype", TypeError, "must have dtype torch.bfloat16, got torch.float16", Tensor.half),
    out("float32", TypeError, "must have dtype torch.bfloat16, got torch.float32", Tensor.float),
    out("3-dims", ValueError, f"{RESULT_SHAPE} [2, 16, 512]", lambda out: out[0]),
    out("head-dim", ValueError, f"{RESULT_SHAPE} [3, 2, 16, 256]", lambda out: out[..., :256]),
    out("smaller-batch", ValueError, f"{RESULT_SHAPE} [2, 2, 16, 512]", lambda out: out[:2]),
    out("heads-first", ValueError, f"{RESULT_SHAPE} [3, 16, 2, 512]", lambda out: out.transpose(1, 2)),
    out("odd-strides", ValueError, f"{STRIDES} [#, #, 513, 1]", with_odd_strides),
    out("strided-rows", ValueError, f"{ROWS} [#, #, #, 2]", with_strided_rows),
    out("misaligned", ValueError, ALIGNMENT, misaligned),
    out("elsewhere", ValueError, DEVICE, elsewhere),
    out(
        "expanded",
        ValueError,
        f"{OWN_PLACES} [0, #, #, 1] for shape [3, 2, 16, 512]",
        lambda out: out[:1].expand(OUT_SHAPE),
    ),
    out(
        "heads-overlap",
        ValueError,
        f"{OWN_PLACES} [#, #, 504, 1] for shape [3, 2, 16, 512]",
        lambda out: out.as_strided(OUT_SHAPE, (2 * 16 * 512, 16 * 512, 504, 1)),
    ),
    *(
        Rejection(
            f"out-over-{name}",
            ValueError,
            f"out must lie apart from {name} in memory, got tensors that overlap",
            with_out_over(name),
            callers,
        )
        for name, callers in {
            "q": EVERY_CALLER,
            "k_cache": EVERY_CALLER,
            "block_table": EVERY_CALLER,
            "cache_seqlens": EVERY_CALLER,
            "tile_scheduler_metadata": WITH_PLAN,
            "num_splits": WITH_PLAN,
        }.items()
    ),
    Rejection(
        "out-in-q",
        ValueError,
        "out must lie apart from q in memory, got tensors that overlap",
        lambda arguments: {**arguments, "out": arguments["q"][..., :HEAD_DIM_V]},
    ),
    value("softmax_scale", ValueError, "must be finite and not negative, got -1", -1.0, EVERY_CALLER),
    value("softmax_scale", ValueError, "must be finite and not negative, got nan", float("nan"), EVERY_CALLER),
    value("softmax_scale", ValueError, "must be finite and not negative, got inf", float("inf"), EVERY_CALLER),
    value("softmax_scale", ValueError, "must be finite and not negative, got -inf", float("-inf"), EVERY_CALLER),
    value("head_dim_v", ValueError, "must be 512, got 576", 576, OF_THE_API),
    value("head_dim_v", ValueError, "must be 512, got 0", 0, OF_THE_API),
    value("head_dim_v", ValueError, "must be 512, got None", None, OF_THE_API),
    value(
        "num_splits",
        ValueError,
        "must be the tensor that came with tile_scheduler_metadata, got None",
        None,
        (call_api,),
    ),
    value("tile_scheduler_metadata", TypeError, f"{PLAN} NoneType", None, (call_api,)),
    value("tile_scheduler_metadata", TypeError, f"{PLAN} int", 5, (call_api,)),
    value("tile_scheduler_metadata", TypeError, f"{PLAN} str", "plan", (call_api,)),
    value("tile_scheduler_metadata", TypeError, f"{PLAN} tuple", (None, None), (call_api,)),
    Rejection(
        "num_splits-with-a-schedule",
        ValueError,
        "num_splits must be None where tile_scheduler_metadata is a schedule object, got Tensor",
        lambda arguments: {**arguments, "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0]},
        (call_api,),
    ),
    unsupported("is_fp8_kvcache", "an fp8 cache", True),
    value("enable_batch_invariant", TypeError, "must be a bool, got 1", 1, (call_api,)),
    unsupported("indices", "sparse attention", torch.zeros(3, 2, 64, dtype=torch.int32)),
    unsupported("attn_sink", "attention sinks", torch.zeros(16)),
    unsupported("extra_k_cache", "a second cache", torch.zeros(2, PAGE_SIZE, 1, HEAD_DIM, dtype=BF16)),
    unsupported("extra_indices_in_kvcache", "a second cache", torch.zeros(3, 2, 64, dtype=torch.int32)),
    unsupported("topk_length", "sparse attention", torch.zeros(3, dtype=torch.int32)),
    unsupported("extra_topk_length", "sparse attention", torch.zeros(3, dtype=torch.int32)),
    unsupported("descale_q", "fp8 queries", torch.ones(1)),
    unsupported("descale_k", "an fp8 cache", torch.ones(1)),
    unsupported("kv_format", "other cache formats", "packed"),
]
