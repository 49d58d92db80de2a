"""Small decodes and appends that take every way through the kernels, for compute-sanitizer: `make sanitize` runs them.

    python tests/sanitized_cases.py --device cuda

Inputs, plans and the reference are made on the CPU, so that the GPU runs no kernels but those of this package. Few of
its CTAs have work, since the sanitizers take their time for each.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from cases import HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, Case, make_case
from plans import plan_for_few_workers
from reference import assert_close, reference
from segments import fold_by_workers, items_in_turn, num_blocks_of, walk
from torch import Tensor

import flash_mla  # noqa: F401
from flash_mla import schedule
from flash_mla.schedule import ClusterCapacity, WorkerGrid

# What the kernels keep in shared memory, in csrc/kernels/sm90.
NUM_STAGES = {"dense": 3, "swapped": 2}
QUEUE_CAPACITY = 8
# Of split_kv_combine.cu: a tile with more pieces than these, and than come in two turns, several CTAs take.
MOST_UNSHARED = 8


class Division(NamedTuple):
    """How the CTAs of the combine take tiles: parts and pieces that a warp merges at a time, or None where the warps
    always share out pieces; pieces where they do; and CTAs of an SM."""

    columns: tuple[int, int] | None
    pieces: int
    ctas_per_sm: int

    @property
    def parts_per_cta(self) -> int:
        return 4 * self.columns[0] if self.columns else 1

    def num_ctas(self, num_pieces: int) -> int:
        """That take the same parts of a tile with so many pieces."""
        if self.columns and num_pieces > max(2 * self.columns[1], MOST_UNSHARED):
            return self.parts_per_cta
        return 1

    @property
    def name(self) -> str:
        if self.columns is None:
            return "combine of shared pieces"
        return f"combine of {self.columns[0]} × {self.columns[1]} at a time"


DIVISIONS = {
    "dense": (
        Division(None, 8, 5),
        Division((1, 16), 8, 3),
        Division((1, 8), 8, 4),
        Division((2, 4), 8, 4),
        Division((2, 2), 8, 5),
    ),
    "swapped": (Division(None, 2, 5), Division((1, 4), 4, 5), Division((2, 2), 4, 5)),
}


@dataclass(frozen=True)
class SanitizedCase:
    name: str
    lengths: Sequence[int]
    num_workers: int | None = None  # that have work; None: as the scheduler divides it
    planned_lengths: Sequence[int] | None = None  # of a plan for other lengths
    split_ctas: int | None = None  # requests without tokens are added until clusters have this size
    strided_out: bool = False
    num_granules: int | None = None  # of batch-invariant cases: requests without tokens are added until these are used
    shape: dict[str, Any] = field(default_factory=dict)  # for make_case

    @property
    def num_heads_kv(self) -> int:
        return self.shape.get("num_heads_kv", 1)

    @property
    def seqlen_q(self) -> int:
        return self.shape.get("seqlen_q", 1)

    @property
    def num_rows_per_head_kv(self) -> int:
        return self.seqlen_q * self.shape.get("num_heads_q", 16) // self.num_heads_kv

    @property
    def is_causal(self) -> bool:
        return self.shape.get("causal", False) and self.seqlen_q > 1

    def grid(self, capacity: ClusterCapacity, batch_size: int | None = None) -> WorkerGrid:
        batch_size = self.batch_size(capacity) if batch_size is None else batch_size
        counts = self.num_rows_per_head_kv, self.num_heads_kv
        return schedule.decode_grid(batch_size, *counts, capacity, self.is_batch_invariant)

    @property
    def is_batch_invariant(self) -> bool:
        return self.num_granules is not None

    def batch_size(self, capacity: ClusterCapacity) -> int:
        smallest = len(self.lengths)
        if self.num_granules is not None:
            batch_sizes = range(smallest, 2000)
            return next(n for n in batch_sizes if self.grid(capacity, n).num_granules == self.num_granules)
        if self.split_ctas is None:
            return smallest
        enough = range(smallest, capacity.num_sms + 2)
        # As it is where a GPU runs no fewer of the next larger clusters.
        grids = ((n, self.grid(capacity, n)) for n in enough)
        return next((n for n, grid in grids if grid.is_swapped and grid.split_ctas == self.split_ctas), smallest)

    def all_lengths(self, capacity: ClusterCapacity, planned: bool = False) -> list[int]:
        lengths = self.planned_lengths if planned and self.planned_lengths is not None else self.lengths
        return [*lengths, *[0] * (self.batch_size(capacity) - len(lengths))]

    def make(self, dtype: torch.dtype, device: str, capacity: ClusterCapacity) -> Case:
        lengths = self.all_lengths(capacity)
        case = make_case(batch=len(lengths), seqlens=lengths, dtype=dtype, device=device, **self.shape)
        return replace(case, batch_invariant=self.is_batch_invariant)

    def plan(self, device: str, capacity: ClusterCapacity) -> tuple[Tensor, Tensor]:
        num_workers = self.num_workers or self.grid(capacity).num_workers
        lengths = self.all_lengths(capacity, planned=True)
        counts = self.num_rows_per_head_kv, self.num_heads_kv
        return plan_for_few_workers(lengths, *counts, num_workers, device, self.is_batch_invariant)


DENSE_CASES = [
    # The last page of the last request is the last entry of the block table: behind it is nobody's memory.
    SanitizedCase("whole tiles", [64, 0, 100], num_workers=2, shape={"num_heads_q": 64, "wide_block_table": False}),
    SanitizedCase(
        "split, strided",
        [1500, 65, 3],
        strided_out=True,
        shape={"num_heads_q": 48, "strided_cache": True, "strided_q": True},
    ),
    SanitizedCase("more than 32 parts of a tile", [64 * 300 - 1, 0, 0], shape={"num_heads_q": 64}),
    SanitizedCase("pair of tiles", [70, 0, 200], num_workers=3, shape={"num_heads_q": 128}),
    SanitizedCase(
        "pair of tiles, split, causal", [1300], num_workers=5, shape={"seqlen_q": 2, "num_heads_q": 128, "causal": True}
    ),
    SanitizedCase("pair of tiles, split, many requests", [1300, *[0] * 19], shape={"num_heads_q": 128}),
    SanitizedCase("pair of tiles, parts of one block", [450, 30, 130], shape={"num_heads_q": 128}),
    # On 132 SMs the first of these have all CTAs of their combine run at once, on 78 the last ones do not.
    SanitizedCase("split, twelve requests", [1300, *[0] * 11], shape={"num_heads_q": 40}),
    SanitizedCase("split, twenty requests", [64 * 80, 1300, *[0] * 18], shape={"num_heads_q": 40}),
    SanitizedCase(
        "split in many parts, thirty requests", [64 * 80 + 1, 64 * 80] * 3 + [70] * 24, shape={"num_heads_q": 40}
    ),
    SanitizedCase("three tiles", [130, 3], num_workers=2, shape={"num_heads_q": 192, "strided_q": True}),
    SanitizedCase(
        "11 tiles for 12 lanes, causal",
        [300, 20],
        num_workers=3,
        shape={"seqlen_q": 44, "num_heads_q": 16, "causal": True},
    ),
    SanitizedCase(
        "many requests", [(0, 1, 64, 65, 200)[i % 5] for i in range(30)], num_workers=2, shape={"num_heads_q": 64}
    ),
    SanitizedCase(
        "many requests, pair of tiles",
        [(0, 1, 64, 65, 200)[i % 5] for i in range(30)],
        num_workers=2,
        shape={"num_heads_q": 128},
    ),
    SanitizedCase("two KV heads", [90, 300], num_workers=3, shape={"num_heads_q": 128, "num_heads_kv": 2}),
    SanitizedCase(
        "rows unequally far apart",
        [130, 0, 70],
        num_workers=2,
        shape={"seqlen_q": 3, "num_heads_q": 48, "strided_q": True},
    ),
    SanitizedCase(
        "shorter than planned", [70, 0, 100], num_workers=6, planned_lengths=[900, 900, 0], shape={"num_heads_q": 64}
    ),
    SanitizedCase(
        "longer than planned", [600, 100, 0], num_workers=4, planned_lengths=[10, 700, 0], shape={"num_heads_q": 128}
    ),
]

SWAPPED_CASES = [
    SanitizedCase("swapped", [64 * 20, 70], shape={"wide_block_table": False}),
    SanitizedCase("swapped, strided", [400, 65, 3], strided_out=True, shape={"strided_cache": True, "strided_q": True}),
    SanitizedCase("swapped, split", [64 * 250 + 5], num_workers=3, shape={"num_heads_q": 12}),
    SanitizedCase(
        "swapped, causal", [300, 2, 65, 0], num_workers=2, shape={"seqlen_q": 4, "num_heads_q": 4, "causal": True}
    ),
    SanitizedCase("swapped, two KV heads", [90, 300], num_workers=3, shape={"num_heads_q": 32, "num_heads_kv": 2}),
    SanitizedCase("swapped, shorter than planned", [70, 0, 100], num_workers=4, planned_lengths=[64 * 400, 900, 0]),
    SanitizedCase("swapped, longer than planned", [64 * 40, 100], num_workers=3, planned_lengths=[10, 64 * 300]),
    *(
        SanitizedCase(f"clusters of {size}", [500, 64, 100], num_workers=2, split_ctas=size)
        for size in (16, 8, 6, 5, 4, 3, 2, 1)
    ),
    SanitizedCase("32 rows", [500], num_workers=2, shape={"num_heads_q": 32}),
    # No more blocks per CTA than stages: racecheck can follow these.
    *(
        SanitizedCase(f"as many blocks as stages, clusters of {size}", [128 * size - 12, 64, 30], split_ctas=size)
        for size in (16, 8, 6, 5, 4, 3, 2, 1)
    ),
    SanitizedCase("as many blocks as stages, 32 rows", [128 * 8 - 12], shape={"num_heads_q": 32}),
    SanitizedCase(
        "32 rows, split, causal",
        [64 * 50 + 5],
        num_workers=3,
        shape={"seqlen_q": 2, "num_heads_q": 15, "causal": True},
    ),
    SanitizedCase("swapped, split, four requests", [64 * 50 + 1, *[0] * 3]),
    SanitizedCase("swapped, split, eight requests", [64 * 120 + 1, *[0] * 7]),
    # CTAs of the combine take more parts of tiles than there are requests: with 6 on 132 SMs, with 4 on 78.
    *(
        SanitizedCase(f"swapped, {num_long} requests split in many parts", [64 * 200 + 1] * num_long, split_ctas=2)
        for num_long in (6, 5, 4)
    ),
]

CASES = [*DENSE_CASES, *SWAPPED_CASES]

# A tile of 32 segments or more, cut where something is left at every level that may be cut, one of a single worker, and
# tiles of one segment.
_STRIDED: dict[str, Any] = {"strided_cache": True, "strided_q": True}
INVARIANT_CASES = [
    *(
        SanitizedCase(
            f"invariant, at most {num_granules} granules",
            [64 * 1027 - 3, 64 * more_blocks, 100],
            num_workers=2,
            num_granules=num_granules,
            strided_out=True,
            shape={"num_heads_q": 48, **_STRIDED},
        )
        for num_granules, more_blocks in ((128, 302), (16, 204), (4, 102), (1, 102))
    ),
    *(
        SanitizedCase(
            f"invariant, pair of tiles, causal, at most {num_granules} granules",
            lengths,
            num_workers=3,
            num_granules=num_granules,
            shape={"seqlen_q": 2, "num_heads_q": 64, "causal": True},
        )
        for num_granules, lengths in ((128, [64 * 70 + 1]), (16, [64 * 150 + 1, 1, 70]))
    ),
    SanitizedCase(
        "invariant, two KV heads, planned for other lengths",
        [64 * 70, 64 * 40, 0],
        num_workers=5,
        planned_lengths=[10, 64 * 70, 900],
        num_granules=16,
        shape={"num_heads_q": 128, "num_heads_kv": 2},
    ),
    *(
        SanitizedCase(
            f"invariant, swapped, at most {num_granules} granules",
            [64 * num_blocks - 3, 64 * more_blocks, 60],
            num_workers=num_workers,
            num_granules=num_granules,
            strided_out=True,
            shape={"num_heads_q": 12, **_STRIDED},
        )
        for num_granules, num_workers, num_blocks, more_blocks in (
            (128, 2, 259, 70),
            (16, 2, 131, 16),
            (4, 4, 131, 22),
            (1, 2, 131, 10),
        )
    ),
    *(
        SanitizedCase(
            f"invariant, swapped, 32 rows, causal, at most {num_granules} granules",
            [64 * 259 + 1, 64 * more_blocks, 70, 0, 0],  # with 128 granules too many for a CTA each to combine them
            num_workers=2,
            num_granules=num_granules,
            shape={"seqlen_q": 2, "num_heads_q": 15, "causal": True},
        )
        for num_granules, more_blocks in ((128, 78), (16, 42), (4, 24), (1, 10))
    ),
    *(
        SanitizedCase(
            f"invariant, swapped, short tile that is cut, at most {num_granules} granules",
            [64 * 20],
            num_workers=3,
            num_granules=num_granules,
        )
        for num_granules in (128, 16)
    ),
    SanitizedCase("invariant, swapped, a segment per worker", [64 * 512 - 3, 100], num_granules=128),
    # Few enough blocks for racecheck.
    SanitizedCase("invariant, swapped, two segments per worker", [64 * 8 - 3], num_workers=4, num_granules=128),
    # One tile, combined by CTAs.
    *(
        SanitizedCase(
            f"invariant, one tile, {num_workers} workers",
            [64 * 1027 - 3],
            num_workers=num_workers,
            num_granules=128,
            shape={"num_heads_q": 64},
        )
        for num_workers in (2, 3)
    ),
]
ALL_CASES = [*CASES, *INVARIANT_CASES]


def _invariant_ways(kernel: str, num_granules: int) -> set[str]:
    """To a result: see fold_by_workers."""
    ways = {"one segment", "result by the worker", *(f"fold at level {level}" for level in range(schedule.FOLD_LEVELS))}
    for level in range(schedule.levels_in_granule(num_granules), schedule.FOLD_LEVELS):
        ways |= {f"{what} at level {level} left to the combine" for what in ("begin", "member")}
        ways.add(f"combine at level {level}")
        if level > 0:
            ways.add(f"several members of level {level} at once")
    if kernel != "dense":
        ways.add("fold with the registers")
    if kernel == "swapped, 16 rows":
        outermost = "registers of the outermost level"
        ways |= {"fold with the shared memory", f"fold with the {outermost}"}
        # A worker ends below the level at which something waits where granules are smaller than what waits: below the
        # outermost one, or below the middle one. With up to 16 segments the outermost level is that of shared memory.
        if num_granules >= 16:
            ways |= {f"{where} of level 2 left to the combine" for where in ("shared memory", outermost)}
        if num_granules == 128:
            ways.add("shared memory of level 1 left to the combine")
        return ways
    if num_granules == 1 or (num_granules == 4 and kernel == "dense"):
        ways.add("fold with the slot of a level")
    if num_granules > 1:
        ways.add("fold with the slot of a granule")
    return ways


INVARIANT_ROUTES = {
    f"{kernel}, at most {num_granules} granules: {way}"
    for kernel in ("dense", "swapped, 16 rows", "swapped, 32 rows")
    for num_granules in schedule.NUM_GRANULES
    for way in _invariant_ways(kernel, num_granules)
} | {
    f"{kernel}, combine of {size} granules, items in turn"
    for kernel in ("dense", "swapped")
    for size in ("small", "large")
}


def plan_rows(case: SanitizedCase, grid: WorkerGrid, capacity: ClusterCapacity) -> list[list[int]]:
    """Of the workers that have work."""
    num_workers = min(case.num_workers or grid.num_workers, grid.num_workers)
    seqlens = torch.tensor(case.all_lengths(capacity, planned=True), dtype=torch.int32)
    return schedule.divide_work(seqlens, grid._replace(num_workers=num_workers), num_workers)[0].tolist()


def invariant_routes_of(case: SanitizedCase, capacity: ClusterCapacity) -> set[str]:
    grid = case.grid(capacity)
    rows, lengths = plan_rows(case, grid, capacity), case.all_lengths(capacity)
    _, ways = fold_by_workers(rows, lengths, grid, lambda segment: "", lambda folded, following: "")
    with_rows = f"swapped, {grid.rows_per_tile} rows" if grid.is_swapped else "dense"
    routes = {f"{with_rows}, at most {grid.num_granules} granules: {way}" for way in ways}
    if any("combine at" in way for way in ways) and items_in_turn(grid, len(lengths), capacity.num_sms):
        size = "small" if grid.num_granules == schedule.MAX_SEGMENTS else "large"
        routes.add(f"{'swapped' if grid.is_swapped else 'dense'}, combine of {size} granules, items in turn")
    return routes


# The ways through a kernel. A tile is the query rows of one or several lanes, a piece what a worker has of it.
_BOTH = {
    "table without room behind it",
    "gaps in queries, cache and output",
    "several KV heads",
    "tile that is not full",
    "worker without work",
    "whole tile",
    "whole tile without keys",
    "first part of a tile",
    "first part of a tile, the only piece of its worker",
    "middle part of a tile",
    "last part of a tile",
    "part of a tile without keys",
    "tile in many pieces beside others",
    "several cut tiles in turn",
    "more blocks than stages",
    "no mask",
    "end of the tokens in a block",
    "causal",
    "causal over several blocks",
    "row that sees no key",
}
_DENSE = {
    "one lane",
    "several lanes",
    "one CTA per cluster",
    "two CTAs per cluster",
    "several lanes, one CTA per cluster",
    "part of one block, one CTA per cluster",
    "part of one block, two CTAs per cluster",
    "lane without rows beside one that has some",
    "more parts than lanes of a warp",
    "more pieces than the queue holds",
    "query rows that no tensor map describes",
    "part of a tile with 8 rows that do not exist",
    *(division.name for division in DIVISIONS["dense"]),
}
_SWAPPED = {
    *(division.name for division in DIVISIONS["swapped"]),
    *(f"16 rows, clusters of {size}" for size in (8, 6, 5, 4, 3, 2, 1)),
    "32 rows, clusters of 8",
    *(f"{rows} rows, {way}" for rows in (16, 32) for way in ("part of a tile", "causal")),
    "16 rows, several pieces with keys",
    "CTA of a cluster without blocks",
    "CTAs of a cluster with unequal blocks",
}
ROUTES = {f"dense: {route}" for route in _BOTH | _DENSE} | {f"swapped: {route}" for route in _BOTH | _SWAPPED}


def routes_of(case: SanitizedCase, capacity: ClusterCapacity) -> set[str]:
    """Which of the ways a case takes, as csrc/kernels/sm90/primitives/pieces.h goes through a plan."""
    grid = case.grid(capacity)
    kernel = "swapped" if grid.is_swapped else "dense"
    routes = routes_of_shape(case, grid) | routes_of_pieces(case, grid, capacity)
    return {f"{kernel}: {route}" for route in routes & (_BOTH | (_SWAPPED if grid.is_swapped else _DENSE))}


def is_followed_by_racecheck(case: SanitizedCase, capacity: ClusterCapacity) -> bool:
    """Whether racecheck comes to an end: it never did where the producer of the swapped kernel has to wait for room."""
    if not case.is_batch_invariant:
        return "swapped: more blocks than stages" not in routes_of(case, capacity)
    grid, lengths = case.grid(capacity), case.all_lengths(capacity)
    num_blocks: Counter[int] = Counter()  # of each CTA
    for segment in walk(plan_rows(case, grid, capacity), lengths, grid):
        own = schedule.segment_range(segment.index, segment.num_segments, num_blocks_of(lengths[segment.batch]))
        num_blocks[segment.worker] += len(own)
    return not grid.is_swapped or max(num_blocks.values()) <= NUM_STAGES["swapped"]


def ctas_per_cluster(grid: WorkerGrid) -> str:
    """Of the dense kernel."""
    return "two CTAs per cluster" if grid.num_lanes % 2 == 0 else "one CTA per cluster"


def routes_of_shape(case: SanitizedCase, grid: WorkerGrid) -> set[str]:
    row_tiles = -(-case.num_rows_per_head_kv // grid.rows_per_tile)
    routes = {
        "one lane" if grid.num_lanes == 1 else "several lanes",
        ctas_per_cluster(grid),
        f"{grid.rows_per_tile} rows, clusters of {grid.split_ctas}",
    }
    if not case.shape.get("wide_block_table", True):
        routes.add("table without room behind it")
    if case.strided_out and case.shape.get("strided_q") and case.shape.get("strided_cache"):
        routes.add("gaps in queries, cache and output")
    if case.num_heads_kv > 1:
        routes.add("several KV heads")
    are_in_order = case.num_heads_kv == 1 and not case.shape.get("strided_q")
    if case.seqlen_q > 1 and case.num_rows_per_head_kv > case.seqlen_q and not are_in_order:
        routes.add("query rows that no tensor map describes")
    if grid.num_lanes > 1 and grid.num_lanes % 2 == 1:
        routes.add("several lanes, one CTA per cluster")
    if case.num_rows_per_head_kv % grid.rows_per_tile != 0:
        routes.add("tile that is not full")
    if row_tiles % grid.num_lanes != 0:
        routes.add("lane without rows beside one that has some")

    for length in case.lengths:
        if length > 0:
            routes.add("end of the tokens in a block" if length % PAGE_SIZE else "no mask")
            if case.is_causal:
                routes |= {"causal", f"{grid.rows_per_tile} rows, causal"}
                # From the first key that some row does not see to the last one.
                if (length - case.seqlen_q + 1) // PAGE_SIZE < (length - 1) // PAGE_SIZE:
                    routes.add("causal over several blocks")
        if length <= 0 or (case.is_causal and length < case.seqlen_q):
            routes.add("row that sees no key")
    return routes


def most_cut_tiles(case: SanitizedCase, grid: WorkerGrid, capacity: ClusterCapacity) -> int:
    return max(min(case.batch_size(capacity) * grid.tiles_per_request, grid.num_workers - 1), 1)


def combine_ctas_per_tile(case: SanitizedCase, grid: WorkerGrid, division: Division) -> int:
    row_groups = -(-min(case.num_rows_per_head_kv, grid.rows_per_tile) // 8)
    return grid.num_lanes * row_groups * (HEAD_DIM_V // 32) // division.parts_per_cta


def combine_division(case: SanitizedCase, grid: WorkerGrid, capacity: ClusterCapacity) -> Division:
    """As csrc/kernels/split_kv_combine chooses it."""
    num_tiles = case.batch_size(capacity) * grid.tiles_per_request

    def fits(division: Division) -> bool:
        num_ctas = most_cut_tiles(case, grid, capacity) * combine_ctas_per_tile(case, grid, division)
        return num_ctas <= division.ctas_per_sm * capacity.num_sms

    kernel = "swapped" if grid.is_swapped else "dense"
    least_workers = {
        "dense": (8 * num_tiles + 1, 8 * num_tiles + 1, 5 * num_tiles, 3 * num_tiles),
        "swapped": (4 * num_tiles + 1, 3 * num_tiles),
    }
    for division, least in zip(DIVISIONS[kernel], least_workers[kernel], strict=False):
        if grid.num_workers >= least and (fits(division) or (grid.is_swapped and division.columns)):
            return division
    return DIVISIONS[kernel][-1]


def routes_of_combine(
    case: SanitizedCase, grid: WorkerGrid, capacity: ClusterCapacity, pieces_of_cut_tiles: Sequence[int]
) -> set[str]:
    if not pieces_of_cut_tiles:
        return set()
    division = combine_division(case, grid, capacity)
    routes = {division.name}
    num_ctas = [division.num_ctas(pieces) for pieces in pieces_of_cut_tiles]
    if max(num_ctas) > 1:
        routes.add("tile in many pieces beside others")
    ctas_at_once = division.ctas_per_sm * capacity.num_sms
    tiles_at_once = max(ctas_at_once // combine_ctas_per_tile(case, grid, division), 1)
    if sum(num_ctas) > min(most_cut_tiles(case, grid, capacity), tiles_at_once):
        routes.add("several cut tiles in turn")
    return routes


def routes_of_pieces(case: SanitizedCase, grid: WorkerGrid, capacity: ClusterCapacity) -> set[str]:
    routes = set()
    pieces_of_cut_tiles = []
    rows, lengths = plan_rows(case, grid, capacity), case.all_lengths(capacity)
    if len(rows) < grid.num_workers or any(row[6] == 0 for row in rows):
        routes.add("worker without work")
    for worker, (batch, tile, begin_block, _, _, end_block, num_pieces, last_worker) in enumerate(rows):
        num_with_keys = num_blocks_of_cta = 0
        for index in range(num_pieces):
            num_blocks = -(-lengths[batch] // PAGE_SIZE)
            continued = index == 0 and begin_block > 0
            continues = index == num_pieces - 1 and last_worker != worker
            begin = min(begin_block, num_blocks) if continued else 0
            end = min(end_block, num_blocks) if continues else num_blocks
            num_with_keys += end > begin
            num_blocks_of_cta += -(-(end - begin) // grid.split_ctas)  # the first one of the cluster
            routes.add(
                {
                    (False, False): "whole tile" if num_blocks > 0 else "whole tile without keys",
                    (False, True): "first part of a tile",
                    (True, True): "middle part of a tile",
                    (True, False): "last part of a tile",
                }[continued, continues]
            )
            if continued or continues:
                routes.add(f"{grid.rows_per_tile} rows, part of a tile")
                if case.num_rows_per_head_kv % grid.rows_per_tile in range(1, grid.rows_per_tile - 7):
                    routes.add("part of a tile with 8 rows that do not exist")
            if continues and not continued:
                pieces_of_cut_tiles.append(last_worker - worker + 1)
            if continues and not continued and num_pieces == 1:
                routes.add("first part of a tile, the only piece of its worker")
            if (continued or continues) and end == begin:
                routes.add("part of a tile without keys")
            if (continued or continues) and end == begin + 1:
                routes.add(f"part of one block, {ctas_per_cluster(grid)}")
            if continues and last_worker - worker + 1 > 32:
                routes.add("more parts than lanes of a warp")
            if 0 < end - begin < grid.split_ctas:
                routes.add("CTA of a cluster without blocks")
            if (end - begin) % grid.split_ctas != 0:
                routes.add("CTAs of a cluster with unequal blocks")
            tile += 1
            if tile == grid.tiles_per_request:
                batch, tile = batch + 1, 0
        if num_with_keys > 1:
            routes.add(f"{grid.rows_per_tile} rows, several pieces with keys")
        if num_with_keys > QUEUE_CAPACITY:
            routes.add("more pieces than the queue holds")
        if num_blocks_of_cta > NUM_STAGES["swapped" if grid.is_swapped else "dense"]:
            routes.add("more blocks than stages")
    return routes | routes_of_combine(case, grid, capacity, pieces_of_cut_tiles)


def run(case: SanitizedCase, dtype: torch.dtype, device: str) -> None:
    """Plan and decode on the device; raise AssertionError if either is wrong."""
    capacity = schedule.capacity_of(torch.device(device))
    expected = reference(case.make(dtype, "cpu", capacity))
    given = case.make(dtype, device, capacity)
    counts = (case.num_rows_per_head_kv, case.num_heads_kv)
    planned = torch.ops.flash_mla.decode_schedule(given.cache_seqlens, *counts, case.is_batch_invariant)
    expected_plan = schedule.decode_schedule(given.cache_seqlens.cpu(), *counts, capacity, case.is_batch_invariant)
    for part, expected_part in zip(planned, expected_plan, strict=True):
        assert torch.equal(part.cpu(), expected_part), "the plan is not that of the host"

    shape = (*given.q.shape[:3], HEAD_DIM_V + (64 if case.strided_out else 0))
    memory = torch.full(shape, float("nan"), dtype=dtype).to(device)
    out = memory[..., 32 : 32 + HEAD_DIM_V] if case.strided_out else memory
    lse = torch.ops.flash_mla.dense_decode_out(
        given.q,
        given.k_cache,
        given.block_table,
        given.cache_seqlens,
        *case.plan(device, capacity),
        given.softmax_scale,
        given.causal,
        case.is_batch_invariant,
        out=out,
    )
    # As a whole: a copy of a part would be a kernel.
    on_cpu = memory.cpu()
    assert_close(on_cpu[..., 32 : 32 + HEAD_DIM_V] if case.strided_out else on_cpu, lse.cpu(), *expected)


@dataclass(frozen=True)
class AppendCase:
    name: str
    dtype: torch.dtype
    slot_dtype: torch.dtype
    gap: int  # elements between entries of the cache, and in front of the first one


APPEND_CASES = [
    AppendCase("16 bytes at a time", torch.bfloat16, torch.int64, gap=0),
    AppendCase("16 bytes at a time, gaps", torch.float16, torch.int32, gap=8),
    AppendCase("16 bytes of float32 at a time", torch.float32, torch.int64, gap=0),
    AppendCase("2 bytes at a time", torch.bfloat16, torch.int32, gap=1),
    AppendCase("4 bytes at a time", torch.float32, torch.int64, gap=1),
]


def run_append(case: AppendCase, device: str) -> None:
    """Append on the device; raise AssertionError unless the cache, gaps included, holds what it should."""
    slots = [2 * PAGE_SIZE - 1, -1, 0, 77, -5, PAGE_SIZE]
    generator = torch.Generator().manual_seed(1)
    kv_c, k_pe = (torch.randn(len(slots), dim, generator=generator).to(case.dtype) for dim in (HEAD_DIM_V, 64))
    memory = torch.zeros(2, PAGE_SIZE, 1, case.gap + HEAD_DIM, dtype=case.dtype)
    expected = memory.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // PAGE_SIZE, slot % PAGE_SIZE, 0, case.gap :] = torch.cat([kv_c[token], k_pe[token]])
    memory = memory.to(device)
    slot_mapping = torch.tensor(slots, dtype=case.slot_dtype).to(device)
    torch.ops.flash_mla.append_kv(kv_c.to(device), k_pe.to(device), memory[..., case.gap :], slot_mapping)
    assert torch.equal(memory.cpu(), expected)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the cases only")
    parser.add_argument("--case", dest="cases", action="append", metavar="NAME", help="only this one, and others named")
    parser.add_argument("--for-racecheck", action="store_true", help="leave out the cases that it hangs in")
    options = parser.parse_args(arguments)
    capacity = schedule.capacity_of(torch.device(options.device))
    known = [*(case.name for case in ALL_CASES), *(f"append, {case.name}" for case in APPEND_CASES)]
    selected = options.cases or known
    if unknown := [name for name in selected if name not in known]:
        parser.error(f"argument --case: must be one of {'; '.join(known)}, got {unknown[0]}")
    for case in ALL_CASES:
        if case.name in selected and options.for_racecheck and not is_followed_by_racecheck(case, capacity):
            print(f"{case.name}: left out, racecheck does not follow it")
            continue
        for dtype in (torch.bfloat16, torch.float16):
            if case.name in selected:
                run(case, dtype, options.device)
                print(f"{case.name}, {str(dtype).removeprefix('torch.')}: ok", flush=True)
    for append_case in APPEND_CASES:
        if f"append, {append_case.name}" in selected:
            run_append(append_case, options.device)
            print(f"append, {append_case.name}: ok", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
