"""The decode kernels against float64, over the whole grid of shapes and at the edges of what it takes."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, INVALID_PAGES, PAGE_SIZE
from gpu_cases import (
    PagedCache,
    check,
    decode,
    make_cache,
    make_plan,
    make_queries,
    mismatch,
    random_lengths,
    reference,
)

import flash_mla
from flash_mla.schedule import capacity_of, worker_grid

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])

BATCH_SIZES = (1, 2, 6, 64, 133)
SEQLENS_Q = (1, 2, 4)
SEQLENS_K = (0, 1, 20, 32, 33, 63, 64, 65, 140, 4096)
HEADS = [(q, kv) for q in (1, 3, 9, 16, 63, 64, 126, 128) for kv in (1, 2, 3) if q % kv == 0]

# Query heads, and batch sizes with their longest requests, for both kernels and clusters of all sizes.
NUM_HEADS = (8, 16, 32, 48, 64, 96, 128)
BATCHES = (
    (1, 40_000),
    (2, 20_000),
    (3, 20_000),
    (16, 3000),
    (20, 3000),
    (24, 2500),
    (32, 2000),
    (40, 1500),
    # Whole requests for CTAs alone with 78, 114 and 132 SMs.
    (76, 900),
    (112, 700),
    (130, 700),
    (140, 700),
)

MAX_REPORTED = 20


@DTYPES
@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), HEADS, ids=[f"h{q}-hkv{kv}" for q, kv in HEADS])
def test_grid(num_heads_q, num_heads_kv, dtype):
    wrong = []
    for case, (batch_size, seqlen_k, varlen) in enumerate(itertools.product(BATCH_SIZES, SEQLENS_K, (False, True))):
        lengths = random_lengths(batch_size, seqlen_k, seed=case) if varlen else [seqlen_k] * batch_size
        invalid_page = INVALID_PAGES[case % len(INVALID_PAGES)]
        cache = make_cache(lengths, num_heads_kv, dtype, seed=case, invalid_page=invalid_page)
        for seqlen_q in SEQLENS_Q:
            q = make_queries(batch_size, seqlen_q, num_heads_q, dtype, seed=case + seqlen_q)
            for causal in (False, True):
                out, lse = decode(q, cache, causal)
                problem = mismatch(out, lse, reference(q, cache, causal))
                if problem is not None:
                    wrong.append(f"b={batch_size} s_q={seqlen_q} s_k={seqlen_k} {varlen=} {causal=}: {problem}")
        if len(wrong) >= MAX_REPORTED:
            wrong.append("further cases were not run")
            break
    assert not wrong, f"{len(wrong)} cases are wrong:\n" + "\n".join(wrong)


@DTYPES
@pytest.mark.parametrize("num_heads_q", NUM_HEADS)
def test_both_kernels(num_heads_q, dtype):
    """Few requests and many, tiles that stay whole, are cut evenly, or by a fair share."""
    wrong = []
    for case, ((batch_size, longest), kind) in enumerate(itertools.product(BATCHES, ("equal", "short", "random"))):
        seqlen_k = 200 if kind == "short" else longest
        lengths = random_lengths(batch_size, seqlen_k, seed=case) if kind == "random" else [seqlen_k] * batch_size
        cache = make_cache(lengths, 1, dtype, seed=case)
        for seqlen_q, causal in ((1, False), (2, True)):
            q = make_queries(batch_size, seqlen_q, num_heads_q, dtype, seed=case)
            out, lse = decode(q, cache, causal)
            problem = mismatch(out, lse, reference(q, cache, causal))
            if problem is not None:
                wrong.append(f"b={batch_size} s_q={seqlen_q} s_k={seqlen_k} {kind}: {problem}")
    assert not wrong, f"{len(wrong)} cases are wrong:\n" + "\n".join(wrong)


def test_both_kernels_are_tried():
    capacity = capacity_of(torch.device("cuda"))
    grids = [worker_grid(batch_size, heads, 1, capacity) for heads in NUM_HEADS for batch_size, _ in BATCHES]
    assert {grid.rows_per_tile for grid in grids} == {16, 32, 64}
    assert {grid.num_lanes > 1 for grid in grids if not grid.is_swapped} == {False, True}
    sizes = {grid.split_ctas for grid in grids if grid.is_swapped}
    assert sizes >= {8, 4, 2, 1}


def test_plan_for_more_workers_than_there_are():
    """A plan for other head counts may have the same shape: results are wrong, nothing else."""
    cache = make_cache([60_000, 1, 100], 1, BF16, seed=18)
    wide, narrow = (make_queries(3, 1, num_heads_q, BF16, seed=18) for num_heads_q in (64, 16))
    plan = make_plan(cache, wide)
    capacity = capacity_of(torch.device("cuda"))
    assert plan[0].shape == make_plan(cache, narrow)[0].shape
    assert int(plan[0][:, 7].max()) >= worker_grid(3, 16, 1, capacity).num_workers
    decode(narrow, cache, False, plan=plan)
    torch.cuda.synchronize()
    check(narrow, cache, False)


@DTYPES
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("batch_size", "seqlen_q", "num_heads_q", "seqlen_k"),
    [(1, 1, 16, 4096), (1, 1, 128, 20000), (3, 2, 128, 3000), (7, 4, 16, 1000), (133, 1, 64, 700), (2, 1, 1, 5000)],
)
def test_same_bits_every_time(batch_size, seqlen_q, num_heads_q, seqlen_k, causal, dtype):
    cache = make_cache(random_lengths(batch_size, seqlen_k, seed=1), 1, dtype, seed=1)
    q = make_queries(batch_size, seqlen_q, num_heads_q, dtype, seed=1)
    other_cache = make_cache([333] * 5, 1, dtype, seed=2)
    other_q = make_queries(5, 1, 24, dtype, seed=2)
    nans = torch.full((1024, 1024), float("nan"), dtype=dtype, device="cuda")
    first_out, first_lse = check(q, cache, causal)
    for _ in range(20):
        # Other kernels leave other values, NaN among them, in shared memory.
        torch.mm(nans, nans)
        decode(other_q, other_cache, False)
        out, lse = decode(q, cache, causal)
        assert torch.equal(out, first_out) and torch.equal(lse, first_lse)


@DTYPES
def test_result_does_not_depend_on_unused_memory(dtype):
    """The same tokens in other pages, among other garbage, give the same bits."""
    lengths = [0, 5, 700, 64, 129, 4000]
    q = make_queries(len(lengths), 2, 16, dtype, seed=3)
    cache = make_cache(lengths, 1, dtype, seed=3)
    out, lse = check(q, cache, True)
    infinite = make_cache(lengths, 1, dtype, seed=3, invalid_page=INVALID_PAGES[1], spare_pages=100)
    infinite.pages[infinite.pages.isnan()] = float("-inf")
    moved_out, moved_lse = decode(q, infinite, True)
    assert torch.equal(moved_out, out) and torch.equal(moved_lse, lse)


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("num_heads_kv", [1, 2])
def test_strided_arguments(num_heads_kv, seqlen_q):
    """Views into larger tensors, as serving frameworks pass them, give the bits of contiguous copies."""
    batch_size, num_heads_q = 5, 32
    cache = make_cache([700, 0, 64, 1, 333], num_heads_kv, BF16, seed=4)
    q = make_queries(batch_size, seqlen_q, num_heads_q, BF16, seed=4)
    out, lse = check(q, cache, True)

    nan = float("nan")
    wide_q = torch.full((batch_size, seqlen_q + 1, num_heads_q, HEAD_DIM + 64), nan, dtype=BF16, device="cuda")
    strided_q = wide_q[:, 1:, :, 32 : 32 + HEAD_DIM]
    strided_q.copy_(q)
    # Other layers' pages between ours, and padding behind each token and head.
    num_pages = cache.pages.shape[0]
    wide_pages = torch.full((num_pages, 3, PAGE_SIZE, num_heads_kv, HEAD_DIM + 80), nan, dtype=BF16, device="cuda")
    strided_pages = wide_pages[:, 1, :, :, 8 : 8 + HEAD_DIM]
    strided_pages.copy_(cache.pages)
    assert not strided_q.is_contiguous() and not strided_pages.is_contiguous()

    strided_out, strided_lse = torch.ops.flash_mla.dense_decode(
        strided_q, strided_pages, cache.block_table, cache.cache_seqlens, *make_plan(cache, q), DEFAULT_SCALE, True
    )
    assert torch.equal(strided_out, out) and torch.equal(strided_lse, lse)


@DTYPES
def test_offsets_beyond_32_bits(dtype):
    """Pages that begin beyond 2**31 and 2**32 elements."""
    page_elements = PAGE_SIZE * HEAD_DIM
    num_pages = 2**32 // page_elements + 1000
    small = make_cache([1000, 3000, 64], 1, dtype, seed=5)
    pages = torch.full((num_pages, PAGE_SIZE, 1, HEAD_DIM), float("nan"), dtype=dtype, device="cuda")
    used = small.block_table >= 0
    source = small.block_table[used].long()
    # In turn near the beginning, just above 2**31 elements, and at the end.
    index = torch.arange(source.numel(), device="cuda")
    begins = torch.tensor([1, 2**31 // page_elements + 1, num_pages - source.numel()], device="cuda")
    target = begins[index % 3] + index
    assert int(target.max()) * page_elements > 2**32
    pages[target] = small.pages[source]
    block_table = small.block_table.clone()
    block_table[used] = target.to(torch.int32)
    far = PagedCache(small.lengths, small.cache_seqlens, pages, block_table, small.keys)
    for seqlen_q, num_heads_q in ((1, 16), (2, 128)):
        q = make_queries(3, seqlen_q, num_heads_q, dtype, seed=5)
        out, lse = check(q, far, True)
        near_out, near_lse = decode(q, small, True)
        assert torch.equal(out, near_out) and torch.equal(lse, near_lse)


def test_page_stride_beyond_32_bits():
    """Few pages, so far apart that page number times stride exceeds 2**32 elements."""
    small = make_cache([140, 64], 1, BF16, seed=6, spare_pages=0)
    num_pages, page_stride = small.pages.shape[0], 2**30
    storage = torch.empty((num_pages - 1) * page_stride + PAGE_SIZE * HEAD_DIM, dtype=BF16, device="cuda")
    assert (num_pages - 1) * page_stride >= 2**32
    pages = storage.as_strided(small.pages.shape, (page_stride, HEAD_DIM, HEAD_DIM, 1))
    pages.copy_(small.pages)
    far = PagedCache(small.lengths, small.cache_seqlens, pages, small.block_table, small.keys)
    check(make_queries(2, 1, 16, BF16, seed=6), far, False)


@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), [(16, 1), (128, 1), (6, 3)])
def test_a_million_tokens(num_heads_q, num_heads_kv):
    length = 2**20 + 77 if num_heads_kv == 1 else 2**18 + 77
    cache = make_cache([0, length, 100], num_heads_kv, BF16, seed=7)
    check(make_queries(3, 1, num_heads_q, BF16, seed=7), cache, True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seqlen_q", "num_heads_q"), [(128, 128), (67, 16), (33, 3), (512, 8)])
def test_many_query_rows(seqlen_q, num_heads_q, causal):
    """More row tiles than SMs, and more query tokens than some requests have keys."""
    lengths = [300, 40, 0, 600]
    cache = make_cache(lengths, 1, BF16, seed=8)
    check(make_queries(len(lengths), seqlen_q, num_heads_q, BF16, seed=8), cache, causal)


@DTYPES
def test_many_requests(dtype):
    cache = make_cache(random_lengths(4096, 200, seed=9), 1, dtype, seed=9)
    check(make_queries(4096, 1, 16, dtype, seed=9), cache, False)


@DTYPES
@pytest.mark.parametrize("scale", [0.0, 0.01, 0.5, 2.0])
def test_softmax_scale(scale, dtype):
    """From equal weights for all keys to nearly all weight on one."""
    cache = make_cache([3000, 1, 0, 64, 200], 1, dtype, seed=10)
    q = make_queries(5, 2, 16, dtype, seed=10)
    # Rounding of the scores, whose terms reach 5, grows with the scale.
    check(q, cache, True, scale, lse_atol=1e-6 + 2e-6 * scale / DEFAULT_SCALE)


# What keys at a position score more than others: ever more or less, or a step per page, at its begin or in its middle.
RAMPS = {
    "ascending": lambda position: position / PAGE_SIZE,
    "descending": lambda position: -position / PAGE_SIZE,
    "steps at pages": lambda position: position // PAGE_SIZE,
    "steps within pages": lambda position: (position + PAGE_SIZE // 2) // PAGE_SIZE,
}


@DTYPES
@pytest.mark.parametrize("num_heads_q", [16, 32, 64, 128])
@pytest.mark.parametrize("ramp", RAMPS)
def test_running_maximum(ramp, num_heads_q, dtype):
    """Scores that rise or fall by 16 per page make every block, or none, rescale what was summed."""
    length = 2000
    cache = make_cache([length, 500], 1, dtype, seed=11)
    q = make_queries(2, 1, num_heads_q, dtype, seed=11).clone()
    direction = torch.zeros(HEAD_DIM, dtype=torch.float64, device="cuda")
    direction[HEAD_DIM_V:] = 1.0
    position = torch.arange(length, device="cuda")
    ramp = RAMPS[ramp](position).double() / 4
    ramp -= ramp.mean()
    q[..., HEAD_DIM_V:] = 1.0
    for request, own_length in enumerate(cache.lengths):
        own = position[:own_length]
        page = cache.block_table[request].long()[own // PAGE_SIZE]
        keys = (cache.keys[request, 0, :own_length] + ramp[:own_length, None] * direction).to(dtype)
        cache.pages[page, own % PAGE_SIZE, 0] = keys
        cache.keys[request, 0, :own_length] = keys.double()
    check(q, cache, False, 1.0, lse_atol=2e-4)


def test_scores_of_any_size():
    """Scores of ±10⁴ neither overflow nor become NaN."""
    cache = make_cache([100, 700], 1, BF16, seed=12)
    q = make_queries(2, 1, 16, BF16, seed=12) * 100
    out, lse = decode(q, cache, False, 10.0)
    expected_out, expected_lse = reference(q, cache, False, 10.0)
    assert expected_lse.abs().max() > 1e4
    torch.testing.assert_close(lse.double(), expected_lse, atol=0.1, rtol=1e-5)
    assert out.isfinite().all() and (out.double() - expected_out).abs().mean() < 1e-2


def test_infinities_and_nan_stay_in_their_request():
    """What another request's tokens hold has no influence, whatever it is."""
    lengths = [400, 400, 400]
    cache = make_cache(lengths, 1, BF16, seed=13)
    q = make_queries(3, 1, 16, BF16, seed=13)
    out, lse = check(q, cache, False)
    cache.pages[cache.block_table[1, 0].long()] = float("nan")
    cache.pages[cache.block_table[1, 3].long()] = float("inf")
    other_out, other_lse = decode(q, cache, False)
    for request in (0, 2):
        assert torch.equal(other_out[request], out[request]) and torch.equal(other_lse[request], lse[request])
    assert other_out[1].isnan().any()


