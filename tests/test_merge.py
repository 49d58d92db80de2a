"""merge_attention_states: shards of the keys give what all keys give, and shards without keys give nothing."""

from __future__ import annotations

import inspect
import math
import random
import shutil

import pytest
import torch
from cases import PAGE_SIZE, Case, make_case
from reference import LSE_ATOL, LSE_RTOL, assert_close, reference
from torch import Tensor

import flash_mla
from flash_mla import merge_attention_states

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INF, NAN = float("inf"), float("nan")
DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
EMPTY = pytest.mark.parametrize("empty", [INF, -INF], ids=["+inf", "-inf"])
# Half a unit in the last place of 8, 11 and 24 bits, as a part of the smallest value that has it; some for the sums.
ROUNDING = {BF16: 2**-8 * 1.001, FP16: 2**-11 * 1.001, FP32: 2**-21}


def make_shards(
    num_shards: int,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
    shape: tuple[int, int, int, int] = (3, 2, 5, 16),
    spread: float = 2.0,
    seed: int = 0,
) -> tuple[list[Tensor], list[Tensor]]:
    """Random results; the LSEs have this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, seqlen_q, num_heads_q, _ = shape
    outs = torch.randn(num_shards, *shape, generator=generator).to(device, dtype)
    lses = torch.randn(num_shards, batch_size, num_heads_q, seqlen_q, generator=generator).mul(spread).to(device)
    return list(outs), list(lses)


def merge_in_float64(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """By torch.logsumexp and torch.softmax, for shards that all have keys."""
    stacked = torch.stack(lses).double()
    lse = stacked.logsumexp(0)
    weights = stacked.softmax(0).transpose(2, 3)[..., None]
    return (weights * torch.stack(outs).double()).sum(0), lse


def check_against_float64(outs: list[Tensor], lses: list[Tensor]) -> None:
    out, lse = merge_attention_states(outs, lses)
    assert out.dtype == outs[0].dtype and lse.dtype == FP32
    assert out.shape == outs[0].shape and lse.shape == lses[0].shape
    assert out.is_contiguous() and lse.is_contiguous()
    expected_out, expected_lse = merge_in_float64(outs, lses)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=LSE_RTOL, atol=LSE_ATOL)
    # The sums are off by float32 roundings of their terms, which may cancel; float16 has a smallest step besides.
    torch.testing.assert_close(out.double(), expected_out, rtol=ROUNDING[out.dtype], atol=2e-6)


def decode_pages(case: Case, table: list[list[int]], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The case with other pages: rows of the block table that need not have the same number of them."""
    columns = max(1, *map(len, table))
    block_table = torch.tensor([row + [-1] * (columns - len(row)) for row in table], dtype=torch.int32)
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    shard = Case(
        case.q, case.k_cache, block_table.to(case.q.device), seqlens.to(case.q.device), case.softmax_scale, False
    )
    return torch.ops.flash_mla.dense_decode(*shard.op_arguments())


