"""Batch-invariant plans: a tree of segments that follows from the length alone, folded alike whoever has which part."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import CAPACITIES, UNUSUAL_CLUSTERS
from segments import fold_by_workers, member_sizes, num_blocks_of, num_segments_of_tile, run_of, tree_of, walk

from flash_mla import schedule
from flash_mla.schedule import (
    CPU_CAPACITY,
    FOLD_LEVELS,
    MAX_SCRATCH_BYTES,
    MAX_SEGMENTS,
    NUM_GRANULES,
    PAGE_SIZE,
    ClusterCapacity,
    WorkerGrid,
    capacity_of,
    decode_schedule,
    divide_work,
    fold_path,
    invariant_grid,
    invariant_scratch_bytes,
    levels_in_granule,
    max_segments,
    min_segment_blocks,
    num_plan_rows,
    num_segments_of,
    radices_of,
    segment_at,
    segment_range,
)

CSRC = Path(__file__).resolve().parents[1] / "csrc"
NUM_SEGMENTS = [2**i for i in range(8)]
NUM_BLOCKS = [*range(140), 255, 256, 511, 512, 513, 1000, 1023, 1024, 1025, 3125, 20_000, 2**25 - 1, 2**25]
ROWS_AND_LANES = ((16, 1), (32, 1), *((64, lanes) for lanes in range(1, 9)))  # of a tile
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


@pytest.mark.parametrize(("num_rows", "num_lanes"), ROWS_AND_LANES)
def test_segments_cover_the_blocks_in_order(num_rows, num_lanes):
    for num_blocks in NUM_BLOCKS:
        segments = num_segments_of(num_blocks, num_rows, num_lanes)
        assert segments in NUM_SEGMENTS
        min_blocks = min_segment_blocks(num_blocks, num_rows)
        assert segments == 1 or num_blocks / segments >= min_blocks
        is_most = segments * num_lanes >= MAX_SEGMENTS or num_blocks / (2 * segments) < min_blocks
        assert is_most or (num_rows, segments) == (32, 16)  # 32 would be left out
        assert (num_rows, segments) != (32, 32)
        assert segments <= max_segments(num_rows, num_lanes)
        ranges = [segment_range(i, segments, num_blocks) for i in range(segments)]
        assert (ranges[0].start, ranges[-1].stop) == (0, num_blocks)
        assert all(left.stop == right.start for left, right in itertools.pairwise(ranges))
        assert all(ranges) or num_blocks == 0


@pytest.mark.parametrize(("num_rows", "num_lanes"), ROWS_AND_LANES)
def test_longer_tiles_have_no_fewer_segments(num_rows, num_lanes):
    """And a long one has 128 or more for all lanes."""
    segments = [num_segments_of(num_blocks, num_rows, num_lanes) for num_blocks in sorted(NUM_BLOCKS)]
    assert segments == sorted(segments)
    assert MAX_SEGMENTS <= segments[-1] * num_lanes < 2 * MAX_SEGMENTS
    assert segments[-1] == max_segments(num_rows, num_lanes)


@pytest.mark.parametrize("num_segments", NUM_SEGMENTS)
def test_tree_has_every_segment_once_and_in_order(num_segments):
    inner, middle, top = radices_of(num_segments)
    assert inner * middle * top == num_segments
    leaves = tree_of([f"{i}" for i in range(num_segments)], in_order).replace("(", "").replace(")", "").split()
    assert leaves == [str(i) for i in range(num_segments)]


def test_tree_of_thirty_two():
    """As csrc/params/segments.h shows it."""
    eights = [f"(((({i} {i + 1}) ({i + 2} {i + 3})) ({i + 4} {i + 5})) ({i + 6} {i + 7}))" for i in range(0, 32, 8)]
    tree = tree_of([f"{i}" for i in range(32)], in_order)
    assert tree == f"((({eights[0]} {eights[1]}) {eights[2]}) {eights[3]})"


@pytest.mark.parametrize("num_granules", NUM_GRANULES)
@pytest.mark.parametrize("num_segments", NUM_SEGMENTS)
def test_granules_are_nodes_of_the_tree(num_segments, num_granules):
    """Of a granule that its worker begins with, the last segment makes it whole, no other does."""
    num_levels, granules = levels_in_granule(num_granules), min(num_segments, num_granules)
    size = num_segments // granules
    for segment in range(num_segments):
        begin = segment // size * size
        path = fold_path(segment, begin, num_segments)
        is_whole = segment % size == size - 1
        assert (path.end_level >= num_levels) == is_whole
        assert path.first == begin if is_whole else path.first >= begin
        assert all(level < num_levels for level in path.folds)
        assert segment % size > 0 or path.folds == []
    starts = {segment_at(place, num_segments, num_granules) for place in range(MAX_SEGMENTS)}
    assert starts == set(range(0, num_segments, size))
    assert segment_at(MAX_SEGMENTS, num_segments, num_granules) == num_segments


@pytest.mark.parametrize("num_segments", NUM_SEGMENTS)
def test_paths_fold_what_the_worker_has(num_segments):
    """The whole tile in the end, nothing of other workers, and only where a chain has begun."""
    sizes = member_sizes(num_segments)
    for begin, segment in itertools.combinations_with_replacement(range(num_segments), 2):
        path = fold_path(segment, begin, num_segments)
        assert path.end_level < FOLD_LEVELS or (begin, segment) == (0, num_segments - 1)
        assert begin <= path.first <= segment
        for level in path.folds:
            assert begin <= segment // sizes[level + 1] * sizes[level + 1] < segment
    assert fold_path(num_segments - 1, 0, num_segments).end_level == FOLD_LEVELS


PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "params/segments.h"
using namespace flash_mla;
int main() {
    for (int num_blocks, num_rows, num_lanes; std::scanf("%d %d %d", &num_blocks, &num_rows, &num_lanes) == 3;) {
        int const bits = segment_bits_of(num_blocks, num_rows, num_lanes);
        std::printf("%d %d", max_segments(num_rows, num_lanes), 1 << bits);
        for (int i = 0; i <= 1 << bits; ++i) std::printf(" %d", segment_begin(i, bits, num_blocks));
        for (int level = 0; level < kFoldLevels; ++level) std::printf(" %d", 1 << level_bits(level, bits));
        for (int const granules : {128, 16, 4, 1}) {
            std::printf(" %d %d", levels_in_granule(granules), levels_with_slots(granules));
            for (int place = 0; place <= kMaxSegments; ++place) std::printf(" %d", segment_at(place, bits, granules));
        }
        std::printf("\\n");
    }
}
"""


