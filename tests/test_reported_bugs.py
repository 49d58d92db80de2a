"""Bugs of such kernels that reached users, as public issue threads report them: one test for each.

FM is deepseek-ai/FlashMLA, VL vllm-project/vllm, SG sgl-project/sglang, FI flashinfer-ai/flashinfer, ETAP
pengcuo/FlashMLA-ETAP. Other tests go further into most of them; docs/reliability.md says which.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, INVALID_PAGES, PAGE_SIZE, Case, make_case
from gpu_cases import capture
from reference import assert_close, reference
from torch import Tensor

import flash_mla
from flash_mla import flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata, schedule

BF16 = torch.bfloat16
Result = tuple[Tensor, Tensor]


def decode(case: Case, plan: tuple[object, Tensor | None] | None = None, out: Tensor | None = None) -> Result:
    return flash_mla_with_kvcache(
        case.q,
        case.k_cache,
        case.block_table,
        case.cache_seqlens,
        HEAD_DIM_V,
        *(get_mla_metadata() if plan is None else plan),
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        out=out,
    )


def nan_like_result(case: Case) -> Tensor:
    return torch.full((*case.q.shape[:3], HEAD_DIM_V), float("nan"), dtype=case.q.dtype, device=case.q.device)


def check(case: Case) -> Result:
    result = decode(case, out=nan_like_result(case))
    assert_close(*result, *reference(case))
    return result


def assert_same(actual: Result, expected: Result) -> None:
    for actual_part, expected_part in zip(actual, expected, strict=True):
        assert torch.equal(actual_part, expected_part)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_probabilities_are_in_shared_memory_before_they_are_multiplied(num_heads_q):
    """ETAP#3: P read by the tensor cores before it was written; lse right, out wrong and another in every run, most
    often with small shapes."""
    case = make_case(batch=4, num_heads_q=num_heads_q, seqlens=[64, 70, 500, 3000], device="cuda")
    expected = check(case)
    for _ in range(300):
        assert_same(decode(case), expected)


def test_nan_behind_the_last_token_stays_there(device):
    """FI#941, VL#43961: 0 times the NaN of a recycled page's end, gsm8k from 0.91 to 0.01."""
    lengths = [1, 63, 65, 127, 129, 200]
    for garbage in (float("nan"), float("inf"), 1e30):
        case = make_case(batch=len(lengths), seqlens=lengths, device=device)
        assert case.k_cache.isnan().any()
        case.k_cache[case.k_cache.isnan()] = garbage
        out, _ = decode(case)
        assert_close(out, decode(case)[1], *reference(case))


def test_nan_in_page_zero_is_nobodys(device):
    """VL#57156: page 0 poisoned by the dummy batches of graph capture, whose tables are zeros and lengths 0."""
    case = make_case(batch=3, seqlens=[100, 0, 0], device=device)
    case.block_table[1:] = 0
    case.k_cache[0] = float("nan")
    out, lse = check(case)
    assert (out[1:] == 0).all() and lse[1:].isposinf().all()


@pytest.mark.gpu
def test_nan_in_page_zero_is_nobodys_in_a_graph():
    """VL#57156: eager right, graphs wrong."""
    case = make_case(batch=3, seqlens=[100, 200, 70], device="cuda")
    lengths, table = case.cache_seqlens.clone(), case.block_table.clone()
    case.cache_seqlens.zero_()
    case.block_table.zero_()
    case.k_cache[0] = float("nan")
    graph, result = capture(lambda: decode(case))
    graph.replay()
    assert (result[0] == 0).all()
    case.cache_seqlens.copy_(lengths)
    case.block_table.copy_(table)
    graph.replay()
    assert_close(*result, *reference(case))


