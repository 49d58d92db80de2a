"""Host twin of the tile scheduler: how decode work is divided among the workers of a GPU.

Work is a line: for every request, for every tile of the request, its KV blocks. Each worker takes one stretch of that
line. A worker is a group of `num_lanes` CTAs that read the same KV blocks for neighbouring 64-row tiles of query rows.
The arithmetic is that of csrc/params/work_division.h and csrc/kernels/decode_schedule, integers only; the tests hold
the two together bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PAGE_SIZE = 64  # tokens per page, and per KV block
BLOCK_M = 64  # query rows per CTA
MAX_LANES = 8  # CTAs that share one stretch of KV blocks
SPLIT_OVERHEAD_BLOCKS = 5  # what starting a piece costs, in KV blocks
MIN_BLOCKS_PER_SPLIT = 2  # the least that is worth a split
METADATA_COLUMNS = 8
CPU_NUM_SMS = 132  # CPU tensors are planned as for an H100 or H200


class WorkerGrid(NamedTuple):
    """How many CTAs there are and how they are grouped; independent of batch size and lengths."""

    num_lanes: int  # CTAs per worker
    num_workers: int  # rows of tile_scheduler_metadata
    tiles_per_request: int


class Pieces(NamedTuple):
    """All pieces of a plan, in the order of the work line; int64 tensors of shape (num_pieces,)."""

    worker: Tensor
    batch: Tensor
    tile: Tensor
    begin_block: Tensor
    end_block: Tensor  # exclusive
    is_partial: Tensor  # bool: another worker does a part of the same tile
    slot: Tensor  # where the partial result lives; -1 for whole tiles
    last_worker: Tensor  # who does the final piece of the tile


def worker_grid(num_rows_per_head_kv: int, num_heads_kv: int, num_sms: int) -> WorkerGrid:
    """Group the SMs into workers.

    Lanes share their KV blocks, so a worker has as many lanes as keep the most row tiles in flight.

    Args:
        num_rows_per_head_kv: query rows that attend to one KV head, seqlen_q * num_heads_q / num_heads_kv.
        num_heads_kv: KV heads.
        num_sms: streaming multiprocessors of the GPU; one CTA each.
    """
    row_tiles = -(-num_rows_per_head_kv // BLOCK_M)
    num_lanes, best_workers, best_groups = 1, 0, 1
    if row_tiles > 1:
        for lanes in range(2, min(MAX_LANES, row_tiles, num_sms) + 1):
            workers, groups = num_sms // lanes, -(-row_tiles // lanes)
            if workers * best_groups >= best_workers * groups:
                num_lanes, best_workers, best_groups = lanes, workers, groups
    return WorkerGrid(num_lanes, num_sms // num_lanes, num_heads_kv * -(-row_tiles // num_lanes))


def decode_schedule(
    cache_seqlens: Tensor, num_rows_per_head_kv: int, num_heads_kv: int, num_sms: int
) -> tuple[Tensor, Tensor]:
    """Plan a decode.

    Args:
        cache_seqlens: (batch_size,) int32, tokens in the cache of each request; negative counts as 0.
        num_rows_per_head_kv, num_heads_kv, num_sms: as in `worker_grid`.

    Returns:
        tile_scheduler_metadata: (num_workers, 8) int32; per worker begin_batch, begin_tile, begin_block, end_batch,
            end_tile, end_block (exclusive), num_pieces, last_worker.
        num_splits: (batch_size + 1,) int32, running count of pieces.
    """
    _, num_workers, tiles = worker_grid(num_rows_per_head_kv, num_heads_kv, num_sms)
    batch_size = cache_seqlens.shape[0]

    # One row beyond the last request, so that the end of the line needs no special case.
    num_blocks = cache_seqlens.new_zeros(batch_size + 1, dtype=torch.int64)
    num_blocks[:batch_size] = (cache_seqlens.to(torch.int64).clamp(min=0) + PAGE_SIZE - 1) // PAGE_SIZE
    tile_cost = num_blocks + SPLIT_OVERHEAD_BLOCKS
    request_cost = tile_cost * tiles
    request_end = request_cost.cumsum(0)
    request_begin = request_end - request_cost
    total = request_begin[batch_size]
    quota = torch.clamp((total + num_workers - 1) // num_workers, min=SPLIT_OVERHEAD_BLOCKS + MIN_BLOCKS_PER_SPLIT)

    # Boundary w: where worker w begins and worker w - 1 ends.
    workers = torch.arange(num_workers + 1, device=cache_seqlens.device)
    cost = torch.minimum(workers * quota, total)
    batch = torch.searchsorted(request_end[:batch_size], cost, right=True)
    cost_in_request = cost - request_begin[batch]
    tile = cost_in_request // tile_cost[batch]
    block = (cost_in_request % tile_cost[batch] - SPLIT_OVERHEAD_BLOCKS).clamp(min=0)

    line_tile = batch * tiles + tile
    first_tile = line_tile[:-1]
    ends_inside = block[1:] > 0
    last_tile = torch.where(ends_inside, line_tile[1:], line_tile[1:] - 1)
    num_pieces = last_tile - first_tile + 1
    idle = num_pieces == 0
    end_batch = torch.where(idle, batch[:-1], last_tile // tiles)
    end_tile = torch.where(idle, tile[:-1], last_tile % tiles)
    end_block = torch.where(ends_inside, block[1:], torch.where(idle, block[:-1], num_blocks[end_batch]))
    last_worker = torch.searchsorted(first_tile.contiguous(), last_tile, right=True) - 1
    last_worker = torch.where(idle, workers[:-1], last_worker)

    begins = (batch[:-1], tile[:-1], block[:-1])
    metadata = torch.stack([*begins, end_batch, end_tile, end_block, num_pieces, last_worker], dim=1)

    splits_inside = torch.bincount(batch[:-1], weights=None, minlength=batch_size + 1)[:batch_size] * 0
    splits_inside = splits_inside.index_add(0, batch[:-1].clamp(max=max(batch_size - 1, 0)), (block[:-1] > 0).long())
    num_splits = cache_seqlens.new_zeros(batch_size + 1, dtype=torch.int64)
    num_splits[1:] = (splits_inside + tiles).cumsum(0)
    return metadata.to(torch.int32), num_splits.to(torch.int32)
