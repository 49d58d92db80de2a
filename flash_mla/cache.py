"""Tools for a paged latent cache: write new tokens into pages, gather them back, and count what fits into memory.

Writing is an op of its own (ops.py), on a GPU one kernel; gathering is plain torch operations. Nothing synchronizes and
no shape depends on values, so that both can be captured in CUDA graphs and compiled as a whole. Values on the device
are checked where value_checks.py says.

A slot is the place of a token in the cache: page * 64 + offset in the page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_mla import ops, value_checks
from flash_mla.checks import HEAD_DIM, check_append, check_count, check_gather, check_tensor
from flash_mla.schedule import PAGE_SIZE


@torch.no_grad()
def append_mla_kv(kv_c: Tensor, k_pe: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write the latents of new tokens into their pages, in place.

    Args:
        kv_c: (num_tokens, 512) bfloat16, float16 or float32, the latent part, any strides.
        k_pe: (num_tokens, 64) or (num_tokens, 1, 64), dtype as kv_c, the RoPE part, any strides.
        cache: (num_blocks, 64, 1, 576), dtype as kv_c, any strides. What kv_c and k_pe hold must not lie in the slots
            that are written: they are read at the same time.
        slot_mapping: (num_tokens,) int32 or int64, the slot of each token; negative for tokens that are not written, as
            those that pad a batch. Two tokens must not have the same slot.

    Only the given slots are written. A GPU copies 16 bytes at a time where the last dimensions are contiguous and
    all addresses and other strides are multiples of that, else single elements, which takes longer.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device. Always on the CPU, on the GPU
            with FLASH_MLA_CHECK=1 in the environment, also: a slot lies behind the end of the cache. Unchecked, its
            token is not written.
        RuntimeError: the GPU is not an sm_90 one, or the kernels were not built.
    """
    for name, value in {"kv_c": kv_c, "k_pe": k_pe, "cache": cache, "slot_mapping": slot_mapping}.items():
        check_tensor(name, value)
    if cache.is_cuda and value_checks.are_wanted_for(cache):
        check_append(kv_c, k_pe, cache, slot_mapping)
        value_checks.check_slots(slot_mapping, cache.shape[0] * PAGE_SIZE)
    ops.append_kv(kv_c, k_pe, cache, slot_mapping)


@torch.no_grad()
def gather_mla_kv(cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The tokens of each request in order.

    Args:
        cache: (num_blocks, 64, 1, 576) bfloat16, float16 or float32, any strides.
        block_table: (batch_size, max_blocks) int32, the pages of each request, any strides. Never read past
            ceil(length / 64) entries of a row, but for the first entry of a request without tokens, which is not used.
        cache_seqlens: (batch_size,) int32, tokens in the cache of each request; negative counts as 0.
        max_seqlen: tokens per request in the result; longer requests are cut off.

    Returns:
        (batch_size, max_seqlen, 576) in the dtype of the cache, 0 behind the last token of a request.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or max_seqlen is negative. Always
            on the CPU, on the GPU with FLASH_MLA_CHECK=1 in the environment, also: a request has more tokens among the
            first max_seqlen than its row of the block table, or pages that the cache does not have. With that variable
            on both: a request has a negative length.
    """
    check_gather(cache, block_table, cache_seqlens, max_seqlen)
    batch_size, max_blocks = block_table.shape
    if value_checks.are_wanted_for(cache):
        value_checks.check_lengths_and_pages(block_table, cache_seqlens.clamp(max=max_seqlen), cache.shape[0])
    lengths = cache_seqlens.clamp(0, max_seqlen)
    if cache.shape[0] == 0 or max_blocks == 0 or batch_size == 0 or max_seqlen == 0:
        return cache.new_zeros(batch_size, max_seqlen, HEAD_DIM)
    # Unchecked, a request that is longer than its row has zeros from there on.
    lengths = lengths.clamp(max=max_blocks * PAGE_SIZE)[:, None]
    positions = torch.arange(max_seqlen, device=cache.device)
    # Behind the last token that token is read again, and in its place zeros are returned.
    readable = torch.minimum(positions, (lengths - 1).clamp(min=0))
    page = block_table.gather(1, readable // PAGE_SIZE).where(lengths > 0, 0)
    tokens = cache[page.long(), readable % PAGE_SIZE, 0]
    return tokens.where((positions < lengths)[..., None], 0)


def bytes_per_token(num_layers: int, head_dim: int = HEAD_DIM, dtype: torch.dtype = torch.bfloat16) -> int:
    """What one token takes in a cache.

    Args:
        num_layers: layers, each with its own cache.
        head_dim: values per token and layer: 576 for MLA, 512 latent and 64 RoPE.
        dtype: of the values.
    """
    check_count("num_layers", num_layers, 1)
    check_count("head_dim", head_dim, 1)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    return num_layers * head_dim * dtype.itemsize


def mha_bytes_per_token(
    num_layers: int, num_heads: int, head_dim_k: int, head_dim_v: int, dtype: torch.dtype = torch.bfloat16
) -> int:
    """What one token takes where the keys and values of every head are cached, as in multi-head attention.

    Args:
        num_layers, dtype: as in `bytes_per_token`.
        num_heads: heads that have keys and values of their own.
        head_dim_k, head_dim_v: values per head in a key and in a value.
    """
    check_count("num_heads", num_heads, 1)
    check_count("head_dim_k", head_dim_k, 1)
    check_count("head_dim_v", head_dim_v, 1)
    return bytes_per_token(num_layers, num_heads * (head_dim_k + head_dim_v), dtype)


def max_cached_tokens(
    memory_bytes: int,
    num_layers: int,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = PAGE_SIZE,
) -> int:
    """How many tokens fit into so much memory, in whole pages of all layers.

    Every request leaves on average half a page unused, which this does not count.

    Args:
        memory_bytes: what is there for the cache.
        num_layers, head_dim, dtype: as in `bytes_per_token`.
        page_size: tokens per page.
    """
    check_count("memory_bytes", memory_bytes, 0)
    check_count("page_size", page_size, 1)
    return memory_bytes // (page_size * bytes_per_token(num_layers, head_dim, dtype)) * page_size
