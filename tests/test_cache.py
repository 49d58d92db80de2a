"""flash_mla/cache.py against simple loops, in caches that hold NaN wherever no token is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, INVALID_PAGES, PAGE_SIZE, make_case
from torch import Tensor

from flash_mla import (
    append_mla_kv,
    bytes_per_token,
    extension,
    flash_mla_with_kvcache,
    gather_mla_kv,
    get_mla_metadata,
    max_cached_tokens,
    mha_bytes_per_token,
    value_checks,
)

CAPACITY_PAGE = Path(__file__).resolve().parents[1] / "docs" / "capacity.md"
NUM_BLOCKS = 6
BF16 = torch.bfloat16

# Consecutive slots, slots in any order, both ends of the cache; tokens skipped at the begin, inside, at the end.
SLOTS = {
    "none-skipped": [64, 65, 66, 67, 68],
    "scattered": [300, 7, 64 * 6 - 1, 0, 129],
    "first-skipped": [-1, -1, 200, 5],
    "some-skipped": [-1, 63, -1, 64, -7, 0, -1],
    "last-skipped": [130, 2, -1],
    "slot-0-and-skipped": [-1, 0, -1],
    "all-skipped": [-1, -1, -(2**31)],
    "one": [77],
    "one-skipped": [-1],
    "empty": [],
}


def make_storage(layout: str, dtype: torch.dtype = BF16, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """NaN, and the cache as a view of it."""

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)

    if layout == "contiguous":
        storage = nan(NUM_BLOCKS, PAGE_SIZE, 1, HEAD_DIM)
        return storage, storage
    if layout == "layers":  # one of the layers of a cache that has them side by side in every page
        storage = nan(NUM_BLOCKS, 3, PAGE_SIZE, 1, HEAD_DIM)
        return storage, storage[:, 1]
    if layout == "gaps":  # between tokens and pages, and in front
        storage = nan(NUM_BLOCKS + 1, PAGE_SIZE + 2, 1, HEAD_DIM + 80)
        return storage, storage[1:, 1:-1, :, 8 : 8 + HEAD_DIM]
    if layout == "odd-rows":  # not at multiples of 16 bytes
        storage = nan(NUM_BLOCKS, PAGE_SIZE, 1, HEAD_DIM + 1)
        return storage, storage[..., 1:]
    if layout == "odd-address":
        storage = nan(NUM_BLOCKS * PAGE_SIZE * HEAD_DIM + 1)
        return storage, storage[1:].view(NUM_BLOCKS, PAGE_SIZE, 1, HEAD_DIM)
    if layout == "columns-apart":
        storage = nan(NUM_BLOCKS, PAGE_SIZE, 1, HEAD_DIM, 2)
        return storage, storage[..., 1]
    assert layout == "rows-first"  # tokens further apart than pages
    storage = nan(PAGE_SIZE, NUM_BLOCKS, 1, HEAD_DIM)
    return storage, storage.transpose(0, 1)


LAYOUTS = ["contiguous", "layers", "gaps", "rows-first"]
# The decode does not take these; they are written element by element.
ODD_LAYOUTS = ["odd-rows", "odd-address", "columns-apart"]


def fill(cache: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    cache.copy_(torch.randn(cache.shape, generator=generator))


def make_tokens(num_tokens: int, dtype: torch.dtype = BF16, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(num_tokens, HEAD_DIM, generator=generator).to(dtype).to(device)
    return tokens[:, :HEAD_DIM_V], tokens[:, HEAD_DIM_V:]


def append_in_a_loop(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slots: list[int]) -> None:
    for token, slot in enumerate(slots):
        if slot >= 0:
            entry = cache[slot // PAGE_SIZE, slot % PAGE_SIZE, 0]
            entry[:HEAD_DIM_V] = kv_c[token]
            entry[HEAD_DIM_V:] = k_pe[token].flatten()


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    return actual.dtype == expected.dtype and torch.equal(actual.view(integer), expected.view(integer))


def check_append(append, layout: str, slots: list[int], slot_dtype: torch.dtype, device: str, **options) -> None:
    """Against the loop, gaps included; once into NaN and once into other tokens."""
    dtype = options.get("dtype", BF16)
    kv_c, k_pe = make_tokens(len(slots), dtype, device)
    if options.get("k_pe_dim") == 3:
        k_pe = k_pe[:, None]
    slot_mapping = torch.tensor(slots, dtype=slot_dtype, device=device)
    for is_filled in (False, True):
        storage, cache = make_storage(layout, dtype, device)
        expected_storage, expected_cache = make_storage(layout, dtype, device)
        if is_filled:
            fill(cache)
            fill(expected_cache)
        append_in_a_loop(kv_c, k_pe, expected_cache, slots)
        assert append(kv_c, k_pe, cache, slot_mapping) is None
        assert same_bits(storage, expected_storage)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("layout", [*LAYOUTS, *ODD_LAYOUTS])
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
def test_append_equals_a_loop(device, slots, layout, slot_dtype):
    check_append(append_mla_kv, layout, slots, slot_dtype, device)


@pytest.mark.parametrize("k_pe_dim", [2, 3])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("layout", ["gaps", "odd-rows"])
def test_append_dtypes_and_shapes_of_k_pe(device, layout, dtype, k_pe_dim):
    check_append(append_mla_kv, layout, SLOTS["some-skipped"], torch.int64, device, dtype=dtype, k_pe_dim=k_pe_dim)


def spread(tensor: Tensor, how: str) -> Tensor:
    """The same values in other places."""
    num_tokens, dim = tensor.shape
    if how == "odd-rows":
        return tensor.new_empty(num_tokens, dim + 1)[:, 1:].copy_(tensor)
    if how == "odd-address":
        return tensor.new_empty(num_tokens * dim + 1)[1:].view(num_tokens, dim).copy_(tensor)
    if how == "columns-apart":
        return tensor.new_empty(num_tokens, dim, 2)[..., 1].copy_(tensor)
    if how == "columns-first":
        return tensor.t().contiguous().t()
    assert how == "rows-of-their-own"
    return tensor.contiguous()


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("how", ["odd-rows", "odd-address", "columns-apart", "columns-first", "rows-of-their-own"])
@pytest.mark.parametrize("which", ["kv_c", "k_pe", "both"])
def test_append_takes_tokens_from_anywhere(device, which, how, dtype):
    slots = [70, -1, 3, 64 * 6 - 1, 128]
    kv_c, k_pe = make_tokens(len(slots), dtype, device)
    spread_kv_c = kv_c if which == "k_pe" else spread(kv_c, how)
    spread_k_pe = k_pe if which == "kv_c" else spread(k_pe, how)
    _, cache = make_storage("contiguous", dtype, device)
    _, expected = make_storage("contiguous", dtype, device)
    append_mla_kv(spread_kv_c, spread_k_pe, cache, torch.tensor(slots, device=device))
    append_in_a_loop(kv_c, k_pe, expected, slots)
    assert same_bits(cache, expected)


def test_append_repeats_one_token(device):
    """Tokens that are all in one place: a stride of 0."""
    kv_c, k_pe = make_tokens(1, device=device)
    slots = [5, -1, 200, 64]
    _, cache = make_storage("contiguous", device=device)
    _, expected = make_storage("contiguous", device=device)
    kv_c, k_pe = kv_c.expand(len(slots), -1), k_pe.expand(len(slots), -1)
    append_mla_kv(kv_c, k_pe, cache, torch.tensor(slots, device=device))
    append_in_a_loop(kv_c, k_pe, expected, slots)
    assert same_bits(cache, expected)


@pytest.mark.parametrize("num_tokens", [3, 4, 5, 255, 8192])
def test_append_many(device, num_tokens):
    """Whole and broken groups of tokens, in pages in any order; every seventh is skipped."""
    num_blocks = 160
    kv_c, k_pe = make_tokens(num_tokens, device=device)
    slots = torch.randperm(num_blocks * PAGE_SIZE, generator=torch.Generator().manual_seed(3))[:num_tokens]
    slots[::7] = -1
    slots = slots.to(device)
    cache = torch.full((num_blocks, PAGE_SIZE, 1, HEAD_DIM), float("nan"), dtype=BF16, device=device)
    expected = cache.clone().view(-1, HEAD_DIM)
    expected[slots[slots >= 0]] = torch.cat([kv_c, k_pe], dim=1)[slots >= 0]
    append_mla_kv(kv_c, k_pe, cache, slots)
    assert same_bits(cache.view(-1, HEAD_DIM), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_unchecked_slots_behind_the_end_are_not_written(slot_dtype, monkeypatch):
    monkeypatch.setattr(value_checks, "ENABLED", False)
    end = NUM_BLOCKS * PAGE_SIZE
    slots = [end, 3, end + 64, torch.iinfo(slot_dtype).max, end - 1]
    kv_c, k_pe = make_tokens(len(slots), device="cuda")
    storage = torch.full((2 * NUM_BLOCKS, PAGE_SIZE, 1, HEAD_DIM), float("nan"), dtype=BF16, device="cuda")
    expected = storage.clone()
    append_mla_kv(kv_c, k_pe, storage[:NUM_BLOCKS], torch.tensor(slots, dtype=slot_dtype, device="cuda"))
    append_in_a_loop(kv_c, k_pe, expected, [slot if slot < end else -1 for slot in slots])
    assert same_bits(storage, expected)


@pytest.mark.gpu
def test_slots_on_a_gpu_are_checked_on_demand(monkeypatch):
    monkeypatch.setattr(value_checks, "ENABLED", True)
    arguments = append_arguments("cuda")
    arguments["slot_mapping"] = torch.tensor([383, 384, -1], device="cuda")
    with pytest.raises(ValueError, match=r"^slot_mapping must hold slots less than 384 .*, got 384 for token 1$"):
        append_mla_kv(**arguments)
    assert torch.isnan(arguments["cache"]).all()


def test_append_takes_strided_tokens_and_slots(device):
    kv_c, k_pe = make_tokens(6, device=device)
    slots = torch.tensor([3, 9, -1, 9, 70, 9], device=device)[::2]
    _, cache = make_storage("contiguous", device=device)
    _, expected = make_storage("contiguous", device=device)
    append_mla_kv(kv_c[::2], k_pe[::2], cache, slots)
    append_in_a_loop(kv_c[::2], k_pe[::2], expected, slots.tolist())
    assert same_bits(cache, expected)


def test_append_ignores_what_skipped_tokens_hold(device):
    kv_c, k_pe = make_tokens(3, device=device)
    kv_c[0], k_pe[2] = float("nan"), float("inf")
    _, cache = make_storage("contiguous", device=device)
    fill(cache)
    before = cache.clone()
    append_mla_kv(kv_c, k_pe, cache, torch.tensor([-1, 64, -1], device=device))
    assert torch.equal(cache[1, 0, 0], torch.cat([kv_c[1], k_pe[1]]))
    cache[1, 0] = before[1, 0]
    assert torch.equal(cache, before)


def test_append_to_a_cache_without_pages(device):
    kv_c, k_pe = make_tokens(2, device=device)
    cache = torch.empty(0, PAGE_SIZE, 1, HEAD_DIM, dtype=BF16, device=device)
    append_mla_kv(kv_c, k_pe, cache, torch.tensor([-1, -1], device=device))


def test_append_takes_no_part_in_autograd(device):
    kv_c, k_pe = make_tokens(2, device=device)
    kv_c.requires_grad_()
    _, cache = make_storage("contiguous", device=device)
    append_mla_kv(kv_c, k_pe, cache, torch.tensor([0, 1], device=device))
    assert not cache.requires_grad


def gather_in_a_loop(cache: Tensor, block_table: Tensor, lengths: list[int], max_seqlen: int) -> Tensor:
    out = torch.zeros(len(lengths), max_seqlen, HEAD_DIM, dtype=cache.dtype, device=cache.device)
    for request, length in enumerate(lengths):
        for position in range(min(length, max_seqlen)):
            page = int(block_table[request, position // PAGE_SIZE])
            out[request, position] = cache[page, position % PAGE_SIZE, 0]
    return out


LENGTHS = [100, 0, 64, 1, 65, -3, 128, 63]


def gather_case(device: str, **options):
    return make_case(batch=len(LENGTHS), seqlens=LENGTHS, device=device, **options)


@pytest.mark.parametrize("max_seqlen", [0, 1, 64, 65, 128, 200])
@pytest.mark.parametrize("invalid_page", INVALID_PAGES)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
def test_gather_equals_a_loop(device, strided, invalid_page, max_seqlen):
    case = gather_case(device, strided_cache=strided, invalid_page=invalid_page, wide_block_table=strided)
    tokens = gather_mla_kv(case.k_cache, case.block_table, case.cache_seqlens, max_seqlen)
    assert tokens.dtype == BF16
    assert torch.equal(tokens, gather_in_a_loop(case.k_cache, case.block_table, LENGTHS, max_seqlen))
    assert torch.isfinite(tokens).all()


def test_gather_from_nothing(device):
    case = gather_case(device)
    nobody = gather_mla_kv(case.k_cache, case.block_table[:0], case.cache_seqlens[:0], 5)
    assert nobody.shape == (0, 5, HEAD_DIM)
    no_tokens = torch.zeros_like(case.cache_seqlens)
    for cache, block_table in ((case.k_cache[:0], case.block_table), (case.k_cache, case.block_table[:, :0])):
        tokens = gather_mla_kv(cache, block_table, no_tokens, 5)
        assert tokens.shape == (len(LENGTHS), 5, HEAD_DIM) and (tokens == 0).all()


def test_gather_is_stopped_by_the_end_of_an_unchecked_table(device, monkeypatch):
    monkeypatch.setattr(value_checks, "are_wanted_for", lambda tensor: False)
    case = make_case(batch=1, seqlens=100, device=device, wide_block_table=False)
    tokens = gather_mla_kv(case.k_cache, case.block_table[:, :1], case.cache_seqlens, 120)
    assert torch.equal(tokens[:, :64], gather_mla_kv(case.k_cache, case.block_table, case.cache_seqlens, 64))
    assert (tokens[:, 64:] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_gather_and_decode(device, layout):
    """Tokens that arrive bit by bit give what a cache gives that held them from the beginning."""
    lengths = [70, 3, 0, 130]
    case = make_case(batch=4, num_heads_q=16, seqlens=lengths, device=device, spare_pages=0)
    num_pages = case.k_cache.shape[0]
    assert num_pages <= NUM_BLOCKS + 1
    tokens = gather_mla_kv(case.k_cache, case.block_table, case.cache_seqlens, max(lengths))
    # All pages one lower: page 0 of the case is unused.
    block_table = torch.where(case.block_table > 0, case.block_table - 1, INVALID_PAGES[1])
    _, cache = make_storage(layout, device=device)
    position = torch.arange(max(lengths), device=device)
    for begin in range(0, max(lengths), 48):
        now = position[begin : begin + 48].expand(len(lengths), -1)
        page = block_table.gather(1, (now // PAGE_SIZE).clamp(max=block_table.shape[1] - 1)).long()
        slots = torch.where(now < case.cache_seqlens[:, None], page * PAGE_SIZE + now % PAGE_SIZE, -1)
        new = tokens[:, begin : begin + 48].flatten(0, 1)
        append_mla_kv(new[:, :HEAD_DIM_V], new[:, HEAD_DIM_V:], cache, slots.flatten())
    assert torch.equal(gather_mla_kv(cache, block_table, case.cache_seqlens, max(lengths)), tokens)

    def decode(k_cache: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        plan = get_mla_metadata()
        return flash_mla_with_kvcache(case.q, k_cache, table, case.cache_seqlens, HEAD_DIM_V, *plan, DEFAULT_SCALE)

    for actual, expected in zip(decode(cache, block_table), decode(case.k_cache, case.block_table), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, None, True], ids=["static", "automatic", "dynamic"])
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_compile_without_graph_breaks(device, layout, dynamic):
    append = torch.compile(append_mla_kv, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for name in ("scattered", "some-skipped", "all-skipped", "one", "empty"):
        check_append(append, layout, SLOTS[name], torch.int64, device)
    gather = torch.compile(gather_mla_kv, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    case = gather_case(device, strided_cache=layout == "gaps", invalid_page=INVALID_PAGES[1])
    for max_seqlen in (70, 128, 200):
        expected = gather_in_a_loop(case.k_cache, case.block_table, LENGTHS, max_seqlen)
        assert torch.equal(gather(case.k_cache, case.block_table, case.cache_seqlens, max_seqlen), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found (c++)")
def test_compile_with_the_default_backend():
    append = torch.compile(append_mla_kv, fullgraph=True, dynamic=True)
    for layout in ("contiguous", "gaps"):
        for name in ("some-skipped", "all-skipped"):
            check_append(append, layout, SLOTS[name], torch.int64, "cpu")
    case = gather_case("cpu", strided_cache=True)
    gather = torch.compile(gather_mla_kv, fullgraph=True)
    expected = gather_in_a_loop(case.k_cache, case.block_table, LENGTHS, 130)
    assert torch.equal(gather(case.k_cache, case.block_table, case.cache_seqlens, 130), expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler was found (c++)")
def test_compiled_append_does_not_copy_the_cache():
    from torch._inductor.utils import run_and_get_code

    def append_to_layer(kv_c: Tensor, k_pe: Tensor, layers: Tensor, slots: Tensor) -> None:
        append_mla_kv(kv_c, k_pe, layers[1].unsqueeze(2), slots)

    layers = torch.zeros(2, 99, PAGE_SIZE, HEAD_DIM, dtype=BF16)
    for function, cache in ((append_mla_kv, layers[0].unsqueeze(2)), (append_to_layer, layers)):
        append = torch.compile(function, fullgraph=True, dynamic=False)
        _, (code,) = run_and_get_code(append, *make_tokens(3), cache, torch.tensor([5, -1, 6]))
        assert code.count("torch.ops.flash_mla.append_kv.default(") == 1
        # A copy would be a loop and have memory of its own.
        assert not re.search(r"static_cast<int64_t>|= empty_strided|copy_\(|clone\(", code)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Captured once, replayed with other tokens and slots."""
    kv_c, k_pe = make_tokens(5, device="cuda")
    slots = torch.full((5,), -1, device="cuda")
    storage, cache = make_storage("gaps", device="cuda")
    fill(cache)
    expected_storage, expected = make_storage("gaps", device="cuda")
    fill(expected)
    block_table = torch.arange(NUM_BLOCKS, dtype=torch.int32, device="cuda").view(2, 3)
    lengths = torch.tensor([0, 0], dtype=torch.int32, device="cuda")

    def step() -> Tensor:
        append_mla_kv(kv_c, k_pe, cache, slots)
        return gather_mla_kv(cache, block_table, lengths, 150)

    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = step()
    for given, new_lengths in (([-1, 5, -1, 64, 383], [140, 0]), ([-1] * 5, [3, 150]), ([0, 1, 2, 3, 4], [64, 65])):
        kv_c.add_(1)
        slots.copy_(torch.tensor(given))
        lengths.copy_(torch.tensor(new_lengths))
        graph.replay()
        append_in_a_loop(kv_c, k_pe, expected, given)
        assert same_bits(storage, expected_storage)
        assert torch.equal(tokens, gather_in_a_loop(expected, block_table, new_lengths, 150))


