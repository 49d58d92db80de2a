"""Paged caches, calls and the float64 reference for the GPU tests, made so that thousands of cases take seconds.

The tokens of all cases are views of one random pool. A cache holds NaN wherever no request has a token: in whole pages,
page 0 among them, and at the ends of last pages. Behind a request's pages the block table holds invalid page numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from cases import DEFAULT_SCALE, HEAD_DIM, HEAD_DIM_V, PAGE_SIZE
from reference import LSE_ATOL, LSE_RTOL, OUT_ATOL, OUT_RTOL, max_cosine_difference
from torch import Tensor

# Queries have 1. Probabilities are rounded to bf16, so keys of a size such that 2^-9 of it lies well within OUT_ATOL.
KEY_STD = 0.1

T = TypeVar("T")


@functools.lru_cache(maxsize=2)
def random_pool(dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal values, from which queries and keys are cut."""
    generator = torch.Generator(device).manual_seed(20)
    size = 400_000_000 if device == "cuda" else 4_000_000
    return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)


@functools.lru_cache(maxsize=2)
def random_key_pool(dtype: torch.dtype, device: str) -> Tensor:
    return random_pool(dtype, device).mul(KEY_STD)


def cut(pool: Tensor, shape: Sequence[int], offset: int) -> Tensor:
    """A view of the pool, which is not to be written to; other offsets give other values while the pool lasts."""
    size = math.prod(shape)
    if size > pool.numel():
        pool = pool.repeat(-(-size // pool.numel()))
    # A multiple of 8 elements keeps what is cut aligned to 16 bytes.
    begin = 8 * ((offset * 7919 * 8) % ((pool.numel() - size) // 8 + 1))
    return pool[begin : begin + size].view(*shape)


@dataclass
class PagedCache:
    """Keys of a batch in scattered pages, and the same keys in order for the reference."""

    lengths: list[int]
    cache_seqlens: Tensor  # (batch_size,) int32
    pages: Tensor  # (num_pages, 64, num_heads_kv, 576)
    block_table: Tensor  # (batch_size, max_pages) int32, rows longer than that in memory
    keys: Tensor  # (batch_size, num_heads_kv, max(longest, 1), 576) float64, 0 beyond each length

    @property
    def batch_size(self) -> int:
        return len(self.lengths)


def random_lengths(batch_size: int, longest: int, seed: int) -> list[int]:
    """One request has the longest length, some have none at all, the others anything between."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (batch_size,), generator=generator)
    lengths[torch.rand(batch_size, generator=generator) < 0.15] = 0
    lengths[int(torch.randint(0, batch_size, (1,), generator=generator))] = longest
    return lengths.tolist()


def make_cache(
    lengths: Sequence[int],
    num_heads_kv: int,
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cuda",
    invalid_page: int = -1,
    spare_pages: int = 3,
) -> PagedCache:
    """Scatter random keys over the pages 1, 2, ... of a cache in random order."""
    generator = torch.Generator(device).manual_seed(seed)
    batch_size = len(lengths)
    length = torch.tensor(lengths, device=device)
    num_pages = (length + PAGE_SIZE - 1) // PAGE_SIZE
    total_pages, total_tokens = sum(-(-n // PAGE_SIZE) for n in lengths), sum(lengths)
    longest = max(lengths)

    # One column more than any request needs, in rows that are longer still.
    columns = -(-longest // PAGE_SIZE) + 1
    storage = torch.full((batch_size, columns + 3), invalid_page, dtype=torch.int32, device=device)
    block_table = storage[:, :columns]
    # Page 0 stays unused: it is what a zeroed table would point to.
    order = torch.randperm(total_pages + spare_pages, generator=generator, device=device)[:total_pages] + 1
    used = torch.arange(columns, device=device) < num_pages[:, None]
    block_table[used] = order.to(torch.int32)

    pages = torch.full(
        (total_pages + spare_pages + 1, PAGE_SIZE, num_heads_kv, HEAD_DIM), float("nan"), dtype=dtype, device=device
    )
    tokens = cut(random_key_pool(dtype, device), (total_tokens, num_heads_kv, HEAD_DIM), seed)
    position = torch.arange(max(longest, 1), device=device)
    is_token = position < length[:, None]  # (batch_size, longest)
    slot = block_table.long()[:, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
    pages.view(-1, num_heads_kv, HEAD_DIM)[slot[is_token]] = tokens

    keys = torch.zeros(batch_size, position.numel(), num_heads_kv, HEAD_DIM, dtype=torch.float64, device=device)
    keys[is_token] = tokens.double()
    return PagedCache(
        lengths=list(lengths),
        cache_seqlens=length.to(torch.int32),
        pages=pages,
        block_table=block_table,
        keys=keys.transpose(1, 2).contiguous(),
    )


def make_queries(
    batch_size: int, seqlen_q: int, num_heads_q: int, dtype: torch.dtype, seed: int = 0, device: str = "cuda"
) -> Tensor:
    return cut(random_pool(dtype, device), (batch_size, seqlen_q, num_heads_q, HEAD_DIM), seed)


def make_plan(cache: PagedCache, q: Tensor) -> tuple[Tensor, Tensor]:
    num_heads_kv = cache.pages.shape[2]
    return torch.ops.flash_mla.decode_schedule(
        cache.cache_seqlens, q.shape[1] * q.shape[2] // num_heads_kv, num_heads_kv
    )


def decode(
    q: Tensor, cache: PagedCache, causal: bool, scale: float = DEFAULT_SCALE, plan: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Decode into memory that held NaN."""
    metadata, num_splits = make_plan(cache, q) if plan is None else plan
    batch_size, seqlen_q, num_heads_q, _ = q.shape
    out = torch.full((batch_size, seqlen_q, num_heads_q, HEAD_DIM_V), float("nan"), dtype=q.dtype, device=q.device)
    # What the op allocates next is most likely this memory.
    poison = torch.full((batch_size, num_heads_q, seqlen_q), float("nan"), dtype=torch.float32, device=q.device)
    del poison
    lse = torch.ops.flash_mla.dense_decode_out(
        q, cache.pages, cache.block_table, cache.cache_seqlens, metadata, num_splits, scale, causal, out=out
    )
    return out, lse


def reference(q: Tensor, cache: PagedCache, causal: bool, scale: float = DEFAULT_SCALE) -> tuple[Tensor, Tensor]:
    """Float64 out (batch_size, seqlen_q, num_heads_q, 512) and lse (batch_size, num_heads_q, seqlen_q)."""
    batch_size, seqlen_q, num_heads_q, _ = q.shape
    num_heads_kv, longest = cache.keys.shape[1:3]
    group = num_heads_q // num_heads_kv
    rows = q.double().view(batch_size, seqlen_q, num_heads_kv, group, HEAD_DIM).transpose(1, 2)
    scores = rows.flatten(2, 3) @ cache.keys.transpose(2, 3)  # (batch_size, num_heads_kv, seqlen_q * group, longest)
    scores *= scale
    seen = cache.cache_seqlens.long()[:, None].expand(batch_size, seqlen_q)
    if causal:
        seen = seen - torch.arange(seqlen_q - 1, -1, -1, device=q.device)
    hidden = torch.arange(longest, device=q.device) >= seen[..., None]  # (batch_size, seqlen_q, longest)
    scores.view(batch_size, num_heads_kv, seqlen_q, group, longest).masked_fill_(
        hidden[:, None, :, None], float("-inf")
    )
    lse = scores.logsumexp(-1)
    weights = scores.softmax(-1).nan_to_num_(nan=0.0)
    out = weights @ cache.keys[..., :HEAD_DIM_V]
    out = out.view(batch_size, num_heads_kv, seqlen_q, group, HEAD_DIM_V).transpose(1, 2).flatten(2, 3)
    lse = lse.view(batch_size, num_heads_kv, seqlen_q, group).transpose(2, 3).flatten(1, 2)
    return out, lse.masked_fill(lse == float("-inf"), float("inf"))


def excess(actual: Tensor, expected: Tensor, atol: float, rtol: float) -> Tensor:
    """Largest |actual - expected| / (atol + rtol·|expected|) as a tensor; NaN if any value is, or a wrong infinity."""
    error = (actual.double() - expected).abs_()
    bound = expected.abs().mul_(rtol).add_(atol)
    return torch.where(actual.double() == expected, 0.0, error.div_(bound)).max()


def mismatch(out: Tensor, lse: Tensor, expected: tuple[Tensor, Tensor], lse_atol: float = LSE_ATOL) -> str | None:
    """What is out of bounds, or None. One synchronization."""
    expected_out, expected_lse = expected
    wide = out.double()
    squares = wide.square().sum() + expected_out.square().sum()
    cosine_difference = (wide - expected_out).square_().sum() / squares.clamp(min=1e-12)
    values = torch.stack(
        [
            excess(out, expected_out, OUT_ATOL, OUT_RTOL),
            excess(lse, expected_lse, lse_atol, LSE_RTOL),
            cosine_difference / max_cosine_difference(out),
        ]
    ).tolist()
    names = ("out", "lse", "the cosine difference of out")
    # NaN is not within bounds.
    wrong = [
        f"{name} is {value:.3g} times its bound" for name, value in zip(names, values, strict=True) if not value <= 1
    ]
    return "; ".join(wrong) or None


def check(
    q: Tensor, cache: PagedCache, causal: bool, scale: float = DEFAULT_SCALE, lse_atol: float = LSE_ATOL
) -> tuple[Tensor, Tensor]:
    """Decode and compare with the reference; returns the result."""
    out, lse = decode(q, cache, causal, scale)
    assert (wrong := mismatch(out, lse, reference(q, cache, causal, scale), lse_atol)) is None, wrong
    return out, lse


def capture(function: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """Warm up on another stream, as frameworks do, then capture; returns the graph and what the captured call gave."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
