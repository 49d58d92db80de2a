"""FLASH_MLA_CHECK=1: lengths and pages on the device are checked, and the offending request is named."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cases import HEAD_DIM_V, Case, make_case

import flash_mla
from flash_mla import lengths


@pytest.fixture(autouse=True)
def check_mode(monkeypatch):
    monkeypatch.setattr(lengths, "ENABLED", True)


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


@pytest.mark.parametrize("length", [-1, 0, 320])
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


def test_table_without_columns(device):
    case = make_case(batch=2, seqlens=0, device=device)
    narrow = Case(case.q, case.k_cache, case.block_table[:, :0], case.cache_seqlens, case.softmax_scale, False)
    out, _ = decode(narrow)
    assert (out == 0).all()
    narrow.cache_seqlens[1] = 5
    with pytest.raises(ValueError, match=r"cache_seqlens must be at most 0.*got 5 for request 1"):
        decode(narrow)


def test_no_requests(device):
    lengths.check_lengths_and_pages(
        torch.empty(0, 4, dtype=torch.int32, device=device), torch.empty(0, dtype=torch.int32, device=device), 1
    )


def test_wrong_shapes_are_left_to_the_op(device):
    case = example(device)
    wrong = Case(case.q, case.k_cache, case.block_table[:2], case.cache_seqlens, case.softmax_scale, False)
    with pytest.raises(ValueError, match=r"^block_table must have shape"):
        decode(wrong)


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
    monkeypatch.setattr(lengths, "ENABLED", False)
    monkeypatch.setattr(lengths, "check_lengths_and_pages", lambda *_: pytest.fail("checked"))
    decode(example("cuda"))


@pytest.mark.parametrize(("value", "enabled"), [("1", True), ("0", False), ("", False)])
def test_environment_variable(value, enabled):
    code = "from flash_mla import lengths; print(lengths.ENABLED)"
    environment = {**os.environ, "FLASH_MLA_CHECK": value}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(enabled)
