"""Values of any size: large ones, infinities and NaN, equal scores, one dominant key, a million tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, Case, make_case
from plans import plan_for_few_workers
from reference import assert_close, reference
from torch import Tensor

BF16, FP16 = torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
LENGTHS = [300, 0, 65, 1, 1000]

# The largest values that inputs may have so that no sum overflows: of fp16 that is nearly all, of bf16 not.
LARGEST = [(BF16, 1e30), (BF16, 1e-30), (FP16, 60_000.0), (FP16, 1e-4)]


def decode(case: Case) -> tuple[Tensor, Tensor]:
    return torch.ops.flash_mla.dense_decode(*case.op_arguments())


def tokens_of(case: Case, request: int) -> tuple[Tensor, Tensor]:
    """Pages and places in them of the tokens of a request, in order."""
    position = torch.arange(int(case.cache_seqlens[request]), device=case.q.device)
    return case.block_table[request].long()[position // PAGE_SIZE], position % PAGE_SIZE


@pytest.mark.parametrize(("dtype", "magnitude"), LARGEST, ids=[f"{str(t)[6:]}-{m:g}" for t, m in LARGEST])
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_values_of_any_magnitude(device, num_heads_q, dtype, magnitude):
    """The bounds scale with the values; queries are as much smaller, so that the scores are ordinary ones."""
    case = make_case(batch=5, seqlen_q=2, num_heads_q=num_heads_q, seqlens=LENGTHS, dtype=dtype, causal=True)
    generator = torch.Generator().manual_seed(1)
    for request in range(5):
        page, place = tokens_of(case, request)
        values = torch.rand(page.numel(), 1, HEAD_DIM, generator=generator, dtype=torch.float64) * 2 - 1
        # The extremes themselves, too.
        values[values.abs() > 0.99] = values[values.abs() > 0.99].sign()
        case.k_cache[page, place] = (values * magnitude).to(dtype)
    case.q.copy_(torch.randn(case.q.shape, generator=generator, dtype=torch.float64) / magnitude)
    case = on(device, case)
    out, lse = decode(case)
    expected_out, expected_lse = reference(case)
    assert expected_out.abs().max() > 0.1 * magnitude
    assert_close(out.double() / magnitude, lse, expected_out / magnitude, expected_lse)


def on(device: str, case: Case) -> Case:
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens)
    return Case(*(tensor.to(device) for tensor in tensors), case.softmax_scale, case.causal)


@DTYPES
@pytest.mark.parametrize("largest", [1e4, 1e6, 1e7], ids=lambda largest: f"{largest:g}")
def test_scores_of_any_size(device, largest, dtype):
    """The output is the value of the best key, the log-sum-exp its score."""
    case = make_case(batch=5, seqlens=LENGTHS, num_heads_q=16, dtype=dtype, std=1.0, device=device)
    raw = reference(dataclasses.replace(case, softmax_scale=1.0))[1]
    case = dataclasses.replace(case, softmax_scale=largest / float(raw[raw.isfinite()].abs().max()))
    out, lse = decode(case)
    expected_out, expected_lse = reference(case)
    assert expected_lse[expected_lse.isfinite()].abs().max() > largest / 2
    # Sums in which terms of this size cancel are rounded; where two keys are nearly as good, that shifts their weights.
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=4e-6 * largest)
    torch.testing.assert_close(out.double(), expected_out, rtol=2**-7, atol=5e-2)


@pytest.mark.parametrize("where", ["latent", "rope", "query"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_infinities_and_nan_stay_in_their_request(device, num_heads_q, value, where):
    """All other requests have the bits that they have without, also where one CTA goes through all of them."""
    lengths = [200, 70, 500, 64, 1, 0, 300]
    case = make_case(batch=len(lengths), num_heads_q=num_heads_q, seqlens=lengths, device=device)
    plans = [case.plan()]
    if device == "cuda":
        plans += [plan_for_few_workers(lengths, num_heads_q, 1, num_workers, device) for num_workers in (1, 3)]
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens)

    def results() -> list[tuple[Tensor, Tensor]]:
        return [torch.ops.flash_mla.dense_decode(*tensors, *plan, DEFAULT_SCALE, False) for plan in plans]

    clean = results()
    for request in (0, 2, 4):
        if where == "query":
            case.q[request, 0, :, 5] = value
        else:
            page, place = tokens_of(case, request)
            case.k_cache[page[-1], place[-1], 0, 5 if where == "latent" else HEAD_DIM_V + 5] = value
    others = [request for request in range(len(lengths)) if request not in (0, 2, 4)]
    for (out, lse), (clean_out, clean_lse) in zip(results(), clean, strict=True):
        assert torch.equal(out[others], clean_out[others]) and torch.equal(lse[others], clean_lse[others])
        for request in (0, 2, 4):
            changed = torch.cat([out[request].flatten(), lse[request].flatten()])
            assert not changed.isfinite().all() or where == "rope"
            assert not torch.equal(out[request], clean_out[request]) or not torch.equal(
                lse[request], clean_lse[request]
            )


@DTYPES
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_equal_scores(device, num_heads_q, dtype):
    """The output is the mean of the values, the log-sum-exp the logarithm of their number."""
    lengths = [1, 2, 63, 64, 65, 1000, 5000]
    case = make_case(batch=7, num_heads_q=num_heads_q, seqlens=lengths, dtype=dtype, device=device)
    case.q.zero_()
    out, lse = decode(case)
    assert_close(out, lse, *reference(case))
    expected = torch.tensor(lengths, dtype=torch.float64, device=device).log()
    torch.testing.assert_close(lse[..., 0].double(), expected[:, None].expand(7, num_heads_q), rtol=2e-6, atol=2e-6)


@DTYPES
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_dominant_key(device, where, dtype):
    """The output is its value, exactly; all others together weigh less than the rounding."""
    lengths = [1, 64, 65, 1000, 5000]
    case = make_case(batch=5, seqlens=lengths, dtype=dtype, device=device)
    case.q[..., HEAD_DIM_V:] = 1
    values = []
    for request, length in enumerate(lengths):
        page, place = tokens_of(case, request)
        best = {"first": 0, "middle": length // 2, "last": length - 1}[where]
        case.k_cache[page[best], place[best], 0, HEAD_DIM_V:] = 16  # a score of 43
        values.append(case.k_cache[page[best], place[best], :, :HEAD_DIM_V])
    out, lse = decode(case)
    assert torch.equal(out, torch.stack(values)[:, None].expand_as(out))
    assert_close(out, lse, *reference(case))


def long_case(length: int, num_heads_q: int, scores: str, device: str) -> tuple[Case, Tensor]:
    """A request of so many tokens, in few pages that it has again and again, between two others.

    Returns:
        The case, and how often each token of the cache occurs in the long request, (num_blocks * 64,) float64.
    """
    num_pages = 40
    generator = torch.Generator().manual_seed(3)
    # Values with a mean, so that the result is not next to nothing.
    cache = torch.randn(num_pages, PAGE_SIZE, 1, HEAD_DIM, generator=generator) * 0.1 + 0.3
    q = torch.randn(3, 1, num_heads_q, HEAD_DIM, generator=generator)
    table = torch.randint(num_pages - 1, (3, -(-length // PAGE_SIZE)), generator=generator).to(torch.int32)
    if scores == "equal":
        q.zero_()
    if scores == "dominant":
        # One token of the last page, which occurs once.
        table[1, -1] = num_pages - 1
        q[..., HEAD_DIM_V:] = 1
        cache[-1, 0, 0, HEAD_DIM_V:] = 16
    count = torch.zeros(num_pages, PAGE_SIZE, dtype=torch.float64)
    whole, rest = divmod(length, PAGE_SIZE)
    count.index_add_(0, table[1, :whole].long(), torch.ones(whole, PAGE_SIZE, dtype=torch.float64))
    if rest > 0:
        count[table[1, whole], :rest] += 1
    seqlens = torch.tensor([100, length, 0], dtype=torch.int32)
    case = Case(q.to(BF16), cache.to(BF16), table, seqlens, DEFAULT_SCALE, True)
    return on(device, case), count.flatten().to(device)


@pytest.mark.parametrize("scores", ["random", "equal", "dominant"])
@pytest.mark.parametrize(
    ("device", "num_heads_q"),
    [("cpu", 1), *(pytest.param("cuda", num_heads_q, marks=pytest.mark.gpu) for num_heads_q in (1, 16, 128))],
)
def test_a_million_tokens(device, num_heads_q, scores):
    """On the CPU once; it takes seconds there."""
    length = 2**20 + 1 if device == "cuda" or scores == "random" else 2**17 + 1
    case, count = long_case(length, num_heads_q, scores, device)
    out, lse = decode(case)
    tokens = case.k_cache.flatten(0, 2).double()
    weighted = case.q[1, 0].double() @ tokens.T * case.softmax_scale + count.log()
    expected_lse = weighted.logsumexp(-1)
    expected_out = weighted.softmax(-1) @ tokens[:, :HEAD_DIM_V]
    assert_close(out[1:2], lse[1:2], expected_out[None, None], expected_lse[None, :, None])
    short = dataclasses.replace(case, cache_seqlens=torch.tensor([100, 0, 0], dtype=torch.int32, device=device))
    short_out, short_lse = reference(short)
    assert_close(out[[0, 2]], lse[[0, 2]], short_out[[0, 2]], short_lse[[0, 2]])
