"""Latents of all layers in pages of 64 tokens, and who has which page.

The host decides which pages a request has; how many tokens it has is known on both sides, and in a decode step the
device counts by itself, so that the step can be a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAGE_SIZE = 64
LATENT_DIM = 512
ROPE_DIM = 64


class OutOfPagesError(RuntimeError):
    """Fewer pages are free than are needed. Nothing has changed: release a request and try again."""


class PageAllocator:
    """Knows which of the pages 0 to num_pages - 1 are free. The page freed last is handed out first."""

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take pages.

        Raises:
            ValueError: count is negative.
            OutOfPagesError: fewer are free; none is taken.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if count > self.num_free:
            raise OutOfPagesError(f"count must be at most {self.num_free}, the pages that are free, got {count}")
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back.

        Raises:
            ValueError: a page is not in use, or is named twice; none is given back.
        """
        if not self._used.issuperset(pages) or len(set(pages)) != len(pages):
            raise ValueError(f"pages must be different pages in use, got {list(pages)}")
        self._used.difference_update(pages)
        self._free.extend(reversed(pages))


class PagedLatentCache:
    """The latents of a batch of requests, each of which has a row of the block table until it is released.

    Attributes:
        layers: for each layer (num_pages, 64, 1, 576) in the dtype of the model: 512 latent values, 64 of RoPE.
        block_table: (max_requests, pages per request) int32, -1 where there is no page.
        cache_seqlens: (max_requests,) int32, tokens of each request; 0 in rows without one.
        lengths: the same on the host.
        allocator: of the pages, which all requests share.
    """

    def __init__(
        self,
        num_layers: int,
        max_requests: int,
        max_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_pages: int | None = None,
    ):
        """An empty cache.

        Args:
            max_tokens: of a request, prompt and generated ones.
            num_pages: for all requests together; by default as many as they can need.
        """
        for name, value in {"num_layers": num_layers, "max_requests": max_requests, "max_tokens": max_tokens}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        max_pages = -(-max_tokens // PAGE_SIZE)
        self.max_tokens = max_tokens
        self.allocator = PageAllocator(max_requests * max_pages if num_pages is None else num_pages)
        # Memory without a token is NaN, so that reading it could not go unnoticed.
        shape = (self.allocator.num_pages, PAGE_SIZE, 1, LATENT_DIM + ROPE_DIM)
        self.layers = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(num_layers)]
        self.block_table = torch.full((max_requests, max_pages), -1, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self.lengths = [0] * max_requests
        self._pages: list[list[int]] = [[] for _ in range(max_requests)]

    @property
    def rows_in_use(self) -> list[int]:
        return [row for row, length in enumerate(self.lengths) if length > 0]

    def admit(self, num_tokens: int) -> int:
        """Give a new request a row, and pages for its first tokens.

        Raises:
            ValueError: num_tokens is not from 1 to max_tokens.
            RuntimeError: there is no row left; OutOfPagesError: there are not enough pages.
        """
        if not 1 <= num_tokens <= self.max_tokens:
            raise ValueError(f"num_tokens must be from 1 to max_tokens = {self.max_tokens}, got {num_tokens}")
        if 0 not in self.lengths:
            raise RuntimeError(f"max_requests = {len(self.lengths)} requests are in the cache, got one more")
        row = self.lengths.index(0)
        self._append_pages(row, self.allocator.allocate(-(-num_tokens // PAGE_SIZE)))
        self.lengths[row] = num_tokens
        self.cache_seqlens[row] = num_tokens
        return row

    def slots(self, row: int) -> Tensor:
        """(length,) int64, where the tokens of a request are: page * 64 + place in the page."""
        positions = torch.arange(self.lengths[row], device=self.block_table.device)
        return self.block_table[row, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE

    def reserve_next(self) -> None:
        """Let every request have a page for one token more. The host's part of a decode step; `advance` is the other.

        Raises:
            ValueError: a request has max_tokens already.
            OutOfPagesError: there are not enough pages. In both cases nothing has changed.
        """
        rows = self.rows_in_use
        for row in rows:
            if self.lengths[row] == self.max_tokens:
                raise ValueError(f"row {row} must have less than max_tokens = {self.max_tokens} tokens, got as many")
        full = [row for row in rows if self.lengths[row] % PAGE_SIZE == 0]
        for row, page in zip(full, self.allocator.allocate(len(full)), strict=True):
            self._append_pages(row, [page])
        for row in rows:
            self.lengths[row] += 1

    def advance(self) -> tuple[Tensor, Tensor]:
        """Count one token more for every request in cache_seqlens; only device work, which may be captured.

        Returns:
            positions: (max_requests,) int64, of the new tokens; 0 in rows without a request.
            slots: (max_requests,) int64, where they go; negative in rows without a request.
        """
        positions = self.cache_seqlens.long()
        pages = self.block_table.gather(1, (positions // PAGE_SIZE)[:, None])[:, 0].long()
        slots = pages * PAGE_SIZE + positions % PAGE_SIZE  # of page -1 negative at any position
        self.cache_seqlens += slots >= 0
        return positions, slots

    def release(self, row: int) -> None:
        """Give the pages and the row of a request back.

        Raises:
            ValueError: the row has no request.
        """
        if row not in self.rows_in_use:
            raise ValueError(f"row must be one of {self.rows_in_use}, which have a request, got {row}")
        self.allocator.free(self._pages[row])
        self._pages[row] = []
        self.lengths[row] = 0
        self.block_table[row] = -1
        self.cache_seqlens[row] = 0

    def _append_pages(self, row: int, pages: list[int]) -> None:
        begin = len(self._pages[row])
        self._pages[row] += pages
        self.block_table[row, begin : begin + len(pages)] = torch.tensor(pages, dtype=torch.int32)
