"""The schedule object that callers create per step and hand to the calls of all layers, which plan when it is empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flash_mla import ops
from flash_mla.checks import (
    check_head_counts,
    check_k_cache_shape,
    check_on_device,
    check_q_shape,
    check_shape,
    check_tensor,
)


class PlanConfig(NamedTuple):
    """What a plan was made for. Lengths are not part of it: they are taken from the cache_seqlens of each call."""

    batch_size: int
    num_rows_per_head_kv: int  # seqlen_q * num_heads_q / num_heads_kv
    num_heads_kv: int
    in_graph_capture: bool  # planned inside a CUDA graph: the tensors hold nothing before its first replay
    batch_invariant: bool = False


class FlashMLASchedMeta:
    """How the work of a decode is divided, filled in by the first call of flash_mla_with_kvcache that gets the object.

    Attributes:
        enable_batch_invariant: whether calls with this schedule are batch-invariant even if they do not ask for it.
        have_initialized: whether a call has filled in the plan. Not consulted: a plan is there if its tensors are.
        config: what the plan was made for; None before the first call and for tensors that were set from outside.
        tile_scheduler_metadata: (num_plan_rows, 8) int32, or None.
        num_splits: (batch_size + 1,) int32, or None.
    """

    enable_batch_invariant: bool
    have_initialized: bool
    config: PlanConfig | None
    tile_scheduler_metadata: Tensor | None
    num_splits: Tensor | None

    def __init__(self, enable_batch_invariant: bool = False) -> None:
        self.enable_batch_invariant = enable_batch_invariant
        self.have_initialized = False
        self.config = None
        self.tile_scheduler_metadata = None
        self.num_splits = None

    def __repr__(self) -> str:
        return f"FlashMLASchedMeta(have_initialized={self.have_initialized}, config={self.config})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> NoReturn:
        raise TypeError(
            f"{getattr(func, '__name__', func)} needs a tensor, got a FlashMLASchedMeta, which may hold none yet; "
            "flash_mla.get_mla_decoding_metadata(...) returns tensors"
        )

    def __getattr__(self, name: str) -> NoReturn:
        # Only reached for attributes that do not exist.
        hint = "; flash_mla.get_mla_decoding_metadata(...) returns tensors" if hasattr(Tensor, name) else ""
        raise AttributeError(f"FlashMLASchedMeta has no attribute {name!r}{hint}")


def describe_call(q: Tensor, k_cache: Tensor, is_compiling: bool) -> tuple[int, int, int, bool]:
    """What a plan has to be made for to serve this call: the first fields of PlanConfig, in a tuple, which is made
    faster."""
    if not is_compiling:
        call = ops.describe_plain_call(q, k_cache)
        if call is not None:
            return call
    q_shape, k_shape = q.shape, k_cache.shape
    if len(q_shape) != 4:
        check_q_shape(q)
    if len(k_shape) != 4:
        check_k_cache_shape(k_cache)
    batch_size, seqlen_q, num_heads_q, _ = q_shape
    num_heads_kv = k_shape[2]
    if num_heads_kv < 1:
        check_head_counts(seqlen_q, num_heads_q, num_heads_kv)
    # Traced code is captured as a whole or not at all, so there the question does not arise.
    in_graph_capture = q.is_cuda and not is_compiling and torch.cuda.is_current_stream_capturing()
    return batch_size, seqlen_q * num_heads_q // num_heads_kv, num_heads_kv, in_graph_capture


def tensors_of_plan(
    plan: Any, q: Tensor, k_cache: Tensor, cache_seqlens: Tensor, is_compiling: bool, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """The tensors of a schedule object, planning first if it has none.

    Args:
        plan: a FlashMLASchedMeta, or any object with its attributes: serving frameworks define their own.
        is_compiling: torch.compiler.is_compiling(), which costs an eager call more than to be handed on.

    A plan that an eager call made is made anew while a CUDA graph is captured, and the other way round: a graph must
    contain its planning, or replays would use the plan for the lengths of the warm-up; and the tensors of a plan inside
    a graph hold nothing before its first replay. Tensors that the caller has set are used as they are.
    """
    call = (*describe_call(q, k_cache, is_compiling), batch_invariant)
    metadata, num_splits = plan.tile_scheduler_metadata, plan.num_splits
    if metadata is not None and num_splits is not None:
        made_for = plan.config
        if made_for == call or not isinstance(made_for, PlanConfig):
            return metadata, num_splits
        if made_for[:3] != call[:3] or made_for.batch_invariant != batch_invariant:
            raise ValueError(
                f"tile_scheduler_metadata must be a plan for {_describe(PlanConfig(*call))}, "
                f"got one for {_describe(made_for)}"
            )
    config = PlanConfig(*call)
    # What is planned here has to serve the next call too, should this one fail for another reason.
    check_head_counts(q.shape[1], q.shape[2], config.num_heads_kv)
    check_tensor("cache_seqlens", cache_seqlens)
    check_shape("cache_seqlens", cache_seqlens, "(batch_size,)", [config.batch_size])
    check_on_device("cache_seqlens", cache_seqlens, q.device)
    counts = config.num_rows_per_head_kv, config.num_heads_kv
    metadata, num_splits = ops.decode_schedule(cache_seqlens, *counts, batch_invariant)
    plan.tile_scheduler_metadata = metadata
    plan.num_splits = num_splits
    plan.config = config
    plan.have_initialized = True
    return metadata, num_splits


def _describe(config: PlanConfig) -> str:
    return (
        f"{config.batch_size} requests, {config.num_rows_per_head_kv} query rows per kv head (seqlen_q * num_heads_q / "
        f"num_heads_kv) and {config.num_heads_kv} kv heads{', batch-invariant' if config.batch_invariant else ''}"
    )
