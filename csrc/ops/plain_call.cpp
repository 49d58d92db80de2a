#include "ops/plain_call.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <pybind11/gil.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <exception>
#include <tuple>
#include <utility>

#include "ops/ops.h"

namespace flash_mla {
namespace {

using at::Tensor;

constexpr int kNumTensors = 6, kSoftmaxScale = 6, kCausal = 7, kBatchInvariant = 8, kOut = 9, kNumArguments = 10;

// Whether nothing but the kernel would see a call with this tensor: no subclass, no transform or tracing (functorch,
// fake tensors, modes), no autocast, no gradient.
bool is_plain(PyObject* argument, c10::impl::LocalDispatchKeySet const& of_thread, bool records_gradients) {
    static c10::DispatchKeySet const kPlainKeys({c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA,
                                                 c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::BackendSelect});
    if (!THPVariable_CheckExact(argument)) return false;
    Tensor const& tensor = THPVariable_Unpack(argument);
    auto const keys = (tensor.key_set() | of_thread.included_) - of_thread.excluded_;
    return kPlainKeys.has_all(keys) && tensor.is_cuda() && !(records_gradients && tensor.requires_grad());
}

bool is_plain_call(PyObject* const* args) {
    if (at::impl::torch_function_mode_enabled() || at::hasCallbacks()) return false;
    auto const of_thread = c10::impl::tls_local_dispatch_key_set();
    bool const records_gradients = at::GradMode::is_enabled();
    for (int i = 0; i < kNumTensors; ++i) {
        if (!is_plain(args[i], of_thread, records_gradients)) return false;
    }
    return PyFloat_CheckExact(args[kSoftmaxScale]) && PyBool_Check(args[kCausal]) &&
           PyBool_Check(args[kBatchInvariant]) &&
           (args[kOut] == Py_None || is_plain(args[kOut], of_thread, records_gradients));
}

}  // namespace

PyObject* describe_plain_call(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
    if (num_args != 2) {
        PyErr_Format(PyExc_TypeError, "describe_plain_call needs 2 arguments, got %zd", num_args);
        return nullptr;
    }
    try {
        if (!THPVariable_CheckExact(args[0]) || !THPVariable_CheckExact(args[1])) Py_RETURN_NONE;
        Tensor const &q = THPVariable_Unpack(args[0]), &k_cache = THPVariable_Unpack(args[1]);
        if (q.dim() != 4 || k_cache.dim() != 4 || k_cache.size(2) < 1) Py_RETURN_NONE;
        // Only there is it known without a question to the driver that the device has a context.
        if (!q.is_cuda() || q.device().index() != c10::cuda::current_device()) Py_RETURN_NONE;
        bool const in_graph_capture =
            c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
        int64_t const num_heads_kv = k_cache.size(2);
        return Py_BuildValue("nnnO", Py_ssize_t(q.size(0)), Py_ssize_t(q.size(1) * q.size(2) / num_heads_kv),
                             Py_ssize_t(num_heads_kv), in_graph_capture ? Py_True : Py_False);
    } catch (std::exception const&) {
        torch::translate_exception_to_python(std::current_exception());
        return nullptr;
    }
}

PyObject* dense_decode_plain(PyObject*, PyObject* const* args, Py_ssize_t num_args) {
    if (num_args != kNumArguments) {
        PyErr_Format(PyExc_TypeError, "dense_decode_plain needs %d arguments, got %zd", kNumArguments, num_args);
        return nullptr;
    }
    try {
        if (!is_plain_call(args)) Py_RETURN_NONE;
        auto const tensor = [&](int i) -> Tensor const& { return THPVariable_Unpack(args[i]); };
        double const softmax_scale = PyFloat_AS_DOUBLE(args[kSoftmaxScale]);
        bool const causal = args[kCausal] == Py_True, batch_invariant = args[kBatchInvariant] == Py_True;
        Tensor out, lse;
        {
            pybind11::gil_scoped_release const release;
            if (args[kOut] == Py_None) {
                std::tie(out, lse) = dense_decode(tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5),
                                                  softmax_scale, causal, batch_invariant);
            } else {
                out = tensor(kOut);
                lse = dense_decode_out(tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5), softmax_scale,
                                       causal, batch_invariant, out);
            }
        }
        PyObject* const result = PyTuple_New(2);
        if (result == nullptr) return nullptr;
        PyTuple_SET_ITEM(result, 0, THPVariable_Wrap(std::move(out)));
        PyTuple_SET_ITEM(result, 1, THPVariable_Wrap(std::move(lse)));
        return result;
    } catch (std::exception const&) {
        torch::translate_exception_to_python(std::current_exception());
        return nullptr;
    }
}

}  // namespace flash_mla
