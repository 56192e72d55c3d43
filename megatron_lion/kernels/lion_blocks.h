// 8-bit momentum: blocks of 32 int8 codes with one bf16 scale each, as defined in megatron_lion/precision.py.

#pragma once

#include "lion_storage.h"

#include <limits>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 32;        // elements that share a scale
constexpr float LEVELS = 127 * 127;  // codes hold the square root of a magnitude
constexpr float SMALLEST_SCALE = 0x1p-100f;
// Near this number the last place has value 1: adding it rounds to nearest even, and the low bits of the sum are the code.
constexpr float ROUNDS = 0x1.8p23f;

struct BlockLayout { // position of a tensor in its parameter: first element, and length of the parameter's rows
    int64_t start, row_length;
    // Index of the block of element i in the tensor.
    int64_t block_of(int64_t i) const { return block_at(start + i) - block_at(start); }
    // First element of the block of element i.
    int64_t begin_of_block(int64_t i) const { return std::max<int64_t>(i - (start + i) % row_length % BLOCK, 0); }

  private:
    int64_t block_at(int64_t i) const {
        return i / row_length * ((row_length + BLOCK - 1) / BLOCK) + i % row_length / BLOCK;
    }
};

struct Codes { // int8 codes and one bf16 scale per block
    int8_t *codes;
    uint16_t *scales;
    BlockLayout layout;
    void fetch_piece(int64_t i) const { fetch(codes + i); } // the scales are too small to matter
};

// One block, possibly incomplete, element by element.

inline float widen(uint16_t scale) { return from_bits(static_cast<uint32_t>(scale) << 16); }

template <class Size> inline void dequantize(const int8_t *codes, uint16_t scale, float *values, Size count) {
    const float unit = widen(scale) * (1.0f / LEVELS);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const float code = codes[j];
        values[j] = (code * std::fabs(code)) * unit; // the first product is exact
    }
}

template <class Size> inline uint16_t scale_of(const float *values, Size count) {
    int32_t largest = 0; // magnitude as an integer, where a NaN is the largest
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < count; ++j) {
        const int32_t magnitude = static_cast<int32_t>(to_bits(values[j]) & MAGNITUDE);
        largest = std::max(largest, magnitude);
    }
    const float peak = from_bits(static_cast<uint32_t>(largest));
    return peak < SMALLEST_SCALE ? 0 : nearest_even(peak) >> 16;
}

template <class Size> inline void quantize(const float *values, uint16_t scale, int8_t *codes, Size count) {
    const float inverse = scale == 0 ? 0.0f : LEVELS / widen(scale);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t root = to_bits(std::sqrt(std::fabs(values[j]) * inverse)), top = to_bits(127.0f);
        const float code = from_bits(std::min(root, top) | (to_bits(values[j]) & SIGN));
        codes[j] = static_cast<int8_t>(to_bits(code + ROUNDS));
    }
    if (!(widen(scale) < std::numeric_limits<float>::infinity())) std::memset(codes, 0, static_cast<size_t>(count));
}

// Eight whole blocks in vectors. Work per block is done for all eight at once, one block per lane.

constexpr int64_t GROUP = LANES * BLOCK;

typedef int8_t Bytes __attribute__((vector_size(2 * LANES)));
typedef uint16_t Scales __attribute__((vector_size(2 * LANES)));

inline Floats widen(Scales scales) { return from_bits(__builtin_convertvector(scales, Words) << 16); }

// 16 codes of one block.
inline Pair dequantize(const int8_t *codes, float unit) {
#ifdef __AVX2__
    const Shorts code = reinterpret_cast<Shorts>(_mm256_cvtepi8_epi16(read<__m128i>(codes)));
#else
    const Shorts code = __builtin_convertvector(read<Bytes>(codes), Shorts);
#endif
    const Ints squares = reinterpret_cast<Ints>(code * (code < 0 ? -code : code));
    return {__builtin_convertvector((squares << 16) >> 16, Floats) * unit,
            __builtin_convertvector(squares >> 16, Floats) * unit};
}