@pytest.mark.gpu
def test_nothing_synchronizes():
    kv_c, k_pe = make_tokens(5, device="cuda")
    slots = torch.tensor(SLOTS["scattered"], device="cuda")
    _, cache = make_storage("contiguous", device="cuda")
    block_table = torch.arange(NUM_BLOCKS, dtype=torch.int32, device="cuda").view(2, 3)
    lengths = torch.tensor([100, 3], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        append_mla_kv(kv_c, k_pe, cache, slots)
        gather_mla_kv(cache, block_table, lengths, 120)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def append_arguments(device: str) -> dict[str, object]:
    kv_c, k_pe = make_tokens(3, device=device)
    _, cache = make_storage("contiguous", device=device)
    return {"kv_c": kv_c, "k_pe": k_pe, "cache": cache, "slot_mapping": torch.tensor([1, -1, 2], device=device)}


def gather_arguments(device: str) -> dict[str, object]:
    case = make_case(batch=2, seqlens=[100, 3], device=device, wide_block_table=False, spare_pages=0)
    names = {"cache": case.k_cache, "block_table": case.block_table, "cache_seqlens": case.cache_seqlens}
    return {**names, "max_seqlen": 100}


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


BAD_APPEND = [
    ("kv_c", TypeError, "must have dtype torch.bfloat16, got torch.float16", lambda t: t.half()),
    ("kv_c", TypeError, "must be a torch.Tensor, got list", lambda t: t.tolist()),
    ("kv_c", ValueError, "must have shape (num_tokens, latent_dim) = [-1, 512], got [3, 511]", lambda t: t[:, 1:]),
    ("kv_c", ValueError, "must have shape (num_tokens, latent_dim) = [-1, 512], got [3, 1, 512]", lambda t: t[:, None]),
    ("kv_c", ValueError, "must be on cpu, where cache is, got meta", on_meta),
    ("k_pe", TypeError, "must have dtype torch.bfloat16, got torch.float32", lambda t: t.float()),
    ("k_pe", TypeError, "must be a torch.Tensor, got NoneType", lambda t: None),
    ("k_pe", ValueError, "must have shape (num_tokens, rope_dim) or (num_tokens, 1, rope_dim) = [3, 64], got [2, 64]",
     lambda t: t[:2]),
    ("k_pe", ValueError, "must have shape (num_tokens, 1, rope_dim) = [3, 1, 64], got [3, 2, 32]",
     lambda t: t.unflatten(1, (2, 32))),
    ("k_pe", ValueError, "must be on cpu, where cache is, got meta", on_meta),
    ("cache", TypeError, "must have dtype torch.bfloat16, torch.float16 or torch.float32, got torch.int16",
     lambda t: t.view(torch.int16)),
    ("cache", TypeError, "must be a torch.Tensor, got int", lambda t: 0),
    ("cache", ValueError, "= [-1, 64, 1, 576], got [6, 64, 576]", lambda t: t[:, :, 0]),
    ("cache", ValueError, "= [-1, 64, 1, 576], got [6, 32, 1, 576]", lambda t: t[:, :32]),
    ("cache", ValueError, "= [-1, 64, 1, 576], got [6, 64, 2, 576]", lambda t: t.repeat(1, 1, 2, 1)),
    ("cache", ValueError, "= [-1, 64, 1, 576], got [6, 64, 1, 512]", lambda t: t[..., :512]),
    ("slot_mapping", TypeError, "must have dtype torch.int32 or torch.int64, got torch.int16", lambda t: t.short()),
    ("slot_mapping", TypeError, "must be a torch.Tensor, got list", lambda t: t.tolist()),
    ("slot_mapping", ValueError, "must have shape (num_tokens,) = [3], got [2]", lambda t: t[:2]),
    ("slot_mapping", ValueError, "must have shape (num_tokens,) = [3], got [1, 3]", lambda t: t[None]),
    ("slot_mapping", ValueError, "must be on cpu, where cache is, got meta", on_meta),
    ("slot_mapping", ValueError, "must hold slots less than 384 = 6 pages of 64 tokens, got 384 for token 1",
     lambda t: torch.tensor([383, 384, -1])),
]  # fmt: skip

BAD_GATHER = [
    ("cache", TypeError, "must have dtype torch.bfloat16, torch.float16 or torch.float32, got torch.float64",
     lambda t: t.double()),
    ("cache", ValueError, "= [-1, 64, 1, 576], got [4, 64, 576]", lambda t: t[:, :, 0]),
    ("block_table", TypeError, "must have dtype torch.int32, got torch.int64", lambda t: t.long()),
    ("block_table", TypeError, "must be a torch.Tensor, got list", lambda t: t.tolist()),
    ("block_table", ValueError, "= [-1, -1], got [2]", lambda t: t[0]),
    ("block_table", ValueError, "must be on cpu, where cache is, got meta", on_meta),
    ("block_table", ValueError, "must hold pages 0 to 3 for the 100 tokens of request 0, got -1 in column 0",
     lambda t: torch.full_like(t, -1)),
    ("cache_seqlens", TypeError, "must have dtype torch.int32, got torch.int64", lambda t: t.long()),
    ("cache_seqlens", ValueError, "must have shape (batch_size,) = [2], got [1]", lambda t: t[:1]),
    ("cache_seqlens", ValueError, "must be on cpu, where cache is, got meta", on_meta),
    ("max_seqlen", TypeError, "must be an int, got 1.5", lambda n: 1.5),
    ("max_seqlen", TypeError, "must be an int, got True", lambda n: True),
    ("max_seqlen", ValueError, "must be at least 0, got -1", lambda n: -1),
]  # fmt: skip


def bad_ids(cases: list) -> list[str]:
    return [f"{name}: {message}" for name, _, message, _ in cases]


@pytest.mark.parametrize(("name", "error", "message", "spoil"), BAD_APPEND, ids=bad_ids(BAD_APPEND))
def test_append_rejects(name, error, message, spoil):
    arguments = append_arguments("cpu")
    cache = arguments["cache"]
    arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=f"^{name} .*{re.escape(message)}$"):
        append_mla_kv(**arguments)
    assert torch.isnan(cache).all()


