"""A Triton kernel that only reads: what the memory can deliver."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192  # 32-bit words per step: eight 16-byte loads in flight for each of 256 threads
STEPS = 8


@triton.jit
def _add_up(source, partial, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0).to(tl.int64)
    offsets = program * (BLOCK * STEPS) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for step in range(STEPS):
        total += tl.load(source + offsets + step * BLOCK)
    tl.store(partial + program, tl.sum(total, axis=0))


def read_all(source: torch.Tensor, partial: torch.Tensor) -> None:
    """Read `source`, int32 of a size that is a multiple of BLOCK·STEPS; one word per program goes to `partial`."""
    _add_up[(source.numel() // (BLOCK * STEPS),)](source, partial, BLOCK=BLOCK, STEPS=STEPS, num_warps=8)
