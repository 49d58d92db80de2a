"""The public functions, with the names, order and defaults that callers of FlashMLA, vLLM and SGLang use."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_mla import ops, schedule, value_checks
from flash_mla.checks import DTYPES, HEAD_DIM, HEAD_DIM_V, DecodeArguments, check_count, check_tensor
from flash_mla.plan import FlashMLASchedMeta, tensors_of_plan

# Whether all calls are batch-invariant, also those that do not ask for it.
BATCH_INVARIANT = value_checks.is_switched_on(variable="FLASH_MLA_BATCH_INVARIANT")

_DEFAULT_SCALE = HEAD_DIM**-0.5
_PARTIAL_ROW_BYTES = 4 * (HEAD_DIM_V + 1)  # float32 out and its log-sum-exp


def get_mla_metadata(
    *args: object, enable_batch_invariant: bool = False, **kwargs: object
) -> tuple[FlashMLASchedMeta, None]:
    """An empty schedule for one decode step.

    The first call of `flash_mla_with_kvcache` that gets it plans on the device; calls for other layers with the same
    shapes use that plan. All other arguments are ignored: they are those of releases that planned here.
    `get_mla_decoding_metadata` is for callers who need tensors.

    Args:
        enable_batch_invariant: whether all calls with this schedule are to be batch-invariant, as if each of them asked
            for it.

    Returns:
        The schedule and None, for the arguments tile_scheduler_metadata and num_splits.
    """
    return FlashMLASchedMeta(_wants_batch_invariance(enable_batch_invariant)), None


def get_mla_decoding_metadata(
    cache_seqlens: Tensor | None = None,
    num_q_tokens_per_head_k: int | None = None,
    num_heads_k: int | None = None,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
    *,
    seqlens_k: Tensor | None = None,
    num_heads_per_head_k: int | None = None,
    enable_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plan a decode now, on the device and without synchronization.

    The plan names no addresses, so it can be copied into persistent buffers. Its shapes depend on the batch size and
    the head counts only. A plan for other lengths of the same batch costs balance, not correctness.

    Args:
        cache_seqlens: (batch_size,) int32, tokens in the cache of each request. Also accepted as seqlens_k.
        num_q_tokens_per_head_k: query rows per KV head, seqlen_q * num_heads_q / num_heads_k. Also accepted as
            num_heads_per_head_k.
        num_heads_k: KV heads.
        num_heads_q: query heads; only checked against the other counts.
        is_fp8_kvcache, topk: of fp8 and sparse attention, for which NotImplementedError is raised.
        enable_batch_invariant: as in the calls that the plan is for: the tensors do not tell them. With
            FLASH_MLA_BATCH_INVARIANT=1 in the environment plans and calls are batch-invariant in any case.

    Returns:
        tile_scheduler_metadata: (num_plan_rows, 8) int32, num_plan_rows at most the number of SMs.
        num_splits: (batch_size + 1,) int32.
    """
    if is_fp8_kvcache:
        _reject("is_fp8_kvcache", is_fp8_kvcache, "an fp8 cache")
    if topk is not None:
        _reject("topk", topk, "sparse attention")
    lengths_of_cache = _either("cache_seqlens", cache_seqlens, "seqlens_k", seqlens_k)
    num_rows = _either("num_q_tokens_per_head_k", num_q_tokens_per_head_k, "num_heads_per_head_k", num_heads_per_head_k)
    if num_heads_k is None:
        raise TypeError("num_heads_k is missing")
    if num_heads_q is not None:
        if num_heads_q < 1 or num_heads_k < 1 or num_heads_q % num_heads_k != 0:
            raise ValueError(f"num_heads_q must be a multiple of num_heads_k = {num_heads_k}, got {num_heads_q}")
        group = num_heads_q // num_heads_k
        if num_rows % group != 0:
            raise ValueError(
                f"num_q_tokens_per_head_k must be a multiple of num_heads_q / num_heads_k = {group}, got {num_rows}"
            )
    batch_invariant = _wants_batch_invariance(enable_batch_invariant)
    return ops.decode_schedule(lengths_of_cache, num_rows, num_heads_k, batch_invariant)


