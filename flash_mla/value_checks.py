"""Checks of values that lie on the device: lengths, page numbers, slots and plans. Each synchronizes with the GPU.

The environment variable FLASH_MLA_CHECK=1, read when the package is imported, turns them on for GPU tensors; the CPU
implementations always do them. Negative lengths have a meaning, that of 0: they are reported only where the variable
is set, on the CPU too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from flash_mla.checks import DecodeArguments
from flash_mla.schedule import MAX_SEGMENTS, METADATA_COLUMNS, PAGE_SIZE, WorkerGrid, capacity_of, decode_grid


def is_switched_on(environ: Mapping[str, str] = os.environ, variable: str = "FLASH_MLA_CHECK") -> bool:
    return environ.get(variable, "").strip() not in ("", "0")


ENABLED = is_switched_on()


def are_wanted_for(tensor: Tensor) -> bool:
    """Whether values beside this tensor are to be checked: not in compiled code nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or (ENABLED and tensor.is_cuda and not torch.cuda.is_current_stream_capturing())


def check_slots(slot_mapping: Tensor, num_slots: int) -> None:
    """Raise ValueError for a token whose slot lies behind the end of the cache; negative ones are allowed."""
    if slot_mapping.shape[0] == 0:
        return
    last, token = slot_mapping.max(0)
    slot, index = torch.stack([last.to(torch.int64), token]).tolist()
    if slot >= num_slots:
        raise ValueError(
            f"slot_mapping must hold slots less than {num_slots} = {num_slots // PAGE_SIZE} pages of {PAGE_SIZE} "
            f"tokens, got {slot} for token {index}"
        )


def check_lengths_and_pages(block_table: Tensor, cache_seqlens: Tensor, num_blocks: int) -> None:
    """Raise ValueError for a request that is longer than its row of the block table or has a page out of range, and
    where FLASH_MLA_CHECK=1 is set for one of negative length.

    Args:
        block_table: (batch_size, max_blocks) int32; only the first ceil(length / 64) entries of a row are looked at.
        cache_seqlens: (batch_size,) int32; negative counts as 0.
        num_blocks: pages of the cache.
    """
    batch_size, max_blocks = block_table.shape
    if batch_size == 0:
        return
    num_used = (cache_seqlens.to(torch.int64) + (PAGE_SIZE - 1)).div(PAGE_SIZE, rounding_mode="floor")
    column = torch.arange(max_blocks, device=block_table.device)
    is_bad = ((block_table < 0) | (block_table >= num_blocks)) & (column < num_used[:, None])
    # The first bad column of each row, max_blocks where there is none.
    first_bad = torch.where(is_bad, column, max_blocks).amin(1) if max_blocks > 0 else torch.zeros_like(num_used)
    has_problem = (num_used > max_blocks) | (first_bad < max_blocks)
    if ENABLED:
        has_problem |= cache_seqlens < 0
    request = has_problem.to(torch.int32).argmax()  # the first one
    # One transfer for all that a message needs.
    found, request_index, length, bad_column = torch.stack(
        [has_problem.any().to(torch.int64), request, cache_seqlens[request], first_bad[request]]
    ).tolist()
    if not found:
        return
    if length < 0:
        raise ValueError(f"cache_seqlens must not be negative, got {length} for request {request_index}")
    if bad_column < max_blocks:
        page = int(block_table[request_index, bad_column])
        raise ValueError(
            f"block_table must hold pages 0 to {num_blocks - 1} for the {length} tokens of request {request_index}, "
            f"got {page} in column {bad_column}"
        )
    raise ValueError(
        f"cache_seqlens must be at most {max_blocks * PAGE_SIZE}, the tokens of {max_blocks} blocks in a row of "
        f"block_table, got {length} for request {request_index}"
    )


def check_planned_tiles(tile_scheduler_metadata: Tensor, batch_size: int, grid: WorkerGrid) -> None:
    """Raise ValueError for a plan that was made for another number of requests, tiles or workers, or that was never
    filled in.

    Plans for other shapes or GPUs often have the same shape, and the kernels follow them: results would stay unwritten,
    or requests that do not exist would be read. A plan ends with the last tile of the last request whatever the
    lengths.
    """
    if batch_size == 0:
        return
    *_, end_batch, end_tile, _, num_pieces, _ = tile_scheduler_metadata.unbind(1)
    workers = torch.arange(num_pieces.shape[0], dtype=num_pieces.dtype, device=num_pieces.device)
    is_of_other_kind = _cuts_otherwise(tile_scheduler_metadata, workers, grid.is_invariant).to(num_pieces.dtype)
    ends = torch.stack([end_batch, end_tile, workers, is_of_other_kind]).where(num_pieces > 0, -1)
    last_request, last_tile, last_worker, is_other_kind = ends.amax(1).tolist()
    if (last_request, last_tile) != (batch_size - 1, grid.tiles_per_request - 1):
        expected = f"{batch_size} requests of {grid.tiles_per_request} tiles (for these head counts and seqlen_q)"
        actual = f"one for {last_request + 1} of {last_tile + 1}" if last_request >= 0 else "one without work"
        raise ValueError(f"tile_scheduler_metadata must be a plan for {expected}, got {actual}")
    if last_worker >= grid.num_workers:
        raise ValueError(
            f"tile_scheduler_metadata must be a plan for {grid.num_workers} workers (for these head counts, seqlen_q, "
            f"GPU and enable_batch_invariant), got one for {last_worker + 1} or more"
        )
    if is_other_kind > 0:
        kinds = ("one that is not batch-invariant", "a batch-invariant one")
        raise ValueError(
            f"tile_scheduler_metadata must be a plan for this call, {kinds[grid.is_invariant]}, "
            f"got {kinds[not grid.is_invariant]}"
        )


def _cuts_otherwise(tile_scheduler_metadata: Tensor, workers: Tensor, is_invariant: bool) -> Tensor:
    """For each worker with work, whether it ends as none does in a plan of this kind. Plans that cut no tile may be of
    both kinds."""
    begin_block, end_block, last_worker = (tile_scheduler_metadata[:, i] for i in (2, 5, 7))
    next_begins_inside = begin_block.roll(-1) > 0
    next_begins_inside[-1:] = False
    if not is_invariant:
        return (last_worker != workers) != next_begins_inside
    return (last_worker != workers) | (end_block > MAX_SEGMENTS) | ((end_block < MAX_SEGMENTS) != next_begins_inside)


def check_values_unless_capturing(arguments: DecodeArguments) -> None:
    """The checks above for arguments that no op has looked at yet; nothing while a CUDA graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        return
    q, k_cache, block_table, cache_seqlens, metadata, *_ = arguments
    # What these rule out the op reports, without a look at any value.
    if not (
        all(isinstance(tensor, Tensor) for tensor in (block_table, cache_seqlens))
        and q.dim() == k_cache.dim() == 4
        and block_table.dim() == metadata.dim() == 2
        and metadata.shape[1] == METADATA_COLUMNS
        and cache_seqlens.shape == block_table.shape[:1] == q.shape[:1]
        and k_cache.shape[2] > 0
        and all(tensor.device == q.device for tensor in (k_cache, block_table, cache_seqlens, metadata))
    ):
        return
    counts = arguments.num_rows_per_head_kv, arguments.num_heads_kv
    grid = decode_grid(q.shape[0], *counts, capacity_of(q.device), arguments.batch_invariant)
    check_planned_tiles(metadata, q.shape[0], grid)
    check_lengths_and_pages(block_table, cache_seqlens, k_cache.shape[0])
