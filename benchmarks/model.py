"""What a decode must at least do: bytes, floating-point operations, and the time they take at the machine's rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.shapes import HEAD_DIM_K, HEAD_DIM_V, PAGE_SIZE, Shape

ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Rates:
    """What the machine was seen to sustain in the same run."""

    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Work:
    """The least work of a call: every cached token read once, q read once, out written once."""

    num_bytes: int
    num_flops: int

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return self.num_flops / self.num_bytes

    def floor_us(self, rates: Rates) -> float:
        """No kernel is faster, up to what the rates' own measurement left out."""
        return 1e6 * max(self.num_bytes / rates.read_bytes_per_s, self.num_flops / rates.flops_per_s)

    def is_memory_bound(self, rates: Rates) -> bool:
        return self.num_bytes / rates.read_bytes_per_s >= self.num_flops / rates.flops_per_s

    def tflops_per_s(self, time_us: float) -> float:
        return self.num_flops / time_us / 1e6

    def gbytes_per_s(self, time_us: float) -> float:
        return self.num_bytes / time_us / 1e3


def visible_pairs(length: int, seqlen_q: int, causal: bool) -> int:
    """Pairs of a query token and a cached token that it sees, of one request; bottom-right aligned if causal."""
    if not causal:
        return length * seqlen_q
    rows = min(seqlen_q, length)
    return rows * length - rows * (rows - 1) // 2


def decode_work(shape: Shape) -> Work:
    lengths = shape.cache_seqlens()
    pairs = sum(visible_pairs(length, shape.seqlen_q, shape.causal) for length in lengths)
    cached = sum(lengths) * shape.num_heads_kv * HEAD_DIM_K
    rows = shape.batch_size * shape.seqlen_q * shape.num_heads_q
    return Work(
        num_bytes=ELEMENT_BYTES * (cached + rows * (HEAD_DIM_K + HEAD_DIM_V)),
        num_flops=2 * pairs * shape.num_heads_q * (HEAD_DIM_K + HEAD_DIM_V),
    )


def cache_bytes(shape: Shape) -> int:
    """Bytes of one cache with whole pages."""
    return ELEMENT_BYTES * sum(shape.num_pages()) * PAGE_SIZE * shape.num_heads_kv * HEAD_DIM_K


def num_cache_copies(cache_bytes: int, l2_bytes: int, l2_multiple: float = 3.0) -> int:
    """Copies to rotate over, so that a copy has left the L2 cache when its turn comes again."""
    return max(1, math.ceil(l2_multiple * l2_bytes / cache_bytes))


def geometric_mean(values: Iterable[float]) -> float:
    logarithms = [math.log(value) for value in values]
    if not logarithms:
        raise ValueError("the geometric mean of nothing is undefined")
    return math.exp(sum(logarithms) / len(logarithms))
