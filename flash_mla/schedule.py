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


def num_sms_of(device: torch.device) -> int:
    """The streaming multiprocessors that a plan on this device is made for."""
    # Without a GPU, fake CUDA tensors are planned for an H100 or H200 too.
    if device.type != "cuda" or not torch.cuda.is_available():
        return CPU_NUM_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


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
            # workers / groups >= best_workers / best_groups
            if workers * best_groups >= best_workers * groups:
                num_lanes, best_workers, best_groups = lanes, workers, groups
    return WorkerGrid(num_lanes, num_sms // num_lanes, num_heads_kv * -(-row_tiles // num_lanes))


def num_partial_rows(grid: WorkerGrid) -> int:
    """Rows of partial results that a plan can ask for: two pieces of a worker may be parts of tiles, its first one and
    its last one, and each of its lanes has a tile of rows for both."""
    return 2 * grid.num_workers * grid.num_lanes * BLOCK_M


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
    grid = worker_grid(num_rows_per_head_kv, num_heads_kv, num_sms)
    return divide_work(cache_seqlens, grid.tiles_per_request, grid.num_workers)


def divide_work(cache_seqlens: Tensor, tiles: int, num_workers: int) -> tuple[Tensor, Tensor]:
    """Plan a decode of so many tiles per request for so many workers; else as `decode_schedule`."""
    batch_size = cache_seqlens.shape[0]

    # One entry beyond the last request, so that the end of the line needs no special case.
    num_blocks = cache_seqlens.new_zeros(batch_size + 1, dtype=torch.int64)
    num_blocks[:batch_size] = (cache_seqlens.to(torch.int64).clamp(min=0) + PAGE_SIZE - 1) // PAGE_SIZE
    tile_cost = num_blocks + SPLIT_OVERHEAD_BLOCKS
    request_end = (tile_cost * tiles).cumsum(0)
    request_begin = request_end - tile_cost * tiles
    total = request_begin[batch_size]
    quota = torch.clamp((total + num_workers - 1) // num_workers, min=SPLIT_OVERHEAD_BLOCKS + MIN_BLOCKS_PER_SPLIT)

    # Boundary w: where worker w begins and worker w - 1 ends. Inside a tile's overhead it moves to the tile's begin.
    workers = torch.arange(num_workers + 1, device=cache_seqlens.device)
    cost = torch.minimum(workers * quota, total)
    batch = torch.searchsorted(request_end[:batch_size], cost, right=True)
    cost_in_request = cost - request_begin[batch]
    tile = cost_in_request // tile_cost[batch]
    block = (cost_in_request % tile_cost[batch] - SPLIT_OVERHEAD_BLOCKS).clamp(min=0)

    # Where as many whole tiles for every worker are even enough, nothing is split.
    whole_tile = workers * (batch_size * tiles) // num_workers
    whole_batch = whole_tile.div(tiles, rounding_mode="floor")
    whole_tile_in_request = whole_tile - whole_batch * tiles
    whole_begin = request_begin[whole_batch] + tile_cost[whole_batch] * whole_tile_in_request
    splits = (whole_begin.diff() > quota + SPLIT_OVERHEAD_BLOCKS).any()
    batch = torch.where(splits, batch, whole_batch)
    tile = torch.where(splits, tile, whole_tile_in_request)
    block = torch.where(splits, block, 0)
    cuts_a_tile = block > 0

    # Tiles numbered along the line.
    begin_tile = batch * tiles + tile
    first_tile = begin_tile[:-1]
    last_tile = torch.where(cuts_a_tile, begin_tile, begin_tile - 1)[1:]
    num_pieces = last_tile - first_tile + 1
    end_batch = last_tile.div(tiles, rounding_mode="floor")
    end_block = torch.where(cuts_a_tile[1:], block[1:], num_blocks[end_batch])
    last_worker = torch.searchsorted(first_tile, last_tile, right=True) - 1

    begin = torch.stack([batch, tile, block], dim=1)[:-1]
    end = torch.stack([end_batch, last_tile - end_batch * tiles, end_block], dim=1)
    is_idle = num_pieces == 0
    end = torch.where(is_idle[:, None], begin, end)
    last_worker = torch.where(is_idle, workers[:-1], last_worker)
    metadata = torch.cat([begin, end, num_pieces[:, None], last_worker[:, None]], dim=1)

    # A request has one piece per tile, and one more for every boundary that cuts one of its tiles.
    num_cuts = torch.zeros_like(num_blocks).index_add_(0, batch, cuts_a_tile.to(torch.int64))
    num_splits = torch.zeros_like(num_blocks)
    num_splits[1:] = (num_cuts[:batch_size] + tiles).cumsum(0)
    return metadata.to(torch.int32), num_splits.to(torch.int32)