@pytest.mark.parametrize("invalid_page", [*INVALID_PAGES, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [0, 100, 0, 64, 0], [64, 0], [-1, 128]], ids=str)
def test_pages_behind_those_of_a_request_are_not_looked_at(device, lengths, invalid_page):
    """VL#33664, VL#35969, SG#5875: length 0 read block_table[-1], page -1 gave a negative offset."""
    case = make_case(batch=len(lengths), seqlens=lengths, device=device, invalid_page=invalid_page)
    out, _ = check(case)
    assert out.isfinite().all()


def test_padding_rows_are_written(device):
    """VL#37442, FI#2883: rows of requests without tokens, and of queries that see no key, leaked what was there."""
    case = make_case(batch=5, seqlen_q=4, seqlens=[0, 2, 0, 300, 1], causal=True, device=device)
    out, lse = check(case)
    assert out.isfinite().all() and not lse.isnan().any()
    assert (out[1, :2] == 0).all() and (out[4, :3] == 0).all()


@pytest.mark.parametrize(("seqlen_q", "num_heads_q"), [(128, 128), (67, 128), (1000, 16), (16384, 1)])
def test_there_is_a_plan_for_more_row_tiles_than_sms(device, seqlen_q, num_heads_q):
    """VL#48045: no CTAs at all planned for prompts of 67 to 128 tokens, and a crash."""
    num_rows = seqlen_q * num_heads_q
    seqlens = torch.tensor([seqlen_q + 5], dtype=torch.int32, device=device)
    metadata, _ = get_mla_decoding_metadata(seqlens, num_rows, 1)
    grid = schedule.worker_grid(1, num_rows, 1, schedule.capacity_of(torch.device(device)))
    assert grid.num_workers >= 1 and metadata.shape[0] == grid.num_workers
    num_split = (metadata[:, 2] > 0).sum()
    assert metadata[:, 6].sum() == grid.tiles_per_request + num_split
    if device == "cuda" or num_rows < 10_000:
        check(make_case(batch=1, seqlen_q=seqlen_q, num_heads_q=num_heads_q, seqlens=[seqlen_q + 5], device=device))


@pytest.mark.gpu
def test_plan_of_the_warm_up_is_not_replayed():
    """VL#33638, VL#42444: garbled after some fifty tokens, as replays used the plan for the lengths of the warm-up."""
    case = make_case(batch=3, seqlens=[2000, 1000, 1], device="cuda")
    case.cache_seqlens.copy_(torch.tensor([5, 0, 1]))
    schedule_of_step, _ = get_mla_metadata()
    graph, result = capture(lambda: decode(case, (schedule_of_step, None)))
    for lengths in ([2000, 1000, 1], [64, 999, 0], [1, 1, 1]):
        case.cache_seqlens.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(schedule_of_step.tile_scheduler_metadata, case.plan()[0])
        assert_close(*result, *reference(case))


def test_page_numbers_times_strides_exceed_32_bits(device, tmp_path):
    """FI#3130, VL#47671: int32 wrapped, and read zeros in large pools."""
    small = make_case(batch=2, seqlens=[70, 64], spare_pages=0, device=device)
    page_stride = 2**31
    size = (small.k_cache.shape[0] - 1) * page_stride + PAGE_SIZE * HEAD_DIM
    if device == "cuda":
        storage = torch.empty(size, dtype=BF16, device=device)
    else:
        # A file of which most is never written takes neither memory nor room on the disk.
        storage = torch.from_file(str(tmp_path / "pool"), shared=True, size=size, dtype=BF16)
    far = storage.as_strided(small.k_cache.shape, (page_stride, HEAD_DIM, HEAD_DIM, 1))
    far.copy_(small.k_cache)
    assert_same(decode(dataclasses.replace(small, k_cache=far)), check(small))


