"""Calls that are rejected: the type of the error and its whole message, whichever way the call comes."""

from __future__ import annotations

import functools
import gc
import itertools
import sys
from pathlib import Path

import pytest
import torch
from cases import HEAD_DIM_V, Case, make_case
from rejections import (
    BF16,
    OUT_SHAPE,
    REJECTIONS,
    Arguments,
    Caller,
    Rejection,
    arguments_of,
    call_api,
    call_compiled_checks,
    call_lazily,
    call_op,
    example,
)

import flash_mla
from flash_mla import extension, get_mla_decoding_metadata, get_mla_metadata
from flash_mla.schedule import CPU_CAPACITY

PAGE_BYTES = 4096

CALLS = [(rejection, caller) for rejection in REJECTIONS for caller in rejection.callers]


def calls_by(*callers: Caller) -> pytest.MarkDecorator:
    parameters = [
        pytest.param(rejection, caller, id=f"{rejection.name}-{caller.__name__}")
        for rejection, caller in CALLS
        if caller in callers
    ]
    return pytest.mark.parametrize(("rejection", "caller"), parameters)


@functools.cache
def right_call(device: str) -> tuple[Arguments, tuple[torch.Tensor, torch.Tensor]]:
    """Arguments that nothing is wrong with, and their result."""
    arguments = arguments_of(example(device))
    return arguments, call_op(arguments)


def assert_right(result: tuple[torch.Tensor, torch.Tensor], device: str) -> None:
    for actual, expected in zip(result, right_call(device)[1], strict=True):
        assert torch.equal(actual, expected)


def other_example(device: str, **options) -> Case:
    shape = {"batch": 3, "seqlen_q": 2, "num_heads_q": 16, "seqlens": [100, 0, 70]}
    return make_case(**{**shape, **options}, device=device)


def test_table_has_at_least_60_calls_of_different_names():
    names = {rejection.name for rejection in REJECTIONS}
    assert len(names) == len(REJECTIONS) >= 60


@calls_by(call_api, call_lazily, call_op)
def test_wrong_call(device, rejection: Rejection, caller: Caller):
    """It raises what the table says, and the next right call, with the same schedule, gives the right bits."""
    arguments = right_call(device)[0]
    options = {"schedule": get_mla_metadata()[0]} if caller is call_lazily else {}
    with pytest.raises(rejection.error) as caught:
        caller(rejection.change(arguments), **options)
    assert rejection.matches(caught.value), f"{type(caught.value).__name__}: {caught.value}"
    assert_right(caller(arguments, **options), device)


@calls_by(call_compiled_checks)
def test_wrong_call_of_the_compiled_checks(rejection: Rejection, caller: Caller):
    if extension.load_extension().module is None:
        pytest.skip(f"needs the built kernels: {extension.unavailable_reason()}")
    with pytest.raises(rejection.error) as caught:
        caller(rejection.change(right_call("cpu")[0]))
    assert rejection.matches(caught.value), f"{type(caught.value).__name__}: {caught.value}"


def test_rejected_calls_leave_nothing_behind(device, request):
    """Thousands of them, of every kind; --rejected-calls says how many. Then the right call gives the right bits."""
    num_calls = request.config.getoption("--rejected-calls")
    callers = [call_api, call_lazily, call_op]
    if device == "cpu" and extension.load_extension().module is not None:
        callers.append(call_compiled_checks)
    arguments = right_call(device)[0]
    wrong = [(rejection.change(arguments), caller) for rejection, caller in CALLS if caller in callers]

    def reject(count: int) -> None:
        for changed, caller in itertools.islice(itertools.cycle(wrong), count):
            try:
                caller(changed)
            except (TypeError, ValueError, NotImplementedError):
                continue
            pytest.fail("a wrong call was not rejected")

    reject(2 * len(wrong))
    gc.collect()
    before = memory_in_use(device)
    reject(num_calls)
    gc.collect()
    resident_pages, python_blocks, device_bytes = (
        now - then for now, then in zip(memory_in_use(device), before, strict=True)
    )
    # A leak of one small object per call would be one block per call, and 16 bytes at least.
    assert python_blocks < num_calls / 50
    assert resident_pages * PAGE_BYTES < 16 * num_calls / 2 + 2**20
    assert device_bytes == 0
    assert_right(call_api(arguments), device)