def decode_shards(case: Case, num_shards: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Decode each shard's pages by themselves; every page of a request falls to a random shard."""
    chance = random.Random(seed)
    tables: list[list[list[int]]] = [[] for _ in range(num_shards)]
    lengths: list[list[int]] = [[] for _ in range(num_shards)]
    for request, length in enumerate(case.cache_seqlens.tolist()):
        num_pages = math.ceil(length / PAGE_SIZE)
        owners = [chance.randrange(num_shards) for _ in range(num_pages)]
        pages = case.block_table[request, :num_pages].tolist()
        for shard in range(num_shards):
            own = [index for index in range(num_pages) if owners[index] == shard]
            tables[shard].append([pages[index] for index in own])
            lengths[shard].append(sum(min(PAGE_SIZE, length - index * PAGE_SIZE) for index in own))
    outs, lses = zip(*map(decode_pages, [case] * num_shards, tables, lengths), strict=True)
    return list(outs), list(lses)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize("seqlen_q", [1, 3])
def test_equals_decoding_all_pages_at_once(device, num_shards, seqlen_q, dtype):
    seqlens = [0, 1, 64, 65, 700, 1500]
    case = make_case(batch=6, seqlen_q=seqlen_q, seqlens=seqlens, dtype=dtype, device=device)
    at_once = torch.ops.flash_mla.dense_decode(*case.op_arguments())
    for seed in range(3):
        outs, lses = decode_shards(case, num_shards, seed)
        # The first request has no keys anywhere, the second has one in a single shard.
        assert sum(int(lse[1].isfinite().all()) for lse in lses) == 1
        merged = merge_attention_states(outs, lses)
        assert_close(*merged, *reference(case))
        assert_close(*merged, at_once[0].double(), at_once[1].double())


def test_order_of_shards_is_the_order_of_sums(device):
    outs, lses = make_shards(7, device=device)
    first, again = merge_attention_states(outs, lses), merge_attention_states(outs, lses)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    backwards = merge_attention_states(outs[::-1], lses[::-1])
    assert not torch.equal(first[0], backwards[0])
    torch.testing.assert_close(first[0], backwards[0])


@DTYPES
@pytest.mark.parametrize("num_shards", [1, 2, 5, 64])
@pytest.mark.parametrize("spread", [0.0, 2.0, 30.0])
def test_against_float64(device, num_shards, dtype, spread):
    check_against_float64(*make_shards(num_shards, dtype, device, spread=spread))


@DTYPES
@pytest.mark.parametrize("offset", [-1000.0, -90.0, 90.0, 1000.0, 1e30])
def test_large_log_sum_exps(device, dtype, offset):
    """exp of them would overflow or vanish."""
    outs, lses = make_shards(3, dtype, device)
    check_against_float64(outs, [lse + offset for lse in lses])


@DTYPES
@pytest.mark.parametrize("difference", [-1000.0, 1000.0, -3e38, 3e38])
def test_one_shard_outweighs_the_other(device, dtype, difference):
    outs, lses = make_shards(2, dtype, device)
    lses[1] = lses[1] + difference
    winner = int(difference > 0)
    out, lse = merge_attention_states(outs, lses)
    assert torch.equal(out, outs[winner]) and torch.equal(lse, lses[winner])


def test_largest_finite_values_do_not_overflow(device):
    for dtype in (BF16, FP16):
        out = torch.full((1, 1, 1, 8), torch.finfo(dtype).max, dtype=dtype, device=device)
        lses = torch.tensor([3e38, -3e38, 3e38], device=device).view(3, 1, 1, 1)
        merged, lse = merge_attention_states([out] * 3, lses)
        assert torch.equal(merged, out) and lse.isfinite().all()


@EMPTY
@DTYPES
@pytest.mark.parametrize("content", [0.0, NAN, INF, -7.0])
def test_empty_shards_change_nothing(device, dtype, content, empty):
    """Not even a bit, wherever among the others they are, and whatever their output holds."""
    outs, lses = make_shards(3, dtype, device)
    expected = merge_attention_states(outs, lses)
    for place in range(4):
        out, lse = torch.full_like(outs[0], content), torch.full_like(lses[0], empty)
        merged = merge_attention_states([*outs[:place], out, *outs[place:]], [*lses[:place], lse, *lses[place:]])
        assert torch.equal(merged[0], expected[0]) and torch.equal(merged[1], expected[1])


def test_rows_are_empty_one_by_one(device):
    """In each row other shards are without keys, of both conventions at once."""
    outs, lses = make_shards(4, device=device)
    expected_outs, expected_lses = merge_attention_states(outs, lses)
    generator = torch.Generator().manual_seed(1)
    kind = torch.randint(0, 4, (4, *lses[0].shape), generator=generator)
    kind[:, 0, 0] = 2  # a row without keys
    kind = kind.to(device)
    for shard in range(4):
        lses[shard] = lses[shard].where(kind[shard] != 2, INF).where(kind[shard] != 3, -INF)
        outs[shard] = outs[shard].where((kind[shard] < 2).transpose(1, 2)[..., None], NAN)
    out, lse = merge_attention_states(outs, lses)
    batch_size, num_heads_q, seqlen_q = lse.shape
    for request in range(batch_size):
        for head in range(num_heads_q):
            for query in range(seqlen_q):
                seen = [shard for shard in range(4) if kind[shard, request, head, query] < 2]
                row, row_lse = out[request, query, head], lse[request, head, query]
                if not seen:
                    assert (row == 0).all() and row_lse == INF
                    continue
                row_outs = [outs[shard][request, query, head][None, None, None] for shard in seen]
                row_lses = [lses[shard][request, head, query][None, None, None] for shard in seen]
                alone, alone_lse = merge_attention_states(row_outs, row_lses)
                torch.testing.assert_close(row, alone[0, 0, 0], rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(row_lse, alone_lse[0, 0, 0], rtol=1e-6, atol=1e-6)
    all_seen = (kind < 2).all(0)
    torch.testing.assert_close(lse[all_seen], expected_lses[all_seen])
    assert all_seen.any() and expected_outs.isfinite().all()


@DTYPES
@pytest.mark.parametrize("lses", [[INF], [-INF], [INF, INF], [-INF, -INF], [INF, -INF, INF]], ids=str)
def test_no_shard_has_keys(device, dtype, lses):
    outs = [torch.full((2, 1, 3, 8), NAN, dtype=dtype, device=device) for _ in lses]
    out, lse = merge_attention_states(outs, [torch.full((2, 3, 1), value, device=device) for value in lses])
    assert out.dtype == dtype and torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, INF))