def test_log_sum_exp_is_natural_and_infinite_for_no_key(device):
    """SG#33064, VL#47079, FI#4452: another base, or finite values for fully masked rows, and shards merged wrongly."""
    case = make_case(batch=2, seqlens=[130, 0], device=device)
    out, lse = check(case)
    tokens = case.k_cache[case.block_table[0].long()].flatten(0, 2)[:130].double()
    scores = case.q[0, 0].double() @ tokens.T * DEFAULT_SCALE
    torch.testing.assert_close(lse[0, :, 0].double(), torch.logsumexp(scores, -1), rtol=1e-5, atol=1e-5)
    assert lse[1].isposinf().all()
    merged_out, merged_lse = flash_mla.merge_attention_states([out, torch.full_like(out, 7)], [lse, lse * float("inf")])
    assert_same((merged_out[:1], merged_lse[:1]), (out[:1], lse[:1]))


def test_device_of_the_tensors_is_asked_not_the_current_one():
    """FM#158: the properties of the wrong GPU, where the guard came after the question."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make_case(batch=2, seqlens=[100, 300], device="cuda:1")
    with torch.cuda.device(0):
        check(case)
        assert torch.cuda.current_device() == 0


def test_table_that_ends_with_the_last_page(device):
    """vllm-project/flash-attention#42: a read behind the table, which zero padding hid. make sanitize looks closer."""
    case = make_case(batch=2, seqlens=[128, 320], wide_block_table=False, device=device)
    own = torch.full((2 * 5,), 2147480000, dtype=torch.int32, device=device)
    table = own.view(2, 5).copy_(case.block_table)
    assert table[-1, -1] == case.block_table[-1, -1]
    check(dataclasses.replace(case, block_table=table))


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_what_other_kernels_leave_in_shared_memory_does_not_matter(num_heads_q):
    """FI#1018: NaN only after an unrelated kernel had run."""
    case = make_case(batch=4, num_heads_q=num_heads_q, seqlens=[1, 64, 100, 700], device="cuda")
    expected = check(case)
    nans = torch.full((4096, 4096), float("nan"), dtype=BF16, device="cuda")
    for _ in range(20):
        torch.mm(nans, nans)
        assert_same(decode(case), expected)


@pytest.mark.parametrize("name", ["q", "k_cache", "block_table", "cache_seqlens"])
def test_wrong_dtypes_are_not_read_as_others(device, name):
    """SG#5154, VL#25956: accepted silently."""
    case = make_case(batch=2, seqlens=[100, 64], device=device)
    tensor = getattr(case, name)
    # The CPU implementation takes float32 queries.
    wrong = tensor.double() if tensor.dtype == BF16 else tensor.long()
    with pytest.raises(TypeError, match=rf"^{name} must have dtype .*, got {wrong.dtype}$"):
        decode(dataclasses.replace(case, **{name: wrong}))


@pytest.mark.parametrize("num_heads_q", [1, 5, 8, 16, 32, 40, 64, 100, 128])
def test_any_number_of_heads(device, num_heads_q):
    """SG#22372, SG#27954: 8, 16 or 32 heads of a rank had to be padded to 64 or 128."""
    check(make_case(batch=2, num_heads_q=num_heads_q, seqlens=[100, 65], device=device))


def test_scratch_does_not_grow_with_the_queries():
    """VL#49357: 8 GiB for a prompt of 32,000 tokens."""
    sizes = {flash_mla.decode_workspace_bytes(seqlen_q * 128, 1, num_sms=132) for seqlen_q in (1, 128, 32_000)}
    assert max(sizes) < 64_000_000


def test_several_query_tokens_see_what_comes_before_them(device):
    """FM#28, FM#190: the causal mask ends at the last token, wherever a request begins."""
    case = make_case(batch=3, seqlen_q=3, seqlens=[3, 64, 200], causal=True, device=device)
    out, lse = check(case)
    for token in range(3):
        seqlens = case.cache_seqlens - (2 - token)
        alone = Case(case.q[:, token : token + 1], case.k_cache, case.block_table, seqlens, DEFAULT_SCALE, False)
        assert_close(out[:, token : token + 1], lse[:, :, token : token + 1], *reference(alone))
