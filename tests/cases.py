"""Inputs of a paged decode as a serving framework would pass them, made to expose any read of what is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_SIZE = 64
HEAD_DIM = 576
HEAD_DIM_V = 512
DEFAULT_SCALE = HEAD_DIM**-0.5

# What frameworks leave behind the pages of a request in a block table.
INVALID_PAGES = (-1, 2147480000)


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    q: Tensor  # (batch_size, seqlen_q, num_heads_q, 576)
    k_cache: Tensor  # (num_blocks, 64, num_heads_kv, 576)
    block_table: Tensor  # (batch_size, max_blocks) int32
    cache_seqlens: Tensor  # (batch_size,) int32
    softmax_scale: float
    causal: bool
    batch_invariant: bool = False

    @property
    def num_rows_per_head_kv(self) -> int:
        return self.q.shape[1] * self.q.shape[2] // self.k_cache.shape[2]

    def plan(self) -> tuple[Tensor, Tensor]:
        """tile_scheduler_metadata and num_splits for these lengths."""
        return torch.ops.flash_mla.decode_schedule(
            self.cache_seqlens, self.num_rows_per_head_kv, self.k_cache.shape[2], self.batch_invariant
        )

    def op_arguments(self) -> tuple[Tensor | float | bool, ...]:
        """Positional arguments of torch.ops.flash_mla.dense_decode."""
        tensors = (self.q, self.k_cache, self.block_table, self.cache_seqlens, *self.plan())
        return (*tensors, self.softmax_scale, self.causal, self.batch_invariant)


def make_case(
    *,
    batch: int,
    seqlen_q: int = 1,
    num_heads_q: int = 16,
    num_heads_kv: int = 1,
    seqlens: int | Sequence[int] | Callable[[int], int] = 100,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    causal: bool = False,
    softmax_scale: float = DEFAULT_SCALE,
    seed: int = 0,
    std: float = 0.1,
    permute_pages: bool = True,
    poison: bool = True,
    invalid_page: int = INVALID_PAGES[0],
    spare_pages: int = 3,
    strided_q: bool = False,
    strided_cache: bool = False,
    wide_block_table: bool = True,
) -> Case:
    """Random queries, and a cache that holds random tokens in scattered pages.

    Args:
        batch: number of requests.
        seqlens: tokens of each request: one number for all, a sequence of `batch` numbers, or a function of the
            request's index.
        std: standard deviation of queries and tokens.
        permute_pages: pages of a request in random places of the cache; else one behind the other from page 1 on.
        poison: NaN wherever no request has a token: in unused pages, page 0 among them, and behind the last token of
            last pages; with strided_q or strided_cache also in the gaps. Else zeros.
        invalid_page: the page number behind a request's own pages in its row of the block table.
        spare_pages: unused pages beside page 0.
        strided_q: q as a view with gaps between heads, tokens and requests.
        strided_cache: k_cache as a view with gaps between heads, tokens and pages, and a storage offset.
        wide_block_table: block_table as a view of a table with longer rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).mul_(std).to(dtype)

    if callable(seqlens):
        lengths = [seqlens(request) for request in range(batch)]
    else:
        lengths = [seqlens] * batch if isinstance(seqlens, int) else list(seqlens)
    if len(lengths) != batch:
        raise ValueError(f"seqlens must have {batch} lengths, got {len(lengths)}")
    num_pages = [-(-max(length, 0) // PAGE_SIZE) for length in lengths]
    unused = float("nan") if poison else 0.0

    q = random(batch, seqlen_q, num_heads_q, HEAD_DIM)
    if strided_q:
        storage = torch.full((batch, seqlen_q + 1, num_heads_q + 2, HEAD_DIM + 64), unused, dtype=dtype)
        view = storage[:, 1:, 1:-1, 32 : 32 + HEAD_DIM]
        q, _ = view, view.copy_(q)

    pool_pages = sum(num_pages) + spare_pages
    # A generator of its own, so that the same tokens come with any placement.
    page_generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(pool_pages, generator=page_generator) if permute_pages else torch.arange(pool_pages)
    # Page 0 stays unused: it is what a zeroed table would point to.
    own_pages = list((order[: sum(num_pages)] + 1).split(num_pages))
    columns = max([*num_pages, 1])
    table_storage = torch.full((batch, columns + (5 if wide_block_table else 0)), invalid_page, dtype=torch.int32)
    if strided_cache:
        cache_storage = torch.full((pool_pages + 1, 2, PAGE_SIZE, num_heads_kv, HEAD_DIM + 80), unused, dtype=dtype)
        k_cache = cache_storage[:, 1, :, :, 8 : 8 + HEAD_DIM]
    else:
        k_cache = torch.full((pool_pages + 1, PAGE_SIZE, num_heads_kv, HEAD_DIM), unused, dtype=dtype)
    for request, (length, pages) in enumerate(zip(lengths, own_pages, strict=True)):
        table_storage[request, : len(pages)] = pages
        if length > 0:
            tokens = torch.full((len(pages) * PAGE_SIZE, num_heads_kv, HEAD_DIM), unused, dtype=dtype)
            tokens[:length] = random(length, num_heads_kv, HEAD_DIM)
            k_cache[pages] = tokens.view(len(pages), PAGE_SIZE, num_heads_kv, HEAD_DIM)

    return Case(
        q=_to_device(q, device),
        k_cache=_to_device(k_cache, device),
        block_table=_to_device(table_storage, device)[:, :columns],
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=device),
        softmax_scale=softmax_scale,
        causal=causal,
    )


def _to_device(tensor: Tensor, device: str | torch.device) -> Tensor:
    """The same values with the same strides; Tensor.to would close the gaps of a view."""
    if tensor.is_contiguous():
        return tensor.to(device)
    storage = tensor._base
    assert storage is not None and storage.is_contiguous()
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
