// Sum of the squares of gradients on a CPU, in one pass. Compiled at first use by megatron_lion/kernels/compiler.py and
// called through ctypes by megatron_lion/kernels/norm_cpu.py.

#include "lion_vectors.h"

#include <algorithm>
#include <vector>

namespace {

// Elements that one thread sums up at a time. The order of additions depends only on this, never on threads.
constexpr int64_t CHUNK = 65536;
constexpr int64_t AHEAD = 4096; // bytes that are fetched before they are used

struct Fp32 {
    static float widen(float value) { return value; }
    static Floats widen(const float *values) { return read<Floats>(values); }
};
struct Bf16 {
    static float widen(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
    static Floats widen(const uint16_t *values) {
        return from_bits(__builtin_convertvector(read<HalfShorts>(values), Words) << 16);
    }
};

// In fp64, where the square of an fp32 number is exact.
template <class Format, class Value> double sum_of_squares(const Value *values, int64_t count) {
    Doubles sums[4] = {};
    int64_t i = 0;
    for (; i + PAIR <= count; i += PAIR) {
        __builtin_prefetch(reinterpret_cast<const char *>(values + i) + AHEAD);
        for (int64_t half = 0; half < 2; ++half) {
            const Floats eight = Format::widen(values + i + half * LANES);
            HalfFloats fours[2];
            std::memcpy(fours, &eight, sizeof fours);
            for (int64_t four = 0; four < 2; ++four) {
                const Doubles exact = __builtin_convertvector(fours[four], Doubles);
                sums[2 * half + four] += exact * exact;
            }
        }
    }
    const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = (all[0] + all[1]) + (all[2] + all[3]);
    for (; i < count; ++i) {
        const double exact = Format::widen(values[i]);
        sum += exact * exact;
    }
    return sum;
}

} // namespace

// The sum over `tensors` tensors of `counts` elements at `addresses`, all in bf16 if `is_bf16`, else in fp32.
extern "C" double sum_of_squares_cpu(int64_t tensors, const void *const *addresses, const int64_t *counts, int is_bf16,
                                     int threads) {
    struct Piece { int64_t tensor, start; };
    std::vector<Piece> pieces;
    for (int64_t tensor = 0; tensor < tensors; ++tensor)
        for (int64_t start = 0; start < counts[tensor]; start += CHUNK) pieces.push_back({tensor, start});
    const int64_t number = static_cast<int64_t>(pieces.size());
    std::vector<double> sums(pieces.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (number > 4)
    for (int64_t p = 0; p < number; ++p) {
        const auto [tensor, start] = pieces[p];
        const int64_t count = std::min(CHUNK, counts[tensor] - start);
        if (is_bf16)
            sums[p] = sum_of_squares<Bf16>(static_cast<const uint16_t *>(addresses[tensor]) + start, count);
        else
            sums[p] = sum_of_squares<Fp32>(static_cast<const float *>(addresses[tensor]) + start, count);
    }
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}
