"""The CPU implementation against float64, and what it must leave alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import HEAD_DIM_V, INVALID_PAGES, Case, make_case
from reference import assert_close, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
MIXED = [0, 1, 63, 64, 65, 140, 0]


def decode(case: Case):
    return torch.ops.flash_mla.dense_decode(*case.op_arguments())


def check(case: Case):
    out, lse = decode(case)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    assert_close(out, lse, *reference(case))
    return out, lse


@DTYPES
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("num_heads_q", "num_heads_kv"), [(1, 1), (3, 3), (9, 3), (16, 1), (63, 1), (64, 2), (126, 3), (128, 1)]
)
@pytest.mark.parametrize("seqlen_q", [1, 2, 4])
def test_grid(seqlen_q, num_heads_q, num_heads_kv, causal, dtype):
    for seed, invalid_page in enumerate(INVALID_PAGES):
        check(
            make_case(
                batch=len(MIXED),
                seqlen_q=seqlen_q,
                num_heads_q=num_heads_q,
                num_heads_kv=num_heads_kv,
                seqlens=MIXED,
                dtype=dtype,
                causal=causal,
                seed=seed,
                invalid_page=invalid_page,
            )
        )


@DTYPES
def test_more_tokens_than_one_step_holds(dtype):
    for causal, seqlens in itertools.product((False, True), ([4096, 4097, 9000], [20_000, 0, 64])):
        check(make_case(batch=3, seqlen_q=2, seqlens=seqlens, dtype=dtype, causal=causal))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), [(1, 1), (9, 3), (16, 1)])
def test_float32_has_no_rounding_but_that_of_sums(num_heads_q, num_heads_kv, causal):
    shape = {"num_heads_q": num_heads_q, "num_heads_kv": num_heads_kv, "seqlen_q": 2, "causal": causal}
    for strided in (False, True):
        seqlens = [*MIXED, 4200]  # the last has more tokens than one step holds
        strides = {"strided_q": strided, "strided_cache": strided}
        case = make_case(batch=len(seqlens), seqlens=seqlens, dtype=FP32, **shape, **strides)
        out, lse = check(case)
        expected_out, expected_lse = reference(case)
        torch.testing.assert_close(out.double(), expected_out, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strides", ["strided_q", "strided_cache"])
@pytest.mark.parametrize("num_heads_kv", [1, 2])
def test_strided_arguments_give_the_same_bits(strides, num_heads_kv):
    shape = {"batch": 3, "seqlen_q": 2, "num_heads_kv": num_heads_kv, "seqlens": [100, 0, 65], "causal": True}
    case, strided = make_case(**shape), make_case(**shape, **{strides: True})
    assert not (strided.q.is_contiguous() and strided.k_cache.is_contiguous())
    for actual, expected in zip(check(strided), decode(case), strict=True):
        assert torch.equal(actual, expected)


def test_rows_that_see_no_key():
    case = make_case(batch=4, seqlen_q=4, seqlens=[0, 1, 3, -5], causal=True)
    out, lse = check(case)
    # Of 4 queries, the last `length` see a key.
    for request, hidden in enumerate([4, 3, 1, 4]):
        assert (out[request, :hidden] == 0).all() and (lse[request, :, :hidden] == float("inf")).all()
        assert lse[request, :, hidden:].isfinite().all()


def test_unused_memory_has_no_influence():
    shape = {"batch": len(MIXED), "seqlens": MIXED, "seqlen_q": 2, "causal": True}
    expected = decode(make_case(**shape, poison=False))
    actual = decode(make_case(**shape, poison=True, invalid_page=INVALID_PAGES[1]))
    moved = decode(make_case(**shape, permute_pages=False, spare_pages=0))
    for result in (actual, moved):
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_softmax_scale(scale):
    check(make_case(batch=2, seqlens=[300, 64], softmax_scale=scale))


def test_large_scores():
    """Scores of ±10⁴ neither overflow nor become NaN."""
    case = make_case(batch=2, seqlens=[300, 5000], std=10.0, softmax_scale=1.0)
    out, lse = decode(case)
    expected_out, expected_lse = reference(case)
    assert expected_lse.max() > 1e3
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(out.double(), expected_out, rtol=2e-2, atol=0.2)


def test_out_argument():
    case = make_case(batch=3, seqlen_q=2, seqlens=[100, 0, 65])
    expected_out, expected_lse = decode(case)
    shape = (3, 2, 16, HEAD_DIM_V)
    contiguous = torch.full(shape, float("nan"), dtype=BF16)
    strided = torch.full((3, 2, 16, HEAD_DIM_V + 64), float("nan"), dtype=BF16)[..., 32 : 32 + HEAD_DIM_V]
    for out in (contiguous, strided):
        lse = torch.ops.flash_mla.dense_decode_out(*case.op_arguments(), out=out)
        assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)


def test_no_requests():
    out, lse = decode(make_case(batch=0, seqlens=[]))
    assert out.shape == (0, 1, 16, HEAD_DIM_V) and lse.shape == (0, 16, 1)


def test_stale_plan_gives_the_same_bits():
    case = make_case(batch=2, seqlens=[500, 20])
    *arguments, scale, causal, _ = case.op_arguments()
    plan = torch.ops.flash_mla.decode_schedule(torch.tensor([1, 9000], dtype=torch.int32), 16, 1)
    out, lse = torch.ops.flash_mla.dense_decode(*arguments[:4], *plan, scale, causal)
    expected_out, expected_lse = decode(case)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)


def test_lse_merges_two_shards():
    """As context parallelism does: the halves of the tokens weighted by their log-sum-exps."""
    case = make_case(batch=1, seqlens=320, dtype=FP16)
    shards = []
    for table, length in ((case.block_table[:, :2], 128), (case.block_table[:, 2:], 192)):
        seqlens = torch.tensor([length], dtype=torch.int32)
        shard = Case(case.q, case.k_cache, table, seqlens, case.softmax_scale, False)
        shards.append(check(shard))
    (first_out, first_lse), (second_out, second_lse) = shards
    lse = torch.logaddexp(first_lse, second_lse)
    weight = (first_lse - lse).exp().transpose(1, 2)[..., None]
    assert_close(first_out * weight + second_out * (1 - weight), lse, *reference(case))


def test_requests_are_independent():
    """A request gives the same bits with other batch-mates."""
    case = make_case(batch=3, seqlens=[200, 5000, 64])
    out, lse = decode(case)
    alone = Case(case.q[:1], case.k_cache, case.block_table[:1], case.cache_seqlens[:1], case.softmax_scale, False)
    alone_out, alone_lse = decode(alone)
    assert torch.equal(alone_out[0], out[0]) and torch.equal(alone_lse[0], lse[0])
