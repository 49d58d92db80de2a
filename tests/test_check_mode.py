"""FLASH_MLA_CHECK=1: lengths, pages and plans on the device are checked, and the offending request is named.

The CPU implementation always does these checks.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from cases import HEAD_DIM_V, Case, make_case

import flash_mla
from flash_mla import schedule, value_checks


@pytest.fixture(autouse=True)
def check_mode(monkeypatch):
    monkeypatch.setattr(value_checks, "ENABLED", True)


def decode(case: Case):
    metadata, num_splits = flash_mla.get_mla_metadata()
    return flash_mla.flash_mla_with_kvcache(
        case.q, case.k_cache, case.block_table, case.cache_seqlens, HEAD_DIM_V, metadata, num_splits
    )


def example(device: str, **options) -> Case:
    return make_case(batch=4, seqlens=[100, 0, 64, 300], device=device, **options)


@pytest.mark.parametrize("invalid_page", [-1, 2147480000])
def test_right_arguments_pass(device, invalid_page):
    out, _ = decode(example(device, invalid_page=invalid_page))
    assert out.isfinite().all()


@pytest.mark.parametrize("length", [0, 1, 320])
def test_lengths_at_the_edge_pass(device, length):
    case = make_case(batch=2, seqlens=[320, 320], device=device)
    case.cache_seqlens[1] = length
    decode(case)


@pytest.mark.parametrize("length", [321, 2**31 - 1])
def test_length_beyond_the_block_table(device, length):
    case = example(device)
    case.cache_seqlens[2] = length
    case.block_table[2] = 1
    with pytest.raises(ValueError, match=rf"cache_seqlens must be at most 320.*got {length} for request 2"):
        decode(case)


@pytest.mark.parametrize("length", [-1, -64, -(2**31)])
def test_negative_length(device, length):
    case = example(device)
    case.cache_seqlens[2] = length
    with pytest.raises(ValueError, match=rf"^cache_seqlens must not be negative, got {length} for request 2$"):
        decode(case)
    with pytest.raises(ValueError, match=rf"^cache_seqlens must not be negative, got {length} for request 2$"):
        flash_mla.gather_mla_kv(case.k_cache, case.block_table, case.cache_seqlens, 320)


def test_negative_length_counts_as_none_where_nothing_is_checked(device, monkeypatch):
    monkeypatch.setattr(value_checks, "ENABLED", False)
    case = example(device)
    case.cache_seqlens[2] = -5
    out, lse = decode(case)
    assert (out[2] == 0).all() and lse[2].isposinf().all()
    assert lse[[0, 3]].isfinite().all()


MISTAKES = [  # message, length, first page
    ("cache_seqlens must not be negative, got -1", -1, 0),
    ("cache_seqlens must be at most 320", 321, 0),
    ("block_table must hold pages", 64, -3),
]


@pytest.mark.parametrize(("message", "length", "page"), MISTAKES, ids=["negative", "too-long", "page"])
def test_the_first_mistake_is_named_whatever_it_is(device, message, length, page):
    """Not one of another kind in a later request."""
    for request in range(4):
        case = make_case(batch=4, seqlens=320, device=device)
        for index, mistake in enumerate([(message, length, page), *MISTAKES][: 4 - request], start=request):
            case.cache_seqlens[index] = mistake[1]
            case.block_table[index, 0] = mistake[2]
        with pytest.raises(ValueError, match=rf"^{message}.* request {request}\b"):
            decode(case)


@pytest.mark.parametrize("page", [-1, "num_blocks", 2147480000])
def test_page_out_of_range(device, page):
    case = example(device)
    num_blocks = case.k_cache.shape[0]
    page = num_blocks if page == "num_blocks" else page
    case.block_table[3, 4] = page
    expected = rf"block_table must hold pages 0 to {num_blocks - 1} .* of request 3, got {page} in column 4"
    with pytest.raises(ValueError, match=expected):
        decode(case)


def test_first_of_several_requests_is_named(device):
    case = example(device)
    case.block_table[0, 1] = -7
    case.block_table[3, 0] = -8
    with pytest.raises(ValueError, match=r"request 0, got -7 in column 1"):
        decode(case)


def decode_with_plan(case: Case, plan: tuple[torch.Tensor, torch.Tensor]):
    return flash_mla.flash_mla_with_kvcache(
        case.q, case.k_cache, case.block_table, case.cache_seqlens, HEAD_DIM_V, *plan
    )


def without_work(metadata: torch.Tensor, num_splits: torch.Tensor):
    """Buffers that no plan was copied into."""
    return torch.zeros_like(metadata), torch.zeros_like(num_splits)


@pytest.mark.parametrize(
    ("make_plan", "got"),
    [
        (lambda case: flash_mla.get_mla_decoding_metadata(case.cache_seqlens, 16, 1), "one for 4 of 1"),
        (lambda case: flash_mla.get_mla_decoding_metadata(case.cache_seqlens, 4, 4), "one for 4 of 4"),
        (lambda case: make_case(batch=3, num_heads_kv=2, device=case.q.device).plan(), "one for 3 of 2"),
        (lambda case: make_case(batch=5, num_heads_kv=2, device=case.q.device).plan(), "one for 5 of 2"),
        (lambda case: without_work(*case.plan()), "one without work"),
    ],
    ids=["fewer-kv-heads", "more-kv-heads", "smaller-batch", "larger-batch", "not-filled"],
)
def test_plan_for_other_shapes_that_has_the_right_shape(device, make_plan, got):
    """Following it, the kernels would leave results unwritten, or read requests that do not exist."""
    case = example(device, num_heads_kv=2)
    metadata, num_splits = make_plan(case)
    assert metadata.shape == case.plan()[0].shape
    plan = metadata, num_splits.new_zeros(5)  # as views of persistent buffers have it
    with pytest.raises(
        ValueError, match=rf"^tile_scheduler_metadata must be a plan for 4 requests of 2 .*, got {got}$"
    ):
        decode_with_plan(case, plan)


@pytest.mark.parametrize("planned_lengths", [[0, 0, 0, 0], [1, 5000, 0, 0], [2**31 - 1, 0, 0, 1]])
@pytest.mark.parametrize(("num_heads_q", "num_heads_kv"), [(16, 1), (128, 1), (6, 3)])
def test_plan_for_other_lengths_passes(device, num_heads_q, num_heads_kv, planned_lengths):
    case = example(device, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv)
    seqlens = torch.tensor(planned_lengths, dtype=torch.int32, device=device)
    plan = flash_mla.get_mla_decoding_metadata(seqlens, num_heads_q // num_heads_kv, num_heads_kv)
    assert decode_with_plan(case, plan)[0].isfinite().all()


def test_table_without_columns(device):
    case = make_case(batch=2, seqlens=0, device=device)
    narrow = Case(case.q, case.k_cache, case.block_table[:, :0], case.cache_seqlens, case.softmax_scale, False)
    out, _ = decode(narrow)
    assert (out == 0).all()
    narrow.cache_seqlens[1] = 5
    with pytest.raises(ValueError, match=r"cache_seqlens must be at most 0.*got 5 for request 1"):
        decode(narrow)


def test_plan_for_more_workers(device):
    """As of a GPU that runs more clusters at once, or of 64 query rows for 16."""
    grid = schedule.worker_grid(3, 16, 1, schedule.CPU_CAPACITY)
    metadata = torch.zeros(132, 8, dtype=torch.int32, device=device)
    for worker in range(grid.num_workers):
        metadata[worker] = torch.tensor([2, 0, worker, 2, 0, worker + 1, 1, grid.num_workers - 1], device=device)
    value_checks.check_planned_tiles(metadata, 3, grid)
    metadata[grid.num_workers] = metadata[grid.num_workers - 1]
    more = grid.num_workers + 1
    with pytest.raises(ValueError, match=rf"a plan for {grid.num_workers} workers .*, got one for {more} or more$"):
        value_checks.check_planned_tiles(metadata, 3, grid)


def test_no_requests(device):
    grid = schedule.worker_grid(0, 16, 1, schedule.CPU_CAPACITY)
    value_checks.check_planned_tiles(torch.zeros(132, 8, dtype=torch.int32, device=device), 0, grid)
    value_checks.check_lengths_and_pages(
        torch.empty(0, 4, dtype=torch.int32, device=device), torch.empty(0, dtype=torch.int32, device=device), 1
    )


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("block_table", lambda table: table[:2]),
        ("block_table", lambda table: None),
        ("q", lambda q: q[0]),
        ("k_cache", lambda k: k[:, :, :0]),
    ],
    ids=["batch", "no-tensor", "dim", "no-heads"],
)
def test_wrong_arguments_are_left_to_the_op(device, name, spoil):
    case = example(device)
    wrong = dataclasses.replace(case, **{name: spoil(getattr(case, name))})
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"\b(block_table|q) must|'block_table'"):
        decode_with_plan(wrong, case.plan())


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_is_not_interrupted(device):
    case = example(device)
    out, lse = torch.compile(lambda: decode(case), fullgraph=True, backend="aot_eager")()
    expected_out, expected_lse = decode(case)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)


@pytest.mark.gpu
def test_off_while_a_graph_is_captured():
    case = example("cuda")
    decode(case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = decode(case)
    graph.replay()
    assert torch.equal(out, decode(case)[0])


@pytest.mark.gpu
def test_off_by_default(monkeypatch):
    monkeypatch.setattr(value_checks, "ENABLED", False)
    monkeypatch.setattr(value_checks, "check_values_unless_capturing", lambda *_: pytest.fail("checked"))
    decode(example("cuda"))


@pytest.mark.parametrize(("value", "enabled"), [("1", True), ("0", False), ("", False), (None, False)])
def test_values_of_the_environment_variable(value, enabled):
    environment = {} if value is None else {"FLASH_MLA_CHECK": value}
    assert value_checks.is_switched_on(environment) is enabled


def test_environment_variable_is_read_at_import():
    code = "from flash_mla import value_checks; print(value_checks.ENABLED)"
    environment = {**os.environ, "FLASH_MLA_CHECK": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"
