"""Host twin of the tile scheduler: how decode work is divided among the workers of a GPU.

Work is a line: for every request, for every tile of the request, its KV blocks. Each worker takes one stretch of that
line. The lanes of a worker are CTAs that read the same KV blocks for neighbouring tiles of query rows; in the swapped
kernel each of them is a cluster that shares out the KV blocks. The arithmetic is that of csrc/params/work_division.h
and csrc/kernels/decode_schedule, integers only; the tests hold the two together bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla import extension

PAGE_SIZE = 64  # tokens per page, and per KV block
BLOCK_M = 64  # query rows per CTA of the dense decode kernel
MAX_LANES = 8  # CTAs that share one stretch of KV blocks
MAX_SPLIT_CTAS = 8  # CTAs that share out the KV blocks of a lane
MAX_SWAPPED_ROWS = 32  # query rows per KV head that the swapped kernel serves in any batch
MAX_SWAPPED_ROWS_OF_FEW = 128  # and of up to FEW_REQUESTS requests, times KV heads
FEW_REQUESTS = 1
METADATA_COLUMNS = 8

# The cost model, in KV blocks: what starting a piece costs, and the least that is worth a split. The swapped kernel's
# are per CTA of a cluster.
DENSE_SPLIT_OVERHEAD, DENSE_MIN_SPLIT = 5, 2
SWAPPED_SPLIT_OVERHEAD, SWAPPED_MIN_SPLIT = 2, 2

_FEW_ROWS, _MORE_ROWS = 16, 32  # per CTA of the swapped kernel
# Sizes of clusters by rows per CTA: merging has to fit their shared memory.
_SPLIT_CTAS = {_FEW_ROWS: (8, 6, 4, 3, 2), _MORE_ROWS: (8, 4, 2)}


class ClusterCapacity(NamedTuple):
    """CTAs that a GPU runs at once, one per SM."""

    num_clusters: tuple[int, ...]  # by size, from 1

    @property
    def num_sms(self) -> int:
        return self.num_clusters[1]


# CPU tensors are planned as for an H200.
CPU_CAPACITY = ClusterCapacity((0, 132, 66, 39, 30, 22, 17, 15, 15))


class WorkerGrid(NamedTuple):
    """How many CTAs there are and how they are grouped; independent of the lengths."""

    num_lanes: int
    num_workers: int  # that get work; a plan may have more rows
    tiles_per_request: int  # tiles of a plan: groups of num_lanes tiles of query rows
    lane_groups: int  # of one KV head
    rows_per_tile: int  # query rows per CTA
    split_ctas: int  # CTAs, a cluster, that share out the KV blocks of a lane
    split_overhead_blocks: int
    min_blocks_per_split: int

    @property
    def is_swapped(self) -> bool:
        return self.rows_per_tile < BLOCK_M


def capacity_of(device: torch.device) -> ClusterCapacity:
    """What a plan on this device is made for."""
    module = extension.loaded_module()
    # Fake CUDA tensors are planned for an H200 too, where the kernels cannot run.
    if device.type != "cuda" or module is None or not torch.cuda.is_available():
        return CPU_CAPACITY
    if torch.cuda.get_device_capability(device) != extension.COMPUTE_CAPABILITY:
        return CPU_CAPACITY
    index = torch.cuda.current_device() if device.index is None else device.index
    return ClusterCapacity(tuple(module.cluster_capacity(index)))


def dense_grid(num_rows_per_head_kv: int, num_heads_kv: int, num_sms: int) -> WorkerGrid:
    """Tiles of 64 rows. Lanes share their KV blocks, so a worker has as many as keep the most row tiles in flight."""
    row_tiles = -(-num_rows_per_head_kv // BLOCK_M)
    num_lanes, best_workers, best_groups = 1, 0, 1
    if row_tiles > 1:
        for lanes in range(2, min(MAX_LANES, row_tiles, num_sms) + 1):
            workers, groups = num_sms // lanes, -(-row_tiles // lanes)
            # workers / groups >= best_workers / best_groups
            if workers * best_groups >= best_workers * groups:
                num_lanes, best_workers, best_groups = lanes, workers, groups
    groups = -(-row_tiles // num_lanes)
    return WorkerGrid(
        num_lanes=num_lanes,
        num_workers=num_sms // num_lanes,
        tiles_per_request=num_heads_kv * groups,
        lane_groups=groups,
        rows_per_tile=BLOCK_M,
        split_ctas=1,
        split_overhead_blocks=DENSE_SPLIT_OVERHEAD,
        min_blocks_per_split=DENSE_MIN_SPLIT,
    )


def swapped_grid(
    num_requests: int, num_rows_per_head_kv: int, num_heads_kv: int, capacity: ClusterCapacity
) -> WorkerGrid:
    """Tiles of 16 or 32 rows, all of a request side by side. A request gets as large a cluster as leaves one for every
    other request."""
    rows_per_tile = _FEW_ROWS if num_rows_per_head_kv <= _FEW_ROWS else _MORE_ROWS
    num_lanes = -(-num_rows_per_head_kv // rows_per_tile)
    split_ctas = 1
    for size in _SPLIT_CTAS[rows_per_tile]:
        if capacity.num_clusters[size] // num_lanes >= num_requests:
            split_ctas = size
            break
    return WorkerGrid(
        num_lanes=num_lanes,
        num_workers=capacity.num_clusters[split_ctas] // num_lanes,
        tiles_per_request=num_heads_kv,
        lane_groups=1,
        rows_per_tile=rows_per_tile,
        split_ctas=split_ctas,
        split_overhead_blocks=SWAPPED_SPLIT_OVERHEAD * split_ctas,
        min_blocks_per_split=SWAPPED_MIN_SPLIT * split_ctas,
    )


def worker_grid(batch_size: int, num_rows_per_head_kv: int, num_heads_kv: int, capacity: ClusterCapacity) -> WorkerGrid:
    """Choose the kernel and group the SMs into workers.

    Args:
        batch_size: requests.
        num_rows_per_head_kv: query rows that attend to one KV head, seqlen_q * num_heads_q / num_heads_kv.
        num_heads_kv: KV heads.
        capacity: what the GPU runs at once.
    """
    # A plan for no requests has workers too.
    num_requests = max(batch_size * num_heads_kv, 1)
    max_rows = MAX_SWAPPED_ROWS_OF_FEW if num_requests <= FEW_REQUESTS else MAX_SWAPPED_ROWS
    has_sms = capacity.num_sms >= -(-MAX_SWAPPED_ROWS_OF_FEW // MAX_SWAPPED_ROWS)
    if num_rows_per_head_kv <= max_rows and has_sms:
        return swapped_grid(num_requests, num_rows_per_head_kv, num_heads_kv, capacity)
    return dense_grid(num_rows_per_head_kv, num_heads_kv, capacity.num_sms)


def num_plan_rows(num_rows_per_head_kv: int, num_heads_kv: int, num_sms: int) -> int:
    """Rows of a plan, enough for every batch size."""
    return dense_grid(num_rows_per_head_kv, num_heads_kv, num_sms).num_workers


def num_partial_rows(num_rows_per_head_kv: int, num_heads_kv: int, num_sms: int) -> int:
    """Rows of partial results that a plan can ask for, enough for every batch size: two pieces of a worker may be parts
    of tiles, its first one and its last one, and each of its lanes has a tile of rows for both."""
    grid = dense_grid(num_rows_per_head_kv, num_heads_kv, num_sms)
    return 2 * grid.num_workers * grid.num_lanes * BLOCK_M


def decode_schedule(
    cache_seqlens: Tensor, num_rows_per_head_kv: int, num_heads_kv: int, capacity: ClusterCapacity
) -> tuple[Tensor, Tensor]:
    """Plan a decode.

    Args:
        cache_seqlens: (batch_size,) int32, tokens in the cache of each request; negative counts as 0.
        num_rows_per_head_kv, num_heads_kv, capacity: as in `worker_grid`.

    Returns:
        tile_scheduler_metadata: (num_plan_rows, 8) int32; per worker begin_batch, begin_tile, begin_block, end_batch,
            end_tile, end_block (exclusive), num_pieces, last_worker. The last rows are without work where the grid has
            fewer workers.
        num_splits: (batch_size + 1,) int32, running count of pieces.
    """
    grid = worker_grid(cache_seqlens.shape[0], num_rows_per_head_kv, num_heads_kv, capacity)
    return divide_work(cache_seqlens, grid, num_plan_rows(num_rows_per_head_kv, num_heads_kv, capacity.num_sms))


def divide_work(cache_seqlens: Tensor, grid: WorkerGrid, num_rows: int) -> tuple[Tensor, Tensor]:
    """Plan a decode for the workers of a grid, in so many rows; else as `decode_schedule`."""
    batch_size, tiles, num_workers = cache_seqlens.shape[0], grid.tiles_per_request, grid.num_workers

    # One entry beyond the last request, so that the end of the line needs no special case.
    num_blocks = cache_seqlens.new_zeros(batch_size + 1, dtype=torch.int64)
    num_blocks[:batch_size] = (cache_seqlens.to(torch.int64).clamp(min=0) + PAGE_SIZE - 1) // PAGE_SIZE
    tile_cost = num_blocks + grid.split_overhead_blocks
    request_end = (tile_cost * tiles).cumsum(0)
    request_begin = request_end - tile_cost * tiles
    total = request_begin[batch_size]
    fair_share = (total + num_workers - 1) // num_workers
    quota = torch.clamp(fair_share, min=grid.split_overhead_blocks + grid.min_blocks_per_split)

    # Boundary w: where worker w begins and worker w - 1 ends, as a tile, numbered along the line, and a block of it.
    workers = torch.arange(num_workers + 1, device=cache_seqlens.device)
    begin_tile, block = _even_boundaries(workers, num_blocks, grid)
    batch = begin_tile.div(tiles, rounding_mode="floor")
    cost = request_begin[batch] + (begin_tile - batch * tiles) * tile_cost[batch]
    cost += torch.where(block > 0, block + grid.split_overhead_blocks, 0)
    slack = grid.split_overhead_blocks + grid.split_overhead_blocks // 2
    is_even = ~(cost.diff() > quota + slack).any()

    # Inside a tile's overhead a boundary moves to the tile's begin.
    cost = torch.minimum(workers * quota, total)
    batch = torch.searchsorted(request_end[:batch_size], cost, right=True)
    cost_in_request = cost - request_begin[batch]
    fair_tile = batch * tiles + cost_in_request // tile_cost[batch]
    fair_block = (cost_in_request % tile_cost[batch] - grid.split_overhead_blocks).clamp(min=0)

    begin_tile = torch.where(is_even, begin_tile, fair_tile)
    block = torch.where(is_even, block, fair_block)
    batch = begin_tile.div(tiles, rounding_mode="floor")
    cuts_a_tile = block > 0

    first_tile = begin_tile[:-1]
    last_tile = torch.where(cuts_a_tile, begin_tile, begin_tile - 1)[1:]
    num_pieces = last_tile - first_tile + 1
    end_batch = last_tile.div(tiles, rounding_mode="floor")
    end_block = torch.where(cuts_a_tile[1:], block[1:], num_blocks[end_batch])
    last_worker = torch.searchsorted(first_tile, last_tile, right=True) - 1

    begin = torch.stack([batch, begin_tile - batch * tiles, block], dim=1)[:-1]
    end = torch.stack([end_batch, last_tile - end_batch * tiles, end_block], dim=1)
    is_idle = num_pieces == 0
    end = torch.where(is_idle[:, None], begin, end)
    last_worker = torch.where(is_idle, workers[:-1], last_worker)
    metadata = torch.zeros(num_rows, METADATA_COLUMNS, dtype=torch.int32, device=cache_seqlens.device)
    metadata[:, [0, 3]] = batch_size
    metadata[:, 7] = torch.arange(num_rows, device=cache_seqlens.device)
    metadata[:num_workers] = torch.cat([begin, end, num_pieces[:, None], last_worker[:, None]], dim=1)

    # A request has one piece per tile, and one more for every boundary that cuts one of its tiles.
    num_cuts = torch.zeros_like(num_blocks).index_add_(0, batch, cuts_a_tile.to(torch.int64))
    num_splits = torch.zeros_like(num_blocks)
    num_splits[1:] = (num_cuts[:batch_size] + tiles).cumsum(0)
    return metadata, num_splits.to(torch.int32)


def _even_boundaries(workers: Tensor, num_blocks: Tensor, grid: WorkerGrid) -> tuple[Tensor, Tensor]:
    """Tile and block where each worker begins if all have as many whole tiles, or all tiles as many workers.

    Args:
        workers: (num_workers + 1,) int64.
        num_blocks: (batch_size + 1,) int64, of each request, and 0 at the end.
    """
    num_tiles = (num_blocks.shape[0] - 1) * grid.tiles_per_request
    workers_per_tile = grid.num_workers // num_tiles if num_tiles > 0 else 1
    if workers_per_tile == 0:
        return workers * num_tiles // grid.num_workers, torch.zeros_like(workers)
    tile = (workers // workers_per_tile).clamp(max=num_tiles)
    blocks_of_tile = num_blocks[tile // grid.tiles_per_request]
    piece = ((blocks_of_tile + workers_per_tile - 1) // workers_per_tile).clamp(min=grid.min_blocks_per_split)
    is_short = blocks_of_tile <= grid.split_overhead_blocks + grid.min_blocks_per_split
    piece = torch.where(is_short, blocks_of_tile, piece)
    block = (workers - tile * workers_per_tile) * piece
    is_behind_tile = (block > 0) & (block >= blocks_of_tile)
    return tile + is_behind_tile.to(torch.int64), torch.where(is_behind_tile, 0, block)
