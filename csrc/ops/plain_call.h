// The way from Python to the dense decode for calls that the dispatcher would hand straight to the CUDA implementation.
#pragma once

#include <Python.h>

namespace flash_mla {

// describe_plain_call(q, k_cache) -> (batch_size, num_rows_per_head_kv, num_heads_kv, in_graph_capture), or None where
// they are not both tensors of 4 dimensions, or q is not on the current GPU
PyObject* describe_plain_call(PyObject* module, PyObject* const* args, Py_ssize_t num_args);

// dense_decode_plain(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, softmax_scale,
//                    causal, batch_invariant, out) -> (out, lse), or None for a call that is not plain; out may be None
PyObject* dense_decode_plain(PyObject* module, PyObject* const* args, Py_ssize_t num_args);

}  // namespace flash_mla
