"""The tile scheduler: every block is covered once, work is even, and host and device agree."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plans import CAPACITIES, UNUSUAL_CLUSTERS

from flash_mla.schedule import (
    BLOCK_M,
    CPU_CAPACITY,
    DENSE_WHOLE_TILE_OF_FEW,
    MAX_LANES,
    MAX_SEGMENTS,
    MAX_SPLIT_CTAS,
    MAX_SWAPPED_ROWS_OF_MANY,
    PAGE_SIZE,
    SWAPPED_WHOLE_TILE,
    ClusterCapacity,
    WorkerGrid,
    capacity_of,
    decode_schedule,
    dense_grid,
    invariant_grid,
    num_partial_rows,
    num_plan_rows,
    worker_grid,
)


@st.composite
def any_capacity(draw: st.DrawFn) -> ClusterCapacity:
    num_sms = draw(st.integers(1, 144))
    larger = (draw(st.integers(0, num_sms // size)) for size in range(2, MAX_SPLIT_CTAS + 1))
    return ClusterCapacity((0, num_sms, *larger))


KNOWN_CAPACITIES = [*CAPACITIES.values(), *map(ClusterCapacity, UNUSUAL_CLUSTERS)]
CAPACITY = st.one_of(st.sampled_from(KNOWN_CAPACITIES), any_capacity())
# With and without large clusters.
OF_SEVERAL_GPUS = pytest.mark.parametrize("capacity", KNOWN_CAPACITIES[:4], ids=["132", "114", "78", "small-clusters"])
NUM_ROWS = st.one_of(st.integers(1, 300), st.integers(1, 16384))
LENGTHS = st.one_of(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.lists(st.one_of(st.just(0), st.integers(0, 200_000)), min_size=1, max_size=12),
    st.lists(st.integers(-3, 2**20), min_size=1, max_size=3),
)
SHAPES = [
    (1, 1, 1),
    (16, 1, 1),
    (32, 1, 1),
    (48, 1, 1),
    (64, 2, 1),
    (65, 1, 2),
    (128, 1, 2),
    (256, 1, 4),
    (512, 3, 8),
    (128, 3, 2),
    (16384, 1, 8),
    (1000, 2, 8),
    (448, 1, 7),
    (640, 1, 2),
]

# Requests and the longest of them.
BATCHES = [
    (0, 0),
    (1, 0),
    (1, 1),
    (1, 100_000),
    (1, 2**31 - 2),
    (2, 70_000),
    (3, 100_000),
    (7, 64),
    (16, 3000),
    (35, 20_000),
    (64, 4096),
    (133, 5000),
    (1025, 3000),
    (4096, 300),
]


def num_blocks_of(length: int) -> int:
    return -(-max(length, 0) // PAGE_SIZE)


def plan(lengths: list[int], num_rows: int, num_heads_kv: int, capacity: ClusterCapacity = CPU_CAPACITY):
    return decode_schedule(torch.tensor(lengths, dtype=torch.int32), num_rows, num_heads_kv, capacity)


def quota_of(lengths: list[int], grid: WorkerGrid) -> int:
    total = sum(num_blocks_of(length) + grid.split_overhead_blocks for length in lengths) * grid.tiles_per_request
    return max(-(-total // grid.num_workers), grid.split_overhead_blocks + grid.min_blocks_per_split)


def slack_of(grid: WorkerGrid, quota: int, num_tiles: int) -> int:
    if grid.is_swapped or grid.num_workers // num_tiles >= 2:
        return 3 * grid.split_overhead_blocks // 2
    return max(8, quota // 3 + 4) if grid.num_lanes == 1 and num_tiles <= grid.num_workers else 8


def read_pieces(rows: list[list[int]], lengths: list[int], tiles: int):
    """The pieces of each worker as the kernel walks them: (batch, tile, begin_block, end_block)."""
    pieces = []
    for begin_batch, begin_tile, begin_block, end_batch, end_tile, end_block, num_pieces, _ in rows:
        own = []
        batch, tile, block = begin_batch, begin_tile, begin_block
        for index in range(num_pieces):
            is_last = index == num_pieces - 1
            own.append((batch, tile, block, end_block if is_last else num_blocks_of(lengths[batch])))
            if is_last:
                assert (batch, tile) == (end_batch, end_tile)
            block = 0
            tile += 1
            if tile == tiles:
                batch, tile = batch + 1, 0
        pieces.append(own)
    return pieces


def check_plan(lengths: list[int], num_rows: int, num_heads_kv: int, capacity: ClusterCapacity):
    """Returns the pieces of each worker, and of each tile who has a part of it."""
    grid = worker_grid(len(lengths), num_rows, num_heads_kv, capacity)
    tiles = grid.tiles_per_request
    metadata, num_splits = plan(lengths, num_rows, num_heads_kv, capacity)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.shape == (num_plan_rows(num_rows, num_heads_kv, capacity.num_sms), 8)
    assert num_splits.shape == (len(lengths) + 1,)
    rows = metadata.tolist()
    pieces = read_pieces(rows, lengths, tiles)
    end_of_line = [len(lengths), 0, 0] * 2
    assert rows[grid.num_workers :] == [
        [*end_of_line, 0, worker] for worker in range(grid.num_workers, metadata.shape[0])
    ]

    # In the order of the workers the pieces are the work line: each tile from block 0 to its end, no gap, no overlap.
    line = [piece for own in pieces for piece in own]
    expected_tile, expected_block = 0, 0
    for batch, tile, begin, end in line:
        assert (batch * tiles + tile, begin) == (expected_tile, expected_block)
        num_blocks = num_blocks_of(lengths[batch])
        # Only a request without tokens has a piece without blocks: it stands for its output.
        assert begin < end <= num_blocks or begin == end == num_blocks == 0
        expected_tile, expected_block = (expected_tile + 1, 0) if end == num_blocks else (expected_tile, end)
    assert (expected_tile, expected_block) == (len(lengths) * tiles, 0)

    # Nobody does more than a fair share plus the overhead of one and a half pieces, or what nothing to merge is worth.
    quota, overhead = quota_of(lengths, grid), grid.split_overhead_blocks
    for own in pieces:
        cost = sum(end - begin + overhead for _, _, begin, end in own)
        assert cost <= quota + slack_of(grid, quota, len(lengths) * tiles)

    # Whoever merges a tile finds the parts of it at the workers that follow, without a gap.
    workers_of = defaultdict(list)
    for worker, own in enumerate(pieces):
        for batch, tile, _, _ in own:
            workers_of[batch * tiles + tile].append(worker)
    for workers in workers_of.values():
        assert workers == list(range(workers[0], workers[0] + len(workers)))

    # last_worker is who ends the tile of the last piece.
    finisher = {
        (batch, tile): worker
        for worker, own in enumerate(pieces)
        for batch, tile, _, end in own
        if end == num_blocks_of(lengths[batch])
    }
    for worker, own in enumerate(pieces):
        row = rows[worker]
        if own:
            assert row[7] == finisher[own[-1][:2]]
        else:
            assert row[:3] == row[3:6] and row[6:] == [0, worker]

    counts = Counter(piece[0] for piece in line)
    assert num_splits[0] == 0
    assert num_splits.diff().tolist() == [counts[batch] for batch in range(len(lengths))]
    return pieces, workers_of


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, num_rows=NUM_ROWS, num_heads_kv=st.integers(1, 4), capacity=CAPACITY)
@example(lengths=[0], num_rows=1, num_heads_kv=1, capacity=CPU_CAPACITY)
@example(lengths=[64 * 132], num_rows=16384, num_heads_kv=1, capacity=CPU_CAPACITY)
@example(lengths=[2**31 - 1], num_rows=1, num_heads_kv=1, capacity=CPU_CAPACITY)
def test_every_block_is_covered_once_and_work_is_even(lengths, num_rows, num_heads_kv, capacity):
    check_plan(lengths, num_rows, num_heads_kv, capacity)


@OF_SEVERAL_GPUS
@pytest.mark.parametrize("num_rows", [16, 32, 48, 64, 128, 300])
def test_tiles_are_divided_evenly(num_rows, capacity):
    """Equal tiles among as many workers each, where that is nearly as even as it can be; else by a fair share."""
    num_even = num_few = num_fair = 0
    for batch_size, num_blocks in itertools.product(
        (1, 2, 3, 5, 7, 15, 16, 20, 39, 40, 66, 70, 131, 132, 133), (0, 1, 3, 4, 7, 20, 33, 64, 1000)
    ):
        grid = worker_grid(batch_size, num_rows, 1, capacity)
        lengths = [PAGE_SIZE * num_blocks] * batch_size
        pieces, workers_of = check_plan(lengths, num_rows, 1, capacity)
        num_tiles = batch_size * grid.tiles_per_request
        share = grid.num_workers // num_tiles
        if share == 0:
            continue
        is_few = not grid.is_swapped and 2 * num_tiles * num_blocks <= grid.num_workers
        least, whole = grid.min_blocks_per_split, 2 * grid.min_blocks_per_split - 1
        if is_few:
            least, whole = 1, DENSE_WHOLE_TILE_OF_FEW
        elif grid.is_swapped:
            least, whole = grid.split_ctas, SWAPPED_WHOLE_TILE * grid.split_ctas
        piece = num_blocks if num_blocks <= whole else max(-(-num_blocks // share), least)
        quota = quota_of(lengths, grid)
        if piece + grid.split_overhead_blocks > quota + slack_of(grid, quota, num_tiles):
            num_fair += 1
            continue
        num_even += 1
        num_few += is_few and piece < num_blocks
        for tile, workers in workers_of.items():
            # A tile without blocks is left to the last one.
            first = tile * share if num_blocks > 0 else tile * share + share - 1
            assert workers == list(range(first, first + (-(-num_blocks // piece) if piece > 0 else 1)))
        assert max(end - begin for own in pieces for _, _, begin, end in own) <= piece
    assert num_even > 0 and num_fair > 0
    assert num_few > 0 or num_rows <= MAX_SWAPPED_ROWS_OF_MANY


def parts_of(
    blocks: list[int], num_rows: int, num_heads_kv: int = 1, capacity: ClusterCapacity = CPU_CAPACITY
) -> list[list[int]]:
    """How many blocks the parts of each tile have, of requests of so many blocks, the last of them with one token."""
    lengths = [PAGE_SIZE * (num_blocks - 1) + 1 if num_blocks > 0 else 0 for num_blocks in blocks]
    pieces, _ = check_plan(lengths, num_rows, num_heads_kv, capacity)
    parts = defaultdict(list)
    for batch, tile, begin, end in itertools.chain.from_iterable(pieces):
        parts[batch, tile].append(end - begin)
    return list(parts.values())


# No larger ones than single CTAs.
SMALL_CLUSTERS = ClusterCapacity(UNUSUAL_CLUSTERS[1])


def in_twos(num_blocks: int) -> list[int]:
    return [2] * (num_blocks // 2) + [1] * (num_blocks % 2)


@OF_SEVERAL_GPUS
@pytest.mark.parametrize(
    ("num_rows", "num_heads_kv", "batch_size"), [(128, 1, 1), (64, 1, 2), (48, 1, 2), (64, 2, 1), (256, 1, 1)]
)
def test_few_blocks_are_cut_in_single_ones(num_rows, num_heads_kv, batch_size, capacity):
    """As long as at most half of the workers have one; all others in parts of two at least."""
    grid = worker_grid(batch_size, num_rows, num_heads_kv, capacity)
    num_tiles = batch_size * grid.tiles_per_request
    few = grid.num_workers // 2 // num_tiles
    assert not grid.is_swapped and few >= grid.split_overhead_blocks + grid.min_blocks_per_split
    parts = parts_of([few] * batch_size, num_rows, num_heads_kv, capacity)
    assert parts == [[1] * few] * num_tiles
    one_more = few + 1
    parts = parts_of([one_more] * batch_size, num_rows, num_heads_kv, capacity)
    assert parts == [in_twos(one_more)] * num_tiles


# The longest tile of few blocks that is not cut.
WHOLE = DENSE_WHOLE_TILE_OF_FEW


@pytest.mark.parametrize(
    ("blocks", "num_rows", "num_heads_kv", "expected"),
    [
        # 66 workers of two lanes: up to 33 blocks.
        pytest.param([WHOLE], 128, 1, [[WHOLE]], id="whole"),
        pytest.param([WHOLE + 1], 128, 1, [[1] * (WHOLE + 1)], id="not-whole"),
        pytest.param([33], 128, 1, [[1] * 33], id="one"),
        pytest.param([34], 128, 1, [in_twos(34)], id="one-too-many"),
        pytest.param([1, WHOLE, 0, 7], 128, 1, [[1], [WHOLE], [0], [1] * 7], id="short"),
        pytest.param([1, WHOLE, 16 - WHOLE, 16], 128, 1, [[1], [WHOLE], [1] * (16 - WHOLE), [1] * 16], id="uneven"),
        pytest.param(
            [2, WHOLE, 16 - WHOLE, 16],
            128,
            1,
            [[2], [WHOLE], in_twos(16 - WHOLE), in_twos(16)],
            id="uneven-too-many",
        ),
        # No more parts than workers for the tile: 22 here.
        pytest.param([1, 0, 32], 128, 1, [[1], [0], in_twos(32)], id="longer-than-its-share"),
        # 132 workers: up to 66 blocks.
        pytest.param([33, 33], 64, 1, [[1] * 33] * 2, id="two"),
        pytest.param([33, 34], 64, 1, [in_twos(33), in_twos(34)], id="two-too-many"),
        pytest.param([WHOLE, 66 - WHOLE], 64, 1, [[WHOLE], [1] * (66 - WHOLE)], id="two-uneven"),
        pytest.param([WHOLE + 1, 66 - WHOLE], 64, 1, [[WHOLE + 1], in_twos(66 - WHOLE)], id="two-uneven-too-many"),
        pytest.param([66, 0], 64, 1, [[1] * 66, [0]], id="two-one-empty"),
        # Blocks of all tiles count.
        pytest.param([33], 64, 2, [[1] * 33] * 2, id="two-kv-heads"),
        pytest.param([34], 64, 2, [in_twos(34)] * 2, id="two-kv-heads-too-many"),
        # One worker per tile, and 33 blocks would be too many for it: parts of a fair share, 5 with their overhead.
        pytest.param([33, *[0] * 39], 128, 1, [[2, 5, 5, 5, 5, 5, 5, 1], *[[0]] * 39], id="by-a-fair-share"),
    ],
)
def test_cuts_of_few_blocks(blocks, num_rows, num_heads_kv, expected):
    assert parts_of(blocks, num_rows, num_heads_kv) == expected


@pytest.mark.parametrize(
    ("blocks", "num_rows", "expected"),
    [
        ([3] * 12, 128, [[3]] * 12),
        ([4] * 12, 128, [[2, 2]] * 12),
        # Five workers for each.
        ([7] * 12, 128, [[2, 2, 2, 1]] * 12),
        # Two.
        ([7] * 33, 128, [[4, 3]] * 33),
        ([7] * 66, 64, [[4, 3]] * 66),
        # One.
        ([7] * 67, 64, [[7]] * 67),
    ],
)
def test_tiles_with_work_for_two_are_cut(blocks, num_rows, expected):
    assert parts_of(blocks, num_rows) == expected


@pytest.mark.parametrize(
    ("blocks", "num_rows", "capacity", "expected"),
    [
        ([7], 16, CPU_CAPACITY, [[7]]),
        ([4], 32, CPU_CAPACITY, [[4]]),
        # Of 16 CTAs, with a block each at least, of which up to two blocks each stay whole.
        ([32], 16, CPU_CAPACITY, [[32]]),
        ([33], 16, CPU_CAPACITY, [[16, 16, 1]]),
        # Seven workers.
        ([140], 16, CPU_CAPACITY, [[20] * 7]),
        # Of 8.
        ([16], 32, CPU_CAPACITY, [[16]]),
        ([40], 32, CPU_CAPACITY, [[8] * 5]),
        # Without large clusters.
        ([2], 16, SMALL_CLUSTERS, [[2]]),
        ([3], 16, SMALL_CLUSTERS, [[1, 1, 1]]),
        ([39], 16, SMALL_CLUSTERS, [[1] * 39]),
    ],
)
def test_cuts_of_the_swapped_kernel(blocks, num_rows, capacity, expected):
    assert worker_grid(len(blocks), num_rows, 1, capacity).is_swapped
    assert parts_of(blocks, num_rows, 1, capacity) == expected


@OF_SEVERAL_GPUS
@pytest.mark.parametrize("num_blocks", [4, 5, 7])
@pytest.mark.parametrize("num_rows", [64, 128])
def test_batch_invariant_plans_have_no_such_cuts(num_rows, num_blocks, capacity):
    """Tiles of one segment, so short that their first worker has them."""
    batch_size = 2
    grid = invariant_grid(batch_size, num_rows, 1, capacity)
    assert not grid.is_swapped and 2 * batch_size * num_blocks <= grid.num_workers
    lengths = torch.tensor([PAGE_SIZE * num_blocks] * batch_size, dtype=torch.int32)
    metadata, num_splits = decode_schedule(lengths, num_rows, 1, capacity, batch_invariant=True)
    assert num_splits.tolist() == [0, 1, 2]
    share = grid.num_workers // batch_size
    working = {worker: row for worker, row in enumerate(metadata.tolist()) if row[6] > 0}
    assert working == {
        request * share: [request, 0, 0, request, 0, MAX_SEGMENTS, 1, request * share] for request in range(batch_size)
    }


@OF_SEVERAL_GPUS
@pytest.mark.parametrize("num_rows", [16, 32, 64, 128])
def test_nearly_equal_lengths(num_rows, capacity):
    generator = torch.Generator().manual_seed(num_rows)
    for batch_size, longest in itertools.product((1, 2, 3, 9, 16, 18, 33, 50, 100), (1, 500, 4096, 100_000)):
        lengths = torch.randint(longest * 9 // 10, longest + 1, (batch_size,), generator=generator).tolist()
        check_plan(lengths, num_rows, 1, capacity)
        check_plan([*lengths[1:], 0], num_rows, 1, capacity)


@settings(max_examples=15, deadline=None)
@given(
    batch_size=st.integers(1000, 4096),
    longest=st.sampled_from([0, 1, 100, 5000]),
    num_rows=st.sampled_from([1, 64, 128, 4096, 16384]),
    seed=st.integers(0, 1000),
)
@example(batch_size=4096, longest=5000, num_rows=1, seed=0)
@example(batch_size=4096, longest=300, num_rows=16384, seed=1)
def test_large_batches(batch_size, longest, num_rows, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (batch_size,), generator=generator).tolist()
    check_plan(lengths, num_rows, 1, CPU_CAPACITY)


@pytest.mark.parametrize("capacity", KNOWN_CAPACITIES, ids=lambda capacity: "-".join(map(str, capacity.num_clusters)))
def test_no_requests(capacity):
    metadata, num_splits = plan([], 16, 1, capacity)
    assert metadata.shape == (capacity.num_sms, 8) and metadata[:, 6].sum() == 0
    assert num_splits.tolist() == [0]


@settings(max_examples=300, deadline=None)
@given(num_rows=NUM_ROWS, num_heads_kv=st.integers(1, 8), batch_size=st.integers(0, 200), capacity=CAPACITY)
def test_worker_grid_covers_all_rows(num_rows, num_heads_kv, batch_size, capacity):
    grid = worker_grid(batch_size, num_rows, num_heads_kv, capacity)
    row_tiles = -(-num_rows // grid.rows_per_tile)
    assert 1 <= grid.num_lanes <= MAX_LANES
    assert grid.num_workers >= 1 and grid.num_workers * grid.num_lanes <= capacity.num_clusters[grid.split_ctas]
    assert grid.tiles_per_request == grid.lane_groups * num_heads_kv
    assert grid.lane_groups * grid.num_lanes >= row_tiles > (grid.lane_groups - 1) * grid.num_lanes
    assert grid.is_swapped == (grid.rows_per_tile < BLOCK_M) and (grid.is_swapped or grid.split_ctas == 1)


def check_room(num_rows: int, num_heads_kv: int, batch_size: int, capacity: ClusterCapacity) -> None:
    """The plan and the partial results of any batch fit what is made for every batch."""
    grid = worker_grid(batch_size, num_rows, num_heads_kv, capacity)
    assert grid.num_workers <= num_plan_rows(num_rows, num_heads_kv, capacity.num_sms)
    num_slots = 2 * grid.num_workers  # the first and the last piece of each worker
    rows = num_partial_rows(num_rows, num_heads_kv, capacity.num_sms)
    assert num_slots * grid.num_lanes * grid.rows_per_tile <= rows


@pytest.mark.parametrize("capacity", KNOWN_CAPACITIES, ids=lambda capacity: "-".join(map(str, capacity.num_clusters)))
def test_plans_of_all_batches_fit(capacity):
    rows = (1, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 97, 127, 128, 129, 192, 256, 300, 448, 512, 4096)
    for num_rows, num_heads_kv, batch_size in itertools.product(rows, (1, 2, 3), range(0, 145)):
        check_room(num_rows, num_heads_kv, batch_size, capacity)


@settings(max_examples=300, deadline=None)
@given(num_rows=NUM_ROWS, num_heads_kv=st.integers(1, 8), batch_size=st.integers(0, 200), capacity=CAPACITY)
def test_plans_of_all_gpus_fit(num_rows, num_heads_kv, batch_size, capacity):
    check_room(num_rows, num_heads_kv, batch_size, capacity)


@pytest.mark.parametrize(("num_rows", "num_heads_kv", "num_lanes"), SHAPES)
def test_number_of_lanes(num_rows, num_heads_kv, num_lanes):
    assert dense_grid(num_rows, num_heads_kv, 132).num_lanes == num_lanes


@pytest.mark.parametrize(
    ("batch_size", "split_ctas"),
    [
        (1, 16),
        (3, 16),
        (4, 8),
        (5, 8),
        (6, 16),
        (7, 16),
        (8, 8),
        (15, 8),
        (16, 6),
        (17, 6),
        (18, 5),
        (22, 5),
        (23, 4),
        (30, 4),
        # Two for each request.
        (31, 2),
        (33, 2),
        (34, 3),
        (39, 3),
        (40, 2),
        (66, 2),
        (67, 2),
        (125, 2),
        # Whole requests, one or several for each SM.
        (126, 1),
        (132, 1),
        (133, 2),
        (250, 2),
        (251, 1),
        (264, 1),
    ],
)
def test_more_requests_make_smaller_clusters(batch_size, split_ctas):
    grid = worker_grid(batch_size, 16, 1, CPU_CAPACITY)
    assert grid.split_ctas == split_ctas and grid.num_workers == CPU_CAPACITY.num_clusters[split_ctas]


@pytest.mark.parametrize("num_rows", [17, 32])
def test_more_than_16_rows_of_several_requests_are_for_the_dense_kernel(num_rows):
    assert worker_grid(1, num_rows, 1, CPU_CAPACITY).split_ctas == 8
    assert not worker_grid(1, num_rows, 2, CPU_CAPACITY).is_swapped
    for batch_size in (2, 15, 66, 132, 1000):
        assert worker_grid(batch_size, num_rows, 1, CPU_CAPACITY) == dense_grid(num_rows, 1, 132)


def test_capacity_without_kernels_is_that_of_an_h200():
    assert capacity_of(torch.device("cpu")) == CPU_CAPACITY
    if not torch.cuda.is_available():
        assert capacity_of(torch.device("cuda")) == CPU_CAPACITY


@pytest.mark.gpu
def test_capacity_of_a_gpu():
    capacity = capacity_of(torch.device("cuda"))
    assert capacity == capacity_of(torch.device("cuda", torch.cuda.current_device()))
    assert capacity.num_sms == torch.cuda.get_device_properties(0).multi_processor_count
    assert len(capacity.num_clusters) == MAX_SPLIT_CTAS + 1
    for size, num_clusters in enumerate(capacity.num_clusters):
        assert 0 <= num_clusters * size <= capacity.num_sms


def test_shape_does_not_depend_on_batch_or_lengths():
    for num_rows, rows in ((16, 132), (64, 132), (128, 66)):
        batches = ([], [0], [5], [10**6], [0] * 100, list(range(1000)))
        assert {plan(lengths, num_rows, 1)[0].shape for lengths in batches} == {(rows, 8)}


def test_even_lengths_split_evenly():
    """132 requests of equal length on 132 workers: one whole request each."""
    metadata, num_splits = plan([4096] * 132, 16, 1)
    assert metadata[:, 6].tolist() == [1] * 132
    assert num_splits[-1] == 132


@pytest.mark.parametrize(
    ("batch_size", "num_rows"), [(128, 16), (128, 128), (64, 128), (58, 128), (100, 64), (104, 300)]
)
def test_whole_tiles_where_a_split_would_not_pay(batch_size, num_rows):
    """Nearly as many tiles as workers, or as a multiple of them: none is split, so nothing is to be merged. With one
    lane already where a quarter of the workers have nothing to do."""
    tiles = worker_grid(batch_size, num_rows, 1, CPU_CAPACITY).tiles_per_request
    metadata, num_splits = plan([4096] * batch_size, num_rows, 1)
    assert num_splits.tolist() == [tiles * request for request in range(batch_size + 1)]
    assert metadata[:, 7].tolist() == list(range(metadata.shape[0]))


@pytest.mark.parametrize(("batch_size", "num_rows"), [(57, 128), (90, 64), (200, 64)])
def test_tiles_are_split_where_too_few_workers_would_have_one(batch_size, num_rows):
    _, num_splits = plan([4096] * batch_size, num_rows, 1)
    assert num_splits[-1] > batch_size


def test_long_tiles_are_split():
    """100 requests would leave 32 of 132 workers idle for long."""
    _, num_splits = plan([65536] * 100, 16, 1)
    assert num_splits[-1] > 100


def test_op_is_the_host_twin():
    seqlens = torch.tensor([100, 0, 7000], dtype=torch.int32)
    for actual, expected in zip(
        torch.ops.flash_mla.decode_schedule(seqlens, 128, 1),
        decode_schedule(seqlens, 128, 1, CPU_CAPACITY),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "num_heads_kv", "num_lanes"), SHAPES)
def test_device_and_host_agree(num_rows, num_heads_kv, num_lanes):
    capacity = capacity_of(torch.device("cuda"))
    generator = torch.Generator().manual_seed(num_rows)
    batches = {
        f"{batch_size} requests up to {longest}": torch.randint(-2, longest + 1, (batch_size,), generator=generator)
        for batch_size, longest in BATCHES
    }
    # Around what is so few that parts of tiles have one block, for one request and for several.
    grid = dense_grid(num_rows, num_heads_kv, capacity.num_sms)
    few = grid.num_workers // (2 * grid.tiles_per_request)
    for total in (few - 1, few, few + 1):
        quarter = few // 4
        for blocks in ([total], [0, total], [3, 4, total - 7], [quarter, quarter, quarter, total - 3 * quarter]):
            batches[f"requests of {blocks} blocks"] = PAGE_SIZE * torch.tensor(blocks)
    for batch, lengths in batches.items():
        lengths = lengths.to(torch.int32)
        planned = torch.ops.flash_mla.decode_schedule(lengths.cuda(), num_rows, num_heads_kv)
        expected = decode_schedule(lengths, num_rows, num_heads_kv, capacity)
        for name, actual_part, expected_part in zip(("metadata", "num_splits"), planned, expected, strict=True):
            assert torch.equal(actual_part.cpu(), expected_part), f"{name} of {batch}"
