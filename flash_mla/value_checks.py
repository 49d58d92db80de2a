"""Checks of values that lie on the device: lengths and page numbers. Each costs a synchronization with the GPU.

The environment variable FLASH_MLA_CHECK=1, read when the package is imported, turns them on for GPU tensors; the CPU
implementation always does them.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flash_mla.schedule import PAGE_SIZE

ENABLED = os.environ.get("FLASH_MLA_CHECK", "").strip() not in ("", "0")


def check_lengths_and_pages(block_table: Tensor, cache_seqlens: Tensor, num_blocks: int) -> None:
    """Raise ValueError for a request that is longer than its row of the block table or has a page out of range.

    Args:
        block_table: (batch_size, max_blocks) int32; only the first ceil(length / 64) entries of a row are looked at.
        cache_seqlens: (batch_size,) int32; negative counts as 0.
        num_blocks: pages of the cache.
    """
    batch_size, max_blocks = block_table.shape
    if batch_size == 0:
        return
    num_used = (cache_seqlens.to(torch.int64) + (PAGE_SIZE - 1)).div(PAGE_SIZE, rounding_mode="floor")
    column = torch.arange(max_blocks, device=block_table.device)
    is_bad = ((block_table < 0) | (block_table >= num_blocks)) & (column < num_used[:, None])
    # The first bad column of each row, max_blocks where there is none.
    first_bad = torch.where(is_bad, column, max_blocks).amin(1) if max_blocks > 0 else torch.zeros_like(num_used)
    has_problem = (num_used > max_blocks) | (first_bad < max_blocks)
    request = has_problem.to(torch.int32).argmax()  # the first one
    # One transfer for all that a message needs.
    found, request_index, length, bad_column = torch.stack(
        [has_problem.any().to(torch.int64), request, cache_seqlens[request], first_bad[request]]
    ).tolist()
    if not found:
        return
    if bad_column < max_blocks:
        page = int(block_table[request_index, bad_column])
        raise ValueError(
            f"block_table must hold pages 0 to {num_blocks - 1} for the {length} tokens of request {request_index}, "
            f"got {page} in column {bad_column}"
        )
    raise ValueError(
        f"cache_seqlens must be at most {max_blocks * PAGE_SIZE}, the tokens of {max_blocks} blocks in a row of "
        f"block_table, got {length} for request {request_index}"
    )


def check_lengths_unless_capturing(block_table: Tensor, cache_seqlens: Tensor, k_cache: Tensor) -> None:
    """The check above for arguments that no op has looked at yet; nothing while a CUDA graph is captured."""
    if torch.cuda.is_current_stream_capturing():
        return
    device = k_cache.device
    if (
        k_cache.dim() == 4
        and block_table.dim() == 2
        and cache_seqlens.shape == block_table.shape[:1]
        and block_table.device == device == cache_seqlens.device
    ):
        check_lengths_and_pages(block_table, cache_seqlens, k_cache.shape[0])