def numbers_of(num_blocks: int, num_rows: int, num_lanes: int) -> list[int]:
    """What the program prints."""
    segments = num_segments_of(num_blocks, num_rows, num_lanes)
    begins = [segment_range(i, segments, num_blocks).start for i in range(segments)]
    numbers = [max_segments(num_rows, num_lanes), segments, *begins, num_blocks, *radices_of(segments)]
    for granules in NUM_GRANULES:
        numbers += [levels_in_granule(granules), schedule.levels_with_slots(granules)]
        numbers += [segment_at(place, segments, granules) for place in range(MAX_SEGMENTS + 1)]
    return numbers


def output_of(source: str, tmp_path: Path, given_input: str = "") -> list[list[int]]:
    """Of a program for the host, line by line."""
    path, program = tmp_path / "segments.cpp", tmp_path / "segments"
    path.write_text(source)
    subprocess.run(["c++", "-std=c++17", f"-I{CSRC}", str(path), "-o", str(program)], check=True)
    process = subprocess.run([str(program)], input=given_input, capture_output=True, text=True, check=True)
    return [list(map(int, line.split())) for line in process.stdout.splitlines()]


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found (c++)")


@NEEDS_COMPILER
def test_segments_are_the_same_on_host_and_device(tmp_path):
    cases = [(num_blocks, *rows_and_lanes) for num_blocks in NUM_BLOCKS for rows_and_lanes in ROWS_AND_LANES]
    lines = output_of(PROGRAM, tmp_path, "\n".join(" ".join(map(str, case)) for case in cases))
    for case, line in zip(cases, lines, strict=True):
        assert line == numbers_of(*case), case


