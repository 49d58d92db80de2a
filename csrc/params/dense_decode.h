// Arguments of the dense decode and of the combine that follows it.
#pragma once

#include <cstdint>

#include "params/work_division.h"

namespace flash_mla {

enum class ElementType { kBFloat16, kFloat16 };  // of q, k_cache and out

// What the softmax of a row has seen: of its keys' scores in the log2 domain a reference, at most 8 below the largest,
// and the sum of the probabilities relative to it, each 2^8 at most; -inf and 0 for no key. Outputs that have not been
// divided by the sum are relative to it too.
struct RowStatistics {
    float reference, sum;
};

// Strides are in elements; the last dimension of every tensor is contiguous.
struct DenseDecodeParams {
    void const* q;              // (batch_size, seqlen_q, num_heads_q, 576)
    void const* k_cache;        // (num_blocks, 64, num_heads_kv, 576)
    int const* block_table;     // (batch_size, >= ceil(cache_seqlens[i] / 64)), any row stride
    int const* cache_seqlens;   // (batch_size,)
    WorkerRow const* metadata;  // (num_workers,)
    void* out;                  // (batch_size, seqlen_q, num_heads_q, 512)
    float* lse;                 // (batch_size, num_heads_q, seqlen_q), natural log
    // Partial results, of (num_partial_slots, num_lanes, rows_per_tile) rows.
    float* out_partial;    // (rows, 512)
    void* packed_partial;  // in the same place, boxes of 16 bits (query_rows.h): what the dense kernel leaves to a
                           // combine
    float* scale_partial;  // (rows, 8): what these are multiplied with
    float* lse_partial;    // (rows,), log2
    // (rows,), where bits do not depend on the batch: of outputs that have not been divided by the sum. Instead of
    // lse_partial.
    RowStatistics* statistics_partial;

    int64_t q_batch_stride, q_token_stride, q_head_stride;
    int64_t k_block_stride, k_token_stride, k_head_stride;
    int64_t block_table_stride;
    int64_t out_batch_stride, out_token_stride, out_head_stride;

    int batch_size;
    int seqlen_q;
    int num_heads_q;
    int num_heads_kv;
    int num_blocks;
    int block_table_columns;
    int heads_per_group;       // num_heads_q / num_heads_kv
    int rows_per_head_kv;      // seqlen_q * heads_per_group
    float softmax_scale_log2;  // softmax_scale * log2(e), > 0
    bool causal;
    WorkerGrid grid;
};

}  // namespace flash_mla