@EMPTY
@DTYPES
def test_one_shard_with_keys_is_returned_bit_for_bit(device, dtype, empty):
    (out,), (lse,) = make_shards(1, dtype, device)
    nothing, none = torch.full_like(out, NAN), torch.full_like(lse, empty)
    for outs, lses in (([out], [lse]), ([nothing, out, nothing], [none, lse, none])):
        merged = merge_attention_states(outs, lses)
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
        assert merged[0].data_ptr() != out.data_ptr() and merged[1].data_ptr() != lse.data_ptr()


def test_nan_of_a_shard_with_keys_is_not_hidden(device):
    outs, lses = make_shards(2, device=device)
    outs[0][0, 0, 0, 0] = NAN
    lses[1][1, 0, 0] = NAN
    out, lse = merge_attention_states(outs, lses)
    assert out[0, 0, 0, 0].isnan() and out[1, 0, 0].isnan().all() and lse[1, 0, 0].isnan()
    assert int(out.isnan().sum()) == 1 + out.shape[3] and int(lse.isnan().sum()) == 1


def test_merging_in_steps(device):
    """A merged result is a shard: a tree of merges gives what one merge gives, empty rows included."""
    outs, lses = make_shards(4, device=device)
    for shard in range(3):
        lses[shard][0] = INF
    for shard in range(4):
        lses[shard][1] = -INF
    left, right = (merge_attention_states(outs[half], lses[half]) for half in (slice(2), slice(2, 4)))
    actual = merge_attention_states([left[0], right[0]], [left[1], right[1]])
    for part, expected in zip(actual, merge_attention_states(outs, lses), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)


def test_tensors_lists_and_tuples(device):
    outs, lses = make_shards(3, BF16, device)
    expected = merge_attention_states(outs, lses)
    for given_outs in (torch.stack(outs), tuple(outs), outs):
        for given_lses in (torch.stack(lses), tuple(lses), lses):
            merged = merge_attention_states(given_outs, given_lses)
            assert torch.equal(merged[0], expected[0]) and torch.equal(merged[1], expected[1])


