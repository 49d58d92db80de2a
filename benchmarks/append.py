"""Time writing new tokens into a paged cache: `python -m benchmarks.append --json result.json`.

A token is read and written, so a call moves twice its bytes. They are compared with what a plain copy of 1 GiB and the
best of the read kernels reach in the same run. Tokens and slots differ from call to call and together exceed the L2
cache, but where that takes more calls than a graph has: below some hundred tokens, which a model too would find there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import flash_mla
from benchmarks.ceilings import READ_BYTES, best_read
from benchmarks.machine import GpuMonitor, describe_gpu
from benchmarks.model import num_cache_copies
from benchmarks.record import describe_run, save_json
from benchmarks.shapes import HEAD_DIM_K, HEAD_DIM_V, PAGE_SIZE
from benchmarks.timer import GraphTimer, TimerSettings, Timing

NUM_TOKENS = [1 << exponent for exponent in range(14)]
COPY_BYTES = 1 << 30


def copy_gbytes_per_s(timer: GraphTimer) -> float:
    """Bytes read and bytes written."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timer.measure(lambda _: target.copy_(source), sustained=False).short_us / 1e3


def measure_append(timer: GraphTimer, num_tokens: int, l2_bytes: int, device: str = "cuda") -> Timing:
    token_bytes = flash_mla.bytes_per_token(1)
    copies = min(num_cache_copies(2 * num_tokens * token_bytes, l2_bytes), timer.settings.max_calls)
    num_blocks = -(-copies * num_tokens // PAGE_SIZE)
    tokens = torch.randn(copies, num_tokens, HEAD_DIM_K, dtype=torch.bfloat16, device=device)
    cache = torch.empty(num_blocks, PAGE_SIZE, 1, HEAD_DIM_K, dtype=torch.bfloat16, device=device)
    slots = torch.randperm(num_blocks * PAGE_SIZE, device=device)[: copies * num_tokens].view(copies, num_tokens)
    kv_c, k_pe = (part.contiguous() for part in tokens.split([HEAD_DIM_V, HEAD_DIM_K - HEAD_DIM_V], dim=2))

    def append(copy: int) -> None:
        flash_mla.append_mla_kv(kv_c[copy], k_pe[copy], cache, slots[copy])

    timing = timer.measure(append, copies, sustained=False)
    for copy in range(copies):
        append(copy)
    written = cache.view(-1, HEAD_DIM_K)[slots]
    if not torch.equal(written, tokens):
        raise RuntimeError(f"the cache does not hold the {num_tokens} tokens that were written")
    return timing


def run_benchmark(
    num_tokens: Sequence[int],
    record: dict[str, Any],
    save: Callable[[], None],
    measure: Callable[[int], Timing],
) -> None:
    """Fill `record` size by size, calling `save` after each measurement."""
    print("tokens      µs    GB/s  of the copy")
    for tokens in num_tokens:
        timing = measure(tokens)
        rate = 2 * tokens * flash_mla.bytes_per_token(1) / timing.short_us / 1e3
        record["results"].append({"num_tokens": tokens, **timing.to_json(), "gbytes_per_s": rate})
        save()
        of_the_copy = rate / record["ceilings"]["copy_gbytes_per_s"]
        print(f"{tokens:6d} {timing.short_us:7.2f} {rate:7.0f} {of_the_copy:12.0%}", flush=True)


def new_record() -> dict[str, Any]:
    return {**describe_run(), "benchmark": "append", "gpu": {}, "timer": {}, "ceilings": {}, "results": []}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=NUM_TOKENS, help="per call")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results there as they come")
    options = parser.parse_args(arguments)
    if (reason := flash_mla.unavailable_reason()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    monitor = GpuMonitor()
    timer = GraphTimer(TimerSettings(), monitor)
    record = new_record()
    record["gpu"] = gpu = describe_gpu(monitor)
    record["timer"] = asdict(timer.settings)
    read_method, read = best_read(timer)
    read_rate, copy_rate = READ_BYTES / read.short_us / 1e3, copy_gbytes_per_s(timer)
    record["ceilings"] = {
        "read_gbytes_per_s": read_rate,
        "read_method": read_method,
        "copy_gbytes_per_s": copy_rate,
    }
    print(f"{gpu['name']}: read {read_rate:.0f} GB/s ({read_method}), copy {copy_rate:.0f} GB/s")

    def save() -> None:
        if options.json is not None:
            save_json(record, options.json)

    run_benchmark(options.tokens, record, save, lambda tokens: measure_append(timer, tokens, gpu["l2_bytes"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
