"""What the ops require of their arguments, for tensors that are not on a GPU.

The CUDA implementations check the same in csrc/ops. Messages name the argument, what was expected and what came.
Sizes may be symbolic (torch.compile).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla.schedule import METADATA_COLUMNS, PAGE_SIZE

HEAD_DIM = 576  # 512 latent + 64 RoPE
HEAD_DIM_V = 512  # the latent part, read again as V
DTYPES = (torch.bfloat16, torch.float16)
CACHE_DTYPES = (*DTYPES, torch.float32)  # float32 as a reference, which the kernels do not take
SLOT_DTYPES = (torch.int32, torch.int64)
ANY_SIZE = -1

_MAX_ROWS = (2**31 - 1) // 2
_MAX_SCHEDULE_BATCH = 24 * 1024
_ROW_ALIGNMENT = 8  # elements of 2 bytes: the kernels copy 16 bytes at a time
_ROW_ALIGNMENT_BYTES = 16


class DecodeArguments(NamedTuple):
    """The arguments of flash_mla::dense_decode, which ops.py describes, in the order of its schema."""

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    tile_scheduler_metadata: Tensor
    num_splits: Tensor
    softmax_scale: float
    causal: bool
    batch_invariant: bool = False

    @property
    def num_heads_kv(self) -> int:
        return self.k_cache.shape[2]

    @property
    def num_rows_per_head_kv(self) -> int:
        return self.q.shape[1] * self.q.shape[2] // self.num_heads_kv


def check_decode_schedule(cache_seqlens: Tensor, num_rows_per_head_kv: int, num_heads_kv: int) -> None:
    """Raise TypeError or ValueError unless flash_mla::decode_schedule can take these arguments."""
    check_dtype("cache_seqlens", cache_seqlens, torch.int32)
    check_shape("cache_seqlens", cache_seqlens, "(batch_size,)", [ANY_SIZE])
    _check_contiguous("cache_seqlens", cache_seqlens)
    if cache_seqlens.shape[0] > _MAX_SCHEDULE_BATCH:
        raise ValueError(
            f"cache_seqlens must have at most {_MAX_SCHEDULE_BATCH} requests, got {cache_seqlens.shape[0]}"
        )
    for name, value in (("num_rows_per_head_kv", num_rows_per_head_kv), ("num_heads_kv", num_heads_kv)):
        if not 1 <= value <= _MAX_ROWS:
            raise ValueError(f"{name} must be positive, got {value}")


def check_dense_decode(arguments: DecodeArguments) -> None:
    """Raise TypeError or ValueError unless flash_mla::dense_decode can take these arguments."""
    q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, *_ = arguments
    _check_q_dtype(q)
    tables = {
        "block_table": block_table,
        "cache_seqlens": cache_seqlens,
        "tile_scheduler_metadata": tile_scheduler_metadata,
        "num_splits": num_splits,
    }
    check_dtype("k_cache", k_cache, q.dtype)
    for name, table in tables.items():
        check_dtype(name, table, torch.int32)

    check_q_shape(q)
    check_k_cache_shape(k_cache)
    batch_size, seqlen_q, num_heads_q, _ = q.shape
    check_shape("block_table", block_table, "(batch_size, max_blocks_per_request)", [batch_size, ANY_SIZE])
    check_shape("cache_seqlens", cache_seqlens, "(batch_size,)", [batch_size])
    check_head_counts(seqlen_q, num_heads_q, k_cache.shape[2])
    if k_cache.shape[0] < 1:
        raise ValueError(f"k_cache must have at least one page, got shape {list(k_cache.shape)}")
    if not (math.isfinite(softmax_scale) and softmax_scale >= 0):
        raise ValueError(f"softmax_scale must be finite and not negative, got {softmax_scale:g}")

    for name, tensor in {"k_cache": k_cache, **tables}.items():
        check_on_device(name, tensor, q.device)

    _check_rows("q", q)
    _check_rows("k_cache", k_cache)
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(
            f"block_table must be contiguous in its last dimension, got strides {list(block_table.stride())}"
        )
    _check_contiguous("cache_seqlens", cache_seqlens)
    _check_contiguous("tile_scheduler_metadata", tile_scheduler_metadata)


def check_plan(arguments: DecodeArguments, num_plan_rows: int) -> None:
    """Raise ValueError for a plan whose shape shows that it was made for another call."""
    check_shape(
        "tile_scheduler_metadata",
        arguments.tile_scheduler_metadata,
        "(num_plan_rows, 8), as planned for these head counts and seqlen_q,",
        [num_plan_rows, METADATA_COLUMNS],
    )
    check_shape("num_splits", arguments.num_splits, "(batch_size + 1,)", [arguments.q.shape[0] + 1])


def check_out(out: Tensor, q: Tensor) -> None:
    """Raise TypeError or ValueError unless the result for q fits into out."""
    check_dtype("out", out, q.dtype)
    check_shape("out", out, "(batch_size, seqlen_q, num_heads_q, head_dim_v)", [*q.shape[:3], HEAD_DIM_V])
    check_on_device("out", out, q.device)
    _check_rows("out", out)


def check_out_memory(out: Tensor, arguments: DecodeArguments) -> None:
    """Raise ValueError if writing to one element of out would change another one, or what is still to be read."""
    _check_address("out", out)
    _check_elements_apart("out", out)
    begin, end = _address_span(out)
    tensors = zip(DecodeArguments._fields, arguments, strict=True)
    for name, other in ((name, value) for name, value in tensors if isinstance(value, Tensor)):
        other_begin, other_end = _address_span(other)
        if begin != end and other_begin != other_end and begin < other_end and other_begin < end:
            raise ValueError(f"out must lie apart from {name} in memory, got tensors that overlap")


def check_addresses(arguments: DecodeArguments) -> None:
    """Raise ValueError unless what the kernels read 16 bytes at a time begins at a multiple of them."""
    _check_address("q", arguments.q)
    _check_address("k_cache", arguments.k_cache)
    _check_address("tile_scheduler_metadata", arguments.tile_scheduler_metadata)


def check_append(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Raise TypeError or ValueError unless append_mla_kv can take these arguments."""
    _check_cache(cache)
    check_dtype("kv_c", kv_c, cache.dtype)
    check_dtype("k_pe", k_pe, cache.dtype)
    check_tensor("slot_mapping", slot_mapping)
    if slot_mapping.dtype not in SLOT_DTYPES:
        raise TypeError(f"slot_mapping must have dtype torch.int32 or torch.int64, got {slot_mapping.dtype}")
    check_shape("kv_c", kv_c, "(num_tokens, latent_dim)", [ANY_SIZE, HEAD_DIM_V])
    num_tokens, rope_dim = kv_c.shape[0], HEAD_DIM - HEAD_DIM_V
    if k_pe.dim() == 3:
        check_shape("k_pe", k_pe, "(num_tokens, 1, rope_dim)", [num_tokens, 1, rope_dim])
    else:
        check_shape("k_pe", k_pe, "(num_tokens, rope_dim) or (num_tokens, 1, rope_dim)", [num_tokens, rope_dim])
    check_shape("slot_mapping", slot_mapping, "(num_tokens,)", [num_tokens])
    for name, tensor in {"kv_c": kv_c, "k_pe": k_pe, "slot_mapping": slot_mapping}.items():
        check_on_device(name, tensor, cache.device, "cache")


