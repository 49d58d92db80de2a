// Arguments of the tile scheduler kernel.
#pragma once

#include "params/segments.h"

namespace flash_mla {

struct DecodeScheduleParams {
    int const* cache_seqlens;  // (batch_size,)
    int* metadata;             // (num_plan_rows, 8): WorkerRow
    int* num_splits;           // (batch_size + 1,): running count of pieces

    int batch_size;
    int num_plan_rows;  // the last ones without work, where the grid has fewer workers
    WorkerGrid grid;
};

}  // namespace flash_mla
