"""The short cut of the eager path: taken where nothing but the kernel would see a call, and with the same results."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import HEAD_DIM_V, Case, make_case
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_mla import extension, flash_mla_with_kvcache, get_mla_metadata, ops, plan

Arguments = tuple[Any, ...]


class Subclass(torch.Tensor):
    pass


class Recorder(TorchDispatchMode):
    """The ops that a mode sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def case() -> Case:
    return make_case(batch=3, seqlen_q=2, seqlens=[300, 0, 70], causal=True, device="cuda")


def requiring_gradients(arguments: Arguments) -> Arguments:
    q, *others = arguments
    return (q.clone().requires_grad_(), *others)


NOT_PLAIN: dict[str, Callable[[Arguments], Arguments]] = {
    "q that requires gradients": requiring_gradients,
    "q of a subclass": lambda arguments: (arguments[0].as_subclass(Subclass), *arguments[1:]),
    "negated view": lambda arguments: (torch._neg_view(arguments[0]), *arguments[1:]),
    "q on the CPU": lambda arguments: (arguments[0].cpu(), *arguments[1:]),
    "lengths on the CPU": lambda arguments: (*arguments[:3], arguments[3].cpu(), *arguments[4:]),
    "None for a tensor": lambda arguments: (*arguments[:5], None, *arguments[6:]),
    "list for a tensor": lambda arguments: (*arguments[:3], [300, 0, 70], *arguments[4:]),
    "integer as scale": lambda arguments: (*arguments[:6], 1, *arguments[7:]),
    "integer for causal": lambda arguments: (*arguments[:7], 1, arguments[8]),
    "integer for batch_invariant": lambda arguments: (*arguments[:8], 1),
}
CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cuda"),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "dispatch mode": Recorder,
    "function mode": TorchFunctionMode,
    "functorch": lambda: torch._functorch.eager_transforms.grad_increment_nesting(),
}


@pytest.mark.gpu
@pytest.mark.parametrize("with_out", [False, True], ids=["new-out", "given-out"])
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_plain_calls_give_the_bits_of_the_op(case, with_out, context):
    arguments = case.op_arguments()
    expected = torch.ops.flash_mla.dense_decode(*arguments)
    out = torch.empty_like(expected[0]) if with_out else None
    with context():
        actual = ops.dense_decode_plain(*arguments, out)
    assert actual is not None
    assert out is None or actual[0] is out
    for actual_part, expected_part in zip(actual, expected, strict=True):
        assert torch.equal(actual_part, expected_part)


@pytest.mark.gpu
@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_arguments_out_of_the_ordinary_are_for_the_dispatcher(case, change):
    assert ops.dense_decode_plain(*change(case.op_arguments()), None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
def test_what_watches_ops_gets_to_see_them(case, context):
    arguments = case.op_arguments()
    with context():
        assert ops.dense_decode_plain(*arguments, None) is None
    assert ops.dense_decode_plain(*arguments, None) is not None


@pytest.mark.gpu
def test_out_that_requires_gradients_is_for_the_dispatcher(case):
    out = torch.empty(3, 2, 16, HEAD_DIM_V, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    assert ops.dense_decode_plain(*case.op_arguments(), out) is None
    with torch.no_grad():
        assert ops.dense_decode_plain(*case.op_arguments(), out) is not None


@pytest.mark.gpu
def test_mode_sees_the_call_of_the_public_function(case):
    tensors = (case.q, case.k_cache, case.block_table, case.cache_seqlens)
    with Recorder() as recorder:
        flash_mla_with_kvcache(*tensors, HEAD_DIM_V, *get_mla_metadata())
    assert recorder.seen == [ops.decode_schedule, ops.dense_decode]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 16, 1), (3, 128, 1), (2, 8, 4)], ids=str)
def test_plain_calls_are_described_as_others_are(shape):
    seqlen_q, num_heads_q, num_heads_kv = shape
    case = make_case(batch=2, seqlen_q=seqlen_q, num_heads_q=num_heads_q, num_heads_kv=num_heads_kv, device="cuda")
    described = plan.describe_call(case.q.as_subclass(Subclass), case.k_cache, is_compiling=False)
    assert ops.describe_plain_call(case.q, case.k_cache) == described == (2, case.num_rows_per_head_kv, shape[2], False)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        in_capture = ops.describe_plain_call(case.q, case.k_cache)
        torch.empty_like(case.q)
    assert in_capture == (*described[:3], True)


def test_calls_on_the_cpu_are_not_plain():
    case = make_case(batch=3, seqlens=[300, 0, 70])
    assert ops.dense_decode_plain(*case.op_arguments(), None) is None
    assert ops.describe_plain_call(case.q, case.k_cache) is None
    assert ops.describe_plain_call(case.q, case.k_cache[0]) is None
    assert ops.describe_plain_call(None, case.k_cache) is None


def test_number_of_arguments_is_checked():
    module = extension.load_extension().module
    if not hasattr(module, "dense_decode_plain"):
        pytest.skip(f"needs the built kernels: {extension.unavailable_reason()}")
    with pytest.raises(TypeError, match="dense_decode_plain needs 10 arguments, got 0"):
        module.dense_decode_plain()
    with pytest.raises(TypeError, match="describe_plain_call needs 2 arguments, got 1"):
        module.describe_plain_call(None)