PATH_PROGRAM = """
#include <cstdio>
#include <initializer_list>
#include "params/segments.h"
using namespace flash_mla;
int main() {
    for (int bits = 0; bits <= kMaxSegmentBits; ++bits) {
        for (int level = 0; level <= kFoldLevels; ++level) std::printf("%d ", 1 << member_bits(level, bits));
        std::printf("\\n");
        for (int begin = 0; begin < 1 << bits; ++begin) {
            for (int index = begin; index < 1 << bits; ++index) {
                SegmentOfWorker const given{index, begin, 1 << bits};
                SegmentOfWorker const segment = SegmentOfWorker::unpacked(given.packed());
                FoldPath const path = fold_path(segment, bits);
                std::printf("%d %d %d %d %d %d %d ", segment.index, segment.begin, segment.end, path.folds,
                            path.end_level, path.first, path.ends_tile() || path.is_begin(bits));
            }
        }
        std::printf("\\n");
    }
}
"""


@NEEDS_COMPILER
def test_paths_are_the_same_on_host_and_device(tmp_path):
    lines = iter(output_of(PATH_PROGRAM, tmp_path))
    for num_segments in NUM_SEGMENTS:
        sizes = member_sizes(num_segments)
        assert next(lines) == sizes
        expected = []
        for begin, segment in itertools.combinations_with_replacement(range(num_segments), 2):
            path = fold_path(segment, begin, num_segments)
            is_begin = path.end_level == FOLD_LEVELS or path.first % sizes[path.end_level + 1] == 0
            folds = sum(1 << level for level in path.folds)
            expected += [segment, begin, num_segments, folds, path.end_level, path.first, int(is_begin)]
        assert next(lines) == expected


RUN_PROGRAM = """
#include <cstdio>
#define __host__
#define __device__
#include "kernels/split_kv_combine/cut_tiles.h"
using namespace flash_mla;
int main() {
    for (int bits, count; std::scanf("%d %d", &bits, &count) == 2;) {
        CutTile tile{0, 0, bits, {}};
        for (int cut; count > 0 && std::scanf("%d", &cut) == 1; --count) tile.cuts.word[cut / 32] |= 1u << cut % 32;
        int const chains = 1 << (bits - level_bits(0, bits)), segments = 1 << bits;
        for (int chain = 0; chain < chains; ++chain) {
            Run const run(chain, tile);
            std::printf("%d %d %d ", run.first_segment, run.num_values, run.second_value_segment);
        }
        for (int segment = 0; segment <= segments; ++segment) std::printf("%d ", tile.cuts.any_before(segment));
        std::printf("\\n");
    }
}
"""


