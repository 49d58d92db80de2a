// Module flash_mla._C: importing it gives the ops of flash_mla/ops.py their CUDA implementations.
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "ops/ops.h"

namespace py = pybind11;

namespace {

std::string cuda_version() {
    return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

py::dict build_info() {
    py::dict info;
    info["arch"] = "sm_90a";
    info["cuda"] = cuda_version();
    info["torch"] = TORCH_VERSION;
    info["cutlass"] =
        std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." + std::to_string(CUTLASS_PATCH);
    info["dtypes"] = py::make_tuple("bfloat16", "float16");
    return info;
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_mla, CUDA, library) {
    library.impl("decode_schedule", &flash_mla::decode_schedule);
    library.impl("dense_decode", &flash_mla::dense_decode);
    library.impl("dense_decode_out", &flash_mla::dense_decode_out);
    library.impl("append_kv", &flash_mla::append_kv);
}

PYBIND11_MODULE(_C, module) { module.def("build_info", &build_info, "What the extension was built for, and with."); }