def memory_in_use(device: str) -> tuple[int, int, int]:
    """Resident pages of the process, blocks that Python allocated, bytes that tensors take on the GPU."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    device_bytes = torch.cuda.memory_allocated() if device == "cuda" else 0
    return resident_pages, sys.getallocatedblocks(), device_bytes


def refuse_float32(case: Case) -> None:
    for call in (call_api, call_op):
        arguments = arguments_of(case)
        with pytest.raises(TypeError, match=r"^q must have dtype torch.bfloat16 or torch.float16, got .*[Ff]loat"):
            call(arguments)


@pytest.mark.gpu
def test_the_kernels_take_no_float32():
    refuse_float32(other_example("cuda", dtype=torch.float32))


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
def test_the_kernels_take_no_float32_without_data(monkeypatch):
    """What the CPU takes is refused while tracing for a GPU."""
    monkeypatch.setattr("flash_mla.schedule.capacity_of", lambda device: CPU_CAPACITY)
    with torch._subclasses.FakeTensorMode():
        refuse_float32(other_example("cuda", dtype=torch.float32))


@pytest.mark.parametrize("plan", ["tensors", "schedule"])
@pytest.mark.parametrize("name", ["q", "k_cache", "block_table", "cache_seqlens"])
def test_not_a_tensor(device, name, plan):
    for value in ([[1, 2]], None):
        arguments = arguments_of(example(device))
        arguments[name] = value
        if plan == "schedule":
            arguments["tile_scheduler_metadata"], arguments["num_splits"] = get_mla_metadata()
        # For what only the op looks at, torch words the message.
        with pytest.raises((TypeError, RuntimeError), match=rf"\b{name}\b"):
            call_api(arguments)


@pytest.mark.parametrize("num_heads_q", [15, 1])
def test_head_counts_that_do_not_divide(device, num_heads_q):
    arguments = arguments_of(other_example(device, num_heads_kv=2))
    arguments["q"] = arguments["q"][:, :, :num_heads_q]
    with pytest.raises(ValueError, match=rf"^q must have a multiple of the 2 heads of k_cache, got {num_heads_q}"):
        call_op(arguments)
    arguments["tile_scheduler_metadata"], arguments["num_splits"] = get_mla_metadata()
    with pytest.raises(ValueError, match=rf"^q must have a multiple of the 2 heads of k_cache, got {num_heads_q}"):
        call_api(arguments)


def test_plan_for_other_head_counts(device):
    arguments = arguments_of(example(device))
    wider = other_example(device, num_heads_q=128)
    arguments["tile_scheduler_metadata"], arguments["num_splits"] = wider.plan()
    with pytest.raises(ValueError, match=r"^tile_scheduler_metadata must have shape .*num_plan_rows"):
        call_api(arguments)


def test_plan_for_another_batch(device):
    arguments = arguments_of(example(device))
    arguments["num_splits"] = other_example(device, batch=4, seqlens=3).plan()[1]
    with pytest.raises(ValueError, match=r"^num_splits must have shape \(batch_size \+ 1,\) = \[4\], got \[5\]"):
        call_api(arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_mla_sparse_fwd", (None, None, None, 0.1)),
        ("get_mla_metadata_dense_fp8", (torch.zeros(3, dtype=torch.int32), 16, 1)),
        ("flash_mla_with_kvcache_fp8", (None, None, None, None, HEAD_DIM_V, None, None)),
    ],
)
def test_functions_that_are_not_there(name, arguments):
    with pytest.raises(NotImplementedError, match=rf"^{name} is not implemented"):
        getattr(flash_mla, name)(*arguments)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built without CUDA")
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
@pytest.mark.parametrize(
    "name", ["k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits", "out"]
)
def test_tensor_on_another_device_without_data(name, other, monkeypatch):
    """Tensors that have shapes only need no GPU, nor a second one."""
    monkeypatch.setattr("flash_mla.schedule.capacity_of", lambda device: CPU_CAPACITY)
    with torch._subclasses.FakeTensorMode():
        arguments = arguments_of(example("cuda"))
        arguments["out"] = torch.zeros(OUT_SHAPE, dtype=BF16, device="cuda")
        arguments[name] = torch.empty_like(arguments[name], device=other)
        with pytest.raises(ValueError, match=rf"^{name} must be on cuda:0, where q is, got {other}$"):
            torch.ops.flash_mla.dense_decode_out(**arguments)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "cache_seqlens", {"cache_seqlens": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "cache_seqlens", {"cache_seqlens": torch.zeros(3, 1, dtype=torch.int32)}),
        (ValueError, "cache_seqlens", {"cache_seqlens": torch.zeros(6, dtype=torch.int32)[::2]}),
        (ValueError, "cache_seqlens", {"cache_seqlens": torch.zeros(24 * 1024 + 1, dtype=torch.int32)}),
        (TypeError, "cache_seqlens", {"cache_seqlens": None}),
        (TypeError, "cache_seqlens", {"seqlens_k": torch.zeros(3, dtype=torch.int32)}),
        (ValueError, "num_rows_per_head_kv", {"num_q_tokens_per_head_k": 0}),
        (TypeError, "num_q_tokens_per_head_k", {"num_q_tokens_per_head_k": None}),
        (TypeError, "num_q_tokens_per_head_k", {"num_heads_per_head_k": 16}),
        (ValueError, "num_heads_kv", {"num_heads_k": 0}),
        (TypeError, "num_heads_k", {"num_heads_k": None}),
        (ValueError, "num_heads_q", {"num_heads_k": 3, "num_heads_q": 16}),
        (ValueError, "num_q_tokens_per_head_k", {"num_q_tokens_per_head_k": 15, "num_heads_q": 16}),
        (NotImplementedError, "is_fp8_kvcache", {"is_fp8_kvcache": True}),
        (NotImplementedError, "topk", {"topk": 2048}),
    ],
)
def test_bad_planning(device, error, name, arguments):
    good = {"cache_seqlens": torch.zeros(3, dtype=torch.int32), "num_q_tokens_per_head_k": 32, "num_heads_k": 1}
    moved = {
        key: value.to(device).as_strided(value.shape, value.stride()) if value.is_contiguous() else value
        for key, value in {**good, **arguments}.items()
        if isinstance(value, torch.Tensor)
    }
    with pytest.raises(error, match=rf"^{name}\b"):
        get_mla_decoding_metadata(**{**good, **arguments, **moved})


def test_cpu_reports_requests_that_exceed_their_table():
    """On the CPU this costs nothing, so it is always checked."""
    case = example("cpu")
    case.cache_seqlens[2] = 100_000
    with pytest.raises(ValueError, match=r"^cache_seqlens must be at most 128.*got 100000 for request 2"):
        call_op(arguments_of(case))


@pytest.mark.parametrize("name", ["q", "k_cache", "num_splits"])
def test_shapes_are_checked_without_data_too(name):
    """torch.compile finds wrong shapes while it traces."""
    arguments = arguments_of(example("cpu"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = {
            key: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for key, value in arguments.items()
        }
        arguments[name] = arguments[name][:, None]
        with pytest.raises(ValueError, match=rf"^{name} must have shape"):
            call_op(arguments)