@NEEDS_COMPILER
def test_runs_are_those_of_the_combine(tmp_path):
    cases = [(num_segments, {cut}) for num_segments in NUM_SEGMENTS for cut in range(1, num_segments)]
    cases += [(32, set(cuts)) for cuts in itertools.combinations(range(1, 32), 2)]
    generator = torch.Generator().manual_seed(1)
    for num_segments, count in itertools.product(NUM_SEGMENTS[1:], (2, 3, 4, 5, 8, 16, 40, 131)):
        for _ in range(10):
            cases.append((num_segments, set((torch.randint(1, num_segments, (count,), generator=generator)).tolist())))
    cases += [(num_segments, set(range(1, num_segments))) for num_segments in NUM_SEGMENTS[1:]]
    given_cases = "\n".join(
        " ".join(map(str, (num_segments.bit_length() - 1, len(cuts), *cuts))) for num_segments, cuts in cases
    )
    for (num_segments, cuts), line in zip(cases, output_of(RUN_PROGRAM, tmp_path, given_cases), strict=True):
        chains = range(num_segments // radices_of(num_segments)[0])
        expected = [number for chain in chains for number in run_of(chain, num_segments, cuts)]
        expected += [int(any(cut < segment for cut in cuts)) for segment in range(num_segments + 1)]
        assert line == expected, (num_segments, cuts)


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
        expected = num_segments_of_tile(length, grid)
        for tile in range(grid.tiles_per_request):
            assert sum((batch, tile, index) in counts for index in range(expected)) == expected
    assert len(counts) == sum(num_segments_of_tile(length, grid) for length in lengths) * grid.tiles_per_request


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
            for s in walk(plan_rows(lengths, num_rows, 1, CPU_CAPACITY), lengths, grid):
                num_blocks = num_blocks_of(lengths[s.batch])
                blocks[s.worker] += len(segment_range(s.index, s.num_segments, num_blocks))
                tiles.setdefault(s.worker, set()).add((s.batch, s.tile))
                least = min_segment_blocks(num_blocks, grid.rows_per_tile)
                largest = max(largest, -(-num_blocks // min(s.num_segments, grid.num_granules)), least)
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
    assert len(counts) == sum(num_segments_of_tile(length, grid) for length in lengths)


def check_sums(rows: list[list[int]], lengths: list[int], grid: WorkerGrid) -> None:
    """All results are the trees."""
    trees = {segments: tree_of([str(i) for i in range(segments)], in_order) for segments in NUM_SEGMENTS}
    results, _ = fold_by_workers(rows, lengths, grid, lambda s: str(s.index), in_order)
    assert results.keys() == set(itertools.product(range(len(lengths)), range(grid.tiles_per_request)))
    for (batch, _), result in results.items():
        assert result == trees[num_segments_of_tile(lengths[batch], grid)]


def grid_of(batch_size: int, num_rows: int, num_granules: int, num_workers: int) -> WorkerGrid:
    grid = invariant_grid(batch_size, num_rows, 1, CPU_CAPACITY)
    return grid._replace(num_granules=num_granules, num_workers=num_workers)


NUM_ROWS = st.sampled_from([16, 32, 64, 128, 256])
GRANULES = st.sampled_from(sorted(NUM_GRANULES))


@given(lengths=LENGTHS, num_rows=NUM_ROWS, num_granules=GRANULES, num_workers=st.integers(1, 132))
@settings(max_examples=150, deadline=None)
def test_sums_have_one_order_whoever_computes_them(lengths, num_rows, num_granules, num_workers):
    """Of any number of workers and of granules."""
    grid = grid_of(len(lengths), num_rows, num_granules, num_workers)
    check_sums(divide_work(torch.tensor(lengths, dtype=torch.int32), grid, num_workers)[0].tolist(), lengths, grid)


@given(
    requests=st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 100_000)), min_size=1, max_size=6),
    num_rows=NUM_ROWS,
    num_granules=GRANULES,
    num_workers=st.integers(1, 132),
)
@settings(max_examples=150, deadline=None)
def test_sums_have_the_same_order_in_a_plan_for_other_lengths(requests, num_rows, num_granules, num_workers):
    planned, lengths = map(list, zip(*requests, strict=True))
    grid = grid_of(len(lengths), num_rows, num_granules, num_workers)
    check_sums(divide_work(torch.tensor(planned, dtype=torch.int32), grid, num_workers)[0].tolist(), lengths, grid)


