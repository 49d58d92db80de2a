// Looks tensor maps up with a driver that counts what it encodes. Prints what is wrong; the exit status is the number
// of mistakes.
#include <cstdio>
#include <cstring>

#include "kernels/sm90/primitives/tensor_map.h"

using namespace flash_mla::sm90;

namespace {

int num_encoded = 0, num_mistakes = 0;

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, cuuint64_t const*, cuuint64_t const*,
                cuuint32_t const*, cuuint32_t const*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill) {
    std::memset(map, ++num_encoded, sizeof(*map));
    return CUDA_SUCCESS;
}

void expect(bool holds, char const* what) {
    if (holds) return;
    std::printf("%s\n", what);
    ++num_mistakes;
}

template <int kRank>
int first_byte(TensorMapSource<kRank> const& source) {
    CUtensorMap map;
    expect(find_tensor_map<kRank>(&map, source) == cudaSuccess, "a map is found or encoded");
    return *reinterpret_cast<unsigned char const*>(&map);
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(char const*, void** entry, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
    *entry = reinterpret_cast<void*>(&encode);
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

int main() {
    constexpr int kRank = 3;
    static char memory[64];
    TensorMapSource<kRank> const first{
        CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, memory, {{{64, 2, 64}, {9, 128, 1}, {5, 1152, 1}}}};
    int const of_first = first_byte(first);
    expect(first_byte(first) == of_first && num_encoded == 1, "the same source is encoded once");

    TensorMapSource<kRank> other = first;
    auto const expect_another = [&](char const* part) {
        int const before = num_encoded;
        expect(!(first == other), part);  // their hashes alone would nearly always tell them apart
        expect(first_byte(other) != of_first && num_encoded == before + 1, part);
        expect(first_byte(first) == of_first && num_encoded == before + 1, part);
        other = first;
    };
    other.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    expect_another("type");
    other.base = memory + 16;
    expect_another("base");
    for (TensorMapAxis& axis : other.axes) {
        axis.extent += 1;
        expect_another("extent");
        axis.stride_bytes += 16;
        expect_another("stride");
        axis.box += 1;
        expect_another("box");
    }

    int const before = num_encoded;
    for (int i = 0; i < 5000; ++i) {
        other.base = reinterpret_cast<void const*>(size_t(i + 1) << 20);
        first_byte(other);
    }
    expect(num_encoded == before + 5000, "other bases");
    return num_mistakes;
}