def check_gather(cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, max_seqlen: int) -> None:
    """Raise TypeError or ValueError unless gather_mla_kv can take these arguments."""
    _check_cache(cache)
    check_dtype("block_table", block_table, torch.int32)
    check_dtype("cache_seqlens", cache_seqlens, torch.int32)
    check_shape("block_table", block_table, "(batch_size, max_blocks_per_request)", [ANY_SIZE, ANY_SIZE])
    check_shape("cache_seqlens", cache_seqlens, "(batch_size,)", [block_table.shape[0]])
    for name, tensor in {"block_table": block_table, "cache_seqlens": cache_seqlens}.items():
        check_on_device(name, tensor, cache.device, "cache")
    check_count("max_seqlen", max_seqlen, 0)


def check_count(name: str, value: int, minimum: int) -> None:
    """Raise TypeError unless the value is an integer, ValueError if it is less than the minimum."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_q_shape(q: Tensor) -> None:
    check_shape("q", q, "(batch_size, seqlen_q, num_heads_q, head_dim)", [ANY_SIZE] * 3 + [HEAD_DIM])


def check_k_cache_shape(k_cache: Tensor) -> None:
    expected = [ANY_SIZE, PAGE_SIZE, ANY_SIZE, HEAD_DIM]
    check_shape("k_cache", k_cache, "(num_blocks, page_size, num_heads_kv, head_dim)", expected)


def check_head_counts(seqlen_q: int, num_heads_q: int, num_heads_kv: int) -> None:
    """Raise ValueError unless the query heads can be divided among the KV heads."""
    if seqlen_q < 1:
        raise ValueError(f"q must have at least one token per request, got {seqlen_q}")
    if num_heads_q < 1 or num_heads_kv < 1 or num_heads_q % num_heads_kv != 0:
        raise ValueError(f"q must have a multiple of the {num_heads_kv} heads of k_cache, got {num_heads_q}")
    if seqlen_q * num_heads_q > _MAX_ROWS:
        raise ValueError(f"q has too many rows per request, got {seqlen_q} tokens of {num_heads_q} heads")


def check_shape(name: str, tensor: Tensor, meaning: str, sizes: Sequence[int]) -> None:
    """Raise ValueError unless the tensor has these sizes; ANY_SIZE stands for any."""
    shape = tensor.shape
    if len(shape) != len(sizes) or any(
        expected != ANY_SIZE and actual != expected for actual, expected in zip(shape, sizes, strict=True)
    ):
        raise ValueError(f"{name} must have shape {meaning} = {list(sizes)}, got {list(shape)}")


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless the value is a tensor. What torch hands to an op as tensor may be None."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError unless the value is a tensor of this dtype."""
    check_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")


