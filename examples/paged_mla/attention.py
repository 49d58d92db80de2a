"""The attention of a DeepSeek-V3 of transformers through flash_mla, by what transformers offers for that.

The model computes its queries, its latents and its output projection as ever. Two things are replaced: `expand_kv`,
which makes keys and values for all heads out of the latents, and the attention function that comes after it. So what
reaches the attention function are latents, which it writes to the paged cache, for a prefill and for a decode step
alike. Then

    prefill  expands them after all, and computes the model's own attention among the tokens of the prompt;
    decode   absorbs the expansion into query and output: W_UK and W_UV are the two parts of the weight of kv_b_proj,

        q·(W_UK c) = (W_UKᵀ q)·c    and    Σ p (W_UV c) = W_UV (Σ p c),

    so that attention is over the latents c themselves, which all heads share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

import flash_mla
from paged_mla.cache import LATENT_DIM, ROPE_DIM

# Not with "flash" in it: for such names transformers wants the package flash-attn.
ATTENTION_NAME = "paged_mla"


@dataclass(frozen=True)
class PagedStep:
    """Where the latents of the tokens of a forward pass go: enough for a prefill, which sees its own tokens only.

    Attributes:
        layers: the cache of each layer, (num_pages, 64, 1, 576) in the dtype of the model.
        slots: (batch_size * seqlen_q,) int64, negative for tokens that are not written.
    """

    layers: Sequence[Tensor]
    slots: Tensor


@dataclass(frozen=True)
class DecodeStep(PagedStep):
    """The same for the newest tokens of every request, which see all that the request has in the cache.

    Attributes:
        block_table: (batch_size, max_pages) int32.
        cache_seqlens: (batch_size,) int32, the new tokens included.
        schedule: of flash_mla.get_mla_metadata(), new in every step: the first layer plans, the others use its plan.
    """

    block_table: Tensor
    cache_seqlens: Tensor
    schedule: flash_mla.FlashMLASchedMeta


def route_attention(model: DeepseekV3ForCausalLM) -> None:
    """Let a model compute its attention from a paged cache, in place.

    From then on its forward needs `paged_step`, position_ids, and use_cache=False, as it is not transformers that has
    the cache. A prefill is of one request, without padding.

    Raises:
        ValueError: latents or RoPE parts have other sizes than those of DeepSeek-V3.
    """
    for name, expected in (("kv_lora_rank", LATENT_DIM), ("qk_rope_head_dim", ROPE_DIM)):
        if (actual := getattr(model.config, name)) != expected:
            raise ValueError(f"model.config.{name} must be {expected}, got {actual}")
    for layer in model.model.layers:
        # The same module, with its parameters and hooks.
        layer.self_attn.__class__ = LatentAttention
    model.set_attn_implementation(ATTENTION_NAME)


class LatentAttention(DeepseekV3Attention):
    """The attention of the model, whose keys and values stay latents up to the attention function."""

    def expand_kv(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        return kv_nope, k_rot


def paged_attention(
    module: LatentAttention,
    query: Tensor,
    kv_c: Tensor,
    k_pe: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    paged_step: PagedStep,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it, where key and value are the latents of the new tokens.

    Args:
        query: (batch_size, num_heads, seqlen_q, 192), 128 values without RoPE and 64 with.
        kv_c: (batch_size, 1, seqlen_q, 512).
        k_pe: (batch_size, 1, seqlen_q, 64), after RoPE.
        attention_mask: None, which transformers gives for attention that it does not know.
        scaling: of the model, its YaRN factor included.

    Returns:
        (batch_size, seqlen_q, num_heads, 128), and None for the attention weights.
    """
    cache = paged_step.layers[module.layer_idx]
    flash_mla.append_mla_kv(kv_c.flatten(0, 2), k_pe.flatten(0, 2), cache, paged_step.slots)
    if isinstance(paged_step, DecodeStep):
        return decode(module, query, cache, paged_step, scaling), None
    key, value = DeepseekV3Attention.expand_kv(module, kv_c, k_pe)
    own_attention = AttentionInterface()["sdpa"]  # causal without a mask
    return own_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def decode(module: LatentAttention, query: Tensor, cache: Tensor, step: DecodeStep, scaling: float) -> Tensor:
    """Attention of the newest tokens over all tokens in the cache; shapes as in `paged_attention`."""
    q_nope, q_pe = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=-1)
    # (num_heads, 128, 512) each: from latents to keys, from latents to values.
    up_projection = module.kv_b_proj.weight.unflatten(0, (query.shape[1], -1))
    w_uk, w_uv = up_projection.split([module.qk_nope_head_dim, module.v_head_dim], dim=1)
    q = torch.cat([torch.einsum("bhsd,hdc->bshc", q_nope, w_uk), q_pe.transpose(1, 2)], dim=-1)
    out, _ = flash_mla.flash_mla_with_kvcache(
        q,
        cache,
        step.block_table,
        step.cache_seqlens,
        module.kv_lora_rank,
        step.schedule,
        None,
        softmax_scale=scaling,
        causal=True,
    )
    return torch.einsum("bshc,hdc->bshd", out, w_uv)


AttentionInterface.register(ATTENTION_NAME, paged_attention)
