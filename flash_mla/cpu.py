"""CPU implementations of the ops in plain torch operations, for all that the kernels support, and for float32.

Results are computed in float32. Only tokens of the request itself are read from the cache: the rest may hold NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_mla import schedule
from flash_mla.checks import (
    HEAD_DIM_V,
    DecodeArguments,
    check_addresses,
    check_append,
    check_decode_schedule,
    check_dense_decode,
    check_out,
    check_out_memory,
    check_plan,
)
from flash_mla.schedule import CPU_CAPACITY, PAGE_SIZE
from flash_mla.value_checks import check_lengths_and_pages, check_planned_tiles, check_slots

_PAGES_PER_STEP = 64  # bounds the float32 copies: 4096 tokens at a time


def decode_schedule(
    cache_seqlens: Tensor, num_rows_per_head_kv: int, num_heads_kv: int, batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    """The plan for an H200."""
    check_decode_schedule(cache_seqlens, num_rows_per_head_kv, num_heads_kv)
    return schedule.decode_schedule(cache_seqlens, num_rows_per_head_kv, num_heads_kv, CPU_CAPACITY, batch_invariant)


def dense_decode(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = DecodeArguments(*arguments)
    check_dense_decode(given)
    out = given.q.new_empty(*given.q.shape[:3], HEAD_DIM_V)
    return out, _decode_into(out, given)


def dense_decode_out(*arguments: Any, out: Tensor) -> Tensor:
    given = DecodeArguments(*arguments)
    check_dense_decode(given)
    check_out(out, given.q)
    check_out_memory(out, given)
    return _decode_into(out, given)


@torch.no_grad()
def append_kv(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    check_append(kv_c, k_pe, cache, slot_mapping)
    check_slots(slot_mapping, cache.shape[0] * PAGE_SIZE)
    is_written = slot_mapping >= 0
    slots = slot_mapping[is_written].long()
    tokens = torch.cat([kv_c[is_written], k_pe[is_written].flatten(1)], dim=1)
    cache[slots // PAGE_SIZE, slots % PAGE_SIZE, 0] = tokens


@torch.no_grad()  # as the kernels: a gradient from here would be missing on a GPU
@torch.autocast("cpu", enabled=False)
def _decode_into(out: Tensor, given: DecodeArguments) -> Tensor:
    q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, _, softmax_scale, causal, batch_invariant = given
    batch_size, seqlen_q, num_heads_q, _ = q.shape
    check_addresses(given)
    counts = given.num_rows_per_head_kv, given.num_heads_kv
    check_plan(given, schedule.num_plan_rows(*counts, CPU_CAPACITY.num_sms))
    # Nothing here follows the plan: each request is computed by itself, so that its bits never depend on the others. A
    # wrong plan is found all the same, as on a GPU it would give wrong results.
    grid = schedule.decode_grid(batch_size, *counts, CPU_CAPACITY, batch_invariant)
    check_planned_tiles(tile_scheduler_metadata, batch_size, grid)
    check_lengths_and_pages(block_table, cache_seqlens, k_cache.shape[0])

    lse = q.new_empty(batch_size, num_heads_q, seqlen_q, dtype=torch.float32)
    for request, length in enumerate(cache_seqlens.tolist()):
        pages = block_table[request, : -(-max(length, 0) // PAGE_SIZE)]
        request_out, request_lse = _decode_request(q[request], k_cache, pages, max(length, 0), softmax_scale, causal)
        out[request] = request_out
        lse[request] = request_lse
    return lse


def _decode_request(
    q: Tensor, k_cache: Tensor, pages: Tensor, length: int, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """One request by online softmax over steps of its pages.

    Args:
        q: (seqlen_q, num_heads_q, 576).
        pages: (ceil(length / 64),) int32.

    Returns:
        float32 out (seqlen_q, num_heads_q, 512) and lse (num_heads_q, seqlen_q).
    """
    seqlen_q, num_heads_q, head_dim = q.shape
    num_heads_kv = k_cache.shape[2]
    # Rows of one KV head: token by token, the heads of its group.
    rows = q.float().view(seqlen_q, num_heads_kv, -1, head_dim).transpose(0, 1).flatten(1, 2)
    # Devices are named throughout: the default one may be another.
    num_visible = torch.full((seqlen_q,), length, device=q.device)
    if causal:
        num_visible += torch.arange(1 - seqlen_q, 1, device=q.device)
    num_visible = num_visible.repeat_interleave(num_heads_q // num_heads_kv)

    row_max = rows.new_full(rows.shape[:2], float("-inf"))
    row_sum = torch.zeros_like(row_max)
    acc = rows.new_zeros(*rows.shape[:2], HEAD_DIM_V)
    for begin in range(0, pages.shape[0], _PAGES_PER_STEP):
        keys = k_cache[pages[begin : begin + _PAGES_PER_STEP].long()].flatten(0, 1)[:length].float().transpose(0, 1)
        length -= keys.shape[1]
        scores = rows @ keys.transpose(1, 2) * softmax_scale
        key = torch.arange(keys.shape[1], device=q.device)
        scores.masked_fill_(key >= num_visible[:, None], float("-inf"))
        num_visible = num_visible - keys.shape[1]

        new_max = torch.maximum(row_max, scores.amax(-1))
        # Rows that have seen no key yet stay at a sum of 0.
        finite_max = new_max.masked_fill(new_max == float("-inf"), 0.0)
        weights = torch.exp(scores - finite_max[..., None])
        rescale = torch.exp(row_max - finite_max)
        row_sum = row_sum * rescale + weights.sum(-1)
        acc = acc * rescale[..., None] + weights @ keys[..., :HEAD_DIM_V]
        row_max = new_max

    sees_no_key = row_max == float("-inf")
    out = (acc / row_sum[..., None]).masked_fill(sees_no_key[..., None], 0.0)
    lse = (row_max + row_sum.log()).masked_fill(sees_no_key, float("inf"))
    out = out.view(num_heads_kv, seqlen_q, -1, HEAD_DIM_V).transpose(0, 1).flatten(1, 2)
    return out, lse.view(num_heads_kv, seqlen_q, -1).transpose(1, 2).flatten(0, 1)