def decode_workspace_bytes(
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    *,
    device: torch.device | str | int | None = None,
    num_sms: int | None = None,
    batch_size: int | None = None,
    enable_batch_invariant: bool = False,
) -> int:
    """Scratch memory of one call of `flash_mla_with_kvcache` on a GPU, in bytes, besides the results it returns.

    It holds the partial results of requests that are split among SMs, 35 MB on a GPU of 132 SMs and less than 64 MB on
    any that the kernels run on, whatever the batch size, the lengths and the head counts. It comes from torch's
    allocator and goes back there as the call returns; in a CUDA graph it belongs to the graph's memory pool and replays
    allocate nothing. The CPU implementation has no such memory.

    Batch-invariant calls take other amounts, which depend on the batch size too, not on lengths, and are at most 64 MB.

    Args:
        num_q_tokens_per_head_k, num_heads_k: as in `get_mla_decoding_metadata`.
        device: a CUDA device, the current one by default. For the CPU, and where the kernels cannot run, the
            answer is that for an H100 or H200.
        num_sms: streaming multiprocessors of a GPU that is not here, instead of a device.
        batch_size: requests of a batch-invariant call; without it the answer is the most that any takes. Other calls
            take the same for all.
        enable_batch_invariant: as in the call; with FLASH_MLA_BATCH_INVARIANT=1 in the environment always.

    Raises:
        TypeError, ValueError: a count is not an integer or less than 1, or device and num_sms are both given.
    """
    check_count("num_q_tokens_per_head_k", num_q_tokens_per_head_k, 1)
    check_count("num_heads_k", num_heads_k, 1)
    if batch_size is not None:
        check_count("batch_size", batch_size, 0)
    if num_sms is None:
        capacity = schedule.capacity_of(torch.device("cuda" if device is None else device))
    elif device is not None:
        raise ValueError(f"num_sms must be None where device is given, got {num_sms}")
    else:
        check_count("num_sms", num_sms, 1)
        # As many clusters as there are SMs for: some GPUs run fewer.
        capacity = schedule.ClusterCapacity((0, *(num_sms // size for size in range(1, schedule.MAX_SPLIT_CTAS + 1))))
    if not _wants_batch_invariance(enable_batch_invariant):
        rows = schedule.num_partial_rows(num_q_tokens_per_head_k, num_heads_k, capacity.num_sms)
        return rows * _PARTIAL_ROW_BYTES
    if batch_size is None:
        return schedule.MAX_SCRATCH_BYTES
    grid = schedule.invariant_grid(batch_size, num_q_tokens_per_head_k, num_heads_k, capacity)
    return schedule.invariant_scratch_bytes(grid, batch_size)


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor | Any,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool | None = None,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    out: Tensor | None = None,
    enable_batch_invariant: bool = False,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
    kv_format: Any = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last seqlen_q tokens of every request over its tokens in a paged latent cache.

    Args:
        q: (batch_size, seqlen_q, num_heads_q, 576) bfloat16 or float16, on the CPU also float32. Contiguous in the last
            dimension, other strides any multiples of 8 elements.
        k_cache: (num_blocks, 64, num_heads_kv, 576), dtype and strides as q: pages of 64 tokens. The first 512 values
            of a token serve as its V.
        block_table: (batch_size, max_blocks) int32, the pages of each request; never read past the tokens it has.
        cache_seqlens: (batch_size,) int32, tokens in the cache of each request, those of q included; negative counts
            as 0.
        head_dim_v: 512.
        tile_scheduler_metadata, num_splits: the schedule of `get_mla_metadata` with None, or the tensors of
            `get_mla_decoding_metadata`.
        softmax_scale: factor of the scores; 576 ** -0.5 by default.
        causal: whether query i sees the tokens j <= cache_seqlens - seqlen_q + i only.
        is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length:
            of attention that this package does not have; NotImplementedError for anything but None and False.
        enable_batch_invariant: whether the bits of a request's results must not depend on the other requests of the
            batch, their number, their order nor their lengths; see docs/reliability.md for what it costs. Also switched
            on by the schedule, with `get_mla_metadata(enable_batch_invariant=True)`, and for all calls by
            FLASH_MLA_BATCH_INVARIANT=1 in the environment. Tensors of a plan must have been made for it.
        descale_q, descale_k, kv_format: of fp8 attention; NotImplementedError for anything but None.
        out: where to write the result, instead of a new tensor; strides as those of q. No other argument may have
            elements between its first and its last.

    Returns:
        out: (batch_size, seqlen_q, num_heads_q, 512) in the dtype of q.
        lse: (batch_size, num_heads_q, seqlen_q) float32, natural logarithm of the sum of exponentials.
        Rows that see no key have out 0 and lse +inf.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, strides or device, or the plan was made for
            other shapes. Always on the CPU, on the GPU with FLASH_MLA_CHECK=1 in the environment, also: a request has
            more tokens than its row of the block table, or pages that the cache does not have, or the plan is one for
            other shapes although its own shape does not show it. With that variable on both: a request has a negative
            length.
        RuntimeError: the kernels are not built, or the GPU is not an sm_90 one.
    """
    if not (
        indices is None
        and attn_sink is None
        and extra_k_cache is None
        and extra_indices_in_kvcache is None
        and topk_length is None
        and extra_topk_length is None
        and descale_q is None
        and descale_k is None
        and kv_format is None
        and (is_fp8_kvcache is None or is_fp8_kvcache is False)
        and head_dim_v == HEAD_DIM_V
        and isinstance(q, Tensor)
        and isinstance(k_cache, Tensor)
        and q.dtype in DTYPES
    ):
        _reject_what_is_unsupported(
            q,
            k_cache,
            head_dim_v,
            is_fp8_kvcache=is_fp8_kvcache,
            indices=indices,
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            topk_length=topk_length,
            extra_topk_length=extra_topk_length,
            descale_q=descale_q,
            descale_k=descale_k,
            kv_format=kv_format,
        )
    if softmax_scale is None:
        softmax_scale = _DEFAULT_SCALE
    is_compiling = torch.compiler.is_compiling()
    batch_invariant = BATCH_INVARIANT or enable_batch_invariant is True
    if not batch_invariant and enable_batch_invariant is not False:
        batch_invariant = _wants_batch_invariance(enable_batch_invariant)

    # The types are compared first as isinstance takes long to find that an object is no tensor.
    if type(tile_scheduler_metadata) is not FlashMLASchedMeta and isinstance(tile_scheduler_metadata, Tensor):
        metadata = tile_scheduler_metadata
        if num_splits is None:
            raise ValueError("num_splits must be the tensor that came with tile_scheduler_metadata, got None")
    elif hasattr(tile_scheduler_metadata, "tile_scheduler_metadata"):
        if num_splits is not None:
            raise ValueError(
                "num_splits must be None where tile_scheduler_metadata is a schedule object, "
                f"got {type(num_splits).__name__}"
            )
        # Schedule objects of others do not have the wish.
        batch_invariant = batch_invariant or getattr(tile_scheduler_metadata, "enable_batch_invariant", False) is True
        metadata, num_splits = tensors_of_plan(
            tile_scheduler_metadata, q, k_cache, cache_seqlens, is_compiling, batch_invariant
        )
    else:
        raise TypeError(
            "tile_scheduler_metadata must be what get_mla_metadata or get_mla_decoding_metadata returned, "
            f"got {type(tile_scheduler_metadata).__name__}"
        )

    arguments = (q, k_cache, block_table, cache_seqlens, metadata, num_splits, softmax_scale, causal, batch_invariant)
    if not is_compiling:
        if value_checks.ENABLED and q.is_cuda:
            value_checks.check_values_unless_capturing(DecodeArguments(*arguments))
        result = ops.dense_decode_plain(*arguments, out)
        if result is not None:
            return result
    if out is None:
        return ops.dense_decode(*arguments)
    return out, ops.dense_decode_out(*arguments, out=out)


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = HEAD_DIM_V,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> NoReturn:
    """Sparse prefill, which this package does not have: raises NotImplementedError."""
    raise NotImplementedError("flash_mla_sparse_fwd is not implemented: this package has dense decoding only")


def get_mla_metadata_dense_fp8(*args: object, **kwargs: object) -> NoReturn:
    """Plan for fp8 queries and an fp8 cache, as vLLM does: raises NotImplementedError."""
    raise NotImplementedError("get_mla_metadata_dense_fp8 is not implemented: this package has no fp8 decoding")


def flash_mla_with_kvcache_fp8(*args: object, **kwargs: object) -> NoReturn:
    """Decode of fp8 queries and an fp8 cache, as vLLM calls it: raises NotImplementedError."""
    raise NotImplementedError("flash_mla_with_kvcache_fp8 is not implemented: this package has no fp8 decoding")


def _either(name: str, value: Any, other_name: str, other_value: Any) -> Any:
    """The value of an argument that has two names."""
    if value is None and other_value is None:
        raise TypeError(f"{name} is missing")
    if value is not None and other_value is not None:
        raise TypeError(f"{name} and {other_name} are names of the same argument, got both")
    return other_value if value is None else value


def _wants_batch_invariance(enable_batch_invariant: bool) -> bool:
    if enable_batch_invariant is not None and not isinstance(enable_batch_invariant, bool):
        raise TypeError(f"enable_batch_invariant must be a bool, got {enable_batch_invariant!r}")
    return BATCH_INVARIANT or bool(enable_batch_invariant)


_UNSUPPORTED = {
    "is_fp8_kvcache": "an fp8 cache",
    "indices": "sparse attention",
    "attn_sink": "attention sinks",
    "extra_k_cache": "a second cache",
    "extra_indices_in_kvcache": "a second cache",
    "topk_length": "sparse attention",
    "extra_topk_length": "sparse attention",
    "descale_q": "fp8 queries",
    "descale_k": "an fp8 cache",
    "kv_format": "other cache formats",
}


def _reject_what_is_unsupported(q: Tensor, k_cache: Tensor, head_dim_v: int, **arguments: object) -> None:
    """Raise for the first argument that asks for what is not there; return if none does."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            _reject(name, value, _UNSUPPORTED[name])
    for name, tensor in (("q", q), ("k_cache", k_cache)):
        check_tensor(name, tensor)
        if tensor.dtype.itemsize == 1:
            raise NotImplementedError(f"{name} must have dtype torch.bfloat16 or torch.float16, got {tensor.dtype}")
    if head_dim_v != HEAD_DIM_V:
        raise ValueError(f"head_dim_v must be {HEAD_DIM_V}, got {head_dim_v}")


def _reject(name: str, value: object, feature: str) -> NoReturn:
    given = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
    raise NotImplementedError(f"{name}: {feature} is not implemented; expected None or False, got {given}")