def check_on_device(name: str, tensor: Tensor, device: torch.device, owner: str = "q") -> None:
    """Raise ValueError unless the tensor is on the device of the owner."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where {owner} is, got {tensor.device}")


def _check_q_dtype(q: Tensor) -> None:
    """What the kernels take; the CPU implementation also takes float32, as a reference."""
    if q.dtype not in (DTYPES if q.device.type == "cuda" else CACHE_DTYPES):
        raise TypeError(f"q must have dtype torch.bfloat16 or torch.float16, got {q.dtype}")


def _check_cache(cache: Tensor) -> None:
    check_tensor("cache", cache)
    if cache.dtype not in CACHE_DTYPES:
        raise TypeError(f"cache must have dtype torch.bfloat16, torch.float16 or torch.float32, got {cache.dtype}")
    check_shape("cache", cache, "(num_blocks, page_size, 1, head_dim)", [ANY_SIZE, PAGE_SIZE, 1, HEAD_DIM])


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


def _check_rows(name: str, tensor: Tensor) -> None:
    """The kernels copy rows 16 bytes at a time; the base address is checked where there is one."""
    *strides, last_stride = tensor.stride()
    if last_stride != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {list(tensor.stride())}")
    for size, stride in zip(tensor.shape, strides, strict=False):
        if size > 1 and stride % _ROW_ALIGNMENT != 0:
            raise ValueError(
                f"{name} must have strides that are multiples of {_ROW_ALIGNMENT} elements, "
                f"got strides {list(tensor.stride())}"
            )


def _check_address(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % _ROW_ALIGNMENT_BYTES != 0:
        raise ValueError(f"{name} must be aligned to {_ROW_ALIGNMENT_BYTES} bytes, got an address that is not")


def _check_elements_apart(name: str, tensor: Tensor) -> None:
    """No two elements in one place. Takes dimensions that interleave for overlapping ones."""
    if tensor.numel() == 0:
        return
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride < extent:
            raise ValueError(
                f"{name} must have a place of its own for every element, got strides {list(tensor.stride())} "
                f"for shape {list(tensor.shape)}"
            )
        extent += (size - 1) * stride


def _address_span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first to the last element, end exclusive."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
