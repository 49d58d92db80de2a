"""What the kernels do with a batch-invariant plan, step by step in plain Python: see csrc/params/segments.h."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Generic, NamedTuple, TypeVar

from flash_mla.schedule import (
    FOLD_LEVELS,
    MAX_SEGMENTS,
    PAGE_SIZE,
    WorkerGrid,
    fold_path,
    levels_in_granule,
    levels_with_slots,
    num_segments_of,
    radices_of,
    segment_at,
)

# Of granule_combine.cu: vectors that a CTA takes at once, and CTAs that an SM has room for.
FINE_SHARE, COARSE_SHARE = (1, 3), (4, 5)

Value = TypeVar("Value")
Tile = tuple[int, int]  # request, and tile of it


class Segment(NamedTuple):
    """A piece of work: a segment of a tile of the plan, for all of its lanes."""

    worker: int
    batch: int
    tile: int
    index: int
    begin: int  # of those that the worker has of the tile
    end: int
    num_segments: int  # of the tile


def num_blocks_of(length: int) -> int:
    return -(-max(length, 0) // PAGE_SIZE)


def num_segments_of_tile(length: int, grid: WorkerGrid) -> int:
    return num_segments_of(num_blocks_of(length), grid.rows_per_tile, grid.num_lanes)


def walk(rows: Sequence[Sequence[int]], lengths: Sequence[int], grid: WorkerGrid) -> Iterator[Segment]:
    """All segments in the order of each worker, as primitives/segment_cursor.h goes through a plan."""
    for worker, (batch, tile, begin, _, _, end, num_pieces, _) in enumerate(rows[: grid.num_workers]):
        for index in range(num_pieces):
            if batch >= len(lengths):
                break
            num_segments = num_segments_of_tile(lengths[batch], grid)
            first_place = min(begin, MAX_SEGMENTS) if index == 0 else 0
            end_place = min(end, MAX_SEGMENTS) if index == num_pieces - 1 else MAX_SEGMENTS
            own = range(
                segment_at(first_place, num_segments, grid.num_granules),
                segment_at(end_place, num_segments, grid.num_granules),
            )
            for segment in own:
                yield Segment(worker, batch, tile, segment, own.start, own.stop, num_segments)
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


class Folded(NamedTuple, Generic[Value]):
    """The value of some segments of a tile, one behind the other."""

    tile: Tile
    first: int
    end: int
    value: Value

    @property
    def name(self) -> tuple[Tile, int, int]:
        return self.tile, self.first, self.end


class Places(Generic[Value]):
    """Where values wait, each until it is taken, which is once. A place belongs to the worker that uses it first."""

    def __init__(self) -> None:
        self.waiting: dict[tuple, Folded[Value]] = {}
        self.owners: dict[tuple, int] = {}

    def put(self, place: tuple, value: Folded[Value], worker: int) -> None:
        assert place not in self.waiting, f"{self.waiting[place].name} is overwritten by {value.name}"
        assert self.owners.setdefault(place, worker) == worker, f"{place} has several workers"
        self.waiting[place] = value

    def take(self, place: tuple, name: tuple[Tile, int, int], worker: int | None = None) -> Folded[Value]:
        """worker: None for the combine, which runs behind all of them."""
        assert place in self.waiting, f"{name} is not there"
        assert worker is None or self.owners[place] == worker
        assert self.waiting[place].name == name
        return self.waiting.pop(place)


def member_sizes(num_segments: int) -> list[int]:
    """Segments in a member of each level's chains, and in the tile."""
    sizes = [1]
    for radix in radices_of(num_segments):
        sizes.append(sizes[-1] * radix)
    return sizes


def room_at(grid: WorkerGrid, level: int, num_segments: int) -> str | None:
    """Where a worker of the swapped kernel keeps begun chains: as FoldingConsumer. None: in a slot."""
    above = level - first_folding_level(num_segments)
    if not grid.is_swapped or (above > 0 and grid.rows_per_tile > 16):
        return None
    return ("registers", "shared memory", "registers of the outermost level")[max(above, 0)]


def first_folding_level(num_segments: int) -> int:
    """The innermost one whose chains have several members."""
    radices = radices_of(num_segments)
    return next((level for level in range(FOLD_LEVELS) if radices[level] > 1), FOLD_LEVELS - 1)


def slot_of(grid: WorkerGrid, segment: Segment, level: int, first: int) -> tuple:
    """As SegmentFold::slot: of what has been folded at a level from a segment on."""
    if grid.num_granules == 1 or level + 1 < levels_in_granule(grid.num_granules):
        assert level < levels_with_slots(grid.num_granules)
        return "slot of a level", segment.worker, level
    return granule_slot(grid, (segment.batch, segment.tile), first, segment.num_segments)


def granule_slot(grid: WorkerGrid, tile: Tile, first: int, num_segments: int) -> tuple:
    assert grid.num_granules > 1
    return "slot of a granule", tile, first // (num_segments // min(num_segments, grid.num_granules))


