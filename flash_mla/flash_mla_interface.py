"""The names that SGLang and early callers import from `flash_mla.flash_mla_interface`."""

from flash_mla.interface import (
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    flash_mla_with_kvcache_fp8,
    get_mla_decoding_metadata,
    get_mla_metadata,
    get_mla_metadata_dense_fp8,
)
from flash_mla.plan import FlashMLASchedMeta

__all__ = [
    "FlashMLASchedMeta",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "flash_mla_with_kvcache_fp8",
    "get_mla_decoding_metadata",
    "get_mla_metadata",
    "get_mla_metadata_dense_fp8",
]
