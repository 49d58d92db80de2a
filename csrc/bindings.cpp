// Module flash_mla._C: importing it gives the ops of flash_mla/ops.py their CUDA implementations.
#include <cuda_runtime_api.h>
#include <cutlass/version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <iterator>
#include <string>
#include <vector>

#include "ops/device.h"
#include "ops/ops.h"
#include "ops/plain_call.h"

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

PyMethodDef fast_method(char const* name, _PyCFunctionFast function, char const* doc) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, doc};
}

}  // namespace

TORCH_LIBRARY_IMPL(flash_mla, CUDA, library) {
    library.impl("decode_schedule", &flash_mla::decode_schedule);
    library.impl("dense_decode", &flash_mla::dense_decode);
    library.impl("dense_decode_out", &flash_mla::dense_decode_out);
    library.impl("append_kv", &flash_mla::append_kv);
}

PYBIND11_MODULE(_C, module) {
    module.def("build_info", &build_info, "What the extension was built for, and with.");
    module.def(
        "cluster_capacity",
        [](int device) {
            flash_mla::ClusterCapacity const& capacity =
                flash_mla::cluster_capacity_of(c10::Device(c10::kCUDA, c10::DeviceIndex(device)));
            return std::vector<int>(std::begin(capacity.num_clusters), std::end(capacity.num_clusters));
        },
        "How many clusters of CTAs a GPU runs at once, by their size; [1] are its SMs.");
    // Plain C functions: what pybind11 does for each argument would eat up what these save.
    static PyMethodDef methods[] = {
        fast_method("describe_plain_call", &flash_mla::describe_plain_call,
                    "What a plan for a call has to be made for; None for calls out of the ordinary."),
        fast_method("dense_decode_plain", &flash_mla::dense_decode_plain,
                    "(out, lse) of a call that the dispatcher would hand straight to the kernels; None for others."),
        {nullptr, nullptr, 0, nullptr},
    };
    if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}