def append_by_compiled_checks(**arguments: object) -> None:
    """The implementation for CUDA, which with wrong arguments gets no further than its checks."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    torch.ops.flash_mla.append_kv.default.redispatch(keys, **arguments)


@pytest.mark.parametrize("append", [torch.ops.flash_mla.append_kv, append_by_compiled_checks], ids=["op", "compiled"])
@pytest.mark.parametrize(("name", "error", "message", "spoil"), BAD_APPEND, ids=bad_ids(BAD_APPEND))
def test_append_op_rejects(name, error, message, spoil, append):
    """What the public function leaves to it, in the same words."""
    if "must be a torch.Tensor" in message:
        pytest.skip("torch does not hand it over, or the public function has reported it")
    if append is append_by_compiled_checks:
        if "must hold slots" in message:
            pytest.skip("on a GPU values are checked by the public function")
        if extension.load_extension().module is None:
            pytest.skip(f"needs the built kernels: {extension.unavailable_reason()}")
    arguments = append_arguments("cpu")
    arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=f"^{name} .*{re.escape(message)}$"):
        append(**arguments)


@pytest.mark.parametrize(("name", "error", "message", "spoil"), BAD_GATHER, ids=bad_ids(BAD_GATHER))
def test_gather_rejects(name, error, message, spoil):
    arguments = gather_arguments("cpu")
    arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=f"^{name} .*{re.escape(message)}$"):
        gather_mla_kv(**arguments)


def test_gather_rejects_requests_longer_than_the_table():
    arguments = gather_arguments("cpu")
    arguments["cache_seqlens"] = torch.tensor([100, 129], dtype=torch.int32)
    arguments["block_table"] = torch.zeros(2, 2, dtype=torch.int32)
    gather_mla_kv(**arguments)  # which are only as long beyond max_seqlen
    message = (
        "^cache_seqlens must be at most 128, the tokens of 2 blocks in a row of block_table, got 129 for request 1$"
    )
    with pytest.raises(ValueError, match=message):
        gather_mla_kv(**{**arguments, "max_seqlen": 200})


def test_values_on_a_gpu_are_checked_on_demand(monkeypatch):
    """Without looking at a GPU: who decides, and what it depends on."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch._subclasses.FakeTensorMode():
        on_gpu = torch.empty(1, device="cuda")
    assert value_checks.are_wanted_for(torch.empty(1))
    assert not value_checks.are_wanted_for(torch.empty(1, device="meta"))
    for is_on in (False, True):
        monkeypatch.setattr(value_checks, "ENABLED", is_on)
        assert value_checks.are_wanted_for(on_gpu) == is_on
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not value_checks.are_wanted_for(on_gpu)


