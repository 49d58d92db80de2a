"""The compiler flags of the extension."""

from build_tools.toolchain import ARCH

CXX_FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-fvisibility=hidden"]

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
    # torch forbids the operators of half types in extensions; CUTLASS uses them.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]