@DTYPES
@pytest.mark.parametrize(("seqlen_q", "num_heads_q", "num_heads_kv"), [(1, 16, 1), (2, 128, 1), (3, 6, 3)])
def test_stale_plan_costs_only_balance(seqlen_q, num_heads_q, num_heads_kv, dtype):
    """A plan for other lengths of the same batch gives right results."""
    planned = [[0, 0, 0, 5000], [1, 64, 65, 0], [9000, 1, 1, 1]]
    actual = [[3000, 0, 100, 64], [0, 0, 0, 0], [4000, 4000, 4000, 4000]]
    q = make_queries(4, seqlen_q, num_heads_q, dtype, seed=14)
    for planned_lengths, lengths in itertools.product(planned, actual):
        cache = make_cache(lengths, num_heads_kv, dtype, seed=14)
        planned_seqlens = torch.tensor(planned_lengths, dtype=torch.int32, device="cuda")
        rows = seqlen_q * num_heads_q // num_heads_kv
        plan = torch.ops.flash_mla.decode_schedule(planned_seqlens, rows, num_heads_kv)
        problem = mismatch(*decode(q, cache, True, plan=plan), reference(q, cache, True))
        assert problem is None, f"planned for {planned_lengths}, run with {lengths}: {problem}"


def test_lse_merges_two_shards():
    """The outputs over two halves of the keys, weighted by their log-sum-exps, make the output over all."""
    cache = make_cache([1000, 900], 1, FP16, seed=15)
    q = make_queries(2, 1, 16, FP16, seed=15)
    halves = []
    for begin, end in ((0, 5), (5, 16)):  # pages
        seqlens = (cache.cache_seqlens - begin * PAGE_SIZE).clamp(max=(end - begin) * PAGE_SIZE)
        table = cache.block_table[:, begin:end]
        keys = cache.keys[:, :, begin * PAGE_SIZE : end * PAGE_SIZE].contiguous()
        half = PagedCache(seqlens.tolist(), seqlens, cache.pages, table, keys)
        halves.append(check(q, half, False))
    (first_out, first_lse), (second_out, second_lse) = halves
    weight = (first_lse - torch.logaddexp(first_lse, second_lse)).exp().transpose(1, 2)[..., None]
    merged_out = first_out.float() * weight + second_out.float() * (1 - weight)
    merged_lse = torch.logaddexp(first_lse, second_lse)
    assert (problem := mismatch(merged_out, merged_lse, reference(q, cache, False))) is None, problem