class Workers(Generic[Value]):
    """All workers of a decode. ways: what happened, in words."""

    def __init__(self, grid: WorkerGrid, fold: Callable[[Folded[Value], Folded[Value]], Folded[Value]]):
        self.grid, self.fold = grid, fold
        self.slots: Places[Value] = Places()
        self.room: Places[Value] = Places()  # registers and shared memory, for one value each
        self.results: dict[Tile, Value] = {}
        self.ways: set[str] = set()

    def add(self, segment: Segment, value: Folded[Value]) -> None:
        """The next segment of its worker."""
        grid, worker, tile = self.grid, segment.worker, (segment.batch, segment.tile)
        sizes = member_sizes(segment.num_segments)
        path = fold_path(segment.index, segment.begin, segment.num_segments)
        is_last = segment.index + 1 == segment.end

        def chain(level: int) -> int:
            return segment.index // sizes[level + 1] * sizes[level + 1]

        for level in path.folds:
            room = room_at(grid, level, segment.num_segments)
            place = (room, worker) if room else slot_of(grid, segment, level, chain(level))
            waiting = (self.room if room else self.slots).take(place, (tile, chain(level), value.first), worker)
            value = self.fold(waiting, value)
            self.ways |= {f"fold at level {level}", f"fold with the {place[0]}"}
        if path.end_level == FOLD_LEVELS:
            assert (value.first, value.end) == (segment.begin, segment.end) == (0, segment.num_segments)
            assert tile not in self.results
            self.results[tile] = value.value
            self.ways.add("one segment" if segment.num_segments == 1 else "result by the worker")
            return

        level = path.end_level
        assert (value.first, value.end) == (path.first, segment.index + 1)
        is_begin = path.first == chain(level)
        room = room_at(grid, level, segment.num_segments)
        if room and is_begin and not is_last:
            self.room.put((room, worker), value, worker)
        else:
            self.slots.put(slot_of(grid, segment, level, path.first), value, worker)

        def has_waiting(level: int) -> bool:
            return segment.begin <= chain(level) < segment.index // sizes[level] * sizes[level]

        if is_last or not is_begin:
            self.ways.add(f"{'begin' if is_begin else 'member'} at level {level} left to the combine")
        for above in range(level + 1, FOLD_LEVELS):
            if not is_last or not has_waiting(above):
                continue
            self.ways.add(f"begin at level {above} left to the combine")
            room = room_at(grid, above, segment.num_segments)
            if room:
                name = tile, chain(above), segment.index // sizes[above] * sizes[above]
                waiting = self.room.take((room, worker), name, worker)
                self.slots.put(slot_of(grid, segment, above, chain(above)), waiting, worker)
                self.ways.add(f"{room} of level {above} left to the combine")
        # What they hold is lost.
        assert not is_last or not any(place[1] == worker for place in self.room.waiting)


def cut_tiles(rows: Sequence[Sequence[int]], lengths: Sequence[int], grid: WorkerGrid) -> dict[Tile, set[int]]:
    """The segments at which workers begin within tiles, as find_cuts of granule_combine.cu finds them."""
    begins = []
    for batch, tile, place, *_ in rows[: grid.num_workers]:
        if place <= 0 or batch >= len(lengths) or tile >= grid.tiles_per_request:
            begins.append(((0, 0), 0))
            continue
        num_segments = num_segments_of_tile(lengths[batch], grid)
        segment = segment_at(min(place, MAX_SEGMENTS), num_segments, grid.num_granules)
        begins.append(((batch, tile), segment if segment < num_segments else 0))

    def is_of_same(worker: int, other: int) -> bool:
        return begins[worker][1] > 0 and begins[other][1] > 0 and begins[worker][0] == begins[other][0]

    tiles: dict[Tile, set[int]] = {}
    for worker, (tile, segment) in enumerate(begins):
        if segment == 0 or (worker > 0 and is_of_same(worker, worker - 1)):
            continue
        assert tile not in tiles
        tiles[tile] = set()
        for other in range(worker, len(begins)):
            if not is_of_same(worker, other):
                break
            tiles[tile].add(begins[other][1])
    return tiles


class Run(NamedTuple):
    """What is left of an innermost chain, as in cut_tiles.h: of a part of it, of all of it, or of several chains."""

    first_segment: int
    num_values: int  # to be folded; 0: what there is of the chain is part of another's value
    second_value_segment: int  # from there on a value is a segment

    def segment_of(self, value: int) -> int:
        return self.first_segment if value == 0 else self.second_value_segment + value - 1


def any_in(cuts: AbstractSet[int], first: int, last: int) -> bool:
    return any(first < cut <= last for cut in cuts)