def test_bytes():
    assert bytes_per_token(1) == (512 + 64) * 2
    assert bytes_per_token(61) == 61 * 1152
    assert bytes_per_token(3, 656, torch.uint8) == 3 * 656
    assert bytes_per_token(num_layers=2, head_dim=10, dtype=torch.float32) == 80
    assert mha_bytes_per_token(61, 128, 192, 128) == 61 * 128 * (192 + 128) * 2
    assert mha_bytes_per_token(2, 8, 64, 32, torch.float32) == 2 * 8 * 96 * 4


@pytest.mark.parametrize("page_size", [1, 64, 100])
def test_as_many_pages_as_fit(page_size):
    page_bytes = page_size * bytes_per_token(3, 40)
    for pages in (0, 1, 7):
        for spare in (0, 1, page_bytes - 1):
            tokens = max_cached_tokens(pages * page_bytes + spare, 3, 40, page_size=page_size)
            assert tokens == pages * page_size


def test_capacity_is_that_of_a_cache():
    cache = torch.empty(5, 4, PAGE_SIZE, 1, HEAD_DIM, dtype=BF16)  # layers, pages
    assert max_cached_tokens(cache.nbytes, 5) == 4 * PAGE_SIZE
    assert max_cached_tokens(cache.nbytes - 1, 5) == 3 * PAGE_SIZE