@DTYPES
def test_public_api_gives_the_bits_of_the_op(dtype):
    lengths = [500, 0, 64, 7000]
    cache = make_cache(lengths, 1, dtype, seed=16)
    q = make_queries(4, 2, 16, dtype, seed=16)
    out, lse = check(q, cache, True)

    metadata, num_splits = flash_mla.get_mla_metadata()
    for _ in range(2):  # plans in the first call, uses that plan in the second
        api_out, api_lse = flash_mla.flash_mla_with_kvcache(
            q, cache.pages, cache.block_table, cache.cache_seqlens, HEAD_DIM_V, metadata, num_splits, causal=True
        )
        assert torch.equal(api_out, out) and torch.equal(api_lse, lse)

    metadata, num_splits = flash_mla.get_mla_decoding_metadata(cache.cache_seqlens, 2 * 16, 1)
    own_out = torch.full_like(out, float("nan"))
    api_out, api_lse = flash_mla.flash_mla_with_kvcache(
        q,
        cache.pages,
        cache.block_table,
        cache.cache_seqlens,
        HEAD_DIM_V,
        metadata,
        num_splits,
        DEFAULT_SCALE,
        True,
        out=own_out,
    )
    assert torch.equal(own_out, out) and torch.equal(api_out, out) and torch.equal(api_lse, lse)


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    cache = make_cache([100, 300], 1, BF16, seed=17)
    q = make_queries(2, 1, 16, BF16, seed=17)
    out, lse = check(q, cache, False)
    q_there, pages, table, seqlens = (
        tensor.to("cuda:1") for tensor in (q, cache.pages, cache.block_table, cache.cache_seqlens)
    )
    plan = torch.ops.flash_mla.decode_schedule(seqlens, 16, 1)
    out_there, lse_there = torch.ops.flash_mla.dense_decode(q_there, pages, table, seqlens, *plan, DEFAULT_SCALE, False)
    assert out_there.device == q_there.device
    assert torch.equal(out_there.cpu(), out.cpu()) and torch.equal(lse_there.cpu(), lse.cpu())
