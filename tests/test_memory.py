"""Scratch memory: bounded, of the size that can be asked for, from torch's allocator, and given back."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest
import torch
from cases import HEAD_DIM_V, PAGE_SIZE
from gpu_cases import capture, make_cache, make_queries

import flash_mla
from flash_mla import decode_workspace_bytes, flash_mla_with_kvcache, get_mla_metadata

MAX_WORKSPACE_BYTES = 64_000_000
# H20, H100 PCIe, H100 SXM and H200, all of a GH100.
NUM_SMS = (78, 114, 132, 144)
NUM_CALLS = 100_000


@pytest.mark.parametrize("num_sms", NUM_SMS)
def test_workspace_is_bounded_whatever_the_shape(num_sms):
    rows = [*range(1, 2000, 7), *range(2000, 40_000, 1009), 2**30 - 1]
    for num_rows, num_heads_kv in itertools.product(rows, (1, 2, 128)):
        size = decode_workspace_bytes(num_rows, num_heads_kv, num_sms=num_sms)
        assert 0 < size <= MAX_WORKSPACE_BYTES, (num_rows, num_heads_kv)


@pytest.mark.parametrize(
    ("num_rows", "num_sms", "num_ctas"),
    [(16, 132, 132), (128, 132, 132), (192, 132, 132), (448, 132, 126), (16, 78, 78)],
)
def test_workspace_holds_two_tiles_of_rows_for_every_cta(num_rows, num_sms, num_ctas):
    assert decode_workspace_bytes(num_rows, 1, num_sms=num_sms) == num_ctas * 2 * 64 * 513 * 4


def test_workspace_without_a_gpu_is_that_of_an_h100():
    expected = decode_workspace_bytes(128, 1, num_sms=132)
    assert decode_workspace_bytes(128, 1, device="cpu") == decode_workspace_bytes(128, 1, device=torch.device("cpu"))
    assert decode_workspace_bytes(128, 1, device="cpu") == expected
    if not torch.cuda.is_available():
        assert decode_workspace_bytes(128, 1) == expected


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "num_q_tokens_per_head_k must be at least 1, got 0", {"num_q_tokens_per_head_k": 0}),
        (TypeError, "num_q_tokens_per_head_k must be an int, got 1.5", {"num_q_tokens_per_head_k": 1.5}),
        (ValueError, "num_heads_k must be at least 1, got -1", {"num_heads_k": -1}),
        (TypeError, "num_heads_k must be an int, got None", {"num_heads_k": None}),
        (ValueError, "num_sms must be at least 1, got 0", {"num_sms": 0}),
        (TypeError, "num_sms must be an int, got '132'", {"num_sms": "132"}),
        (ValueError, "num_sms must be None where device is given, got 132", {"num_sms": 132, "device": "cpu"}),
    ],
)
def test_workspace_of_wrong_arguments(error, message, arguments):
    with pytest.raises(error) as caught:
        decode_workspace_bytes(**{"num_q_tokens_per_head_k": 16, "num_heads_k": 1, **arguments})
    assert str(caught.value) == message


def decode_call(lengths: list[int], seqlen_q: int, num_heads_q: int, num_heads_kv: int = 1) -> Callable[[], object]:
    """A call of a layer that plans for itself."""
    cache = make_cache(lengths, num_heads_kv, torch.bfloat16)
    q = make_queries(len(lengths), seqlen_q, num_heads_q, torch.bfloat16)
    return lambda: flash_mla_with_kvcache(
        q, cache.pages, cache.block_table, cache.cache_seqlens, HEAD_DIM_V, *get_mla_metadata()
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "seqlen_q", "num_heads_q", "num_heads_kv"),
    [
        ([100], 1, 16, 1),
        ([100_000], 1, 16, 1),
        ([500] * 200, 1, 128, 1),
        ([3000, 0, 64], 3, 128, 1),
        ([700, 700], 7, 64, 1),
        ([300], 128, 128, 1),
        ([5000] * 3, 1, 6, 3),
    ],
)
def test_a_call_takes_what_was_announced(lengths, seqlen_q, num_heads_q, num_heads_kv):
    """The highest memory use during a call is its results, a plan and the workspace, to the byte."""
    call = decode_call(lengths, seqlen_q, num_heads_q, num_heads_kv)
    call()  # loads the kernels
    num_rows = len(lengths) * seqlen_q * num_heads_q
    rows_per_head_kv = seqlen_q * num_heads_q // num_heads_kv
    plan = flash_mla.get_mla_decoding_metadata(
        torch.zeros(len(lengths), dtype=torch.int32, device="cuda"), rows_per_head_kv, num_heads_kv
    )
    results_bytes = num_rows * (2 * HEAD_DIM_V + 4) + sum(4 * part.numel() for part in plan)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # What was asked for: blocks may be larger, where it is not worth dividing them.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    stats = torch.cuda.memory_stats()
    assert stats["requested_bytes.all.peak"] - before == results_bytes + decode_workspace_bytes(
        rows_per_head_kv, num_heads_kv
    )
    del result
    assert torch.cuda.memory_stats()["requested_bytes.all.current"] == before


@pytest.mark.gpu
def test_replays_allocate_nothing():
    graph, result = capture(decode_call([3000, 0, 64, 9000], 2, 128))
    graph.replay()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    for _ in range(100):
        graph.replay()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    for counter in (
        "allocation.all.allocated",
        "segment.all.allocated",
        "allocated_bytes.all.current",
        "num_alloc_retries",
    ):
        assert after[counter] == before[counter], counter
    del result


@pytest.mark.gpu
def test_memory_stays_flat_over_100_000_calls():
    call = decode_call([PAGE_SIZE, 0, 700], 1, 16)
    for _ in range(100):
        call()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_stats()
    for _ in range(NUM_CALLS):
        call()
    torch.cuda.synchronize()
    gc.collect()
    after = torch.cuda.memory_stats()
    for counter in ("allocated_bytes.all.current", "allocation.all.current", "reserved_bytes.all.current"):
        assert after[counter] == before[counter], counter