def test_strides_do_not_matter_and_arguments_stay_as_they_are(device):
    outs, lses = make_shards(3, BF16, device)
    lses[2][0] = INF
    kept = [tensor.clone() for tensor in (*outs, *lses)]
    strided_outs = [out.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for out in outs]
    strided_lses = [lse.transpose(0, 2).contiguous().transpose(0, 2) for lse in lses]
    merged, expected = merge_attention_states(strided_outs, strided_lses), merge_attention_states(outs, lses)
    for actual, wanted in zip(merged, expected, strict=True):
        assert actual.is_contiguous() and torch.equal(actual, wanted)
    assert all(torch.equal(now, before) for now, before in zip((*outs, *lses), kept, strict=True))


@pytest.mark.parametrize("shape", [(0, 1, 16, 512), (2, 0, 16, 512), (2, 1, 0, 512)], ids=str)
def test_no_rows(device, shape):
    outs, lses = make_shards(2, BF16, device, shape)
    out, lse = merge_attention_states(outs, lses)
    assert out.shape == shape and lse.shape == (shape[0], shape[2], shape[1])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, None, True], ids=["static", "automatic", "dynamic"])
def test_compile_without_graph_breaks(device, dynamic):
    compiled = torch.compile(merge_attention_states, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((3, 1, 16, 64), (5, 1, 16, 64), (5, 2, 8, 64)):
        outs, lses = make_shards(3, BF16, device, shape)
        lses[1][0], lses[2][0], lses[0][1] = INF, -INF, -INF
        for given in ((outs, lses), (torch.stack(outs), torch.stack(lses))):
            for actual, expected in zip(compiled(*given), merge_attention_states(*given), strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found (c++)")
def test_compile_with_the_default_backend():
    outs, lses = make_shards(3, BF16)
    lses[1][0], lses[2][0] = INF, -INF
    for lse in lses:
        lse[1] = INF
    outs[1][0] = NAN
    out, lse = torch.compile(merge_attention_states, fullgraph=True)(outs, lses)
    expected_out, expected_lse = merge_attention_states(outs, lses)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("device_of_shards", ["cpu", "cuda", "meta"])
def test_without_data(device_of_shards):
    if device_of_shards == "cuda" and not torch.backends.cuda.is_built():
        pytest.skip("torch was built without CUDA")
    with torch._subclasses.FakeTensorMode():
        outs = torch.empty(4, 3, 2, 16, 512, dtype=FP16, device=device_of_shards)
        lses = torch.empty(4, 3, 16, 2, device=device_of_shards)
        out, lse = merge_attention_states(outs, lses)
    assert (out.shape, out.dtype, out.device.type) == ((3, 2, 16, 512), FP16, device_of_shards)
    assert (lse.shape, lse.dtype, lse.device.type) == ((3, 16, 2), FP32, device_of_shards)
    assert out.is_contiguous() and lse.is_contiguous()


def second(spoil):
    """The shards with the second spoilt."""
    return lambda shards: [shards[0], spoil(shards[1]), *shards[2:]]


BAD_INPUT = {
    "outs-none": ("outs", TypeError, "outs must be a list .*, got NoneType", lambda outs: None),
    "outs-generator": ("outs", TypeError, "outs must be a list .*, got generator", lambda outs: (o for o in outs)),
    "outs-no-shards": ("outs", ValueError, "outs must have at least one shard, got none", lambda outs: []),
    "outs-stack-of-none": ("outs", ValueError, "outs must have at least one", lambda outs: torch.stack(outs)[:0]),
    "outs-single": (
        "outs",
        ValueError,
        r"outs must have shape \(num_shards, batch_size, .*, got",
        lambda outs: outs[0],
    ),
    "outs-not-a-tensor": ("outs", TypeError, r"outs\[1\] must be a torch.Tensor, got list", second(Tensor.tolist)),
    "outs-float64": (
        "outs",
        TypeError,
        r"outs\[0\] must have dtype .*, got torch.float64",
        lambda outs: [outs[0].double()] * 3,
    ),
    "outs-int32": (
        "outs",
        TypeError,
        r"outs\[0\] must have dtype .*, got torch.int32",
        lambda outs: [outs[0].int()] * 3,
    ),
    "outs-mixed-dtypes": (
        "outs",
        TypeError,
        r"outs\[1\] must have dtype torch.bfloat16, got torch.float16",
        second(Tensor.half),
    ),
    "outs-dim": (
        "outs",
        ValueError,
        r"outs\[0\] must have shape \(batch_size, .*, got",
        lambda outs: [o[0] for o in outs],
    ),
    "outs-batch": (
        "outs",
        ValueError,
        r"outs\[1\] must have shape .* = \[3, 2, 5, 16\], got \[2, ",
        second(lambda o: o[:2]),
    ),
    "outs-head-dim": (
        "outs",
        ValueError,
        r"outs\[1\] must have shape .*, got \[3, 2, 5, 8\]",
        second(lambda o: o[..., :8]),
    ),
    "outs-device": (
        "outs",
        ValueError,
        r"outs\[1\] must be on .*, where outs\[0\] is, got meta",
        second(lambda o: o.to("meta")),
    ),
    "lses-none": ("lses", TypeError, "lses must be a list .*, got NoneType", lambda lses: None),
    "lses-dict": ("lses", TypeError, "lses must be a list .*, got dict", lambda lses: dict(enumerate(lses))),
    "lses-no-shards": ("lses", ValueError, "lses must have at least one shard, got none", lambda lses: ()),
    "lses-single": (
        "lses",
        ValueError,
        r"lses must have shape \(num_shards, batch_size, .*, got",
        lambda lses: lses[0],
    ),
    "lses-count": ("lses", ValueError, "lses must have as many shards as outs = 3, got 2", lambda lses: lses[:2]),
    "lses-stacked-count": ("lses", ValueError, "lses must have as many .*, got 2", lambda lses: torch.stack(lses)[:2]),
    "lses-not-a-tensor": (
        "lses",
        TypeError,
        r"lses\[1\] must be a torch.Tensor, got NoneType",
        second(lambda lse: None),
    ),
    "lses-bf16": (
        "lses",
        TypeError,
        r"lses\[1\] must have dtype torch.float32, got torch.bfloat16",
        second(Tensor.bfloat16),
    ),
    "lses-float64": (
        "lses",
        TypeError,
        r"lses\[0\] must have dtype .*, got torch.float64",
        lambda lses: [x.double() for x in lses],
    ),
    "lses-order": (
        "lses",
        ValueError,
        r"lses\[1\] must have shape .* = \[3, 5, 2\], got \[3, 2, 5\]",
        second(lambda x: x.mT),
    ),
    "lses-dim": (
        "lses",
        ValueError,
        r"lses\[1\] must have shape .*, got \[3, 10\]",
        second(lambda lse: lse.flatten(1)),
    ),
    "lses-batch": ("lses", ValueError, r"lses\[1\] must have shape .*, got \[1, 5, 2\]", second(lambda lse: lse[:1])),
    "lses-device": (
        "lses",
        ValueError,
        r"lses\[1\] must be on .*, where outs\[0\] is, got meta",
        second(lambda x: x.to("meta")),
    ),
}


@pytest.mark.parametrize(("name", "error", "message", "spoil"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(device, name, error, message, spoil):
    outs, lses = make_shards(3, BF16, device)
    arguments = {"outs": outs, "lses": lses}
    arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=f"^{message}"):
        merge_attention_states(**arguments)


def test_it_is_public():
    assert "merge_attention_states" in flash_mla.__all__
    assert list(inspect.signature(merge_attention_states).parameters) == ["outs", "lses"]
