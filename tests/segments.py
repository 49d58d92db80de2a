"""What the kernels do with a batch-invariant plan, step by step in plain Python: see csrc/params/segments.h."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from flash_mla.schedule import (
    FOLD_LEVELS,
    MAX_SEGMENTS,
    PAGE_SIZE,
    WorkerGrid,
    fold_path,
    levels_in_granule,
    levels_with_slots,
    min_segment_blocks,
    num_segments_of,
    radices_of,
    segment_at,
)

Value = TypeVar("Value")


class Segment(NamedTuple):
    """A piece of work: a segment of a tile of the plan, for all of its lanes."""

    worker: int
    batch: int
    tile: int
    index: int
    num_segments: int  # of the tile


def num_blocks_of(length: int) -> int:
    return -(-max(length, 0) // PAGE_SIZE)


def walk(rows: Sequence[Sequence[int]], lengths: Sequence[int], grid: WorkerGrid) -> Iterator[Segment]:
    """All segments in the order of each worker, as primitives/segment_cursor.h goes through a plan."""
    for worker, (batch, tile, begin, _, _, end, num_pieces, _) in enumerate(rows):
        for index in range(num_pieces):
            if batch >= len(lengths):
                break
            num_blocks = num_blocks_of(lengths[batch])
            num_segments = num_segments_of(num_blocks, min_segment_blocks(grid.rows_per_tile))
            first = segment_at(min(begin, MAX_SEGMENTS) if index == 0 else 0, num_segments, grid.num_granules)
            place = min(end, MAX_SEGMENTS) if index == num_pieces - 1 else MAX_SEGMENTS
            for segment in range(first, segment_at(place, num_segments, grid.num_granules)):
                yield Segment(worker, batch, tile, segment, num_segments)
            tile += 1
            if tile == grid.tiles_per_request:
                batch, tile = batch + 1, 0


def fold_chains(nodes: Sequence[Value], radix: int, fold: Callable[[Value, Value], Value]) -> list[Value]:
    """The nodes above, each a chain of so many."""
    return [functools.reduce(fold, nodes[i : i + radix]) for i in range(0, len(nodes), radix)]


def tree_of(values: Sequence[Value], fold: Callable[[Value, Value], Value]) -> Value:
    """The sum of all segments of a tile, straight from its definition."""
    nodes = list(values)
    for radix in radices_of(len(values)):
        nodes = fold_chains(nodes, radix, fold)
    (root,) = nodes
    return root


def fold_by_workers(
    segments: Sequence[Segment],
    value_of: Callable[[Segment], Value],
    grid: WorkerGrid,
    fold: Callable[[Value, Value], Value],
) -> tuple[dict[tuple[int, int], Value], set[str]]:
    """The results of all tiles of a plan, through the slots of workers and granules and the combine.

    Returns:
        Results by request and tile, and the ways that were taken.
    """
    num_levels, num_granules = levels_in_granule(grid.num_granules), grid.num_granules
    last_level = num_levels - (num_granules > 1)  # that one's values wait in the slot of the granule
    level_slots: dict[tuple[int, int], Value] = {}
    granule_slots: dict[tuple[int, int, int], Value] = {}
    results: dict[tuple[int, int], Value] = {}
    ways = set()
    for segment in segments:
        granules = min(segment.num_segments, num_granules)
        granule = segment.index // (segment.num_segments // granules)
        folds, end_level = fold_path(segment.index, segment.num_segments, num_levels)

        def slot_of(level: int, segment: Segment = segment, granule: int = granule) -> tuple[dict, tuple[int, ...]]:
            if level >= last_level:
                assert num_granules > 1
                return granule_slots, (segment.batch, segment.tile, granule)
            assert level < levels_with_slots(num_granules)
            return level_slots, (segment.worker, level)

        value = value_of(segment)
        for level in folds:
            slots, key = slot_of(level)
            value = fold(slots[key], value)
            ways.add(f"fold at level {level}")
        if segment.num_segments == 1:
            results[segment.batch, segment.tile] = value
            ways.add("one segment")
        elif num_granules == 1 and end_level == num_levels:
            results[segment.batch, segment.tile] = value
            ways.add("several segments, result by the worker")
        else:
            slots, key = slot_of(end_level)
            slots[key] = value
            ways.add(f"left in the slot of a {'granule' if slots is granule_slots else 'level'}")
    # The combine.
    tiles = {(segment.batch, segment.tile): segment.num_segments for segment in segments}
    for (batch, tile), num_segments in tiles.items():
        granules = min(num_segments, num_granules)
        if num_granules == 1 or num_segments == 1:
            continue
        nodes = [granule_slots[batch, tile, granule] for granule in range(granules)]
        for level in range(num_levels, FOLD_LEVELS):
            radix = radices_of(num_segments)[level]
            nodes = fold_chains(nodes, radix, fold)
            if radix > 1:
                ways.add(f"combine at level {level}")
        (results[batch, tile],) = nodes
    return results, ways
