"""The shapes that are measured: one list, from which presets are made."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import product
from typing import Any

PAGE_SIZE = 64
HEAD_DIM_K = 576
HEAD_DIM_V = 512

# How the cached lengths of a batch are spread.
UNIFORM = "uniform"  # all equal to seqlen_k
NORMAL = "normal"  # normal distribution with mean seqlen_k and standard deviation seqlen_k / 2, clipped below
ONE_LONG = "one-long"  # the first request has seqlen_k tokens, the others LENGTH_BESIDE_ONE_LONG
LENGTHS = (UNIFORM, NORMAL, ONE_LONG)

LENGTH_BESIDE_ONE_LONG = 1024
LENGTH_SEED = 1


@dataclass(frozen=True, order=True)
class Shape:
    """One decode call: a batch of requests, each with `seqlen_q` query tokens over a paged cache."""

    batch_size: int
    seqlen_q: int
    num_heads_q: int
    seqlen_k: int
    lengths: str = UNIFORM
    causal: bool = False
    dtype: str = "bf16"
    num_heads_kv: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_size", "seqlen_q", "num_heads_q", "seqlen_k", "num_heads_kv"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads_q % self.num_heads_kv:
            raise ValueError(f"num_heads_q={self.num_heads_q} is not a multiple of num_heads_kv={self.num_heads_kv}")
        if self.lengths not in LENGTHS:
            raise ValueError(f"lengths must be one of {', '.join(LENGTHS)}, got {self.lengths!r}")
        if self.dtype not in ("bf16", "fp16"):
            raise ValueError(f"dtype must be bf16 or fp16, got {self.dtype!r}")

    @property
    def name(self) -> str:
        parts = [f"b={self.batch_size}", f"q={self.seqlen_q}", f"h={self.num_heads_q}", f"k={self.seqlen_k}"]
        if self.num_heads_kv != 1:
            parts.append(f"hkv={self.num_heads_kv}")
        if self.lengths != UNIFORM:
            parts.append(_LENGTHS_TO_WORD[self.lengths])
        if self.causal:
            parts.append("causal")
        if self.dtype != "bf16":
            parts.append(self.dtype)
        return ",".join(parts)

    def cache_seqlens(self) -> list[int]:
        """Cached tokens of each request, the same for every library and run."""
        if self.lengths == NORMAL:
            # Always the same standard-normal draws: a longer mean scales the batch and does not reshuffle it.
            draw = random.Random(LENGTH_SEED)
            drawn = [int(draw.normalvariate(self.seqlen_k, self.seqlen_k / 2)) for _ in range(self.batch_size)]
            return [max(length, self.seqlen_q) for length in drawn]
        if self.lengths == ONE_LONG:
            return [self.seqlen_k] + [LENGTH_BESIDE_ONE_LONG] * (self.batch_size - 1)
        return [self.seqlen_k] * self.batch_size

    def num_pages(self) -> list[int]:
        return [-(-length // PAGE_SIZE) for length in self.cache_seqlens()]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Shape:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})


_WORD_TO_LENGTHS = {"varlen": NORMAL, "one-long": ONE_LONG}
_LENGTHS_TO_WORD = {lengths: word for word, lengths in _WORD_TO_LENGTHS.items()}
_KEYS = {"b": "batch_size", "q": "seqlen_q", "h": "num_heads_q", "k": "seqlen_k", "hkv": "num_heads_kv"}


def parse_shape(spec: str) -> Shape:
    """Read what `Shape.name` writes: `b=128,q=2,h=128,k=8192,varlen,causal,fp16`; q defaults to 1."""
    values: dict[str, Any] = {"seqlen_q": 1}
    for part in spec.split(","):
        key, separator, value = part.strip().partition("=")
        if separator and key in _KEYS and value.isdigit():
            values[_KEYS[key]] = int(value)
        elif not separator and key in _WORD_TO_LENGTHS:
            values["lengths"] = _WORD_TO_LENGTHS[key]
        elif not separator and key == "causal":
            values["causal"] = True
        elif not separator and key in ("bf16", "fp16"):
            values["dtype"] = key
        else:
            raise ValueError(
                f"{part!r} in shape {spec!r} is none of b=, q=, h=, k=, hkv= with a number, varlen, one-long, causal, "
                "bf16, fp16"
            )
    missing = [key for key in "bhk" if _KEYS[key] not in values]
    if missing:
        raise ValueError(f"shape {spec!r} lacks {', '.join(missing)}")
    return Shape(**values)


def _first() -> Iterator[Shape]:
    for heads in (16, 128):
        yield Shape(128, 1, heads, 4096)


def _small() -> Iterator[Shape]:
    """A few requests, where launch, latency and the merging of partial results decide."""
    for heads, tokens in product((16, 128), (1024, 4096)):
        yield Shape(1, 1, heads, tokens)
    yield Shape(1, 1, 128, 32768)
    for heads in (16, 128):
        yield Shape(1, 1, heads, 131072)
    for heads in (16, 128):
        yield Shape(4, 1, heads, 8192)
    for heads in (16, 64, 128):
        yield Shape(16, 1, heads, 4096)
    yield Shape(16, 2, 128, 4096)
    for heads in (16, 128):
        yield Shape(32, 1, heads, 1024)
    yield Shape(1, 4, 128, 8192)


def _small_more() -> Iterator[Shape]:
    """What lies between the shapes of `small`: odd batches, head counts and lengths, and mixed lengths."""
    for heads in (8, 24, 32, 64, 96):
        yield Shape(1, 1, heads, 4096)
    for batch, heads, tokens in [(2, 16, 3001), (3, 128, 2049), (5, 8, 12345), (7, 64, 777), (11, 128, 5000)]:
        yield Shape(batch, 1, heads, tokens)
    for batch, heads, tokens in [(13, 32, 1500), (24, 16, 2047), (27, 96, 1999), (9, 16, 30000), (1, 16, 500000)]:
        yield Shape(batch, 1, heads, tokens)
    for heads in (16, 128):
        yield Shape(16, 1, heads, 131072, lengths=ONE_LONG)
        yield Shape(16, 1, heads, 4096, lengths=NORMAL)
        yield Shape(8, 2, heads, 4096, causal=True)
    yield Shape(2, 4, 16, 4096, causal=True)
    yield Shape(16, 16, 16, 4096, causal=True)


def _compute() -> Iterator[Shape]:
    """128 heads and a full GPU: the tensor cores decide."""
    for seqlen_q, tokens in product((1, 2), (4096, 8192, 16384, 32768)):
        yield Shape(128, seqlen_q, 128, tokens, lengths=NORMAL)
    for seqlen_q, tokens, batch in product((1, 2), (4096, 8192, 16384, 32768), (64, 128, 132)):
        yield Shape(batch, seqlen_q, 128, tokens)
    for lengths, tokens in product((NORMAL, UNIFORM), (4096, 8192, 16384, 32768)):
        yield Shape(128, 2, 128, tokens, lengths=lengths, causal=True)
    for batch in (64, 132):
        yield Shape(batch, 1, 128, 8192, lengths=NORMAL)


def _memory() -> Iterator[Shape]:
    """Few heads and much cache: the memory bandwidth decides."""
    sizes = [(16, 32768), (64, 8192), (128, 4096), (128, 16384)]
    for heads, (batch, tokens) in product((16, 32, 64), sizes):
        yield Shape(batch, 1, heads, tokens)
    for heads, tokens in product((16, 32, 64), (4096, 16384)):
        yield Shape(128, 1, heads, tokens, lengths=NORMAL)


def _queries() -> Iterator[Shape]:
    """Several query tokens, each beside the single-query shape that has as many rows."""
    for seqlen_q in (2, 4, 8):
        yield Shape(128, seqlen_q, 16, 4096)
        yield Shape(128, 1, 16 * seqlen_q, 4096)
    for seqlen_q in (2, 4):
        yield Shape(64, seqlen_q, 128, 8192)
        yield Shape(64, 1, 128 * seqlen_q, 8192)


def _fp16() -> Iterator[Shape]:
    for seqlen_q, tokens in product((1, 2), (4096, 16384)):
        yield Shape(128, seqlen_q, 128, tokens, lengths=NORMAL, dtype="fp16")
        yield Shape(128, seqlen_q, 128, tokens, dtype="fp16")
    for heads in (16, 64):
        yield Shape(128, 1, heads, 4096, dtype="fp16")
        yield Shape(128, 1, heads, 16384, dtype="fp16")
    yield Shape(1, 1, 128, 4096, dtype="fp16")


def _anchors() -> Iterator[Shape]:
    """The dense shapes of which the times of other libraries were known before this package existed."""
    yield from _small()
    for heads, (batch, tokens) in product((16, 32, 64), [(16, 32768), (64, 8192), (128, 4096), (128, 16384)]):
        yield Shape(batch, 1, heads, tokens)
    yield Shape(128, 1, 16, 4096, lengths=NORMAL)
    for seqlen_q, tokens in product((1, 2), (4096, 8192, 16384, 32768)):
        yield Shape(128, seqlen_q, 128, tokens, lengths=NORMAL)
    yield Shape(128, 2, 128, 8192, lengths=NORMAL, causal=True)
    yield Shape(132, 1, 128, 4096)
    yield Shape(64, 1, 128, 8192)


def _sweep() -> Iterator[Shape]:
    """For the plots of time against batch size and against context."""
    for heads, batch in product((16, 128), (1, 2, 4, 8, 16, 32, 64, 128, 256)):
        yield Shape(batch, 1, heads, 4096)
    for heads, tokens in product((16, 128), (1024, 2048, 8192, 16384, 32768, 65536, 131072)):
        yield Shape(1, 1, heads, tokens)
    for heads, tokens in product((16, 128), (1024, 2048, 8192, 16384)):
        yield Shape(32, 1, heads, tokens)


def unique(shapes: Iterable[Shape]) -> list[Shape]:
    return list(dict.fromkeys(shapes))


PRESETS: dict[str, list[Shape]] = {
    "first": unique(_first()),
    "small": unique(_small()),
    "small-more": unique(_small_more()),
    "compute": unique(_compute()),
    "memory": unique(_memory()),
    "queries": unique(_queries()),
    "fp16": unique(_fp16()),
    "large": unique([*_compute(), *_memory(), *_queries(), *_fp16()]),
    "anchors": unique(_anchors()),
    "sweep": unique(_sweep()),
}


def select_shapes(selections: Iterable[str]) -> list[Shape]:
    """Shapes named by presets and by single shapes as `parse_shape` reads them, in that order, each once."""
    selected: list[Shape] = []
    for selection in selections:
        if selection in PRESETS:
            selected += PRESETS[selection]
        elif "=" in selection:
            selected.append(parse_shape(selection))
        else:
            raise ValueError(
                f"{selection!r} is neither a preset ({', '.join(PRESETS)}) nor a shape such as b=1,h=16,k=4096"
            )
    return unique(selected)
