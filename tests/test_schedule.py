"""The tile scheduler: every block is covered once, work is even, and host and device agree."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash_mla.schedule import (
    BLOCK_M,
    CPU_NUM_SMS,
    MAX_LANES,
    MIN_BLOCKS_PER_SPLIT,
    PAGE_SIZE,
    SPLIT_OVERHEAD_BLOCKS,
    decode_schedule,
    worker_grid,
)

NUM_SMS = st.sampled_from([1, 2, 7, 78, 114, 132, 144])
NUM_ROWS = st.one_of(st.integers(1, 300), st.integers(1, 16384))
LENGTHS = st.one_of(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.lists(st.one_of(st.just(0), st.integers(0, 200_000)), min_size=1, max_size=12),
    st.lists(st.integers(-3, 2**20), min_size=1, max_size=3),
)
SHAPES = [
    (1, 1, 1),
    (16, 1, 1),
    (64, 2, 1),
    (65, 1, 2),
    (128, 1, 2),
    (256, 1, 4),
    (512, 3, 4),
    (128, 3, 2),
    (16384, 1, 4),
    (1000, 2, 4),
    (448, 1, 7),
]

# Requests and the longest of them.
BATCHES = [
    (0, 0),
    (1, 0),
    (1, 1),
    (1, 100_000),
    (1, 2**31 - 2),
    (7, 64),
    (64, 4096),
    (133, 5000),
    (1025, 3000),
    (4096, 300),
]


def num_blocks_of(length: int) -> int:
    return -(-max(length, 0) // PAGE_SIZE)


def plan(lengths: list[int], num_rows: int, num_heads_kv: int, num_sms: int):
    metadata, num_splits = decode_schedule(torch.tensor(lengths, dtype=torch.int32), num_rows, num_heads_kv, num_sms)
    return metadata, num_splits


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


def check_plan(lengths: list[int], num_rows: int, num_heads_kv: int, num_sms: int) -> None:
    grid = worker_grid(num_rows, num_heads_kv, num_sms)
    tiles = grid.tiles_per_request
    metadata, num_splits = plan(lengths, num_rows, num_heads_kv, num_sms)
    assert metadata.dtype == num_splits.dtype == torch.int32
    assert metadata.shape == (grid.num_workers, 8) and num_splits.shape == (len(lengths) + 1,)
    rows = metadata.tolist()
    pieces = read_pieces(rows, lengths, tiles)

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

    # Nobody does more than a fair share plus the overhead of one piece.
    total = sum((num_blocks_of(length) + SPLIT_OVERHEAD_BLOCKS) * tiles for length in lengths)
    quota = max(-(-total // grid.num_workers), SPLIT_OVERHEAD_BLOCKS + MIN_BLOCKS_PER_SPLIT)
    for own in pieces:
        cost = sum(end - begin + SPLIT_OVERHEAD_BLOCKS for _, _, begin, end in own)
        assert cost <= quota + SPLIT_OVERHEAD_BLOCKS

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


@settings(max_examples=300, deadline=None)
@given(lengths=LENGTHS, num_rows=NUM_ROWS, num_heads_kv=st.integers(1, 4), num_sms=NUM_SMS)
@example(lengths=[0], num_rows=1, num_heads_kv=1, num_sms=132)
@example(lengths=[64 * 132], num_rows=16384, num_heads_kv=1, num_sms=132)
@example(lengths=[2**31 - 1], num_rows=1, num_heads_kv=1, num_sms=132)
def test_every_block_is_covered_once_and_work_is_even(lengths, num_rows, num_heads_kv, num_sms):
    check_plan(lengths, num_rows, num_heads_kv, num_sms)


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
    check_plan(lengths, num_rows, 1, CPU_NUM_SMS)


def test_no_requests():
    metadata, num_splits = plan([], 16, 1, 132)
    assert metadata.shape == (132, 8) and metadata[:, 6].sum() == 0
    assert num_splits.tolist() == [0]


@settings(max_examples=300, deadline=None)
@given(num_rows=NUM_ROWS, num_heads_kv=st.integers(1, 8), num_sms=NUM_SMS)
def test_worker_grid_covers_all_rows(num_rows, num_heads_kv, num_sms):
    grid = worker_grid(num_rows, num_heads_kv, num_sms)
    row_tiles = -(-num_rows // BLOCK_M)
    assert 1 <= grid.num_lanes <= MAX_LANES
    assert grid.num_workers >= 1 and grid.num_workers * grid.num_lanes <= num_sms
    assert grid.tiles_per_request % num_heads_kv == 0
    groups = grid.tiles_per_request // num_heads_kv
    assert groups * grid.num_lanes >= row_tiles > (groups - 1) * grid.num_lanes


@pytest.mark.parametrize(("num_rows", "num_heads_kv", "num_lanes"), SHAPES)
def test_number_of_lanes(num_rows, num_heads_kv, num_lanes):
    assert worker_grid(num_rows, num_heads_kv, 132).num_lanes == num_lanes


def test_shape_does_not_depend_on_batch_or_lengths():
    shapes = {plan(lengths, 16, 1, 132)[0].shape for lengths in ([], [0], [5], [10**6], [0] * 100, list(range(1000)))}
    assert shapes == {(132, 8)}


def test_even_lengths_split_evenly():
    """132 requests of equal length on 132 workers: one whole request each."""
    metadata, num_splits = plan([4096] * 132, 16, 1, 132)
    assert metadata[:, 6].tolist() == [1] * 132
    assert num_splits[-1] == 132


@pytest.mark.parametrize(("batch_size", "num_rows"), [(128, 16), (128, 128), (64, 128), (104, 300)])
def test_whole_tiles_where_a_split_would_not_pay(batch_size, num_rows):
    """Nearly as many tiles as workers, or as a multiple of them: none is split, so nothing is to be merged."""
    tiles = worker_grid(num_rows, 1, 132).tiles_per_request
    metadata, num_splits = plan([4096] * batch_size, num_rows, 1, 132)
    assert num_splits.tolist() == [tiles * request for request in range(batch_size + 1)]
    assert metadata[:, 7].tolist() == list(range(metadata.shape[0]))


def test_long_tiles_are_split():
    """100 requests would leave 32 of 132 workers idle for long."""
    _, num_splits = plan([65536] * 100, 16, 1, 132)
    assert num_splits[-1] > 100


def test_op_is_the_host_twin():
    seqlens = torch.tensor([100, 0, 7000], dtype=torch.int32)
    for actual, expected in zip(
        torch.ops.flash_mla.decode_schedule(seqlens, 128, 1),
        decode_schedule(seqlens, 128, 1, CPU_NUM_SMS),
        strict=True,
    ):
        assert torch.equal(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "num_heads_kv", "num_lanes"), SHAPES)
def test_device_and_host_agree(num_rows, num_heads_kv, num_lanes):
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    generator = torch.Generator().manual_seed(num_rows)
    for batch_size, longest in BATCHES:
        lengths = torch.randint(-2, longest + 1, (batch_size,), generator=generator).to(torch.int32)
        planned = torch.ops.flash_mla.decode_schedule(lengths.cuda(), num_rows, num_heads_kv)
        expected = decode_schedule(lengths, num_rows, num_heads_kv, num_sms)
        for name, actual_part, expected_part in zip(("metadata", "num_splits"), planned, expected, strict=True):
            assert torch.equal(actual_part.cpu(), expected_part), f"{name} of {batch_size} requests up to {longest}"
