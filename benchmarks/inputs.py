"""Tensors of a shape, and the float64 result that they must give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.model import cache_bytes, num_cache_copies
from benchmarks.shapes import HEAD_DIM_K, HEAD_DIM_V, PAGE_SIZE, Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SOFTMAX_SCALE = HEAD_DIM_K**-0.5

# Queries have 1. Probabilities are rounded to bf16 by all libraries; with keys of 1 that alone exceeds the bounds where
# a request has few tokens.
KEY_STD = 0.1

# Bounds on out and on the log-sum-exp: |actual - expected| <= ATOL + RTOL * |expected|.
OUT_ATOL, OUT_RTOL = 8e-4, 2.01 / 128
LSE_ATOL, LSE_RTOL = 1e-6, 8.01 / 65536


@dataclass(frozen=True)
class Inputs:
    shape: Shape
    q: Tensor  # (batch_size, seqlen_q, num_heads_q, 576)
    caches: list[Tensor]  # copies of (num_pages, 64, num_heads_kv, 576) with different contents, used in turn
    block_table: Tensor  # (batch_size, max_pages) int32; entries beyond a request's pages are 0
    cache_seqlens: Tensor  # (batch_size,) int32
    lengths: list[int]  # the same on the host
    page_indices: Tensor  # (num_pages,) int32: the rows of the block table one after another, without their ends
    page_offsets: Tensor  # (batch_size + 1,) int32: where each row begins in page_indices
    softmax_scale: float = SOFTMAX_SCALE


class CachePool:
    """Random latents made once; the caches of all shapes are views of them."""

    def __init__(self, device: torch.device, l2_bytes: int):
        self.device = device
        self.l2_bytes = l2_bytes
        self._elements: dict[str, Tensor] = {}

    def num_copies(self, shape: Shape) -> int:
        return num_cache_copies(cache_bytes(shape), self.l2_bytes)

    def reserve(self, shapes: list[Shape]) -> None:
        """Make room for the largest of the shapes, so that the pool is filled once."""
        for dtype in {shape.dtype for shape in shapes}:
            self._random(dtype, max(self._num_elements(shape) for shape in shapes if shape.dtype == dtype))

    def inputs(self, shape: Shape) -> Inputs:
        num_pages = sum(shape.num_pages())
        copies = self.num_copies(shape)
        elements = self._random(shape.dtype, self._num_elements(shape))[: self._num_elements(shape)]
        pages = elements.view(copies, num_pages, PAGE_SIZE, shape.num_heads_kv, HEAD_DIM_K)

        generator = torch.Generator(self.device).manual_seed(num_pages)
        page_indices = torch.randperm(num_pages, generator=generator, device=self.device, dtype=torch.int32)
        pages_of_request = torch.tensor(shape.num_pages(), device=self.device)
        page_offsets = torch.zeros(shape.batch_size + 1, dtype=torch.int64, device=self.device)
        page_offsets[1:] = pages_of_request.cumsum(0)
        column = torch.arange(max(shape.num_pages()), device=self.device)
        position = (page_offsets[:-1, None] + column).clamp(max=num_pages - 1)
        table = torch.where(column < pages_of_request[:, None], page_indices[position], 0)

        q_shape = (shape.batch_size, shape.seqlen_q, shape.num_heads_q, HEAD_DIM_K)
        q = torch.empty(q_shape, dtype=DTYPES[shape.dtype], device=self.device).normal_(generator=generator)
        lengths = shape.cache_seqlens()
        return Inputs(
            shape=shape,
            q=q,
            caches=list(pages),
            block_table=table.to(torch.int32),
            cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            lengths=lengths,
            page_indices=page_indices,
            page_offsets=page_offsets.to(torch.int32),
        )

    def _num_elements(self, shape: Shape) -> int:
        return self.num_copies(shape) * cache_bytes(shape) // DTYPES[shape.dtype].itemsize

    def _random(self, dtype: str, size: int) -> Tensor:
        if dtype not in self._elements or self._elements[dtype].numel() < size:
            self._elements.pop(dtype, None)
            self._elements[dtype] = torch.empty(size, dtype=DTYPES[dtype], device=self.device).normal_(std=KEY_STD)
        return self._elements[dtype]


def sampled_requests(lengths: list[int]) -> list[int]:
    """Requests to check: the first, the last, a shortest and a longest."""
    order = range(len(lengths))
    return sorted({0, len(lengths) - 1, min(order, key=lengths.__getitem__), max(order, key=lengths.__getitem__)})


def expected_result(inputs: Inputs, request: int, copy: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 out (seqlen_q, num_heads_q, 512) and log-sum-exp (num_heads_q, seqlen_q) of one request."""
    shape, length = inputs.shape, inputs.lengths[request]
    pages = inputs.block_table[request, : -(-length // PAGE_SIZE)].long()
    keys = inputs.caches[copy][pages].flatten(0, 1)[:length].double()  # (length, num_heads_kv, 576)
    group = shape.num_heads_q // shape.num_heads_kv
    queries = inputs.q[request].double().unflatten(1, (shape.num_heads_kv, group))
    scores = torch.einsum("ihgd,jhd->hgij", queries, keys) * inputs.softmax_scale
    if shape.causal:
        row = torch.arange(shape.seqlen_q, device=keys.device)[:, None]
        column = torch.arange(length, device=keys.device)
        scores.masked_fill_(column > length - shape.seqlen_q + row, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num()
    out = torch.einsum("hgij,jhd->ihgd", weights, keys[..., :HEAD_DIM_V]).flatten(1, 2)
    return out, lse.flatten(0, 1).masked_fill(lse.flatten(0, 1) == float("-inf"), float("inf"))


def largest_excess(actual: Tensor, expected: Tensor, atol: float, rtol: float) -> float:
    """Largest |actual - expected| / (atol + rtol·|expected|): at most 1 if within bounds, infinite for NaN."""
    error = (actual.to(expected.dtype) - expected).abs()
    error = torch.where(actual == expected, 0.0, error)  # equal infinities
    return (error / (atol + rtol * expected.abs())).nan_to_num(float("inf"), float("inf")).max().item()


def check_result(inputs: Inputs, out: Tensor, lse: Tensor | None) -> tuple[float, str | None]:
    """Largest |out - expected| over the sampled requests, and what is wrong, if anything is."""
    max_error = 0.0
    for request in sampled_requests(inputs.lengths):
        expected_out, expected_lse = expected_result(inputs, request)
        max_error = max(max_error, (out[request].double() - expected_out).abs().max().nan_to_num(float("inf")).item())
        excess = largest_excess(out[request], expected_out, OUT_ATOL, OUT_RTOL)
        if excess > 1:
            return max_error, f"out of request {request} exceeds its error bound {excess:.3g} times"
        if lse is not None:
            excess = largest_excess(lse[request], expected_lse, LSE_ATOL, LSE_RTOL)
            if excess > 1:
                return max_error, f"lse of request {request} exceeds its error bound {excess:.3g} times"
    return max_error, None


def compare_results(first: Tensor, second: Tensor) -> str | None:
    """What is wrong if two libraries' outputs for all requests differ by more than both may be off."""
    excess = largest_excess(second.float(), first.float(), 2 * OUT_ATOL, 2 * OUT_RTOL)
    return f"the outputs differ by {excess:.3g} times the bound" if excess > 1 else None
