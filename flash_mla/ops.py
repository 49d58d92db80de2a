"""The ops torch.ops.flash_mla.*: schemas, implementations for CPU and for shapes only; those for CUDA are compiled.

decode_schedule(cache_seqlens, num_rows_per_head_kv, num_heads_kv, batch_invariant=False)
    -> (tile_scheduler_metadata, num_splits)
    Divides the KV blocks of a batch among the workers of a GPU, on the device and without synchronization.
    cache_seqlens: (batch_size,) int32, contiguous.
    num_rows_per_head_kv: seqlen_q * num_heads_q / num_heads_kv.
    batch_invariant: as in the call that the plan is for.
    tile_scheduler_metadata: (num_plan_rows, 8) int32, num_splits: (batch_size + 1,) int32: see schedule.py.

dense_decode(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale, causal,
             batch_invariant=False) -> (out, lse)
    Attention of the last seqlen_q tokens of every request over its tokens in a paged latent cache.
    q: (batch_size, seqlen_q, num_heads_q, 576) bfloat16 or float16, on the CPU also float32; k_cache: (num_blocks, 64,
        num_heads_kv, 576) of the same dtype. Both contiguous in the last dimension, other strides any multiples of 8
        elements, addresses multiples of 16 bytes.
    block_table: (batch_size, max_blocks) int32, rows contiguous and any distance apart; never read past
        ceil(cache_seqlens[i] / 64) entries of row i, nor past max_blocks where a kernel that allowed this one to start
        early is still writing the lengths.
    cache_seqlens: (batch_size,) int32, contiguous; 0 and less stand for a request without tokens.
    tile_scheduler_metadata, num_splits: a plan for the same batch size, seqlen_q and head counts. The lengths are
        taken from cache_seqlens: a plan for other lengths costs balance only.
    softmax_scale: finite, not negative.
    causal: query i sees the tokens j <= cache_seqlens - seqlen_q + i.
    batch_invariant: the bits of a request's results do not depend on the other requests, nor on how many there are.
    out: (batch_size, seqlen_q, num_heads_q, 512) in the dtype of q, contiguous.
    lse: (batch_size, num_heads_q, seqlen_q) float32, natural logarithm of the sum of exponentials.
    Rows that see no key have out 0 and lse +inf.

dense_decode_out(..., *, out) -> lse
    The same into a given tensor, strides as those of q. No other argument has elements between its first and its last.

append_kv(kv_c, k_pe, cache, slot_mapping) -> ()
    Writes tokens into their pages, all strides as they may be; see cache.py.
    kv_c: (num_tokens, 512) bfloat16, float16 or float32; k_pe: (num_tokens, 64) or (num_tokens, 1, 64); cache:
        (num_blocks, 64, 1, 576) of the same dtype, changed in place.
    slot_mapping: (num_tokens,) int32 or int64, page * 64 + offset in the page; negative: not written.

Wrong dtypes raise TypeError, wrong shapes, strides, devices and values ValueError, GPUs other than sm_90 RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_mla import cpu, extension, schedule
from flash_mla.checks import (
    HEAD_DIM_V,
    DecodeArguments,
    check_append,
    check_decode_schedule,
    check_dense_decode,
    check_out,
    check_plan,
)

_DECODE_ARGUMENTS = (
    "Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor tile_scheduler_metadata, "
    "Tensor num_splits, float softmax_scale, bool causal, bool batch_invariant=False"
)
_SCHEMAS = (
    "decode_schedule(Tensor cache_seqlens, int num_rows_per_head_kv, int num_heads_kv, bool batch_invariant=False)"
    " -> (Tensor tile_scheduler_metadata, Tensor num_splits)",
    f"dense_decode({_DECODE_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    f"dense_decode_out({_DECODE_ARGUMENTS}, *, Tensor(a!) out) -> Tensor lse",
    "append_kv(Tensor kv_c, Tensor k_pe, Tensor(a!) cache, Tensor slot_mapping) -> ()",
)

# Not DEF, of which a process can have one per namespace: sgl-flash-mla, which SGLang may load, defines ops here too.
_library = torch.library.Library("flash_mla", "FRAGMENT")
for _schema in _SCHEMAS:
    # The compiler must hand over tensors with the strides they have in eager mode: the checks depend on them.
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))


def _fake_decode_schedule(
    cache_seqlens: Tensor, num_rows_per_head_kv: int, num_heads_kv: int, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    check_decode_schedule(cache_seqlens, num_rows_per_head_kv, num_heads_kv)
    rows = _num_plan_rows(num_rows_per_head_kv, num_heads_kv, cache_seqlens.device)
    metadata = cache_seqlens.new_empty(rows, schedule.METADATA_COLUMNS)
    return metadata, cache_seqlens.new_empty(cache_seqlens.shape[0] + 1)


def _fake_dense_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = DecodeArguments(*arguments)
    lse = _fake_lse(given)
    return given.q.new_empty(*given.q.shape[:3], HEAD_DIM_V), lse


def _fake_dense_decode_out(*arguments: Any, out: Tensor) -> Tensor:
    given = DecodeArguments(*arguments)
    lse = _fake_lse(given)
    check_out(out, given.q)
    return lse


def _fake_lse(given: DecodeArguments) -> Tensor:
    check_dense_decode(given)
    check_plan(given, _num_plan_rows(given.num_rows_per_head_kv, given.num_heads_kv, given.q.device))
    batch_size, seqlen_q, num_heads_q, _ = given.q.shape
    return given.q.new_empty(batch_size, num_heads_q, seqlen_q, dtype=torch.float32)


def _num_plan_rows(num_rows_per_head_kv: int, num_heads_kv: int, device: torch.device) -> int:
    """Compiled in, so that other head counts compile again; other batch sizes do not."""
    num_sms = schedule.capacity_of(device).num_sms
    return schedule.num_plan_rows(int(num_rows_per_head_kv), int(num_heads_kv), num_sms)


def _fake_append_kv(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    check_append(kv_c, k_pe, cache, slot_mapping)


def _no_kernels(*args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(f"flash_mla has no kernels for CUDA tensors: {extension.unavailable_reason()}")


_library.impl("decode_schedule", cpu.decode_schedule, "CPU")
_library.impl("dense_decode", cpu.dense_decode, "CPU")
_library.impl("dense_decode_out", cpu.dense_decode_out, "CPU")
_library.impl("append_kv", cpu.append_kv, "CPU")
torch.library.register_fake("flash_mla::decode_schedule", _fake_decode_schedule, lib=_library)
torch.library.register_fake("flash_mla::dense_decode", _fake_dense_decode, lib=_library)
torch.library.register_fake("flash_mla::dense_decode_out", _fake_dense_decode_out, lib=_library)
torch.library.register_fake("flash_mla::append_kv", _fake_append_kv, lib=_library)

_module = extension.load_extension().module
if _module is None:
    for _name in ("decode_schedule", "dense_decode", "dense_decode_out", "append_kv"):
        _library.impl(_name, _no_kernels, "CUDA")

# The overloads themselves: calling these skips the search for an overload in every call.
decode_schedule = torch.ops.flash_mla.decode_schedule.default
dense_decode = torch.ops.flash_mla.dense_decode.default
dense_decode_out = torch.ops.flash_mla.dense_decode_out.default
append_kv = torch.ops.flash_mla.append_kv.default


def _not_plain(*arguments: object) -> None:
    return None


# Short cuts of the eager path, None for calls that are not plain: tensors that are not on the GPU or are more than
# tensors, gradients, modes, tracing, profiling. They are no ops: not for code that is being compiled.
# dense_decode_plain takes the arguments of dense_decode and out or None, by position, and returns (out, lse);
# describe_plain_call takes q and k_cache and returns what plan.describe_call does.
dense_decode_plain: Callable[..., tuple[Tensor, Tensor] | None]
dense_decode_plain = getattr(_module, "dense_decode_plain", _not_plain)
describe_plain_call: Callable[[Tensor, Tensor], tuple[int, int, int, bool] | None]
describe_plain_call = getattr(_module, "describe_plain_call", _not_plain)
