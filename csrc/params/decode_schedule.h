// Arguments of the tile scheduler kernel.
#pragma once

#include "params/work_division.h"

namespace flash_mla {

struct DecodeScheduleParams {
    int const* cache_seqlens;  // (batch_size,)
    int* metadata;             // (num_workers, 8): WorkerRow
    int* num_splits;           // (batch_size + 1,): running count of pieces

    int batch_size;
    int num_workers;
    int tiles_per_request;
};

}  // namespace flash_mla
