"""Decoding with a DeepSeek-V3 of transformers from a paged cache of latents.

cache.py has the pages, attention.py sends the attention of the model through them, decoder.py decodes a batch.
"""

from paged_mla.attention import DecodeStep, PagedStep, route_attention
from paged_mla.cache import OutOfPagesError, PageAllocator, PagedLatentCache
from paged_mla.decoder import PagedDecoder

__all__ = [
    "DecodeStep",
    "OutOfPagesError",
    "PageAllocator",
    "PagedDecoder",
    "PagedLatentCache",
    "PagedStep",
    "route_attention",
]
