"""Float64 reference of the paged decode, and the bounds within which a result counts as right."""

from __future__ import annotations

import torch
from cases import HEAD_DIM_V, PAGE_SIZE, Case
from torch import Tensor

# |actual - expected| <= ATOL + RTOL * |expected| elementwise, for inputs whose values are of the order 0.1 to 1:
# two roundings of bf16 for out; for lse the rounding of float32 sums.
OUT_ATOL, OUT_RTOL = 8e-4, 2.01 / 128
LSE_ATOL, LSE_RTOL = 1e-6, 8.01 / 65536
# Of out as one vector: 1 - 2 <actual, expected> / (|actual|^2 + |expected|^2).
MAX_COSINE_DIFFERENCE = 5e-6
# Of a few rows in bf16: where one key has most of the weight, rounding its probability alone, by up to 2^-8, makes up
# to 2^-17, and rounding out up to 2e-6. Over more rows this averages out.
MAX_COSINE_DIFFERENCE_OF_FEW_ROWS, FEW_ROWS = 2**-17 + 2e-6, 16


def max_cosine_difference(out: Tensor) -> float:
    is_coarse = out.dtype == torch.bfloat16 and out.numel() < FEW_ROWS * HEAD_DIM_V
    return MAX_COSINE_DIFFERENCE_OF_FEW_ROWS if is_coarse else MAX_COSINE_DIFFERENCE


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Attention of every request over its own tokens, in float64 on the device of the case.

    Returns:
        out: (batch_size, seqlen_q, num_heads_q, 512) float64; 0 for rows that see no key.
        lse: (batch_size, num_heads_q, seqlen_q) float64, natural logarithm; +inf for rows that see no key.
    """
    batch_size, seqlen_q, num_heads_q, head_dim = case.q.shape
    num_heads_kv = case.k_cache.shape[2]
    group = num_heads_q // num_heads_kv
    out = torch.zeros(batch_size, seqlen_q, num_heads_q, HEAD_DIM_V, dtype=torch.float64, device=case.q.device)
    lse = torch.full((batch_size, num_heads_q, seqlen_q), float("inf"), dtype=torch.float64, device=case.q.device)
    for request, length in enumerate(case.cache_seqlens.tolist()):
        if length <= 0:
            continue
        pages = case.block_table[request, : -(-length // PAGE_SIZE)].long()
        keys = case.k_cache[pages].reshape(-1, num_heads_kv, head_dim)[:length].double()
        queries = case.q[request].double().unflatten(1, (num_heads_kv, group))
        scores = torch.einsum("qngd,knd->ngqk", queries, keys) * case.softmax_scale
        if case.causal:
            key, query = torch.arange(length, device=keys.device), torch.arange(seqlen_q, device=keys.device)
            scores.masked_fill_(key > length - seqlen_q + query[:, None], float("-inf"))
        sees_a_key = (scores > float("-inf")).any(-1, keepdim=True)
        weights = scores.softmax(-1).where(sees_a_key, 0)
        out[request] = torch.einsum("ngqk,knd->qngd", weights, keys[..., :HEAD_DIM_V]).flatten(1, 2)
        lse[request] = scores.logsumexp(-1).where(sees_a_key[..., 0], float("inf")).flatten(0, 1)
    return out, lse


def assert_close(actual_out: Tensor, actual_lse: Tensor, expected_out: Tensor, expected_lse: Tensor) -> None:
    """Fail unless out and lse are within the bounds above; infinities have to be equal, NaN is never right."""
    _assert_within("lse", actual_lse, expected_lse, LSE_ATOL, LSE_RTOL)
    _assert_within("out", actual_out, expected_out, OUT_ATOL, OUT_RTOL)
    actual = actual_out.double()
    squares = actual.square().sum() + expected_out.square().sum()
    difference = float((actual - expected_out).square().sum() / squares.clamp(min=1e-12))
    allowed = max_cosine_difference(actual_out)
    assert difference <= allowed, f"the cosine difference of out is {difference:.3g}, allowed are {allowed:.3g}"


def _assert_within(name: str, actual: Tensor, expected: Tensor, atol: float, rtol: float) -> None:
    assert actual.shape == expected.shape, f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual = actual.double()
    error = (actual - expected).abs()
    # Written so that NaN is an error; equal infinities have an error of NaN.
    wrong = ~((error <= atol + rtol * expected.abs()) | (actual == expected))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name} is out of bounds in {int(wrong.sum())} of {wrong.numel()} places, first at {list(where)}: "
            f"{float(actual[where])!r}, expected {float(expected[where])!r}"
        )
