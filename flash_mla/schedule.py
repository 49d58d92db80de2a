"""Host twin of the tile scheduler: how decode work is divided among the workers of a GPU.

Work is a line: for every request, for every tile of the request, its KV blocks. Each worker takes one stretch of that
line. The lanes of a worker are CTAs that read the same KV blocks for neighbouring tiles of query rows; in the swapped
kernel a worker has one lane, a cluster that shares out the KV blocks. The arithmetic is that of
csrc/params/work_division.h and csrc/kernels/decode_schedule, integers only; the tests hold the two together bit for
bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_mla import extension

PAGE_SIZE = 64  # tokens per page, and per KV block
BLOCK_M = 64  # query rows per CTA of the dense decode kernel
MAX_LANES = 8  # CTAs that share one stretch of KV blocks
MAX_SPLIT_CTAS = 16  # CTAs that share out the KV blocks of a lane
# Query rows per KV head that the swapped kernel serves: of a request alone, or where bits do not depend on the batch;
# and of several requests, since tiles of 64 rows in the dense kernel, half empty, take less time than tiles of 32.
MAX_SWAPPED_ROWS, MAX_SWAPPED_ROWS_OF_MANY = 32, 16
METADATA_COLUMNS = 8

# The cost model, in KV blocks: what starting a piece costs, and the least that is worth a split. The swapped kernel's
# are per CTA of a cluster.
DENSE_SPLIT_OVERHEAD, DENSE_MIN_SPLIT = 3, 2
DENSE_WHOLE_TILE_OF_FEW = 2
# What a worker with whole tiles may have above its quota; where some SMs are enough a third of it and the second.
DENSE_WHOLE_SLACK, DENSE_WHOLE_SLACK_OF_SOME = 8, 4
SWAPPED_SPLIT_OVERHEAD, SWAPPED_MIN_SPLIT = 3, 2
SWAPPED_WHOLE_TILE = 2  # up to which a tile is not cut where tiles are divided evenly
SWAPPED_SPLIT_OVERHEAD_OF_MORE = 4  # with tiles of 32 rows
DENSE_SEGMENTS_SPLIT_OVERHEAD, SEGMENTS_SPLIT_OVERHEAD = 5, 2  # where bits do not depend on the batch

# Where bits must not depend on the batch: see csrc/params/segments.h, which this follows.
MAX_SEGMENTS = 128  # of a tile
FOLD_LEVELS = 3
DENSE_MIN_SEGMENT = 16  # blocks
DENSE_LONG_TILE = 128
DENSE_MIN_SEGMENT_OF_LONG_TILE = 32
SWAPPED_MIN_SEGMENT = 1
SWAPPED_MIN_SEGMENT_OF_32_ROWS = 4
MAX_SCRATCH_BYTES = 64_000_000
# Granules of a tile at most, the smallest granules first, and log2 of it.
NUM_GRANULES = {128: 7, 16: 4, 4: 2, 1: 0}

_FEW_ROWS, _MORE_ROWS = 16, 32  # per CTA of the swapped kernel
_ROW_FLOATS = 512 + 2  # of a partial result: out, and what its softmax has seen
# Sizes of clusters by rows per CTA: merging has to fit their shared memory.
_SPLIT_CTAS = {_FEW_ROWS: (8, 6, 5, 4, 3, 2), _MORE_ROWS: (8, 4, 2)}
_MAX_SPLIT_CTAS = {_FEW_ROWS: MAX_SPLIT_CTAS, _MORE_ROWS: 8}


class ClusterCapacity(NamedTuple):
    """CTAs that a GPU runs at once, one per SM."""

    num_clusters: tuple[int, ...]  # by size, from 1

    @property
    def num_sms(self) -> int:
        return self.num_clusters[1]


# CPU tensors are planned as for an H200.
CPU_CAPACITY = ClusterCapacity((0, 132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7))


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
    num_granules: int = 0  # of a tile at most, where bits do not depend on the batch; otherwise 0

    @property
    def is_invariant(self) -> bool:
        return self.num_granules > 0

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
    """Tiles of 64 rows. Lanes share their KV blocks, so a worker has as many as keep the most row tiles in flight, or
    nearly the most."""
    row_tiles = -(-num_rows_per_head_kv // BLOCK_M)
    num_lanes, best_workers, best_groups = 1, 0, 1
    if row_tiles > 1:
        for lanes in range(2, min(MAX_LANES, row_tiles, num_sms) + 1):
            workers, groups = num_sms // lanes, -(-row_tiles // lanes)
            # workers / groups >= best_workers / best_groups, or up to 1/32 less for pairs
            if 32 * workers * best_groups >= (31 if lanes % 2 == 0 else 32) * best_workers * groups:
                num_lanes = lanes
            if workers * best_groups > best_workers * groups:
                best_workers, best_groups = workers, groups
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


def _swapped_rows_per_tile(num_rows_per_head_kv: int) -> int:
    return _FEW_ROWS if num_rows_per_head_kv <= _FEW_ROWS else _MORE_ROWS


def _swapped_grid_of(
    split_ctas: int, num_rows_per_head_kv: int, num_heads_kv: int, capacity: ClusterCapacity
) -> WorkerGrid:
    """Tiles of 16 or 32 rows, with clusters of a given size."""
    rows_per_tile = _swapped_rows_per_tile(num_rows_per_head_kv)
    overhead = SWAPPED_SPLIT_OVERHEAD if rows_per_tile == _FEW_ROWS else SWAPPED_SPLIT_OVERHEAD_OF_MORE
    return WorkerGrid(
        num_lanes=1,
        num_workers=capacity.num_clusters[split_ctas],
        tiles_per_request=num_heads_kv,
        lane_groups=1,
        rows_per_tile=rows_per_tile,
        split_ctas=split_ctas,
        split_overhead_blocks=overhead * split_ctas,
        min_blocks_per_split=SWAPPED_MIN_SPLIT * split_ctas,
    )


def fill_sms_whole(num_requests: int, num_sms: int) -> bool:
    """Whether at least nineteen of twenty SMs have work where each takes whole requests."""
    places = -(-num_requests // num_sms) * num_sms
    return 20 * (places - num_requests) <= places


def swapped_grid(
    num_requests: int, num_rows_per_head_kv: int, num_heads_kv: int, capacity: ClusterCapacity
) -> WorkerGrid:
    """A request gets as large a cluster as leaves one for every other request, but two of two CTAs rather than one of
    three; where there are none for all, one of two, unless whole requests fill the GPU. One of 16 only where tiles that
    are divided evenly get three quarters of the CTAs that they would get with 8, as fewer of those fit the GPU."""
    rows_per_tile = _swapped_rows_per_tile(num_rows_per_head_kv)
    split_ctas = 1 if capacity.num_clusters[2] == 0 or fill_sms_whole(num_requests, capacity.num_sms) else 2
    for size in _SPLIT_CTAS[rows_per_tile]:
        if capacity.num_clusters[size] >= num_requests:
            split_ctas = 2 if size == 3 and capacity.num_clusters[2] >= 2 * num_requests else size
            break
    # CTAs of tiles that are divided evenly.
    even = {size: capacity.num_clusters[size] // num_requests * num_requests * size for size in (8, 16)}
    if _MAX_SPLIT_CTAS[rows_per_tile] >= 16 and even[16] > 0 and 4 * even[16] >= 3 * even[8]:
        split_ctas = 16
    return _swapped_grid_of(split_ctas, num_rows_per_head_kv, num_heads_kv, capacity)


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
    if num_rows_per_head_kv <= (MAX_SWAPPED_ROWS if num_requests == 1 else MAX_SWAPPED_ROWS_OF_MANY):
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


def invariant_grid(
    batch_size: int, num_rows_per_head_kv: int, num_heads_kv: int, capacity: ClusterCapacity
) -> WorkerGrid:
    """One kernel, without clusters that share out blocks, for as many query rows, whatever the batch; and the smallest
    granules whose values there is room for."""
    if num_rows_per_head_kv <= MAX_SWAPPED_ROWS:
        grid = _swapped_grid_of(1, num_rows_per_head_kv, num_heads_kv, capacity)
        grid = grid._replace(split_overhead_blocks=SEGMENTS_SPLIT_OVERHEAD)
    else:
        grid = dense_grid(num_rows_per_head_kv, num_heads_kv, capacity.num_sms)
        grid = grid._replace(split_overhead_blocks=DENSE_SEGMENTS_SPLIT_OVERHEAD)
    for num_granules in NUM_GRANULES:
        grid = grid._replace(num_granules=num_granules)
        if invariant_scratch_bytes(grid, batch_size) <= MAX_SCRATCH_BYTES:
            break
    return grid


def decode_grid(
    batch_size: int, num_rows_per_head_kv: int, num_heads_kv: int, capacity: ClusterCapacity, batch_invariant: bool
) -> WorkerGrid:
    choose = invariant_grid if batch_invariant else worker_grid
    return choose(batch_size, num_rows_per_head_kv, num_heads_kv, capacity)


def invariant_scratch_bytes(grid: WorkerGrid, batch_size: int) -> int:
    """Slots for what waits at the levels within a granule and for the values of granules."""
    num_ctas = grid.num_workers * grid.num_lanes
    num_slots = num_ctas * levels_with_slots(grid.num_granules)
    num_slots += batch_size * grid.tiles_per_request * grid.num_lanes * granule_slots_of_tile(grid)
    return 4 * num_slots * grid.rows_per_tile * _ROW_FLOATS


def min_segment_blocks(num_blocks: int, rows_per_tile: int) -> int:
    if rows_per_tile == BLOCK_M:
        return DENSE_MIN_SEGMENT_OF_LONG_TILE if num_blocks >= DENSE_LONG_TILE else DENSE_MIN_SEGMENT
    return {_FEW_ROWS: SWAPPED_MIN_SEGMENT, _MORE_ROWS: SWAPPED_MIN_SEGMENT_OF_32_ROWS}[rows_per_tile]


def num_segments_of(num_blocks: int, rows_per_tile: int, num_lanes: int = 1) -> int:
    """A power of two: the most segments that are not too short, doubled as long as there are fewer than 128 for all
    lanes; with 32 rows not 32."""
    min_blocks = min_segment_blocks(num_blocks, rows_per_tile)
    segments = 1
    while segments * num_lanes < MAX_SEGMENTS and num_blocks >= 2 * segments * min_blocks:
        segments *= 2
    return 16 if rows_per_tile == _MORE_ROWS and segments == 32 else segments


def max_segments(rows_per_tile: int, num_lanes: int) -> int:
    """The most segments that any tile has."""
    return num_segments_of(MAX_SEGMENTS * DENSE_MIN_SEGMENT_OF_LONG_TILE, rows_per_tile, num_lanes)


def granule_slots_of_tile(grid: WorkerGrid) -> int:
    if grid.num_granules == 1:
        return 0
    return min(grid.num_granules, max_segments(grid.rows_per_tile, grid.num_lanes))


def segment_range(segment: int, num_segments: int, num_blocks: int) -> range:
    """The blocks of a segment."""
    return range(segment * num_blocks // num_segments, (segment + 1) * num_blocks // num_segments)


def radices_of(num_segments: int) -> tuple[int, int, int]:
    """Of the levels of the tree over so many segments, the innermost first."""
    top = min(num_segments, 4)
    middle = min(num_segments // top, 4)
    return num_segments // (top * middle), middle, top


def levels_in_granule(num_granules: int) -> int:
    return {128: 0, 16: 1, 4: 2, 1: 3}[num_granules]


def levels_with_slots(num_granules: int) -> int:
    """Levels that need a slot of the CTA: what begins where a granule does waits in the granule's own slot."""
    return FOLD_LEVELS if num_granules == 1 else max(levels_in_granule(num_granules) - 1, 0)