@pytest.mark.parametrize(
    ("function", "arguments", "minimum"),
    [
        (bytes_per_token, {"num_layers": 1, "head_dim": 1}, 1),
        (mha_bytes_per_token, {"num_layers": 1, "num_heads": 1, "head_dim_k": 1, "head_dim_v": 1}, 1),
        (max_cached_tokens, {"num_layers": 1, "head_dim": 1, "page_size": 1}, 1),
        (max_cached_tokens, {"memory_bytes": 0}, 0),
    ],
    ids=["bytes", "mha-bytes", "tokens", "memory"],
)
def test_counts_are_checked(function, arguments, minimum):
    others = {"memory_bytes": 10, "num_layers": 1} if function is max_cached_tokens else {}
    function(**{**others, **arguments})
    for name in arguments:
        with pytest.raises(ValueError, match=f"^{name} must be at least {minimum}, got {minimum - 1}$"):
            function(**{**others, **arguments, name: minimum - 1})
        for value in (1.0, True, "8", None):
            with pytest.raises(TypeError, match=f"^{name} must be an int, got {re.escape(repr(value))}$"):
                function(**{**others, **arguments, name: value})


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(bytes_per_token, [1, 1]), (mha_bytes_per_token, [1, 1, 1, 1]), (max_cached_tokens, [1, 1, 1])],
    ids=["bytes", "mha-bytes", "tokens"],
)
def test_dtypes_are_checked(function, arguments):
    with pytest.raises(TypeError, match=r"^dtype must be a torch\.dtype, got str$"):
        function(*arguments, "bfloat16")


