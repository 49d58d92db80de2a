"""Merging attention over disjoint sets of keys, for context parallelism and for prefixes that requests share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_mla.checks import ANY_SIZE, check_dtype, check_on_device, check_shape, check_tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OUT_SHAPE = "(batch_size, seqlen_q, num_heads_q, head_dim_v)"
_LSE_SHAPE = "(batch_size, num_heads_q, seqlen_q)"


def merge_attention_states(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from the results for shards of them: the log-sum-exp merge of Flash-Decoding and of
    cascade inference.

        lse = log(sum_i exp(lses[i]))
        out = sum_i exp(lses[i] - lse) * outs[i]

    A row whose LSE is +inf or -inf saw no key of that shard: `flash_mla_with_kvcache` gives +inf, other libraries give
    -inf. Such a row has no weight, whatever its output holds, NaN included.

    Sums are in float32 and in the order of the shards, so that the same shards give the same bits; the output is
    rounded once. A row that saw keys of one shard only is that shard's, bit for bit. An LSE of NaN gives NaN.

    Args:
        outs: the output for each shard, (batch_size, seqlen_q, num_heads_q, head_dim_v) in bfloat16, float16 or
            float32, the same for all: a list or tuple, or one tensor with the shards as first dimension. Any strides.
        lses: the LSE for each shard, (batch_size, num_heads_q, seqlen_q) float32, natural logarithm: in the same order,
            a list or tuple, or one tensor with the shards as first dimension. Any strides.

    Returns:
        out: (batch_size, seqlen_q, num_heads_q, head_dim_v) in the dtype of outs, contiguous.
        lse: (batch_size, num_heads_q, seqlen_q) float32, contiguous.
        Rows that saw no key of any shard have out 0 and lse +inf.

    Raises:
        TypeError: an argument is not made of tensors, or has the wrong dtype, or dtypes differ among outs.
        ValueError: there are no shards, the number of lses is not that of outs, or a shape or device is wrong.
    """
    outs, lses = _shards("outs", outs, _OUT_SHAPE), _shards("lses", lses, _LSE_SHAPE)
    _check_shards(outs, lses)

    lses = [lse.masked_fill(lse.isinf(), float("-inf")) for lse in lses]
    largest = torch.stack(lses).amax(0)
    no_key = largest == float("-inf")
    # Where there is no key at all, -inf - -inf would be NaN.
    largest = largest.masked_fill(no_key, 0)
    weights = [(lse - largest).exp() for lse in lses]
    total = torch.zeros_like(largest)
    for weight in weights:
        total = total + weight
    divisor = total.masked_fill(no_key, 1)

    merged = torch.zeros(outs[0].shape, dtype=torch.float32, device=outs[0].device)
    for out, lse, weight in zip(outs, lses, weights, strict=True):
        # A weight of 0 does not hide NaN.
        used = out.float().masked_fill(_per_row_of_out(lse == float("-inf")), 0)
        merged = merged + used * _per_row_of_out(weight / divisor)
    lse = (largest + total.log()).masked_fill(no_key, float("inf"))
    return merged.to(outs[0].dtype).contiguous(), lse.contiguous()


def _per_row_of_out(tensor: Tensor) -> Tensor:
    """(batch_size, num_heads_q, seqlen_q) as (batch_size, seqlen_q, num_heads_q, 1)."""
    return tensor.transpose(1, 2).unsqueeze(-1)


def _shards(name: str, value: Sequence[Tensor] | Tensor, shape_of_shard: str) -> list[Tensor]:
    """The shards as a list, each a tensor."""
    if isinstance(value, Tensor):
        meaning = f"(num_shards, {shape_of_shard[1:]}"
        check_shape(name, value, meaning, [ANY_SIZE] * (meaning.count(",") + 1))
        shards = list(value.unbind())
    elif isinstance(value, (list, tuple)):
        shards = list(value)
    else:
        raise TypeError(f"{name} must be a list or tuple of tensors, or one tensor, got {type(value).__name__}")
    if not shards:
        raise ValueError(f"{name} must have at least one shard, got none")
    for index, shard in enumerate(shards):
        check_tensor(f"{name}[{index}]", shard)
    return shards


def _check_shards(outs: list[Tensor], lses: list[Tensor]) -> None:
    """Raise TypeError or ValueError unless these shards can be merged."""
    if len(lses) != len(outs):
        raise ValueError(f"lses must have as many shards as outs = {len(outs)}, got {len(lses)}")
    first = outs[0]
    if first.dtype not in _DTYPES:
        raise TypeError(f"outs[0] must have dtype torch.bfloat16, torch.float16 or torch.float32, got {first.dtype}")
    check_shape("outs[0]", first, _OUT_SHAPE, [ANY_SIZE] * 4)
    batch_size, seqlen_q, num_heads_q, _ = first.shape
    for argument, shards, dtype, meaning, sizes in (
        ("outs", outs, first.dtype, _OUT_SHAPE, first.shape),
        ("lses", lses, torch.float32, _LSE_SHAPE, (batch_size, num_heads_q, seqlen_q)),
    ):
        for index, shard in enumerate(shards):
            name = f"{argument}[{index}]"
            check_dtype(name, shard, dtype)
            check_shape(name, shard, meaning, sizes)
            check_on_device(name, shard, first.device, "outs[0]")
