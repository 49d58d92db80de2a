"""What the machine delivers in the same run: bytes read per second, and bf16 matrix FLOP/s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.model import Rates
from benchmarks.timer import GraphTimer, Timing

GEMM_SIZE = 8192
READ_BYTES = 2 << 30
WORDS_PER_PROGRAM = 1 << 16  # READ_BYTES is a multiple of it, as the read kernel asks


@dataclass(frozen=True)
class Ceilings:
    read_gbytes_per_s: float
    read_gbytes_per_s_sustained: float
    read_method: str
    gemm_tflops_per_s: float
    gemm_tflops_per_s_sustained: float
    gemm_sm_clock_mhz: int | None = None

    def rates(self, sustained: bool) -> Rates:
        if sustained:
            return Rates(self.read_gbytes_per_s_sustained * 1e9, self.gemm_tflops_per_s_sustained * 1e12)
        return Rates(self.read_gbytes_per_s * 1e9, self.gemm_tflops_per_s * 1e12)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_ceilings(timer: GraphTimer) -> Ceilings:
    read_method, read = best_read(timer)
    gemm = _gemm(timer)
    flops = 2 * GEMM_SIZE**3
    assert read.sustained_us is not None and gemm.sustained_us is not None
    return Ceilings(
        read_gbytes_per_s=READ_BYTES / read.short_us / 1e3,
        read_gbytes_per_s_sustained=READ_BYTES / read.sustained_us / 1e3,
        read_method=read_method,
        gemm_tflops_per_s=flops / gemm.short_us / 1e6,
        gemm_tflops_per_s_sustained=flops / gemm.sustained_us / 1e6,
        gemm_sm_clock_mhz=gemm.sm_clock_mhz,
    )


def best_read(timer: GraphTimer) -> tuple[str, Timing]:
    words = torch.empty(READ_BYTES // 4, dtype=torch.int32, device="cuda").random_()
    partial = torch.empty(words.numel() // WORDS_PER_PROGRAM, dtype=torch.int32, device="cuda")
    floats = words.view(torch.float32)
    methods: dict[str, Callable[[int], Any]] = {"torch.sum": lambda _: torch.sum(floats)}
    try:
        from benchmarks.read_kernel import read_all

        read_all(words, partial)
        methods["Triton kernel"] = lambda _: read_all(words, partial)
    except Exception as error:
        # Triton needs a C compiler at run time; torch's reduction comes close to the same rate.
        print(f"The Triton read kernel does not run here ({type(error).__name__}: {error}); torch.sum stands in for it")
    timings = {name: timer.measure(call) for name, call in methods.items()}
    best = min(timings, key=lambda name: timings[name].short_us)
    return best, timings[best]


def _gemm(timer: GraphTimer) -> Timing:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return timer.measure(lambda _: torch.mm(a, b.T, out=out))