def rows_of_page() -> list[list[str]]:
    lines = [line for line in CAPACITY_PAGE.read_text().splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


VALUES = {"MLA": HEAD_DIM, "MHA, all heads": 128 * (192 + 128), "MHA, 16 of the heads": 16 * (192 + 128)}


def test_bytes_in_the_page():
    header, *rows = rows_of_page()[:4]
    assert header == ["", "values per token and layer", "bytes per token"]
    expected = {name: [f"{values:,}", f"{bytes_per_token(61, values):,}"] for name, values in VALUES.items()}
    assert {name: numbers for name, *numbers in rows} == expected
    assert mha_bytes_per_token(61, 128, 192, 128) == bytes_per_token(61, VALUES["MHA, all heads"])
    text = " ".join(CAPACITY_PAGE.read_text().split())
    ratios = [mha_bytes_per_token(61, heads, 192, 128) / bytes_per_token(61) for heads in (128, 16)]
    assert re.findall(r"MHA takes ([\d.]+) times as much", text) == [f"{ratio:.1f}" for ratio in ratios]


def test_tokens_in_the_page():
    (budget, *columns), *rows = rows_of_page()[4:]
    assert budget == "memory for the cache" and columns == list(VALUES)
    assert [row[0] for row in rows] == ["80 GB", "60 GB", "40 GB", "20 GB"]
    for memory, *tokens in rows:
        memory_bytes = int(memory.removesuffix(" GB")) * 10**9
        assert tokens == [f"{max_cached_tokens(memory_bytes, 61, values):,}" for values in VALUES.values()]


def test_code_in_the_page(capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", CAPACITY_PAGE.read_text(), re.MULTILINE | re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.split() == re.findall(r"\)  # (\d+)$", code, re.MULTILINE)