def run_of(chain: int, num_segments: int, cuts: AbstractSet[int]) -> Run:
    """What comes of the innermost chain with this number, and of those that one worker has folded with it."""
    size, radix, _ = radices_of(num_segments)
    begin, outer_begin = chain * size, chain // radix * radix * size
    if any_in(cuts, begin, begin + size - 1):
        second = begin + 1
        while not any_in(cuts, begin, second):
            second += 1
        return Run(begin, 1 + begin + size - second, second)
    if begin > outer_begin:
        return Run(begin, int(any_in(cuts, outer_begin, begin)), 0)
    if begin > 0 and not any_in(cuts, begin, begin + radix * size - 1):
        return Run(begin, int(any_in(cuts, 0, begin)), 0)
    return Run(begin, 1, 0)


def items_in_turn(grid: WorkerGrid, batch_size: int, num_sms: int) -> bool:
    """Whether a CTA of the combine takes several items of a tile, as launch of granule_combine.cu divides them."""
    vectors_at_once, ctas_per_sm = FINE_SHARE if grid.num_granules == MAX_SEGMENTS else COARSE_SHARE
    num_items = grid.num_lanes * grid.rows_per_tile * 512 // 128 // vectors_at_once
    return ctas_per_sm * num_sms // (batch_size * grid.tiles_per_request) < num_items


def combine(
    tile: Tile,
    num_segments: int,
    cuts: AbstractSet[int],
    grid: WorkerGrid,
    slots: Places[Value],
    fold: Callable[[Folded[Value], Folded[Value]], Folded[Value]],
) -> tuple[Folded[Value], set[str]]:
    """The result of a tile that is cut, as granule_combine_kernel makes it, and the ways that were taken."""
    size, radix, _ = radices_of(num_segments)
    ways: set[str] = set()
    runs = [run_of(chain, num_segments, cuts) for chain in range(num_segments // size)]
    # The kernel has room for so many of an outer chain.
    most = 32 if grid.num_granules == MAX_SEGMENTS else 4
    for first in range(0, len(runs), radix):
        assert sum(run.num_values for run in runs[first : first + radix]) <= most

    def values_of(chain: int) -> Iterator[Folded[Value]]:
        run = runs[chain]
        for i in range(run.num_values):
            first = run.segment_of(i)
            end = run.segment_of(i + 1) if i > 0 else run.second_value_segment
            if run.num_values == 1:
                # Up to the next value.
                end = next((later.first_segment for later in runs[chain + 1 :] if later.num_values > 0), num_segments)
                for level, member in ((1, size), (2, size * radix)):
                    if member < end - first and (level == 2 or end - first < size * radix):
                        ways.add(f"several members of level {level} at once")
            yield slots.take(granule_slot(grid, tile, first, num_segments), (tile, first, end))

    def fold_chain(level: int, values: Iterable[Folded[Value]]) -> Folded[Value] | None:
        folded = None
        for value in values:
            if folded is not None:
                ways.add(f"combine at level {level}")
            folded = value if folded is None else fold(folded, value)
        return folded

    def existing(values: Iterable[Folded[Value] | None]) -> list[Folded[Value]]:
        return [value for value in values if value is not None]

    # A warp for each outer chain.
    chains = [fold_chain(0, values_of(chain)) for chain in range(len(runs))]
    outer_chains = [fold_chain(1, existing(chains[i : i + radix])) for i in range(0, len(chains), radix)]
    assert outer_chains[0] is not None
    whole = fold_chain(2, existing(outer_chains))
    assert whole is not None and whole.name == (tile, 0, num_segments)
    return whole, ways


def fold_by_workers(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    grid: WorkerGrid,
    value_of: Callable[[Segment], Value],
    fold: Callable[[Value, Value], Value],
) -> tuple[dict[Tile, Value], set[str]]:
    """The results of all tiles of a plan, through what workers have room for, slots and the combine.

    Returns:
        Results by request and tile, and the ways that were taken.
    """

    def fold_neighbours(folded: Folded[Value], following: Folded[Value]) -> Folded[Value]:
        assert folded.tile == following.tile and folded.end == following.first
        return Folded(folded.tile, folded.first, following.end, fold(folded.value, following.value))

    workers = Workers(grid, fold_neighbours)
    for segment in walk(rows, lengths, grid):
        tile = segment.batch, segment.tile
        workers.add(segment, Folded(tile, segment.index, segment.index + 1, value_of(segment)))
    results, ways = workers.results, workers.ways
    # Where tiles are granules there is no combine.
    for tile, cuts in (cut_tiles(rows, lengths, grid) if grid.num_granules > 1 else {}).items():
        assert tile not in results
        num_segments = num_segments_of_tile(lengths[tile[0]], grid)
        folded, ways_of_tile = combine(tile, num_segments, cuts, grid, workers.slots, fold_neighbours)
        results[tile] = folded.value
        ways |= ways_of_tile
    assert not workers.slots.waiting and not workers.room.waiting
    return results, ways
