"""The compiler and linker flags of the extension."""

import platform

from build_tools.toolchain import ARCH

# Host code that checks its own buffers and returns: what overflows ends the process instead of running on.
HARDENING_FLAGS = [
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
    "-D_GLIBCXX_ASSERTIONS",
    "-fstack-protector-strong",
    "-fstack-clash-protection",
    *("-Wformat", "-Werror=format-security"),
]
if platform.machine() == "x86_64":
    HARDENING_FLAGS.append("-fcf-protection")

CXX_FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-fvisibility=hidden", *HARDENING_FLAGS]

# Symbols are bound when the extension is loaded, and what they are bound through is read-only from then on.
LINK_FLAGS = ["-Wl,-z,relro", "-Wl,-z,now", "-Wl,-z,noexecstack"]

# What build_tools/checked_nvcc.py reads.
PTXAS_REPORT_FLAGS = ["-Xptxas=-v,-warn-spills,-warn-lmem-usage"]

NVCC_FLAGS = [
    f"-gencode=arch=compute_{ARCH.removeprefix('sm_')},code={ARCH}",
    "-O3",
    "-std=c++17",
    "-DNDEBUG",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    *PTXAS_REPORT_FLAGS,
    f"-Xcompiler={','.join(HARDENING_FLAGS)}",
    # torch forbids the operators of half types in extensions; CUTLASS uses them.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]