def segment_at(place: int, num_segments: int, num_granules: int) -> int:
    """The segment at a place of the plan, in 128ths of the tile; the first one of a granule."""
    granules = min(num_segments, num_granules)
    return place * granules // MAX_SEGMENTS * (num_segments // granules)


class FoldPath(NamedTuple):
    """What becomes of the value of a segment."""

    folds: list[int]  # levels where it is folded with what waits there
    end_level: int  # where it is left then; FOLD_LEVELS where it has become the whole tile
    first: int  # segment of what is left: the begin of a chain, or a member whose chain another worker has begun


def fold_path(segment: int, begin: int, num_segments: int) -> FoldPath:
    """The path of a segment's value through the tree.

    Args:
        segment, begin: this one, and the first one that its worker has of the tile.
        num_segments: of the tile.
    """
    folds: list[int] = []
    size = 1  # segments in a member of the level's chains
    for level, radix in enumerate(radices_of(num_segments)):
        member = segment // size % radix
        chain = segment // (size * radix) * size * radix
        if member > 0 and chain < begin:
            return FoldPath(folds, level, segment // size * size)
        if member > 0:
            folds.append(level)
        if member < radix - 1:
            return FoldPath(folds, level, chain)
        size *= radix
    return FoldPath(folds, FOLD_LEVELS, 0)


def decode_schedule(
    cache_seqlens: Tensor,
    num_rows_per_head_kv: int,
    num_heads_kv: int,
    capacity: ClusterCapacity,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plan a decode.

    Args:
        cache_seqlens: (batch_size,) int32, tokens in the cache of each request; negative counts as 0.
        num_rows_per_head_kv, num_heads_kv, capacity: as in `worker_grid`.
        batch_invariant: whether tiles may be cut between granules only.

    Returns:
        tile_scheduler_metadata: (num_plan_rows, 8) int32; per worker begin_batch, begin_tile, begin_block, end_batch,
            end_tile, end_block (exclusive), num_pieces, last_worker. The last rows are without work where the grid has
            fewer workers. With batch_invariant the blocks are 128ths of the tile, and last_worker is the worker itself.
        num_splits: (batch_size + 1,) int32, running count of pieces.
    """
    grid = decode_grid(cache_seqlens.shape[0], num_rows_per_head_kv, num_heads_kv, capacity, batch_invariant)
    return divide_work(cache_seqlens, grid, num_plan_rows(num_rows_per_head_kv, num_heads_kv, capacity.num_sms))


def even_slack(grid: WorkerGrid, quota: Tensor, num_tiles: int) -> Tensor | int:
    """How many blocks more than its quota the busiest worker may have where tiles are divided evenly.

    Where the dense kernel has whole tiles there is nothing to merge, which is worth more; and up to 64 rows memory is
    the limit, which two thirds of the SMs reach too.
    """
    if grid.is_swapped or grid.is_invariant or grid.num_workers >= 2 * num_tiles:
        return grid.split_overhead_blocks + grid.split_overhead_blocks // 2
    if grid.num_lanes > 1 or num_tiles > grid.num_workers:
        return DENSE_WHOLE_SLACK
    return (quota // 3 + DENSE_WHOLE_SLACK_OF_SOME).clamp(min=DENSE_WHOLE_SLACK)


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

    # Boundary w: where worker w begins and worker w - 1 ends, as a tile, numbered along the line, and a block of it, or
    # a place in it.
    workers = torch.arange(num_workers + 1, device=cache_seqlens.device)
    begin_tile, block = _even_boundaries(workers, num_blocks, grid)
    batch = begin_tile.div(tiles, rounding_mode="floor")
    cost = request_begin[batch] + (begin_tile - batch * tiles) * tile_cost[batch]
    blocks_before = block * num_blocks[batch] // MAX_SEGMENTS if grid.is_invariant else block
    cost += torch.where(block > 0, blocks_before + grid.split_overhead_blocks, 0)
    is_even = ~(cost.diff() > quota + even_slack(grid, quota, batch_size * tiles)).any()

    # Inside a tile's overhead a boundary moves to the tile's begin.
    cost = torch.minimum(workers * quota, total)
    batch = torch.searchsorted(request_end[:batch_size], cost, right=True)
    cost_in_request = cost - request_begin[batch]
    fair_tile = batch * tiles + cost_in_request // tile_cost[batch]
    fair_block = (cost_in_request % tile_cost[batch] - grid.split_overhead_blocks).clamp(min=0)
    if grid.is_invariant:
        fair_tile, fair_block = _nearest_granule(fair_tile, fair_block, num_blocks[batch], num_blocks, grid)

    begin_tile = torch.where(is_even, begin_tile, fair_tile)
    block = torch.where(is_even, block, fair_block)
    batch = begin_tile.div(tiles, rounding_mode="floor")
    cuts_a_tile = block > 0

    first_tile = begin_tile[:-1]
    last_tile = torch.where(cuts_a_tile, begin_tile, begin_tile - 1)[1:]
    end_batch = last_tile.div(tiles, rounding_mode="floor")
    if grid.is_invariant:
        end_of_tile = torch.full_like(last_tile, MAX_SEGMENTS)
        is_idle = (begin_tile.diff() == 0) & (block.diff() == 0)
        last_worker = workers[:-1]
    else:
        end_of_tile = num_blocks[end_batch]
        is_idle = last_tile < first_tile
        last_worker = torch.searchsorted(first_tile, last_tile, right=True) - 1
        last_worker = torch.where(is_idle, workers[:-1], last_worker)
    num_pieces = torch.where(is_idle, 0, last_tile - first_tile + 1)
    end_block = torch.where(cuts_a_tile[1:], block[1:], end_of_tile)

    begin = torch.stack([batch, begin_tile - batch * tiles, block], dim=1)[:-1]
    end = torch.stack([end_batch, last_tile - end_batch * tiles, end_block], dim=1)
    end = torch.where(is_idle[:, None], begin, end)
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
    """Tile and block, or place, where each worker begins if all have as many whole tiles, or all tiles as many workers.

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
    least_part, longest_whole = _even_cuts(num_blocks.sum() * grid.tiles_per_request, grid)
    is_short = blocks_of_tile <= longest_whole
    worker_of_tile = workers - tile * workers_per_tile
    if grid.is_invariant:
        # As many granules for each worker as the busiest must have: the first ones have work, and most of them whole
        # chains. Behind the last tile there is nothing to divide.
        num_granules = _num_granules(blocks_of_tile, grid)
        share = (num_granules + workers_per_tile - 1) // workers_per_tile
        granule = worker_of_tile * torch.where(is_short, num_granules, share)
        return _granule_begin(tile, torch.where(tile == num_tiles, 0, granule), num_granules)
    piece = ((blocks_of_tile + workers_per_tile - 1) // workers_per_tile).clamp(min=least_part)
    piece = torch.where(is_short, blocks_of_tile, piece)
    block = worker_of_tile * piece
    is_behind_tile = (block > 0) & (block >= blocks_of_tile)
    return tile + is_behind_tile.to(torch.int64), torch.where(is_behind_tile, 0, block)


def _even_cuts(total_blocks: Tensor, grid: WorkerGrid) -> tuple[Tensor, Tensor]:
    """How tiles are cut evenly: in parts of so many blocks at least, and not at all up to some length."""
    least_part = grid.min_blocks_per_split
    if grid.is_invariant:
        return torch.tensor(least_part), torch.tensor(grid.split_overhead_blocks + least_part)
    if grid.is_swapped:
        return torch.tensor(grid.split_ctas), torch.tensor(SWAPPED_WHOLE_TILE * grid.split_ctas)
    is_few = 2 * total_blocks <= grid.num_workers
    return torch.where(is_few, 1, least_part), torch.where(is_few, DENSE_WHOLE_TILE_OF_FEW, 2 * least_part - 1)


def _num_granules(num_blocks: Tensor, grid: WorkerGrid) -> Tensor:
    segments = [num_segments_of(count, grid.rows_per_tile, grid.num_lanes) for count in num_blocks.tolist()]
    return torch.tensor(segments, dtype=torch.int64).clamp(max=grid.num_granules)


def _granule_begin(tile: Tensor, granule: Tensor, num_granules: Tensor) -> tuple[Tensor, Tensor]:
    """The tile and the place in it, in 128ths, where a granule begins; behind the last one that is the next tile."""
    is_behind_tile = granule >= num_granules
    place = torch.where(is_behind_tile, 0, granule * (MAX_SEGMENTS // num_granules))
    return tile + is_behind_tile.to(torch.int64), place


def _nearest_granule(
    tile: Tensor, part: Tensor, whole: Tensor, num_blocks: Tensor, grid: WorkerGrid
) -> tuple[Tensor, Tensor]:
    """The boundary between granules that is nearest to part / whole of a tile."""
    num_granules = _num_granules(num_blocks[tile.div(grid.tiles_per_request, rounding_mode="floor")], grid)
    granule = torch.where(whole > 0, (2 * part * num_granules + whole) // (2 * whole).clamp(min=1), 0)
    return _granule_begin(tile, granule, num_granules)