// The largest lane of each of eight vectors.
inline Ints largest_lanes(const Ints *v) {
    Ints fours[2];
    for (int64_t half = 0; half < 2; ++half, v += 4) {
        const Ints ab = larger(SHUFFLE(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13), SHUFFLE(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15));
        const Ints cd = larger(SHUFFLE(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13), SHUFFLE(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15));
        fours[half] = larger(SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13), SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15));
    }
    return larger(SHUFFLE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11), SHUFFLE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15));
}

inline Floats square_root(Floats values) {
#ifdef __AVX__
    return _mm256_sqrt_ps(values);
#else
    for (int64_t lane = 0; lane < LANES; ++lane) values[lane] = std::sqrt(values[lane]);
    return values;
#endif
}

// Writes 32 codes.
inline void write_codes(int8_t *codes, Shorts first, Shorts second) {
#ifdef __AVX2__ // interleaves quarters of the two
    const __m256i packed = _mm256_packs_epi16(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second));
    write(codes, _mm256_permute4x64_epi64(packed, 0b11011000));
#else
    write(codes, __builtin_convertvector(first, Bytes));
    write(codes + PAIR, __builtin_convertvector(second, Bytes));
#endif
}

// The factors of the squared codes of eight blocks.
struct Units {
    alignas(4 * LANES) float of[LANES];
    explicit Units(const uint16_t *scales) { write(of, widen(read<Scales>(scales)) * (1.0f / LEVELS)); }
};

// New values of eight blocks, and the factors that turn them into codes once the largest value of each block is known.
struct Group {
    Pair values[LANES][2];
    Ints peaks[LANES];
    alignas(4 * LANES) float inverses[LANES], tops[LANES]; // a top of 0 makes the whole block NaN

    void set(int64_t block, Pair first, Pair second) {
        values[block][0] = first, values[block][1] = second;
        peaks[block] = larger(larger(magnitude(first.even), magnitude(first.odd)),
                              larger(magnitude(second.even), magnitude(second.odd)));
    }
    void scale(uint16_t *scales) {
        const Floats peak = from_bits(reinterpret_cast<Words>(largest_lanes(peaks)));
        const Words scale = (peak < SMALLEST_SCALE ? Words{} : nearest_even(peak)) & 0xffff0000u;
        write(scales, __builtin_convertvector(scale >> 16, Scales));
        write(inverses, scale == 0u ? Floats{} : LEVELS / from_bits(scale));
        write(tops, from_bits(scale) < std::numeric_limits<float>::infinity() ? Floats{} + 127.0f : Floats{});
    }
};

// The magnitudes that become a block's codes. encode() is separate because square roots have a long latency.
struct Roots {
    Pair pairs[2];

    Roots(const Group &group, int64_t block) {
        const float inverse = group.inverses[block], t = group.tops[block];
        const Floats top = {t, t, t, t, t, t, t, t};
        const auto root = [&](Floats value) {
            const Floats exact = square_root(absolute(value) * inverse);
            return exact < top ? exact : top; // a NaN is not less
        };
        for (int64_t half = 0; half < 2; ++half) {
            const Pair &value = group.values[block][half];
            pairs[half] = {root(value.even), root(value.odd)};
        }
    }
    // Writes the block's codes; `codes` points to the group's first code.
    void encode(const Group &group, int64_t block, int8_t *codes) const {
        const auto code = [](Floats value, Floats root) { // in the lower halves of words
            return to_bits(from_bits(to_bits(root) | (to_bits(value) & SIGN)) + ROUNDS);
        };
        Shorts both[2];
        for (int64_t half = 0; half < 2; ++half) {
            const Pair &value = group.values[block][half], &root = pairs[half];
            both[half] = reinterpret_cast<Shorts>(halves(code(value.even, root.even), code(value.odd, root.odd) << 16));
        }
        write_codes(codes + block * BLOCK, both[0], both[1]);
    }
};

} // namespace
