"""Attention kernels for Multi-head Latent Attention (MLA) on Hopper GPUs, with a CPU implementation of the same ops."""

from flash_mla._version import __version__
from flash_mla.cache import append_mla_kv, bytes_per_token, gather_mla_kv, max_cached_tokens, mha_bytes_per_token
from flash_mla.extension import is_available, unavailable_reason, warn_of_rival
from flash_mla.interface import (
    decode_workspace_bytes,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    flash_mla_with_kvcache_fp8,
    get_mla_decoding_metadata,
    get_mla_metadata,
    get_mla_metadata_dense_fp8,
)
from flash_mla.merge import merge_attention_states
from flash_mla.plan import FlashMLASchedMeta

__all__ = [
    "FlashMLASchedMeta",
    "__version__",
    "append_mla_kv",
    "bytes_per_token",
    "decode_workspace_bytes",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "flash_mla_with_kvcache_fp8",
    "gather_mla_kv",
    "get_mla_decoding_metadata",
    "get_mla_metadata",
    "get_mla_metadata_dense_fp8",
    "is_available",
    "max_cached_tokens",
    "merge_attention_states",
    "mha_bytes_per_token",
    "unavailable_reason",
]

warn_of_rival()
