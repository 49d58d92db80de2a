"""Tensor maps that were encoded before: found again by all that they depend on, and by nothing less."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import Case, make_case

from build_tools.flags import CXX_FLAGS
from build_tools.toolchain import ToolchainError, find_cuda

ROOT = Path(__file__).resolve().parents[1]


def test_every_part_of_the_source_tells_maps_apart(tmp_path):
    try:
        include_dirs = [ROOT / "csrc", *find_cuda(str(torch.version.cuda)).include_dirs]
    except ToolchainError as error:
        pytest.skip(f"needs the headers of CUDA: {error}")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "tensor_map_cache"
    options = [*CXX_FLAGS, *(f"-I{each}" for each in include_dirs)]
    source = ROOT / "tests" / "tensor_map_cache.cpp"
    subprocess.run([compiler, *options, str(source), "-o", str(program)], check=True)
    process = subprocess.run([str(program)], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "")


def at_one_address(case: Case, memory: torch.Tensor) -> Case:
    """The same case, its cache at the begin of the memory with the strides that it has."""
    k_cache = case.k_cache
    cache = memory.view(k_cache.dtype).as_strided(k_cache.shape, k_cache.stride())
    cache.copy_(k_cache)
    return Case(case.q, cache, case.block_table, case.cache_seqlens, case.softmax_scale, case.causal)


def test_caches_that_follow_each_other_at_one_address(device):
    """Of other dtypes, sizes, head counts and strides: each gives the bits that it gives in memory of its own."""
    options = [
        {},
        {"dtype": torch.float16},
        {"spare_pages": 40},
        {"num_heads_kv": 2},
        {"strided_cache": True},
        {"num_heads_kv": 2, "strided_cache": True},
        {},
    ]
    cases = [make_case(batch=2, seqlens=[300, 70], device=device, seed=i, **each) for i, each in enumerate(options)]
    memory = torch.zeros(2**25, dtype=torch.uint8, device=device)
    for case in cases:
        expected = torch.ops.flash_mla.dense_decode(*case.op_arguments())
        moved = at_one_address(case, memory)
        assert moved.k_cache.data_ptr() == memory.data_ptr()
        actual = torch.ops.flash_mla.dense_decode(*moved.op_arguments())
        for actual_part, expected_part in zip(actual, expected, strict=True):
            assert torch.equal(actual_part, expected_part)
