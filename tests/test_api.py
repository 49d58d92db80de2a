"""The public functions as their callers use them."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM_V, Case, make_case
from gpu_cases import capture

import flash_mla
from flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_decoding_metadata, get_mla_metadata
from flash_mla.plan import PlanConfig


@pytest.fixture
def case(device) -> Case:
    return make_case(batch=3, seqlen_q=2, seqlens=[100, 0, 70], device=device)


def tensors(case: Case):
    return case.q, case.k_cache, case.block_table, case.cache_seqlens


def assert_same(actual, expected) -> None:
    for actual_part, expected_part in zip(actual, expected, strict=True):
        assert torch.equal(actual_part, expected_part)


def expected_result(case: Case, causal: bool = False):
    *arguments, _, _, _ = case.op_arguments()
    return torch.ops.flash_mla.dense_decode(*arguments, case.softmax_scale, causal)


@dataclass
class ForeignSchedule:
    """As serving frameworks define their own."""

    have_initialized: bool = False
    config: Any = None
    tile_scheduler_metadata: torch.Tensor | None = None
    num_splits: torch.Tensor | None = None


# get_mla_metadata: every way in which it is called gives an empty schedule.
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((), {}),
        (("seqlens", 16, 1), {}),
        (("seqlens", 16, 1), {"num_heads_q": 16, "is_fp8_kvcache": True, "topk": 2048}),
        ((), {"cache_seqlens": None, "num_q_tokens_per_head_k": 32, "num_heads_k": 1}),
    ],
)
def test_get_mla_metadata_is_lazy(args, kwargs):
    schedule, num_splits = get_mla_metadata(*args, **kwargs)
    assert type(schedule) is FlashMLASchedMeta and num_splits is None
    assert schedule.tile_scheduler_metadata is None and schedule.num_splits is None and schedule.config is None
    assert schedule.have_initialized is False


@pytest.mark.parametrize(
    "call",
    [
        lambda seqlens: get_mla_decoding_metadata(seqlens, 32, 1),
        lambda seqlens: get_mla_decoding_metadata(cache_seqlens=seqlens, num_heads_per_head_k=32, num_heads_k=1),
        lambda seqlens: get_mla_decoding_metadata(cache_seqlens=seqlens, num_q_tokens_per_head_k=32, num_heads_k=1),
        lambda seqlens: get_mla_decoding_metadata(seqlens, 32, 1, 16, False, None),
        lambda seqlens: get_mla_decoding_metadata(seqlens, 32, 1, num_heads_q=16, is_fp8_kvcache=False, topk=None),
        lambda seqlens: get_mla_decoding_metadata(num_heads_k=1, num_heads_per_head_k=32, seqlens_k=seqlens),
    ],
)
def test_get_mla_decoding_metadata_gives_tensors(case, call):
    assert_same(call(case.cache_seqlens), case.plan())


def test_lazy_schedule_is_filled_by_the_first_call_and_kept(case):
    schedule, num_splits = get_mla_metadata()
    expected = expected_result(case)
    assert_same(flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule, num_splits), expected)
    planned = schedule.tile_scheduler_metadata, schedule.num_splits
    assert_same(planned, case.plan())
    assert schedule.have_initialized and schedule.config == PlanConfig(3, 32, 1, False)
    assert_same(flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule, num_splits), expected)
    assert schedule.tile_scheduler_metadata is planned[0] and schedule.num_splits is planned[1]
    assert "PlanConfig(batch_size=3" in repr(schedule)


@pytest.mark.parametrize(
    "call",
    [
        # February to April 2025
        lambda t, plan: flash_mla_with_kvcache(*t, 512, *plan),
        lambda t, plan: flash_mla_with_kvcache(*t, 512, *plan, softmax_scale=DEFAULT_SCALE, causal=False),
        lambda t, plan: flash_mla_with_kvcache(*t, 512, *plan, DEFAULT_SCALE, False),
        # September 2025
        lambda t, plan: flash_mla_with_kvcache(*t, 512, *plan, None, False, False, None),
        # January 2026
        lambda t, plan: flash_mla_with_kvcache(*t, 512, get_mla_metadata()[0]),
        lambda t, plan: flash_mla_with_kvcache(*t, 512, get_mla_metadata()[0], None, None, False, *[None] * 7),
        # vLLM
        lambda t, plan: flash_mla_with_kvcache(
            *t, 512, *get_mla_metadata(), softmax_scale=DEFAULT_SCALE, out=None, enable_batch_invariant=False
        ),
        # sgl_kernel, by position: descale_q and descale_k before is_fp8_kvcache
        lambda t, plan: flash_mla_with_kvcache(*t, 512, *plan, DEFAULT_SCALE, False, None, None, False),
        # SGLang
        lambda t, plan: flash_mla_with_kvcache(
            *t, head_dim_v=512, tile_scheduler_metadata=plan[0], num_splits=plan[1], descale_q=None, descale_k=None,
            is_fp8_kvcache=False, kv_format=None,
        ),
        lambda t, plan: flash_mla_with_kvcache(
            q=t[0], k_cache=t[1], block_table=t[2], cache_seqlens=t[3], head_dim_v=512,
            tile_scheduler_metadata=plan[0], num_splits=plan[1], causal=False, is_fp8_kvcache=None, indices=None,
            attn_sink=None, extra_k_cache=None, extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None,
        ),
        lambda t, plan: flash_mla_with_kvcache(*t, 512, ForeignSchedule()),
        # Set although nothing was planned
        lambda t, plan: flash_mla_with_kvcache(*t, 512, ForeignSchedule(have_initialized=True, config="theirs")),
        lambda t, plan: flash_mla_with_kvcache(*t, 512, ForeignSchedule(True, "theirs", *plan)),
    ],
)  # fmt: skip
def test_calls_in_use(case, call):
    assert_same(call(tensors(case), case.plan()), expected_result(case))


def test_causal_and_scale_arrive(case):
    plan = case.plan()
    result = flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, *plan, 0.3, True)
    expected = torch.ops.flash_mla.dense_decode(*tensors(case), *plan, 0.3, True)
    assert_same(result, expected)
    assert not torch.equal(result[0], expected_result(case)[0])


def test_out_is_written_and_returned(case):
    out = torch.full((3, 2, 16, HEAD_DIM_V), float("nan"), dtype=case.q.dtype, device=case.q.device)
    result, lse = flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, *get_mla_metadata(), out=out)
    assert result is out
    assert_same((result, lse), expected_result(case))


def test_foreign_schedule_is_filled(case):
    schedule = ForeignSchedule()
    flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule)
    assert schedule.have_initialized
    assert_same((schedule.tile_scheduler_metadata, schedule.num_splits), case.plan())


def test_plan_may_be_copied_into_larger_buffers(case):
    """As SGLang does: persistent buffers, of which the call gets the first rows."""
    metadata, num_splits = case.plan()
    buffers = [torch.full((1000, 8), -7, dtype=torch.int32), torch.full((1000,), -7, dtype=torch.int32)]
    views = [
        buffer.to(case.q.device)[: part.shape[0]] for buffer, part in zip(buffers, (metadata, num_splits), strict=True)
    ]
    for view, part in zip(views, (metadata, num_splits), strict=True):
        view.copy_(part)
    assert_same(flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, *views), expected_result(case))


def test_schedule_serves_other_lengths_of_the_same_batch(case):
    schedule, _ = get_mla_metadata()
    flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule)
    case.cache_seqlens.copy_(torch.tensor([1, 0, 64]))
    assert_same(flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule), expected_result(case))


@pytest.mark.parametrize(
    "other",
    [{"batch": 4}, {"seqlen_q": 1}, {"num_heads_q": 128}, {"num_heads_kv": 2}],
    ids=lambda other: next(iter(other)),
)
def test_schedule_for_other_shapes_is_rejected(case, device, other):
    schedule, _ = get_mla_metadata()
    flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule)
    other_case = make_case(**{"batch": 3, "seqlen_q": 2, "seqlens": 10, "device": device, **other})
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata must be a plan for .* got one for 3 requests, 32 "):
        flash_mla_with_kvcache(*tensors(other_case), HEAD_DIM_V, schedule)
    assert_same(flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule), expected_result(case))


def test_schedule_survives_a_call_that_failed(case):
    schedule, _ = get_mla_metadata()
    with pytest.raises(ValueError, match=r"^cache_seqlens"):
        flash_mla_with_kvcache(case.q, case.k_cache, case.block_table, case.cache_seqlens[:2], HEAD_DIM_V, schedule)
    with pytest.raises(ValueError, match=r"^block_table"):
        flash_mla_with_kvcache(case.q, case.k_cache, case.block_table[:2], case.cache_seqlens, HEAD_DIM_V, schedule)
    assert_same(flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule), expected_result(case))


@pytest.mark.parametrize(
    ("misuse", "error"),
    [
        (lambda schedule: torch.empty(132, 8, dtype=torch.int32).copy_(schedule), TypeError),
        (lambda schedule: torch.cat([schedule, schedule]), TypeError),
        (lambda schedule: schedule.shape, AttributeError),
        (lambda schedule: schedule.clone(), AttributeError),
    ],
    ids=["copy_", "cat", "shape", "clone"],
)
def test_schedule_where_a_tensor_is_needed(misuse, error):
    with pytest.raises(error, match="get_mla_decoding_metadata"):
        misuse(get_mla_metadata()[0])


def test_schedule_is_an_ordinary_object():
    schedule, _ = get_mla_metadata()
    assert copy.deepcopy(schedule).config is None
    with pytest.raises(AttributeError, match=r"has no attribute 'colour'$"):
        schedule.colour  # noqa: B018


def test_import_paths():
    interface = importlib.import_module("flash_mla.flash_mla_interface")
    for name in interface.__all__:
        assert getattr(interface, name) is getattr(flash_mla, name)
    assert set(flash_mla.__all__) <= set(dir(flash_mla))
    assert (Path(flash_mla.__file__).parent / "py.typed").is_file()


@pytest.mark.gpu
def test_schedule_of_the_warm_up_is_planned_again_in_the_graph():
    """Otherwise replays with other lengths would use the plan for those of the warm-up."""
    case = make_case(batch=3, seqlens=[100, 64, 7000], device="cuda")
    case.cache_seqlens.copy_(torch.tensor([5, 0, 64]))
    schedule, _ = get_mla_metadata()
    graph, result = capture(lambda: flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule))
    assert schedule.config.in_graph_capture
    for lengths in ([100, 64, 7000], [1, 0, 65], [0, 0, 0]):
        case.cache_seqlens.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(schedule.tile_scheduler_metadata, case.plan()[0])
        assert_same(result, expected_result(case))


@pytest.mark.gpu
def test_schedule_of_a_graph_is_planned_again_outside():
    """The tensors of a plan in a graph that was not replayed hold nothing."""
    case = make_case(batch=3, seqlens=[100, 0, 7000], device="cuda")
    schedule, _ = get_mla_metadata()
    capture(lambda: flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule))
    assert_same(flash_mla_with_kvcache(*tensors(case), HEAD_DIM_V, schedule), expected_result(case))
    assert not schedule.config.in_graph_capture
