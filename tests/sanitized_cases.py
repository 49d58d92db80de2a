"""Small decodes that reach every path of the kernels, for compute-sanitizer: not a test by itself.

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
