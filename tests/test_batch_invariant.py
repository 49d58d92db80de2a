"""Batch invariance: how it is asked for, and the results of the CPU implementation."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import HEAD_DIM_V, Case, make_case
from reference import assert_close, reference

import flash_mla
from flash_mla import (
    decode_workspace_bytes,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    get_mla_metadata,
    interface,
    schedule,
    value_checks,
)

LENGTHS = [5000, 0, 70, 2100]


@pytest.fixture
def case(device) -> Case:
    return make_case(batch=4, seqlen_q=2, seqlens=LENGTHS, causal=True, device=device)


def call(case: Case, metadata: Any, num_splits: Any = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens)
    return flash_mla_with_kvcache(
        *tensors, HEAD_DIM_V, metadata, num_splits, softmax_scale=case.softmax_scale, causal=case.causal, **options
    )


def plan(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return get_mla_decoding_metadata(case.cache_seqlens, case.num_rows_per_head_kv, case.k_cache.shape[2], **options)


@dataclass
class ForeignSchedule:
    """As serving frameworks define their own."""

    have_initialized: bool = False
    config: Any = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None


def rows_of_invariant_plan(case: Case) -> torch.Tensor:
    return torch.ops.flash_mla.decode_schedule(
        case.cache_seqlens, case.num_rows_per_head_kv, case.k_cache.shape[2], True
    )[0]


WAYS = {
    "keyword of the call": lambda: (get_mla_metadata()[0], {"enable_batch_invariant": True}),
    "keyword of the schedule": lambda: (get_mla_metadata(enable_batch_invariant=True)[0], {}),
    "both": lambda: (get_mla_metadata(enable_batch_invariant=True)[0], {"enable_batch_invariant": True}),
    "a schedule object of others": lambda: (ForeignSchedule(), {"enable_batch_invariant": True}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ways_to_ask_for_it(case, way):
    metadata, options = way()
    out, lse = call(case, metadata, **options)
    assert torch.equal(metadata.tile_scheduler_metadata, rows_of_invariant_plan(case))
    expected = torch.ops.flash_mla.dense_decode(*replace(case, batch_invariant=True).op_arguments())
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    # The next layer.
    again, _ = call(case, metadata, **options)
    assert torch.equal(again, out)


def test_tensors_of_a_plan(case):
    metadata, num_splits = plan(case, enable_batch_invariant=True)
    assert torch.equal(metadata, rows_of_invariant_plan(case))
    assert metadata.shape == plan(case)[0].shape and num_splits.shape == plan(case)[1].shape
    out, lse = call(case, metadata, num_splits, enable_batch_invariant=True)
    assert_close(out, lse, *reference(case))


def test_environment_switches_it_on(case, monkeypatch):
    monkeypatch.setattr(interface, "BATCH_INVARIANT", True)
    lazy = get_mla_metadata()[0]
    out, _ = call(case, lazy)
    assert torch.equal(lazy.tile_scheduler_metadata, rows_of_invariant_plan(case))
    assert torch.equal(plan(case)[0], rows_of_invariant_plan(case))
    assert torch.equal(call(case, *plan(case), enable_batch_invariant=False)[0], out)
    assert decode_workspace_bytes(16, 1, batch_size=3, num_sms=132) == decode_workspace_bytes(
        16, 1, batch_size=3, num_sms=132, enable_batch_invariant=True
    )


@pytest.mark.parametrize(("value", "enabled"), [("1", True), ("0", False), ("", False), (None, False)])
def test_environment_variable_is_read_at_import(value, enabled):
    code = "from flash_mla import interface; print(interface.BATCH_INVARIANT)"
    environment = {name: text for name, text in os.environ.items() if name != "FLASH_MLA_BATCH_INVARIANT"}
    if value is not None:
        environment["FLASH_MLA_BATCH_INVARIANT"] = value
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"{enabled}\n"


def test_off_by_default(case):
    lazy = get_mla_metadata()[0]
    call(case, lazy)
    assert not lazy.config.batch_invariant and not lazy.enable_batch_invariant
    assert torch.equal(lazy.tile_scheduler_metadata, plan(case)[0])
    assert not torch.equal(lazy.tile_scheduler_metadata, rows_of_invariant_plan(case))


@pytest.mark.parametrize("planned", [False, True])
def test_schedule_of_the_other_kind_is_refused(case, planned):
    lazy = get_mla_metadata()[0]
    call(case, lazy, enable_batch_invariant=planned)
    with pytest.raises(ValueError, match=r"must be a plan for 4 requests.*, got one for 4 requests") as caught:
        call(case, lazy, enable_batch_invariant=not planned)
    assert str(caught.value).count("batch-invariant") == 1
    call(case, lazy, enable_batch_invariant=planned)


@pytest.mark.parametrize("num_heads_q", [16, 64, 128])
@pytest.mark.parametrize("planned", [False, True])
def test_tensors_of_the_other_kind_are_found_by_their_values(planned, num_heads_q):
    """On the CPU, and on a GPU where values are checked."""
    case = make_case(batch=3, num_heads_q=num_heads_q, seqlens=[20_000, 5, 3000])
    message = r"tile_scheduler_metadata must be a plan for (\d+ workers|this call)"
    with pytest.raises(ValueError, match=message):
        call(case, *plan(case, enable_batch_invariant=planned), enable_batch_invariant=not planned)
    call(case, *plan(case, enable_batch_invariant=planned), enable_batch_invariant=planned)


@pytest.mark.gpu
@pytest.mark.parametrize("planned", [False, True])
def test_check_mode_finds_tensors_of_the_other_kind(monkeypatch, planned):
    monkeypatch.setattr(value_checks, "ENABLED", True)
    case = make_case(batch=3, num_heads_q=64, seqlens=[20_000, 5, 3000], device="cuda")
    with pytest.raises(ValueError, match="tile_scheduler_metadata must be a plan for this call"):
        call(case, *plan(case, enable_batch_invariant=planned), enable_batch_invariant=not planned)


@pytest.mark.parametrize("wrong", [1, "yes", 0])
def test_what_is_no_bool_is_refused(case, wrong):
    for function in (get_mla_metadata, lambda **options: call(case, get_mla_metadata()[0], **options)):
        with pytest.raises(TypeError, match="enable_batch_invariant must be a bool, got "):
            function(enable_batch_invariant=wrong)
    with pytest.raises(TypeError, match="enable_batch_invariant must be a bool, got "):
        decode_workspace_bytes(16, 1, enable_batch_invariant=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_heads_q", [16, 128])
def test_bits_of_the_cpu_do_not_depend_on_the_batch(num_heads_q, dtype):
    case = make_case(batch=4, num_heads_q=num_heads_q, seqlens=LENGTHS, dtype=dtype)
    tables = (case.q, case.block_table, case.cache_seqlens)
    out, lse = call(case, get_mla_metadata()[0], enable_batch_invariant=True)
    for chosen in ([0], [3], [2, 0, 3], [3, 1, 0, 0, 2, 3, 1]):
        q, block_table, seqlens = (table[chosen] for table in tables)
        part = Case(q, case.k_cache, block_table, seqlens, case.softmax_scale, case.causal)
        part_out, part_lse = call(part, get_mla_metadata()[0], enable_batch_invariant=True)
        assert torch.equal(part_out, out[chosen]) and torch.equal(part_lse, lse[chosen])


@pytest.mark.parametrize("num_sms", [78, 114, 132, 144])
def test_workspace_is_bounded(num_sms):
    for num_rows in (1, 16, 32, 33, 64, 128, 256, 1000, 16384, 2**30 - 1):
        for batch_size in (0, 1, 2, 8, 64, 256, 1000, 24 * 1024):
            size = decode_workspace_bytes(
                num_rows, 1, num_sms=num_sms, batch_size=batch_size, enable_batch_invariant=True
            )
            assert 0 <= size <= schedule.MAX_SCRATCH_BYTES
    assert decode_workspace_bytes(16, 1, num_sms=num_sms, enable_batch_invariant=True) == schedule.MAX_SCRATCH_BYTES


def test_batch_size_makes_no_difference_otherwise():
    sizes = {decode_workspace_bytes(128, 1, num_sms=132, batch_size=batch_size) for batch_size in (None, 1, 1000)}
    assert sizes == {decode_workspace_bytes(128, 1, num_sms=132)}
    with pytest.raises(ValueError, match="batch_size must be at least 0, got -1"):
        decode_workspace_bytes(128, 1, batch_size=-1)


def test_repr_and_config_name_it():
    lazy = get_mla_metadata(enable_batch_invariant=True)[0]
    call(make_case(batch=2, seqlens=[100, 3]), lazy)
    assert "batch_invariant=True" in repr(lazy)
    assert isinstance(lazy, flash_mla.FlashMLASchedMeta)
