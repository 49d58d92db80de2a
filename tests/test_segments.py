"""Batch-invariant plans: a tree of segments that follows from the length alone, and workers that get whole nodes."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CAPACITIES, UNUSUAL_CLUSTERS
from segments import fold_by_workers, num_blocks_of, tree_of, walk

from flash_mla import schedule
from flash_mla.schedule import (
    CPU_CAPACITY,
    DENSE_MIN_SEGMENT,
    MAX_SCRATCH_BYTES,
    MAX_SEGMENTS,
    NUM_GRANULES,
    SWAPPED_MIN_SEGMENT,
    ClusterCapacity,
    capacity_of,
    decode_schedule,
    divide_work,
    fold_path,
    invariant_grid,
    invariant_scratch_bytes,
    levels_in_granule,
    min_segment_blocks,
    num_plan_rows,
    num_segments_of,
    radices_of,
    segment_at,
    segment_range,
)

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NUM_BLOCKS = [*range(140), 255, 256, 511, 512, 513, 1000, 1023, 1024, 1025, 3125, 20_000, 2**25 - 1, 2**25]
MIN_BLOCKS = (1, 2, SWAPPED_MIN_SEGMENT, DENSE_MIN_SEGMENT, 64)
KNOWN_CAPACITIES = [*CAPACITIES.values(), *map(ClusterCapacity, UNUSUAL_CLUSTERS)]
COUNTS = [(1, 1), (16, 1), (32, 3), (33, 1), (64, 2), (128, 1), (192, 1), (256, 1), (1000, 2)]
LENGTHS = st.one_of(
    st.lists(st.integers(0, 20_000), min_size=1, max_size=40),
    st.lists(st.one_of(st.just(0), st.integers(0, 200_000)), min_size=1, max_size=150),
    st.lists(st.integers(-3, 2**21), min_size=1, max_size=3),
)


def plan_rows(lengths: list[int], num_rows: int, num_heads_kv: int, capacity: ClusterCapacity) -> list[list[int]]:
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    return decode_schedule(seqlens, num_rows, num_heads_kv, capacity, batch_invariant=True)[0].tolist()


def in_order(left: str, right: str) -> str:
    return f"({left} {right})"


@pytest.mark.parametrize("min_blocks", MIN_BLOCKS)
def test_segments_cover_the_blocks_in_order(min_blocks):
    for num_blocks in NUM_BLOCKS:
        segments = num_segments_of(num_blocks, min_blocks)
        assert segments in (1, 2, 4, 8, 16, 32, 64)
        assert segments == 1 or num_blocks / segments >= min_blocks
        assert segments == MAX_SEGMENTS or num_blocks / (2 * segments) < min_blocks
        ranges = [segment_range(i, segments, num_blocks) for i in range(segments)]
        assert (ranges[0].start, ranges[-1].stop) == (0, num_blocks)
        assert all(left.stop == right.start for left, right in itertools.pairwise(ranges))
        assert all(ranges) or num_blocks == 0


@pytest.mark.parametrize("num_segments", [2**i for i in range(7)])
def test_tree_has_every_segment_once_and_in_order(num_segments):
    inner, middle, top = radices_of(num_segments)
    assert inner * middle * top == num_segments
    leaves = tree_of([f"{i}" for i in range(num_segments)], in_order).replace("(", "").replace(")", "").split()
    assert leaves == [str(i) for i in range(num_segments)]


def test_tree_of_sixteen():
    tree = tree_of([f"{i}" for i in range(16)], in_order)
    assert tree == "(((((0 1) (2 3)) (4 5)) (6 7)) ((((8 9) (10 11)) (12 13)) (14 15)))"


@pytest.mark.parametrize("num_granules", NUM_GRANULES)
@pytest.mark.parametrize("num_segments", [2**i for i in range(7)])
def test_granules_are_nodes_of_the_tree(num_segments, num_granules):
    """The first segment of a granule is folded with nothing, the last one makes it whole, no other does."""
    num_levels, granules = levels_in_granule(num_granules), min(num_segments, num_granules)
    size = num_segments // granules
    for segment in range(num_segments):
        folds, end_level = fold_path(segment, num_segments, num_levels)
        assert (end_level == num_levels) == (segment % size == size - 1)
        assert segment % size > 0 or folds == []
    starts = {segment_at(place, num_segments, num_granules) for place in range(MAX_SEGMENTS)}
    assert starts == set(range(0, num_segments, size))
    assert segment_at(MAX_SEGMENTS, num_segments, num_granules) == num_segments


PROGRAM = """
#include <cstdio>
#include "params/segments.h"
using namespace flash_mla;
int main() {
    for (int num_blocks, min_blocks; std::scanf("%d %d", &num_blocks, &min_blocks) == 2;) {
        int const bits = segment_bits_of(num_blocks, min_blocks);
        std::printf("%d", 1 << bits);
        for (int i = 0; i <= 1 << bits; ++i) std::printf(" %d", segment_begin(i, bits, num_blocks));
        for (int level = 0; level < kFoldLevels; ++level) std::printf(" %d", 1 << level_bits(level, bits));
        for (int const granules : {64, 8, 2, 1}) {
            std::printf(" %d %d", levels_in_granule(granules), levels_with_slots(granules));
            for (int i = 0; i < 1 << bits; ++i) {
                FoldPath const path = fold_path(i, bits, levels_in_granule(granules));
                std::printf(" %d %d", path.folds, path.end_level);
            }
            for (int place = 0; place <= 64; ++place) std::printf(" %d", segment_at(place, bits, granules));
        }
        std::printf("\\n");
    }
}
"""


def numbers_of(num_blocks: int, min_blocks: int) -> list[int]:
    """What the program prints."""
    segments = num_segments_of(num_blocks, min_blocks)
    begins = [segment_range(i, segments, num_blocks).start for i in range(segments)]
    numbers = [segments, *begins, num_blocks, *radices_of(segments)]
    for granules in NUM_GRANULES:
        numbers += [levels_in_granule(granules), schedule.levels_with_slots(granules)]
        for segment in range(segments):
            folds, end_level = fold_path(segment, segments, levels_in_granule(granules))
            numbers += [sum(1 << level for level in folds), end_level]
        numbers += [segment_at(place, segments, granules) for place in range(MAX_SEGMENTS + 1)]
    return numbers


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found (c++)")
def test_segments_are_the_same_on_host_and_device(tmp_path):
    source, program = tmp_path / "segments.cpp", tmp_path / "segments"
    source.write_text(PROGRAM.replace("#include <cstdio>", "#include <cstdio>\n#include <initializer_list>"))
    subprocess.run(["c++", "-std=c++17", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    cases = [(num_blocks, min_blocks) for num_blocks in NUM_BLOCKS for min_blocks in MIN_BLOCKS]
    given_cases = "\n".join(f"{num_blocks} {min_blocks}" for num_blocks, min_blocks in cases)
    process = subprocess.run([str(program)], input=given_cases, capture_output=True, text=True, check=True)
    for case, line in zip(cases, process.stdout.splitlines(), strict=True):
        assert list(map(int, line.split())) == numbers_of(*case), case


def check_plan(lengths: list[int], num_rows: int, num_heads_kv: int, capacity: ClusterCapacity) -> None:
    grid = invariant_grid(len(lengths), num_rows, num_heads_kv, capacity)
    rows = plan_rows(lengths, num_rows, num_heads_kv, capacity)
    assert len(rows) == num_plan_rows(num_rows, num_heads_kv, capacity.num_sms)
    assert all(row[6] == 0 for row in rows[grid.num_workers :])
    assert all(row[7] == worker for worker, row in enumerate(rows))
    for row, following in itertools.pairwise(rows):
        if row[6] > 0:
            assert (following[2] > 0) == (row[5] < MAX_SEGMENTS)
            assert following[2] == 0 or following[:3] == row[3:6]
    # Every segment once, granules undivided.
    segments = list(walk(rows, lengths, grid))
    counts = Counter((s.batch, s.tile, s.index) for s in segments)
    assert set(counts.values()) == {1}
    workers_of: dict[tuple[int, int, int], set[int]] = {}
    for s in segments:
        granule = s.index // (s.num_segments // min(s.num_segments, grid.num_granules))
        workers_of.setdefault((s.batch, s.tile, granule), set()).add(s.worker)
    assert all(len(workers) == 1 for workers in workers_of.values())
    for batch, length in enumerate(lengths):
        expected = num_segments_of(num_blocks_of(length), min_segment_blocks(grid.rows_per_tile))
        for tile in range(grid.tiles_per_request):
            assert sum((batch, tile, index) in counts for index in range(expected)) == expected
    assert len(counts) == sum(
        num_segments_of(num_blocks_of(length), min_segment_blocks(grid.rows_per_tile)) * grid.tiles_per_request
        for length in lengths
    )


@pytest.mark.parametrize("capacity", KNOWN_CAPACITIES[:4], ids=["132", "114", "78", "small-clusters"])
@pytest.mark.parametrize(("num_rows", "num_heads_kv"), COUNTS)
@given(lengths=LENGTHS)
@settings(max_examples=15, deadline=None)
def test_every_segment_is_covered_once(num_rows, num_heads_kv, capacity, lengths):
    check_plan(lengths, num_rows, num_heads_kv, capacity)


@pytest.mark.parametrize("capacity", KNOWN_CAPACITIES, ids=lambda capacity: str(capacity.num_clusters[1:3]))
def test_plans_of_any_gpu(capacity):
    for lengths in ([100], [70_000], [0, 0], [5000] * 40, [131_072, 1, 0, 9000]):
        for num_rows, num_heads_kv in COUNTS[:7]:
            check_plan(lengths, num_rows, num_heads_kv, capacity)


def test_work_is_as_even_as_granules_allow():
    """No worker has more than its fair share, a tile's overhead and half a granule at either end; or a division that is
    even enough."""
    for lengths in ([131_072], [32_768] * 4, [8192] * 16, [4096] * 128, [4096] * 64, [200_000, *[1000] * 100]):
        for num_rows in (16, 128):
            grid = invariant_grid(len(lengths), num_rows, 1, CPU_CAPACITY)
            blocks: Counter[int] = Counter()
            tiles: dict[int, set[tuple[int, int]]] = {}
            largest = 0
            min_blocks = min_segment_blocks(grid.rows_per_tile)
            for s in walk(plan_rows(lengths, num_rows, 1, CPU_CAPACITY), lengths, grid):
                num_blocks = num_blocks_of(lengths[s.batch])
                blocks[s.worker] += len(segment_range(s.index, s.num_segments, num_blocks))
                tiles.setdefault(s.worker, set()).add((s.batch, s.tile))
                largest = max(largest, -(-num_blocks // min(s.num_segments, grid.num_granules)), min_blocks)
            overhead = grid.split_overhead_blocks
            total = sum(num_blocks_of(length) + overhead for length in lengths) * grid.tiles_per_request
            quota = -(-total // grid.num_workers)
            for worker, own in blocks.items():
                assert own + overhead * len(tiles[worker]) <= quota + 2 * overhead + largest, (lengths, num_rows)


@given(
    planned=st.lists(st.integers(0, 100_000), min_size=3, max_size=3),
    lengths=st.lists(st.integers(0, 100_000), min_size=3, max_size=3),
    num_rows=st.sampled_from([16, 64, 128]),
)
@settings(max_examples=60, deadline=None)
def test_plan_for_other_lengths_covers_every_segment_once(planned, lengths, num_rows):
    grid = invariant_grid(3, num_rows, 1, CPU_CAPACITY)
    segments = list(walk(plan_rows(planned, num_rows, 1, CPU_CAPACITY), lengths, grid))
    counts = Counter((s.batch, s.index) for s in segments)
    assert set(counts.values()) == {1}
    numbers = [num_segments_of(num_blocks_of(length), min_segment_blocks(grid.rows_per_tile)) for length in lengths]
    assert len(counts) == sum(numbers)


@given(
    lengths=LENGTHS,
    num_rows=st.sampled_from([16, 64, 128, 256]),
    num_granules=st.sampled_from(sorted(NUM_GRANULES)),
    num_workers=st.integers(1, 132),
)
@settings(max_examples=80, deadline=None)
def test_sums_have_one_order_whoever_computes_them(lengths, num_rows, num_granules, num_workers):
    """Of any number of workers and of granules."""
    grid = invariant_grid(len(lengths), num_rows, 1, CPU_CAPACITY)
    grid = grid._replace(num_granules=num_granules, num_workers=num_workers)
    rows = divide_work(torch.tensor(lengths, dtype=torch.int32), grid, num_workers)[0].tolist()
    segments = list(walk(rows, lengths, grid))
    results, _ = fold_by_workers(segments, lambda s: str(s.index), grid, in_order)
    for (batch, _), result in results.items():
        number = num_segments_of(num_blocks_of(lengths[batch]), min_segment_blocks(grid.rows_per_tile))
        assert result == tree_of([str(i) for i in range(number)], in_order)
    assert len(results) == len(lengths) * grid.tiles_per_request


def fold_partials(folded: tuple[torch.Tensor, ...], following: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """csrc/kernels/sm90/primitives/fold.h, in float64."""
    out, log2_sum = folded
    next_out, next_log2_sum = following
    largest = torch.maximum(log2_sum, next_log2_sum)
    if largest == float("-inf"):
        return torch.zeros_like(out), largest
    powers = torch.exp2(log2_sum - largest), torch.exp2(next_log2_sum - largest)
    total = powers[0] + powers[1]
    weights = powers[0] / total, powers[1] / total
    return weights[0] * out + weights[1] * next_out, torch.log2(total) + largest


@pytest.mark.parametrize("num_granules", NUM_GRANULES)
@pytest.mark.parametrize("num_segments", [1, 2, 8, 16, 64])
def test_folded_segments_are_the_attention_over_all_keys(num_segments, num_granules):
    generator = torch.Generator().manual_seed(num_segments)
    num_blocks = num_segments * DENSE_MIN_SEGMENT
    scores = torch.randn(num_blocks, generator=generator, dtype=torch.float64) * 3
    scores[segment_range(num_segments - 1, num_segments, num_blocks).start :] = float("-inf")  # a segment without keys
    if num_segments == 1:
        scores[0] = 1.0
    values = torch.randn(num_blocks, 4, generator=generator, dtype=torch.float64)
    lengths = [num_blocks * 64, 100]
    grid = invariant_grid(2, 64, 1, CPU_CAPACITY)._replace(num_granules=num_granules, num_workers=7)

    def value_of(segment):
        if segment.batch != 0:
            return torch.zeros(4, dtype=torch.float64), torch.tensor(float("-inf"), dtype=torch.float64)
        blocks = segment_range(segment.index, segment.num_segments, num_blocks)
        own = scores[blocks.start : blocks.stop]
        out = own.softmax(0).nan_to_num(0.0) @ values[blocks.start : blocks.stop]
        return out, torch.logsumexp(own, 0) / torch.log(torch.tensor(2.0, dtype=torch.float64))

    rows = divide_work(torch.tensor(lengths, dtype=torch.int32), grid, 7)[0].tolist()
    results, _ = fold_by_workers(list(walk(rows, lengths, grid)), value_of, grid, fold_partials)
    out, log2_sum = results[0, 0]
    torch.testing.assert_close(out, scores.softmax(0) @ values)
    torch.testing.assert_close(log2_sum * torch.log(torch.tensor(2.0, dtype=torch.float64)), scores.logsumexp(0))
    assert results[1, 0][1] == float("-inf")


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=map(str, CAPACITIES))
def test_scratch_is_bounded_and_granules_are_the_smallest_that_fit(capacity):
    for num_rows, num_heads_kv in [*COUNTS, (16384, 1), (2**20, 1)]:
        seen = []
        for batch_size in (0, 1, 2, 3, 4, 16, 31, 64, 88, 128, 256, 1000, 4096, 24 * 1024):
            grid = invariant_grid(batch_size, num_rows, num_heads_kv, capacity)
            assert invariant_scratch_bytes(grid, batch_size) <= MAX_SCRATCH_BYTES
            seen.append(grid.num_granules)
            larger = [granules for granules in NUM_GRANULES if granules > grid.num_granules]
            for granules in larger:
                assert invariant_scratch_bytes(grid._replace(num_granules=granules), batch_size) > MAX_SCRATCH_BYTES
            # Nothing else depends on the batch.
            assert grid._replace(num_granules=0) == invariant_grid(1, num_rows, num_heads_kv, capacity)._replace(
                num_granules=0
            )
        assert seen == sorted(seen, reverse=True)


def test_one_kernel_for_as_many_rows():
    def kinds(num_rows: int) -> set[tuple[int, ...]]:
        grids = (invariant_grid(batch_size, num_rows, 1, CPU_CAPACITY) for batch_size in (1, 2, 100, 5000))
        return {(grid.rows_per_tile, grid.split_ctas, grid.num_lanes) for grid in grids}

    assert {num_rows: kinds(num_rows) for num_rows in (16, 32, 33, 128)} == {
        16: {(16, 2, 1)},
        32: {(32, 2, 1)},
        33: {(64, 1, 1)},
        128: {(64, 1, 2)},
    }


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "num_heads_kv"), COUNTS)
def test_plan_of_the_gpu_is_that_of_the_host(num_rows, num_heads_kv):
    capacity = capacity_of(torch.device("cuda"))
    generator = torch.Generator().manual_seed(3)
    batches: list[list[int]] = [[], [0], [100], [2**31 - 2], [200_000], [70_000, 0, 3], [4096] * 64, [4096] * 132]
    for batch_size, longest in ((3, 40_000), (40, 20_000), (133, 5000), (1025, 3000), (4096, 300)):
        batches.append(torch.randint(-2, longest, (batch_size,), generator=generator).tolist())
    for lengths in batches:
        seqlens = torch.tensor(lengths, dtype=torch.int32)
        planned = torch.ops.flash_mla.decode_schedule(seqlens.cuda(), num_rows, num_heads_kv, True)
        expected = decode_schedule(seqlens, num_rows, num_heads_kv, capacity, batch_invariant=True)
        for part, expected_part in zip(planned, expected, strict=True):
            assert torch.equal(part.cpu(), expected_part), len(lengths)
