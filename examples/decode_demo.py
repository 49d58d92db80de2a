"""Decode a batch of requests of different lengths from a paged latent cache.

Each step appends a token to every request, plans the attention once, and calls it once per layer, as a model would.
Queries and latents are random: what the demo shows is the cache, the calls, their speed, and that the result is right.

    python examples/decode_demo.py --help
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence

import torch

import flash_mla

PAGE_SIZE = 64
LATENT_DIM = 512  # also the size of the values, which are the latent part of the keys
ROPE_DIM = 64
KEY_DIM = LATENT_DIM + ROPE_DIM
SOFTMAX_SCALE = (128 + ROPE_DIM) ** -0.5  # from the head size before the projections are absorbed

KEY_STD = 0.1  # with unit size the rounding of probabilities to bf16 alone could exceed the bound below

# What the output and the log-sum-exp may be off: |actual - expected| <= ATOL + RTOL * |expected|.
OUT_ATOL, OUT_RTOL = 8e-4, 2.01 / 128
LSE_ATOL, LSE_RTOL = 1e-6, 8.01 / 65536

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PagedLatentCache:
    """Latents of all layers, in pages of 64 tokens that a block table scatters."""

    def __init__(self, num_layers: int, batch_size: int, max_tokens: int, dtype: torch.dtype, device: torch.device):
        pages_per_request = math.ceil(max_tokens / PAGE_SIZE)
        num_pages = batch_size * pages_per_request
        # Memory that no token has been written to is NaN here, so that reading it could not go unnoticed.
        shape = (num_layers, num_pages, PAGE_SIZE, 1, KEY_DIM)
        self.pages = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.free_pages = torch.randperm(num_pages).tolist()
        self.block_table = torch.full((batch_size, pages_per_request), -1, dtype=torch.int32)
        self.lengths = [0] * batch_size
        self.device = device

    def reserve(self, request: int, num_tokens: int) -> torch.Tensor:
        """Lengthen a request, allocating pages as needed, and return the slots of its new tokens."""
        begin, end = self.lengths[request], self.lengths[request] + num_tokens
        for index in range(math.ceil(begin / PAGE_SIZE), math.ceil(end / PAGE_SIZE)):
            self.block_table[request, index] = self.free_pages.pop()
        self.lengths[request] = end
        positions = torch.arange(begin, end)
        return self.block_table[request, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE

    def gather(self, layer: int, request: int) -> torch.Tensor:
        """All tokens of one request in order, (length, 576)."""
        row = self.block_table[request : request + 1].to(self.device)
        length = torch.tensor([self.lengths[request]], dtype=torch.int32, device=self.device)
        return flash_mla.gather_mla_kv(self.pages[layer], row, length, self.lengths[request])[0]


def reference(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention of one request: q (heads, 576), keys (length, 576) -> out (heads, 512), lse (heads,)."""
    scores = q.double() @ keys.double().T * SOFTMAX_SCALE
    return scores.softmax(dim=-1) @ keys[:, :LATENT_DIM].double(), scores.logsumexp(dim=-1)


