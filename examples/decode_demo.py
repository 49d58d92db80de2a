"""Decode a batch of requests of different lengths from a paged latent cache.

Each step appends a token to every request, plans the attention once, and calls it once per layer, as a model would. Queries and
latents are random: what the demo shows is the cache, the calls, their speed, and that the result is right.

    python examples/decode_demo.py --help
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time

import torch

import flash_mla

PAGE_SIZE = 64
LATENT_DIM = 512  # also the size of the values, which are the latent part of the keys
ROPE_DIM = 64
KEY_DIM = LATENT_DIM + ROPE_DIM
SOFTMAX_SCALE = (128 + ROPE_DIM) ** -0.5  # from the head size before the projections are absorbed

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

    def write(self, layer: int, slots: torch.Tensor, latents: torch.Tensor) -> None:
        self.pages[layer].view(-1, KEY_DIM)[slots] = latents

    def gather(self, layer: int, request: int) -> torch.Tensor:
        """All tokens of one request in order, (length, 576)."""
        positions = torch.arange(self.lengths[request])
        slots = self.block_table[request, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE
        return self.pages[layer].view(-1, KEY_DIM)[slots.to(self.device)]


def reference(q: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention of one request: q (heads, 576), keys (length, 576) -> out (heads, 512), lse (heads,)."""
    scores = q.double() @ keys.double().T * SOFTMAX_SCALE
    return scores.softmax(dim=-1) @ keys[:, :LATENT_DIM].double(), scores.logsumexp(dim=-1)


def error_and_verdict(actual: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> tuple[float, bool]:
    error = (actual.double() - expected).abs()
    return error.max().item(), bool((error <= atol + rtol * expected.abs()).all())


def choose_device(requested: str) -> torch.device:
    if requested != "auto":
        return torch.device(requested)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        if flash_mla.is_available():
            return torch.device("cuda")
        print(f"The GPU is not used: {flash_mla.unavailable_reason()}")
    return torch.device("cpu")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="cuda, cpu, or auto: an sm_90 GPU if there is one")
    parser.add_argument("--batch", type=int, help="requests (128 on a GPU, 4 on a CPU)")
    parser.add_argument("--tokens", type=int, help="cached tokens of the longest request at the start (8192 or 700)")
    parser.add_argument("--layers", type=int, help="layers, each with its own cache (4 or 2)")
    parser.add_argument("--steps", type=int, help="tokens to decode (32 or 8)")
    parser.add_argument("--heads", type=int, help="query heads (128 or 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    arguments = parser.parse_args()
    arguments.device = choose_device(arguments.device)
    on_gpu = arguments.device.type == "cuda"
    for name, for_gpu, for_cpu in [("batch", 128, 4), ("tokens", 8192, 700), ("layers", 4, 2), ("steps", 32, 8), ("heads", 128, 16)]:
        if getattr(arguments, name) is None:
            setattr(arguments, name, for_gpu if on_gpu else for_cpu)
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device, dtype = arguments.device, DTYPES[arguments.dtype]
    batch_size, num_layers = arguments.batch, arguments.layers
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    cache = PagedLatentCache(num_layers, batch_size, arguments.tokens + arguments.steps, dtype, device)
    for request in range(batch_size):
        # From a quarter of the longest request's length up to all of it.
        prompt_length = max(1, arguments.tokens * (batch_size + 3 * (request + 1)) // (4 * batch_size))
        slots = cache.reserve(request, prompt_length).to(device)
        for layer in range(num_layers):
            cache.write(layer, slots, random(prompt_length, KEY_DIM))

    seconds_per_layer = []
    max_error, is_right = 0.0, True
    for step in range(1, arguments.steps + 1):
        slots = torch.cat([cache.reserve(request, 1) for request in range(batch_size)]).to(device)
        for layer in range(num_layers):
            cache.write(layer, slots, random(batch_size, KEY_DIM))
        queries = [random(batch_size, 1, arguments.heads, KEY_DIM) for _ in range(num_layers)]
        block_table = cache.block_table.to(device)
        cache_seqlens = torch.tensor(cache.lengths, dtype=torch.int32, device=device)

        synchronize()
        begin = time.perf_counter()
        # The first layer's call makes the plan, the other layers use it.
        metadata, num_splits = flash_mla.get_mla_metadata()
        results = [
            flash_mla.flash_mla_with_kvcache(
                q, pages, block_table, cache_seqlens, LATENT_DIM, metadata, num_splits, SOFTMAX_SCALE, causal=True
            )
            for q, pages in zip(queries, cache.pages, strict=True)
        ]
        synchronize()
        seconds_per_layer.append((time.perf_counter() - begin) / num_layers)

        layer, request = step % num_layers, step % batch_size
        out, lse = results[layer]
        expected_out, expected_lse = reference(queries[layer][request, 0], cache.gather(layer, request))
        error, out_is_right = error_and_verdict(out[request, 0], expected_out, atol=8e-4, rtol=2.01 / 128)
        _, lse_is_right = error_and_verdict(lse[request, :, 0], expected_lse, atol=1e-6, rtol=8.01 / 65536)
        max_error = max(max_error, error)
        is_right = is_right and out_is_right and lse_is_right
        print(
            f"step {step:3d}/{arguments.steps}  {sum(cache.lengths):8d} cached tokens  "
            f"{seconds_per_layer[-1] * 1e6:9.1f} µs per layer  request {request:3d} "
            + ("ok" if out_is_right and lse_is_right else "WRONG"),
            flush=True,
        )

    seconds = statistics.median(seconds_per_layer)
    cached_tokens = sum(cache.lengths)
    num_bytes = cached_tokens * KEY_DIM * dtype.itemsize
    num_flops = 2 * cached_tokens * arguments.heads * (KEY_DIM + LATENT_DIM)
    rows = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "batch": f"{batch_size} requests, {arguments.heads} heads, {arguments.dtype}",
        "cached tokens": f"{cached_tokens} in each of {num_layers} layers",
        "µs per layer": f"{seconds * 1e6:.1f}",
        "effective GB/s": f"{num_bytes / seconds / 1e9:.1f}",
        "effective TFLOP/s": f"{num_flops / seconds / 1e12:.3f}",
        "max error": f"{max_error:.2e} against float64: {'ok' if is_right else 'WRONG'}",
    }
    print()
    for name, value in rows.items():
        print(f"{name:<18} {value}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
