"""A decode that starts while the kernel before it still writes what the decode reads.

The kernels look ahead: before the kernel before has ended they read plan, lengths and block table, and may find what is
old. Here that kernel lets the decode start at once, takes its time, and then writes all or a part of it anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cases import DEFAULT_SCALE
from gpu_cases import make_cache, make_queries
from torch import Tensor

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
ALIGNMENT = 256  # words
NUM_PAGES = 128
COLUMNS = 40  # of the block table
LENGTHS = {
    "long-then-short": ([2300, 0, 700, 64, 1], [1, 130, 0, 640, 65]),
    "short-then-long": ([1, 130, 0, 640, 65], [2300, 0, 700, 64, 1]),
    "none-then-some": ([0, 0, 0, 0, 0], [70, 70, 70, 70, 70]),
    "same": ([500, 60, 64, 1000, 3], [500, 60, 64, 1000, 3]),
}


class State:
    """All that a decode reads, in one buffer."""

    def __init__(self, parts: dict[str, Tensor], num_heads_q: int):
        self.num_heads_q = num_heads_q
        sizes = {name: part.numel() * part.element_size() // 4 for name, part in parts.items()}
        self.begin, total = {}, 0
        for name, size in sizes.items():
            self.begin[name] = total
            total += -(-size // ALIGNMENT) * ALIGNMENT
        self.words = torch.zeros(total, dtype=torch.int32, device="cuda")
        self.end = {name: self.begin[name] + size for name, size in sizes.items()}
        self.parts = {name: self.range_of(name).view(part.dtype).view(part.shape) for name, part in parts.items()}
        for name, part in parts.items():
            self.parts[name].copy_(part)

    def range_of(self, name: str) -> Tensor:
        return self.words[self.begin[name] : self.end[name]]

    def decode(self, batch_invariant: bool) -> tuple[Tensor, Tensor]:
        names = ("pages", "block_table", "cache_seqlens", "metadata", "num_splits")
        q = self.parts["q"][:, :, : self.num_heads_q]
        return torch.ops.flash_mla.dense_decode(
            q, *(self.parts[name] for name in names), DEFAULT_SCALE, False, batch_invariant
        )

    def with_parts(self, **parts: Tensor) -> State:
        return State({**self.parts, **parts}, self.num_heads_q)


def make_state(
    lengths: Sequence[int],
    num_heads_q: int,
    batch_invariant: bool,
    seed: int,
    seqlen_q: int = 1,
    num_spare_heads: int = 0,
) -> State:
    cache = make_cache(lengths, 1, BF16, seed=seed)
    pages = torch.full((NUM_PAGES, *cache.pages.shape[1:]), float("nan"), dtype=BF16, device="cuda")
    pages[: cache.pages.shape[0]] = cache.pages
    block_table = torch.full((len(lengths), COLUMNS), -1, dtype=torch.int32, device="cuda")
    block_table[:, : cache.block_table.shape[1]] = cache.block_table
    metadata, num_splits = torch.ops.flash_mla.decode_schedule(
        cache.cache_seqlens, seqlen_q * num_heads_q, 1, batch_invariant
    )
    return State(
        {
            "q": make_queries(len(lengths), seqlen_q, num_heads_q + num_spare_heads, BF16, seed=seed),
            "pages": pages,
            "block_table": block_table,
            "cache_seqlens": cache.cache_seqlens,
            "metadata": metadata,
            "num_splits": num_splits,
        },
        num_heads_q,
    )


def decode_behind_late_writer(before: State, after: State, names: Sequence[str], batch_invariant: bool):
    from late_writer import copy_late

    state = before.with_parts()
    target, source = (s.words[s.begin[names[0]] : s.end[names[-1]]] for s in (state, after))
    state.decode(batch_invariant)
    torch.cuda.synchronize()
    copy_late(target, source)
    result = state.decode(batch_invariant)
    torch.cuda.synchronize()
    return result


MODES = pytest.mark.parametrize("batch_invariant", [False, True], ids=["default", "batch-invariant"])
HEADS = pytest.mark.parametrize("num_heads_q", [16, 32, 128])


@MODES
@HEADS
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_everything_is_written_late(num_heads_q, lengths, batch_invariant):
    pytest.importorskip("triton")
    before, after = (make_state(each, num_heads_q, batch_invariant, seed) for seed, each in enumerate(lengths))
    expected = after.decode(batch_invariant)
    for _ in range(3):
        result = decode_behind_late_writer(before, after, list(after.parts), batch_invariant)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@MODES
@pytest.mark.parametrize("num_heads_q", [8, 16, 64])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_query_rows_that_no_tensor_map_describes_are_written_late(num_heads_q, lengths, batch_invariant):
    pytest.importorskip("triton")
    before, after = (
        make_state(each, num_heads_q, batch_invariant, seed, seqlen_q=2, num_spare_heads=1)
        for seed, each in enumerate(lengths)
    )
    expected = after.decode(batch_invariant)
    for _ in range(3):
        result = decode_behind_late_writer(before, after, list(after.parts), batch_invariant)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@MODES
@HEADS
@pytest.mark.parametrize("name", ["q", "pages", "block_table", "cache_seqlens", "metadata"])
def test_one_thing_is_written_late(num_heads_q, name, batch_invariant):
    pytest.importorskip("triton")
    lengths = {"cache_seqlens": [130, 1, 2300, 64, 0]}.get(name, [500, 60, 64, 1000, 3])
    before = make_state([500, 60, 64, 1000, 3], num_heads_q, batch_invariant, 0)
    after = make_state(lengths, num_heads_q, batch_invariant, 1)
    if name == "metadata":
        other = make_state([3, 1000, 2, 60, 2000], num_heads_q, batch_invariant, 1)
        after = before.with_parts(**{name: other.parts[name]})
    elif name == "cache_seqlens":
        # Every page of the table is one that exists.
        table = torch.arange(before.parts["block_table"].numel(), device="cuda", dtype=torch.int32) % 90
        pages = torch.nan_to_num(before.parts["pages"])
        shared = {"block_table": table.view(-1, COLUMNS), "pages": pages}
        before = before.with_parts(**shared)
        after = before.with_parts(**{name: after.parts[name]})
    elif name == "block_table":
        # The same pages in another order.
        pages = torch.nan_to_num(before.parts["pages"])
        before = before.with_parts(pages=pages)
        table = before.parts[name]
        after = before.with_parts(block_table=torch.where(table > 0, table.max() + 1 - table, table))
    elif name == "pages":
        after = before.with_parts(pages=-before.parts[name])
    else:
        after = before.with_parts(**{name: after.parts[name]})
    expected = after.decode(batch_invariant)
    for _ in range(3):
        result = decode_behind_late_writer(before, after, [name], batch_invariant)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    assert not torch.equal(before.decode(batch_invariant)[0], expected[0]) or name == "metadata"