def compare(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> tuple[float, bool]:
    error = (actual.double() - expected).abs()
    return error.max().item(), bool((error <= atol + rtol * expected.abs()).all())


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def find_gpu() -> torch.device:
    """The first GPU that the kernels run on; there is one if flash_mla.is_available()."""
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return torch.device("cuda", capabilities.index((9, 0)))


def choose_device(requested: str) -> torch.device:
    """The device to decode on. Raises ValueError for one that cannot be used."""
    reason = flash_mla.unavailable_reason()
    if requested == "auto":
        print("Decoding on the GPU" if reason is None else f"Decoding on the CPU: {reason}", flush=True)
        return find_gpu() if reason is None else torch.device("cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ValueError(f"must be auto, cpu or cuda, got {requested!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"must be auto, cpu or cuda, got {requested!r}")
    if device.type == "cuda" and reason is not None:
        raise ValueError(f"cannot be {requested}: {reason}")
    if device.index is not None and device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"cannot be {requested}: torch sees {count(torch.cuda.device_count(), 'GPU')}")
    return find_gpu() if device == torch.device("cuda") else device


# Sizes for a GPU and for a CPU.
DEFAULTS = {"batch": (128, 4), "tokens": (8192, 700), "layers": (4, 2), "steps": (32, 8), "heads": (128, 16)}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: an sm_90 GPU if there is one")
    parser.add_argument("--batch", type=int, help="requests (128 on a GPU, 4 on a CPU)")
    parser.add_argument("--tokens", type=int, help="cached tokens of the longest request at the start (8192 or 700)")
    parser.add_argument("--layers", type=int, help="layers, each with its own cache (4 or 2)")
    parser.add_argument("--steps", type=int, help="tokens to decode (32 or 8)")
    parser.add_argument("--heads", type=int, help="query heads (128 or 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args(arguments)
    for name in DEFAULTS:
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"argument --{name}: must be at least 1, got {value}")
    try:
        options.device = choose_device(options.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    for name, (for_gpu, for_cpu) in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, for_gpu if options.device.type == "cuda" else for_cpu)
    return options


class Demo:
    """A batch of requests, their caches, and what a model would do with them in every step."""

    def __init__(self, options: argparse.Namespace):
        self.device, self.dtype = options.device, DTYPES[options.dtype]
        self.batch_size, self.num_layers, self.num_heads = options.batch, options.layers, options.heads
        max_tokens = options.tokens + options.steps
        self.cache = PagedLatentCache(self.num_layers, self.batch_size, max_tokens, self.dtype, self.device)
        for request in range(self.batch_size):
            # From a quarter of the longest request's length up to all of it.
            share = (self.batch_size + 3 * (request + 1)) / (4 * self.batch_size)
            self.append([request], max(1, int(options.tokens * share)))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def append(self, requests: Iterable[int], num_tokens: int) -> None:
        """Give these requests so many more tokens, in all layers."""
        slots = torch.cat([self.cache.reserve(request, num_tokens) for request in requests]).to(self.device)
        for layer in range(self.num_layers):
            kv_c, k_pe = (self.random(len(slots), KEY_DIM) * KEY_STD).split([LATENT_DIM, ROPE_DIM], dim=1)
            flash_mla.append_mla_kv(kv_c, k_pe, self.cache.pages[layer], slots)

    def decode(self, queries: list[torch.Tensor]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], float]:
        """The attention of all layers, and the seconds it took per layer."""
        block_table = self.cache.block_table.to(self.device)
        cache_seqlens = torch.tensor(self.cache.lengths, dtype=torch.int32, device=self.device)
        self.synchronize()
        begin = time.perf_counter()
        # The first layer's call makes the plan, the other layers use it.
        metadata, num_splits = flash_mla.get_mla_metadata()
        results = [
            flash_mla.flash_mla_with_kvcache(
                q, pages, block_table, cache_seqlens, LATENT_DIM, metadata, num_splits, SOFTMAX_SCALE, causal=True
            )
            for q, pages in zip(queries, self.cache.pages, strict=True)
        ]
        self.synchronize()
        return results, (time.perf_counter() - begin) / self.num_layers

    def step(self, number: int) -> tuple[float, float, bool]:
        """Decode one token; returns seconds per layer, the error of one request in one layer, and if it is right."""
        self.append(range(self.batch_size), 1)
        queries = [self.random(self.batch_size, 1, self.num_heads, KEY_DIM) for _ in range(self.num_layers)]
        results, seconds = self.decode(queries)
        layer, request = number % self.num_layers, number % self.batch_size
        out, lse = results[layer]
        expected_out, expected_lse = reference(queries[layer][request, 0], self.cache.gather(layer, request))
        error, out_is_right = compare(out[request, 0], expected_out, OUT_ATOL, OUT_RTOL)
        _, lse_is_right = compare(lse[request, :, 0], expected_lse, LSE_ATOL, LSE_RTOL)
        return seconds, error, out_is_right and lse_is_right


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    torch.manual_seed(0)
    print(f"Filling the caches of {count(options.layers, 'layer')} for {count(options.batch, 'request')}", flush=True)
    demo = Demo(options)
    times, errors, verdicts = [], [], []
    for number in range(1, options.steps + 1):
        seconds, error, is_right = demo.step(number)
        times.append(seconds)
        errors.append(error)
        verdicts.append(is_right)
        print(
            f"step {number:{len(str(options.steps))}}/{options.steps}  {sum(demo.cache.lengths):8d} cached tokens  "
            f"{seconds * 1e6:9.1f} µs per layer  {'ok' if is_right else 'WRONG'}",
            flush=True,
        )

    seconds = statistics.median(times)
    cached_tokens = sum(demo.cache.lengths)
    num_bytes = cached_tokens * KEY_DIM * demo.dtype.itemsize
    num_flops = 2 * cached_tokens * demo.num_heads * (KEY_DIM + LATENT_DIM)
    allowed = f"{OUT_ATOL:.1g} + {OUT_RTOL:.1%} of the value"
    verdict = "ok" if all(verdicts) else f"WRONG in {count(verdicts.count(False), 'step')}"
    rows = {
        "device": torch.cuda.get_device_name(demo.device) if demo.device.type == "cuda" else "CPU",
        "batch": f"{count(demo.batch_size, 'request')}, {count(demo.num_heads, 'head')}, {options.dtype}",
        "cached tokens": f"{cached_tokens} in {'each layer' if demo.num_layers > 1 else 'the layer'} at the end",
        "µs per layer": f"{seconds * 1e6:.1f} (median of the steps, the call from Python included)",
        "effective GB/s": f"{num_bytes / seconds / 1e9:.3g}",
        "effective TFLOP/s": f"{num_flops / seconds / 1e12:.3g}",
        "max error": f"{max(errors):.2g} against float64 (allowed: {allowed}), {verdict}",
    }
    print()
    for name, value in rows.items():
        print(f"{name:<17}  {value}")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
