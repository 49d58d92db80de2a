"""Batch invariance of the kernels: a request has the same bits alone and among any others, and they are right."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE
from gpu_cases import (
    PagedCache,
    capture,
    cut,
    make_cache,
    make_queries,
    mismatch,
    random_key_pool,
    random_lengths,
    random_pool,
    reference,
)
from plans import plan_for_few_workers
from torch import Tensor

import flash_mla
from flash_mla import decode_workspace_bytes, flash_mla_with_kvcache, get_mla_metadata
from flash_mla.schedule import (
    MAX_SCRATCH_BYTES,
    capacity_of,
    invariant_grid,
    num_segments_of,
)

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
HEADS = pytest.mark.parametrize("num_heads_q", [16, 128])
SEQLENS_Q = pytest.mark.parametrize("seqlen_q", [1, 2])

# Of the requests that are compared: no tokens, one segment, and as many as there are; lengths that fill pages and not.
WATCHED = (0, 1, 64, 700, 4096, 17_001, 32_768, 65_600, 131_072, 200_000)
# What lengths like these are divided into, with so many rows.
NUM_SEGMENTS = {16: {1, 8, 64, 128}, 32: {1, 16, 64, 128}, 128: {1, 4, 64}}
# How many others there are beside one of them, and how long at most.
BATCHES = ((1, 0), (2, 300), (3, 131_072), (4, 9000), (8, 20_000), (30, 3000), (32, 4096), (100, 2000), (256, 700))


def decode(q: Tensor, pages: Tensor, block_table: Tensor, cache_seqlens: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Into memory that held NaN, with scratch that held NaN."""
    rows = q.shape[1] * q.shape[2] // pages.shape[2]
    scratch = decode_workspace_bytes(
        rows, pages.shape[2], device=q.device, batch_size=q.shape[0], enable_batch_invariant=True
    )
    out = torch.full((*q.shape[:3], HEAD_DIM_V), float("nan"), dtype=q.dtype, device=q.device)
    # What the op allocates next is most likely this memory.
    poison = torch.full((max(scratch // 4, 1),), float("nan"), dtype=torch.float32, device=q.device)
    del poison
    poison = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("nan"), dtype=torch.float32, device=q.device)
    del poison
    return flash_mla_with_kvcache(
        q,
        pages,
        block_table,
        cache_seqlens,
        HEAD_DIM_V,
        *get_mla_metadata(),
        softmax_scale=DEFAULT_SCALE,
        causal=causal,
        out=out,
        enable_batch_invariant=True,
    )


class Pool:
    """Requests in the pages of one cache, NaN where there are no tokens, of which batches are made."""

    def __init__(self, lengths: Sequence[int], seqlen_q: int, num_heads_q: int, dtype: torch.dtype, seed: int = 0):
        self.lengths = list(lengths)
        num_pages = [-(-length // PAGE_SIZE) for length in lengths]
        self.pages = torch.full((sum(num_pages) + 1, PAGE_SIZE, 1, HEAD_DIM), float("nan"), dtype=dtype, device="cuda")
        generator = torch.Generator().manual_seed(seed)
        order = (torch.randperm(sum(num_pages), generator=generator) + 1).to("cuda", torch.int32)
        self.block_table = torch.full((len(lengths), max(num_pages) + 1), -1, dtype=torch.int32, device="cuda")
        first = 0
        for request, (length, count) in enumerate(zip(lengths, num_pages, strict=True)):
            own = order[first : first + count]
            first += count
            self.block_table[request, :count] = own
            if length > 0:
                tokens = torch.full((count * PAGE_SIZE, HEAD_DIM), float("nan"), dtype=dtype, device="cuda")
                tokens[:length] = cut(random_key_pool(dtype, "cuda"), (length, HEAD_DIM), seed + request)
                self.pages[own.long()] = tokens.view(count, PAGE_SIZE, 1, HEAD_DIM)
        self.q = cut(random_pool(dtype, "cuda"), (len(lengths), seqlen_q, num_heads_q, HEAD_DIM), seed + 7)
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32, device="cuda")

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = torch.tensor(list(chosen), device="cuda")
        return self.q[index], self.pages, self.block_table[index], self.cache_seqlens[index]

    def decode(self, chosen: Sequence[int], causal: bool) -> tuple[Tensor, Tensor]:
        return decode(*self.batch(chosen), causal)

    def expected(self, request: int, causal: bool) -> tuple[Tensor, Tensor]:
        length = self.lengths[request]
        keys = torch.zeros(1, 1, max(length, 1), HEAD_DIM, dtype=torch.float64, device="cuda")
        own = self.block_table[request, : -(-length // PAGE_SIZE)].long()
        keys[0, 0, :length] = self.pages[own].view(-1, HEAD_DIM)[:length].double()
        cache = PagedCache([length], self.cache_seqlens[request : request + 1], self.pages, self.block_table, keys)
        return reference(self.q[request : request + 1], cache, causal)


@functools.lru_cache(maxsize=1)
def pool_of(seqlen_q: int, num_heads_q: int, dtype: torch.dtype) -> Pool:
    """The watched requests first, then others of all lengths that BATCHES asks for."""
    others = [length for _, longest in BATCHES for length in random_lengths(8, longest, seed=longest)]
    return Pool([*WATCHED, *others], seqlen_q, num_heads_q, dtype)


def batches_with(request: int, size: int, longest: int, pool: Pool) -> list[tuple[list[int], int]]:
    """Batches of this size, and where in them the request is."""
    fitting = [i for i, length in enumerate(pool.lengths) if length <= longest]
    generator = torch.Generator().manual_seed(31 * request + size)
    batches = []
    for place in sorted({0, size // 2, size - 1}):
        picks = torch.randint(len(fitting), (size,), generator=generator).tolist()
        batch = [fitting[i] for i in picks]
        batch[place] = request
        batches.append((batch, place))
    return batches


def test_lengths_split_and_granules_of_all_sizes_occur():
    capacity = capacity_of(torch.device("cuda"))
    for num_rows, segments in NUM_SEGMENTS.items():
        grids = [invariant_grid(size, num_rows, 1, capacity) for size, _ in BATCHES]
        assert {grid.num_granules for grid in grids} >= ({128, 16, 4} if num_rows == 16 else {128, 16, 4, 1})
        rows, lanes = grids[0].rows_per_tile, grids[0].num_lanes
        assert {num_segments_of(-(-length // PAGE_SIZE), rows, lanes) for length in WATCHED} >= segments


@DTYPES
@SEQLENS_Q
@HEADS
def test_request_alone_is_right(num_heads_q, seqlen_q, dtype):
    pool = pool_of(seqlen_q, num_heads_q, dtype)
    for request, causal in itertools.product(range(len(WATCHED)), (False, True)):
        out, lse = pool.decode([request], causal)
        wrong = mismatch(out, lse, pool.expected(request, causal))
        assert wrong is None, f"{pool.lengths[request]} tokens, {causal=}: {wrong}"


@DTYPES
@SEQLENS_Q
@HEADS
def test_bits_do_not_depend_on_the_batch(num_heads_q, seqlen_q, dtype):
    """Batch size, place in the batch, other requests and their lengths, requests without tokens."""
    pool, causal = pool_of(seqlen_q, num_heads_q, dtype), seqlen_q > 1
    wrong = []
    for request in range(len(WATCHED)):
        alone_out, alone_lse = pool.decode([request], causal)
        for size, longest in BATCHES:
            for batch, place in batches_with(request, size, longest, pool):
                out, lse = pool.decode(batch, causal)
                if not (torch.equal(out[place], alone_out[0]) and torch.equal(lse[place], alone_lse[0])):
                    differing = int((out[place] != alone_out[0]).sum()), int((lse[place] != alone_lse[0]).sum())
                    wrong.append(f"{pool.lengths[request]} tokens, place {place} of {size}: {differing} values differ")
    assert not wrong, "\n".join(wrong[:20])


@pytest.mark.parametrize("num_heads_q", [1, 24, 32, 48, 64, 192, 256])
def test_other_head_counts(num_heads_q):
    pool = Pool([9001, 0, 4096, 70, 40_000], 1, num_heads_q, BF16)
    alone = [pool.decode([request], False) for request in range(5)]
    for request, (out, lse) in enumerate(alone):
        assert (wrong := mismatch(out, lse, pool.expected(request, False))) is None, f"request {request}: {wrong}"
    for batch in ([4, 3, 2, 1, 0], [0] * 9 + [4, 2], [2, 4] * 70, [1, 0] * 128):
        out, lse = pool.decode(batch, False)
        for place, request in enumerate(batch):
            assert torch.equal(out[place], alone[request][0][0]), (batch[:5], place)
            assert torch.equal(lse[place], alone[request][1][0]), (batch[:5], place)


@HEADS
def test_several_kv_heads(num_heads_q):
    lengths = [9001, 0, 4096, 70]
    cache = make_cache(lengths, 2, BF16, seed=3)
    q = make_queries(len(lengths), 2, num_heads_q, BF16, seed=3)
    out, lse = decode(q, cache.pages, cache.block_table, cache.cache_seqlens, True)
    assert (wrong := mismatch(out, lse, reference(q, cache, True))) is None, wrong
    for request in range(len(lengths)):
        only = slice(request, request + 1)
        alone_out, alone_lse = decode(q[only], cache.pages, cache.block_table[only], cache.cache_seqlens[only], True)
        assert torch.equal(alone_out[0], out[request]) and torch.equal(alone_lse[0], lse[request])


@HEADS
def test_permutations(num_heads_q):
    pool = pool_of(1, num_heads_q, BF16)
    requests = list(range(len(WATCHED)))
    first_out, first_lse = pool.decode(requests, False)
    generator = torch.Generator().manual_seed(5)
    for _ in range(20):
        order = torch.randperm(len(requests), generator=generator).tolist()
        out, lse = pool.decode(order, False)
        assert torch.equal(out, first_out[order]) and torch.equal(lse, first_lse[order])


@HEADS
def test_graphs(num_heads_q):
    """A graph of a padded batch, replayed for other requests and lengths, gives the bits of eager calls."""
    pool = pool_of(1, num_heads_q, BF16)
    batch = pool.batch([0] * 40)
    static = tuple(part.clone() if part is not pool.pages else part for part in batch)

    def run() -> tuple[Tensor, Tensor]:
        return flash_mla_with_kvcache(
            *static, HEAD_DIM_V, *get_mla_metadata(), softmax_scale=DEFAULT_SCALE, enable_batch_invariant=True
        )

    graph, (out, lse) = capture(run)
    for chosen in ([6, 2], [9], [7, 5, 3, 1], list(range(10)) * 4):
        padded = [*chosen, *[0] * (40 - len(chosen))]
        for target, source in zip(static, pool.batch(padded), strict=True):
            if target is not pool.pages:
                target.copy_(source)
        graph.replay()
        for place, request in enumerate(padded):
            eager_out, eager_lse = pool.decode([request], False)
            assert torch.equal(out[place], eager_out[0]) and torch.equal(lse[place], eager_lse[0])


@HEADS
def test_plan_for_other_lengths_gives_the_same_bits(num_heads_q):
    pool = pool_of(1, num_heads_q, BF16)
    q, pages, block_table, cache_seqlens = pool.batch([6, 0, 9, 4, 1])
    expected = decode(q, pages, block_table, cache_seqlens, False)
    for planned in ([1, 1, 1, 1, 1], [0, 200_000, 3, 64, 9000], [70_000] * 5, [0] * 5):
        plan = flash_mla.get_mla_decoding_metadata(
            torch.tensor(planned, dtype=torch.int32, device="cuda"), num_heads_q, 1, enable_batch_invariant=True
        )
        actual = flash_mla_with_kvcache(
            q, pages, block_table, cache_seqlens, HEAD_DIM_V, *plan, DEFAULT_SCALE, enable_batch_invariant=True
        )
        for actual_part, expected_part in zip(actual, expected, strict=True):
            assert torch.equal(actual_part, expected_part), planned


@HEADS
@pytest.mark.parametrize("seqlen_q", [1, 2])
@pytest.mark.parametrize("batch", [[9], [8, 3], [5, 0, 9, 4, 1], [7, *[2] * 40], [6, 4, *[3] * 130]], ids=len)
def test_bits_do_not_depend_on_who_has_which_part(num_heads_q, seqlen_q, batch):
    """Tiles that one worker has, and tiles that are cut in few places and in many."""
    pool = pool_of(seqlen_q, num_heads_q, BF16)
    q, pages, block_table, cache_seqlens = pool.batch(batch)
    expected = decode(q, pages, block_table, cache_seqlens, True)
    for num_workers in (1, 2, 3, 5, 7, 12, 29, 64, 131):
        lengths = [pool.lengths[request] for request in batch]
        plan = plan_for_few_workers(lengths, seqlen_q * num_heads_q, 1, num_workers, "cuda", batch_invariant=True)
        actual = flash_mla_with_kvcache(
            q,
            pages,
            block_table,
            cache_seqlens,
            HEAD_DIM_V,
            *plan,
            DEFAULT_SCALE,
            causal=True,
            enable_batch_invariant=True,
        )
        for actual_part, expected_part in zip(actual, expected, strict=True):
            assert torch.equal(actual_part, expected_part), num_workers


@HEADS
def test_same_bits_every_time(num_heads_q):
    pool = pool_of(2, num_heads_q, BF16)
    nans = torch.full((1024, 1024), float("nan"), dtype=BF16, device="cuda")
    for batch in ([9, 0, 5], list(range(10)) * 3, [4, 5] * 100):
        first_out, first_lse = pool.decode(batch, True)
        for _ in range(10):
            torch.mm(nans, nans)
            out, lse = pool.decode(batch, True)
            assert torch.equal(out, first_out) and torch.equal(lse, first_lse)


@HEADS
def test_infinities_and_nan_stay_in_their_request(num_heads_q):
    pool = Pool([9001, 9001, 9001], 1, num_heads_q, BF16)
    clean_out, clean_lse = pool.decode([0, 1, 2], False)
    own = pool.block_table[1, : -(-9001 // PAGE_SIZE)].long()
    pool.pages[own[5], 3, 0, 0] = float("nan")
    out, lse = pool.decode([0, 1, 2], False)
    assert out[1].isnan().any() and lse[1].isnan().all()
    for request in (0, 2):
        assert torch.equal(out[request], clean_out[request]) and torch.equal(lse[request], clean_lse[request])


@pytest.mark.parametrize(
    ("batch_size", "num_heads_q"), [(1, 16), (3, 128), (40, 128), (60, 128), (100, 128), (256, 16)]
)
def test_a_call_takes_what_was_announced(batch_size, num_heads_q):
    seqlens = torch.full((batch_size,), 3000, dtype=torch.int32, device="cuda")
    cache = make_cache([3000], 1, BF16)
    q = make_queries(batch_size, 1, num_heads_q, BF16)
    table = cache.block_table.expand(batch_size, -1).contiguous()
    plan = flash_mla.get_mla_decoding_metadata(seqlens, num_heads_q, 1, enable_batch_invariant=True)

    def run() -> object:
        return flash_mla_with_kvcache(q, cache.pages, table, seqlens, HEAD_DIM_V, *plan, enable_batch_invariant=True)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = run()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    scratch = decode_workspace_bytes(num_heads_q, 1, batch_size=batch_size, enable_batch_invariant=True)
    assert scratch <= MAX_SCRATCH_BYTES
    assert peak == scratch + batch_size * num_heads_q * (2 * HEAD_DIM_V + 4)
    del result
