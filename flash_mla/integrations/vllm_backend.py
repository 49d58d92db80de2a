"""vLLM's attention backend FLASHMLA with the dense decode of this package.

Imported by vLLM, through the path that `vllm.register` gives it. The classes extend those of vLLM's own backend, which
keeps what this package has no kernels for: with an fp8 cache its plan and its kernels are used. Prefill is vLLM's.

Under CUDA graphs the plan is made on the device inside the first decode call of a step, so that it is captured with it:
there are no persistent buffers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import vllm
from torch import Tensor

from flash_mla import extension
from flash_mla.checks import DTYPES, HEAD_DIM
from flash_mla.integrations.plugin import DISABLING_VARIABLE, log_first_use
from flash_mla.integrations.vllm import log
from flash_mla.interface import flash_mla_with_kvcache, get_mla_metadata

_DOES_NOT_FIT = (
    f"flash_mla does not fit vLLM {vllm.__version__} ({{}}); {DISABLING_VARIABLE}=1 keeps vLLM's own backend"
)

try:
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.attention.backends.mla import flashmla
    from vllm.v1.attention.backends.mla.flashmla import FlashMLADecodeMetadata, FlashMLAMetadata
    from vllm.v1.attention.backends.utils import reshape_attn_output_for_spec_decode, reshape_query_for_spec_decode
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache
except ImportError as _error:
    raise ImportError(_DOES_NOT_FIT.format(_error)) from _error


def _require_parameters(function: Callable[..., Any], *names: str) -> None:
    """Raise ImportError, which vLLM reports as the reason, where a method to extend has changed."""
    parameters = inspect.signature(function).parameters
    if missing := [name for name in names if name not in parameters]:
        raise ImportError(_DOES_NOT_FIT.format(f"{function.__qualname__} has no parameter {', '.join(missing)}"))


_require_parameters(
    flashmla.FlashMLAMetadataBuilder._build_decode, "block_table_tensor", "seq_lens_device", "dcp_tot_seq_lens_device"
)
_require_parameters(FlashMLADecodeMetadata, "block_table", "seq_lens", "dcp_tot_seq_lens", "scheduler_metadata")
_require_parameters(flashmla.FlashMLAImpl.forward_mqa, "q", "kv_c_and_k_pe_cache", "attn_metadata", "layer")


class FlashMLABackend(flashmla.FlashMLABackend):
    """What vLLM asks before it chooses a backend, and the classes to use then."""

    @staticmethod
    def get_builder_cls() -> type[FlashMLAMetadataBuilder]:
        return FlashMLAMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[FlashMLAImpl]:
        return FlashMLAImpl

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [HEAD_DIM]

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return tuple(capability) == extension.COMPUTE_CAPABILITY

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any, **named_others: Any
    ) -> str | None:
        """Why this combination cannot be served, None if it can."""
        if kv_cache_dtype is not None and is_quantized_kv_cache(kv_cache_dtype):
            return super().supports_combination(head_size, dtype, kv_cache_dtype, *others, **named_others)
        if kv_cache_dtype not in (None, "auto", str(dtype).removeprefix("torch.")):
            return f"kv_cache_dtype must be that of the model, {dtype}, got {kv_cache_dtype}"
        return None


class FlashMLAMetadataBuilder(flashmla.FlashMLAMetadataBuilder):
    """Metadata of a step: for the dense decode, a schedule that the first layer fills."""

    def _build_decode(self, **arguments: Any) -> FlashMLADecodeMetadata:
        """Called by vLLM with block_table_tensor (batch_size, max_blocks) int32, seq_lens_device (batch_size,) int32,
        dcp_tot_seq_lens_device (batch_size,) int32 or None, and more that is only for vLLM's own plan."""
        if self.kv_cache_spec.dtype not in DTYPES:
            return super()._build_decode(**arguments)
        schedule, _ = get_mla_metadata()
        return FlashMLADecodeMetadata(
            block_table=arguments["block_table_tensor"],
            seq_lens=arguments["seq_lens_device"],
            dcp_tot_seq_lens=arguments["dcp_tot_seq_lens_device"],
            scheduler_metadata=schedule,
        )


class FlashMLAImpl(flashmla.FlashMLAImpl):
    """Attention of one layer; vLLM's own with an fp8 cache."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **mla_args: Any,
    ) -> None:
        self.is_dense = not is_quantized_kv_cache(kv_cache_dtype)
        # FlashMLAImpl's own constructor requires vLLM's kernels, which only the fp8 cache needs.
        initialize = super(flashmla.FlashMLAImpl, self).__init__ if self.is_dense else super().__init__
        initialize(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            **mla_args,
        )
        unsupported = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            "logits_soft_cap": logits_soft_cap,
        }
        for name, value in unsupported.items():
            if value:
                raise NotImplementedError(f"{name} must be None: FLASHMLA has full attention only, got {value}")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"attn_type must be {AttentionType.DECODER}, got {attn_type}")
        if self.is_dense:
            log_first_use("vLLM", log)

    def forward_mqa(
        self,
        q: Tensor | tuple[Tensor, Tensor],
        kv_c_and_k_pe_cache: Tensor,
        attn_metadata: FlashMLAMetadata,
        layer: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Decode all requests of a step that have the same number of query tokens.

        Args:
            q: (num_tokens, num_heads, 576), or its (..., 512) latent and (..., 64) RoPE part; the tokens of a request
                are consecutive, num_tokens = batch_size * seqlen_q.
            kv_c_and_k_pe_cache: (num_blocks, 64, 576), dtype of q; blocks may be any distance apart.
            attn_metadata: of this step.
            layer: for vLLM's own kernels.

        Returns:
            out: (num_tokens, num_heads, 512) in the dtype of q.
            lse: (num_tokens, num_heads) float32, natural logarithm, with decode context parallelism; otherwise as the
                kernel gives it, (batch_size, num_heads, seqlen_q), and unused.
        """
        if not self.is_dense:
            return super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        decode = attn_metadata.decode
        out, lse = flash_mla_with_kvcache(
            reshape_query_for_spec_decode(q, attn_metadata.num_decodes),
            kv_c_and_k_pe_cache.unsqueeze(2),
            decode.block_table,
            decode.seq_lens,
            self.kv_lora_rank,
            decode.scheduler_metadata,
            softmax_scale=self.scale,
            causal=True,
        )
        if self.need_to_return_lse_for_decode:
            lse = lse.transpose(1, 2).flatten(0, 1)
        return reshape_attn_output_for_spec_decode(out), lse