def rows_between(boundaries: list[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """A plan of one tile per request, cut anywhere: where workers begin but for the first, as request and place."""
    rows = []
    for (batch, place), (end_batch, end_place) in itertools.pairwise([(0, 0), *sorted(boundaries), (batch_size, 0)]):
        last = end_batch if end_place > 0 else end_batch - 1
        num_pieces = 0 if (batch, place) == (end_batch, end_place) else last - batch + 1
        end = [last, 0, end_place or MAX_SEGMENTS] if num_pieces > 0 else [batch, 0, place]
        rows.append([batch, 0, place, *end, num_pieces, len(rows)])
    return rows


@given(
    lengths=st.lists(st.integers(0, 140_000), min_size=1, max_size=4),
    num_rows=st.sampled_from([16, 32, 64]),
    num_granules=GRANULES,
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_sums_have_one_order_wherever_tiles_are_cut(lengths, num_rows, num_granules, data):
    """Also between others than granules, as in plans for other lengths."""
    boundary = st.tuples(st.integers(0, len(lengths) - 1), st.integers(0, MAX_SEGMENTS - 1))
    boundaries = data.draw(st.lists(boundary, max_size=131))
    grid = grid_of(len(lengths), num_rows, num_granules, len(boundaries) + 1)
    check_sums(rows_between(boundaries, len(lengths)), lengths, grid)


def blocks_in(num_segments: int, num_rows: int) -> int:
    """The fewest blocks with which a tile has so many segments."""
    return next(n for n in range(1, 5000) if num_segments_of(n, num_rows) == num_segments)


@pytest.mark.parametrize("num_rows", [16, 32, 64])
def test_sums_have_one_order_with_every_few_cuts(num_rows):
    """All cuts of 2 to 8 segments, all pairs of 16 and 32."""
    for num_segments in (2, 4, 8, 16, 32):
        if (num_segments, num_rows) == (32, 32):
            continue  # there are none
        lengths, places = [blocks_in(num_segments, num_rows) * PAGE_SIZE], range(1, num_segments)
        counts = range(len(places) + 1) if num_segments <= 8 else (1, 2)
        for cuts in itertools.chain.from_iterable(itertools.combinations(places, count) for count in counts):
            boundaries = [(0, place * MAX_SEGMENTS // num_segments) for place in cuts]
            check_sums(rows_between(boundaries, 1), lengths, grid_of(1, num_rows, MAX_SEGMENTS, len(cuts) + 1))


def fold_partials(folded: tuple[torch.Tensor, ...], following: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """csrc/kernels/sm90/primitives/fold.h, in float64: outputs, reference and sum."""
    out, reference, total = folded
    next_out, next_reference, next_total = following
    difference = next_reference - reference
    weight = torch.exp2(-difference) if difference > 0 else torch.ones_like(total)
    next_weight = torch.exp2(difference) if difference < 0 else torch.ones_like(total)
    return (
        weight * out + next_weight * next_out,
        torch.maximum(reference, next_reference),
        weight * total + next_weight * next_total,
    )


@pytest.mark.parametrize("num_granules", NUM_GRANULES)
@pytest.mark.parametrize("num_segments", [1, 2, 8, 32, 128])
def test_folded_segments_are_the_attention_over_all_keys(num_segments, num_granules):
    generator = torch.Generator().manual_seed(num_segments)
    num_blocks = blocks_in(num_segments, 64)
    scores = torch.randn(num_blocks, generator=generator, dtype=torch.float64) * 3
    scores[segment_range(num_segments - 1, num_segments, num_blocks).start :] = float("-inf")  # a segment without keys
    if num_segments == 1:
        scores[0] = 1.0
    values = torch.randn(num_blocks, 4, generator=generator, dtype=torch.float64)
    lengths = [num_blocks * PAGE_SIZE, 100]
    grid = invariant_grid(2, 64, 1, CPU_CAPACITY)._replace(num_granules=num_granules, num_workers=7)

    no_key = torch.zeros(4, dtype=torch.float64), *torch.tensor([float("-inf"), 0.0], dtype=torch.float64)

    def value_of(segment):
        if segment.batch != 0:
            return no_key
        blocks = segment_range(segment.index, segment.num_segments, num_blocks)
        own = scores[blocks.start : blocks.stop] / math.log(2.0)
        if own.max() == float("-inf"):
            return no_key
        reference = own.max() - segment.index % 9  # sums may be relative to less
        powers = torch.exp2(own - reference)
        return powers @ values[blocks.start : blocks.stop], reference, powers.sum()

    rows = divide_work(torch.tensor(lengths, dtype=torch.int32), grid, 7)[0].tolist()
    results, _ = fold_by_workers(rows, lengths, grid, value_of, fold_partials)
    out, reference, total = results[0, 0]
    torch.testing.assert_close(out / total, scores.softmax(0) @ values)
    torch.testing.assert_close((torch.log2(total) + reference) * math.log(2.0), scores.logsumexp(0))
    assert results[1, 0][1:] == (float("-inf"), 0.0)


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
        16: {(16, 1, 1)},
        32: {(32, 1, 1)},
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
