"""What is unusual and allowed: aliases, no elements, gradients, threads, inference and deterministic mode."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE, Case, make_case
from reference import assert_close, reference

import flash_mla
from flash_mla import flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata

ops = torch.ops.flash_mla
BF16 = torch.bfloat16


@pytest.fixture
def case(device) -> Case:
    return make_case(batch=3, seqlen_q=2, seqlens=[300, 0, 70], causal=True, device=device)


def decode(case: Case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens)
    return flash_mla_with_kvcache(
        *tensors, HEAD_DIM_V, *get_mla_metadata(), softmax_scale=case.softmax_scale, causal=case.causal, **options
    )


def assert_same(actual, expected) -> None:
    for actual_part, expected_part in zip(actual, expected, strict=True):
        assert torch.equal(actual_part, expected_part)


def test_queries_that_are_tokens_of_the_cache(device):
    """What is only read may overlap."""
    case = make_case(batch=1, seqlen_q=1, num_heads_q=1, seqlens=[130], device=device)
    q = case.k_cache[case.block_table[0, 0].long()][None, :1]
    assert q.untyped_storage().data_ptr() == case.k_cache.untyped_storage().data_ptr()
    aliased = Case(q, case.k_cache, case.block_table, case.cache_seqlens, case.softmax_scale, False)
    copied = Case(q.clone(), case.k_cache, case.block_table, case.cache_seqlens, case.softmax_scale, False)
    assert_same(decode(aliased), decode(copied))


def test_queries_of_all_requests_in_one_place(case):
    """An expanded tensor: its stride between requests is 0."""
    q = case.q[:1].expand(3, -1, -1, -1)
    broadcast = Case(q, case.k_cache, case.block_table, case.cache_seqlens, case.softmax_scale, True)
    copied = Case(q.clone(), case.k_cache, case.block_table, case.cache_seqlens, case.softmax_scale, True)
    assert_same(decode(broadcast), decode(copied))


def test_tables_in_one_buffer(case):
    """Lengths and block table as parts of one allocation, as a framework uploads them."""
    columns = case.block_table.shape[1]
    buffer = torch.empty(3 + 3 * columns, dtype=torch.int32, device=case.q.device)
    lengths, table = buffer[:3], buffer[3:].view(3, columns)
    lengths.copy_(case.cache_seqlens)
    table.copy_(case.block_table)
    packed = Case(case.q, case.k_cache, table, lengths, case.softmax_scale, True)
    assert_same(decode(packed), decode(case))


def test_requests_that_share_pages(device):
    """As with a common prefix."""
    case = make_case(batch=3, seqlens=[200, 200, 200], device=device)
    case.block_table[:, :2] = case.block_table[0, :2].clone()
    assert_close(*decode(case), *reference(case))


def test_out_beside_the_queries(case):
    """Parts of one allocation, one behind the other, are apart."""
    expected = decode(case)
    size_q, size_out = case.q.numel(), expected[0].numel()
    buffer = torch.full((size_q + size_out,), float("nan"), dtype=BF16, device=case.q.device)
    q, out = buffer[:size_q].view(case.q.shape).copy_(case.q), buffer[size_q:].view(expected[0].shape)
    packed = Case(q, case.k_cache, case.block_table, case.cache_seqlens, case.softmax_scale, True)
    result, lse = decode(packed, out=out)
    assert_same((result, lse), expected)
    assert torch.equal(q, case.q)


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (1, 0, 2)], ids=str)
def test_out_with_its_dimensions_in_another_order(case, order):
    """Heads, tokens and requests may come in any order in memory."""
    expected = decode(case)
    shape = expected[0].shape
    memory = torch.full([shape[dim] for dim in order] + [HEAD_DIM_V], float("nan"), dtype=BF16, device=case.q.device)
    out = memory.permute(*(order.index(dim) for dim in range(3)), 3)
    assert out.shape == shape and out.stride(-1) == 1
    result, lse = decode(case, out=out)
    assert result is out
    assert_same((result, lse), expected)


@pytest.mark.parametrize("planned", ["lazy", "eager"])
def test_no_requests(device, planned):
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    lengths = empty(0)
    plan = get_mla_metadata() if planned == "lazy" else get_mla_decoding_metadata(lengths, 32, 1)
    for columns in (0, 5):
        q, cache = empty(0, 2, 16, HEAD_DIM, dtype=BF16), empty(4, PAGE_SIZE, 1, HEAD_DIM, dtype=BF16)
        out, lse = flash_mla_with_kvcache(q, cache, empty(0, columns), lengths, HEAD_DIM_V, *plan)
        assert out.shape == (0, 2, 16, HEAD_DIM_V) and out.dtype == BF16
        assert lse.shape == (0, 16, 2) and lse.dtype == torch.float32
        given = empty(0, 2, 16, HEAD_DIM_V, dtype=BF16)
        assert flash_mla_with_kvcache(q, cache, empty(0, columns), lengths, HEAD_DIM_V, *plan, out=given)[0] is given


def test_table_without_columns(device):
    case = make_case(batch=2, seqlens=0, device=device)
    narrow = Case(case.q, case.k_cache, case.block_table[:, :0], case.cache_seqlens, DEFAULT_SCALE, False)
    out, lse = decode(narrow)
    assert (out == 0).all() and lse.isposinf().all()


def test_cache_of_one_page(device):
    case = make_case(batch=1, seqlens=64, spare_pages=0, device=device)
    last = case.k_cache[1:]
    assert last.shape[0] == 1
    one = Case(case.q, last, torch.zeros_like(case.block_table), case.cache_seqlens, case.softmax_scale, False)
    assert_close(*decode(one), *reference(one))


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic_algorithms,
    "default-dtype-float64": lambda: default_dtype(torch.float64),
    "default-dtype-bfloat16": lambda: default_dtype(torch.bfloat16),
    "default-device-meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_torch_change_nothing(case, mode):
    """Nor do they turn into errors, for a plan made inside or outside of them, or for the cache tools."""
    expected, expected_plan = decode(case), case.plan()
    gathered = flash_mla.gather_mla_kv(case.k_cache, case.block_table, case.cache_seqlens, 300)
    tokens, slots = gathered[0, :20], torch.arange(20, dtype=torch.int64, device=case.q.device)
    target, expected_target = (torch.zeros_like(case.k_cache) for _ in range(2))
    flash_mla.append_mla_kv(tokens[:, :512], tokens[:, 512:], expected_target, slots)
    outside = get_mla_metadata()[0]
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens, HEAD_DIM_V)

    with MODES[mode]():
        inside = get_mla_metadata()[0]
        for schedule in (inside, outside):
            assert_same(flash_mla_with_kvcache(*tensors, schedule, None, case.softmax_scale, True), expected)
        assert_same(case.plan(), expected_plan)
        assert_same(decode(case, out=torch.empty_like(expected[0])), expected)
        assert torch.equal(flash_mla.gather_mla_kv(case.k_cache, case.block_table, case.cache_seqlens, 300), gathered)
        flash_mla.append_mla_kv(tokens[:, :512], tokens[:, 512:], target, slots)
        merged, _ = flash_mla.merge_attention_states([expected[0]], [expected[1]])
    assert torch.equal(target, expected_target)
    assert torch.equal(merged, expected[0])
    # Plans and results made inside serve outside.
    for schedule in (inside, outside):
        assert_same(flash_mla_with_kvcache(*tensors, schedule, None, case.softmax_scale, True), expected)


@pytest.mark.parametrize("requiring", ["q", "k_cache", "both"])
def test_inputs_that_require_gradients(case, requiring):
    """The same bits, and nothing is recorded for a backward pass that does not exist."""
    expected = decode(case)
    for name, tensor in (("q", case.q), ("k_cache", case.k_cache)):
        if requiring in (name, "both"):
            tensor.requires_grad_()
    actual = decode(case)
    assert_same(actual, expected)
    out = torch.empty_like(expected[0])
    assert_same(decode(case, out=out), expected)
    assert not out.requires_grad


def test_autocast_changes_nothing(case):
    expected = decode(case)
    with torch.autocast(case.q.device.type, dtype=torch.float16 if case.q.is_cuda else BF16):
        assert_same(decode(case), expected)


def test_several_threads(device):
    """Each with a stream and schedules of its own; they get the bits of calls one after the other."""
    cases = [make_case(batch=3, seqlens=[300, 0, 70 + number], seed=number, device=device) for number in range(4)]
    expected = [decode(case) for case in cases]
    if device == "cuda":
        torch.cuda.synchronize()

    def decode_often(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if device == "cpu":
            return [decode(case) for _ in range(5)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = [decode(case) for _ in range(50)]
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(cases)) as pool:
        for results, right in zip(pool.map(decode_often, cases), expected, strict=True):
            for result in results:
                assert_same(result, right)
