"""Small decodes for compute-sanitizer, which reach the paths of the kernels: not a test by itself.

compute-sanitizer --tool memcheck --error-exitcode 1 python tests/sanitized_cases.py
"""

from __future__ import annotations

import sys

import torch
from cases import make_case
from reference import assert_close, reference

import flash_mla  # noqa: F401

# Lengths that end inside pages, requests without tokens, splits, one and several 64-row tiles, with and without pairs.
CASES = {
    "one tile": {"batch": 3, "num_heads_q": 16, "seqlens": [100, 0, 64]},
    "split": {"batch": 2, "num_heads_q": 16, "seqlens": [1500, 65], "strided_cache": True},
    "pair of tiles": {"batch": 3, "num_heads_q": 128, "seqlens": [70, 0, 200]},
    "pairs, split, causal": {"batch": 1, "seqlen_q": 2, "num_heads_q": 128, "seqlens": [1300], "causal": True},
    "three tiles": {"batch": 2, "num_heads_q": 192, "seqlens": [130, 3], "strided_q": True},
    # So many that a CTA goes through more pieces than its queue holds.
    "many requests": {"batch": 1600, "num_heads_q": 16, "seqlens": lambda i: (0, 1, 64, 65, 200)[i % 5]},
    "many requests, pairs": {"batch": 800, "num_heads_q": 128, "seqlens": lambda i: (0, 1, 64, 65, 200)[i % 5]},
    "two KV heads": {"batch": 2, "num_heads_q": 32, "num_heads_kv": 2, "seqlens": [90, 300]},
}


def main() -> int:
    for name, shape in CASES.items():
        for dtype in (torch.bfloat16, torch.float16):
            case = make_case(**shape, dtype=dtype, device="cuda")
            out, lse = torch.ops.flash_mla.dense_decode(*case.op_arguments())
            torch.cuda.synchronize()
            assert_close(out, lse, *reference(case))
            print(f"{name} {dtype} ok", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
