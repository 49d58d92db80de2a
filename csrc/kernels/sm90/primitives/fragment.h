// The accumulator of a 64×N wgmma, as its 128 threads hold it: thread t has two rows, 16·(t / 32) + (t % 32) / 4 and
// the one 8 below it, and of every 8 columns the pair 2·(t % 4).
//   element 4·i + 2·h + c  =  (row + 8·h, column 8·i + 2·(t % 4) + c)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cute/arch/util.hpp>
#include <cutlass/numeric_types.h>

#include <cstdint>

namespace flash_mla::sm90 {

inline constexpr int kRowsPerThread = 2;

// The thread's number in its warpgroup, read anew where it is asked for, so that nothing that follows from it occupies
// registers between.
__device__ inline uint32_t thread_now() {
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
    return thread;
}
__device__ inline int thread_in_warpgroup_now() { return int(thread_now() % 128); }

// What the first lane of each quad reads, for all of the quad.
template <typename T>
__device__ T load_for_quad(T const& source) {
    int const lane = thread_in_warpgroup_now() % 32;
    T value{};
    if (lane % 4 == 0) value = source;
    return __shfl_sync(~0u, value, lane & ~3);
}

// The same of a word in shared memory, read anew where it is asked for.
__device__ inline uint32_t word_for_quad_now(uint32_t shared_address) {
    uint32_t value;
    asm volatile(
        "{\n"
        ".reg .pred reads;\n"
        ".reg .b32 lane;\n"
        "mov.u32 lane, %%tid.x;\n"
        "and.b32 lane, lane, 3;\n"
        "setp.eq.u32 reads, lane, 0;\n"
        "mov.u32 %0, 0;\n"
        "@reads ld.volatile.shared.b32 %0, [%1];\n"
        "shfl.sync.idx.b32 %0, %0, 0, 0x1c1f, 0xffffffff;\n"
        "}\n"
        : "=r"(value)
        : "r"(shared_address)
        : "memory");
    return value;
}

// A flag in shared memory that the first lanes of the quads read, for all of the warp. Predicated, because a branch
// made the compiler duplicate what follows.
__device__ inline bool flag_for_warp(bool const& flag) {
    uint32_t value;
    asm volatile(
        "{\n"
        ".reg .pred reads;\n"
        ".reg .b32 lane_in_quad;\n"
        "and.b32 lane_in_quad, %2, 3;\n"
        "setp.eq.u32 reads, lane_in_quad, 0;\n"
        "mov.u32 %0, 0;\n"
        "@reads ld.shared.u8 %0, [%1];\n"
        "}\n"
        : "=r"(value)
        : "r"(cute::cast_smem_ptr_to_uint(&flag)), "r"(threadIdx.x)
        : "memory");
    return __any_sync(~0u, value);
}

__device__ inline int fragment_row(int thread, int half) { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; }
__device__ inline int fragment_column(int thread, int tile) { return 8 * tile + 2 * (thread % 4); }

__device__ inline uint32_t pack_pair(float low, float high, cutlass::bfloat16_t) {
    __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}
__device__ inline uint32_t pack_pair(float low, float high, cutlass::half_t) {
    __half2 const pair = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(pair);
}

// Transposes a 4×4 matrix of words whose row i the i-th lane of each quad holds.
__device__ inline void transpose_in_quad(uint32_t& word0, uint32_t& word1, uint32_t& word2, uint32_t& word3) {
    auto exchange = [](uint32_t& kept_by_upper, uint32_t& kept_by_lower, int distance) {
        bool const upper = threadIdx.x & distance;
        uint32_t const sent = upper ? kept_by_upper : kept_by_lower;
        uint32_t const received = __shfl_xor_sync(~0u, sent, distance);
        (upper ? kept_by_upper : kept_by_lower) = received;
    };
    exchange(word0, word1, 1);
    exchange(word2, word3, 1);
    exchange(word0, word2, 2);
    exchange(word1, word3, 2);
}

// Starts to copy 16 bytes to shared memory, past the L1.
__device__ inline void copy_16_bytes_async(uint32_t shared_address, void const* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address), "l"(source) : "memory");
}

// Four 8×8 matrices of 16-bit elements from registers to shared memory; lane l gives the address of row l % 8 of matrix
// l / 8. Predicated, not a branch: so it can stand between wgmma that belong together.
__device__ inline void store_matrix_x4_if(bool condition, uint32_t shared_address, uint32_t const (&word)[4]) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %5, 0;\n"
        "@p stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n"
        "}\n" ::"r"(shared_address),
        "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(uint32_t(condition))
        : "memory");
}

// The other way.
__device__ inline void load_matrix_x4(uint32_t shared_address, uint32_t& word0, uint32_t& word1, uint32_t& word2,
                                      uint32_t& word3) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(word0), "=r"(word1), "=r"(word2), "=r"(word3)
                 : "r"(shared_address)
                 : "memory");
}

// Two 8×8 matrices, transposed; lanes 0–15 give the addresses of what are their columns.
__device__ inline void store_matrix_x2_transposed(uint32_t shared_address, uint32_t word0, uint32_t word1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};\n" ::"r"(shared_address), "r"(word0),
                 "r"(word1)
                 : "memory");
}

// The 8×8 matrix of 16-bit elements that a warp holds, lane l the pair (l / 4, 2·(l % 4)), transposed.
__device__ inline uint32_t transpose_matrix(uint32_t pair) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(transposed) : "r"(pair));
    return transposed;
}

}  // namespace flash_mla::sm90
