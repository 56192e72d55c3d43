// Sum of the squares of gradients on a CPU, in one pass. Compiled at first use by megatron_lion/kernels/compiler.py and
// called through ctypes by megatron_lion/kernels/norm_cpu.py.

#include "lion_vectors.h"

#include <algorithm>
#include <vector>

namespace {

// Elements that one thread sums up at a time. The order of additions depends only on this, never on threads.
constexpr int64_t CHUNK = 65536;
constexpr int64_t AHEAD = 4096; // bytes: how far ahead memory is fetched

// Elements with squares that are added in fp32. A lane adds 16 of them, so a sum of positive numbers has an error of at
// most 20 roundings: 1.2e-6 of itself, 6e-7 of its root, and in practice far less.
constexpr int64_t RUN = 512;
// Sums of a chunk outside of this range are computed again in fp64: squares may have been too large or small for fp32.
constexpr double SMALLEST = 1e-20, LARGEST = 1e30;

struct Fp32 {
    static double widen(float value) { return value; }
    static Pair widen16(const float *values) { return {read<Floats>(values), read<Floats>(values + LANES)}; }
};
struct Bf16 {
    static double widen(uint16_t value) { return from_bits(static_cast<uint32_t>(value) << 16); }
    static Pair widen16(const uint16_t *values) { // those of even index, then the others
        const Words both = read<Words>(values);
        return {from_bits(both << 16), from_bits(both & 0xffff0000u)};
    }
};

inline double total(Floats values) {
    HalfFloats fours[2];
    std::memcpy(fours, &values, sizeof fours);
    const Doubles sums = __builtin_convertvector(fours[0], Doubles) + __builtin_convertvector(fours[1], Doubles);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// In fp64, where the square of an fp32 number is exact.
template <class Format, class Value> double exact_sum_of_squares(const Value *values, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += Format::widen(values[i]) * Format::widen(values[i]);
    return sum;
}

template <class Format, class Value> double sum_of_squares(const Value *values, int64_t count) {
    double sum = 0;
    int64_t i = 0;
    for (; i + RUN <= count; i += RUN) {
        Floats squares[4] = {};
        for (int64_t j = i; j < i + RUN; j += 2 * PAIR) {
            __builtin_prefetch(reinterpret_cast<const char *>(values + j) + AHEAD);
            const Pair first = Format::widen16(values + j), second = Format::widen16(values + j + PAIR);
            squares[0] += first.first * first.first, squares[1] += first.second * first.second;
            squares[2] += second.first * second.first, squares[3] += second.second * second.second;
        }
        sum += total((squares[0] + squares[1]) + (squares[2] + squares[3]));
    }
    if (i > 0 && !(sum > SMALLEST && sum < LARGEST)) sum = exact_sum_of_squares<Format>(values, i); // also of a NaN
    return sum + exact_sum_of_squares<Format>(values + i, count - i);
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
