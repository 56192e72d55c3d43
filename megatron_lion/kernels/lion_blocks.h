// 8-bit momentum: blocks of 32 int8 codes with one bf16 scale each, as defined in megatron_lion/precision.py.
//
// Eight blocks are a group. Work per block is done for all eight at once, one block per lane. Blocks at the end of a row
// or of a shard are incomplete.

#pragma once

#include "lion_step.h"

#include <limits>

namespace {

constexpr float LEVELS = 127 * 127; // codes hold the square root of a magnitude
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

typedef int8_t Bytes __attribute__((vector_size(2 * LANES)));
typedef int8_t HalfBytes __attribute__((vector_size(LANES)));

// 16 codes of one block, of which all squares and products are exact.
template <Order ORDER> inline Pair dequantize(const int8_t *codes, float unit) {
    if constexpr (ORDER == IN_MEMORY) {
        const auto eight = [&](const int8_t *codes) {
            const Floats code = __builtin_convertvector(read<HalfBytes>(codes), Floats);
            return code * absolute(code) * unit;
        };
        return {eight(codes), eight(codes + LANES)};
    }
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

inline Floats widen(HalfShorts scales) { return from_bits(__builtin_convertvector(scales, Words) << 16); }

// The blocks of elements `i` to `last`, one after the other.
struct Blocks {
    int64_t i, last, row_length;
    int64_t left; // elements from i to the end of the row
    int64_t size; // of the block at i; 0 at the end

    Blocks(BlockLayout layout, int64_t first, int64_t last) : i(first), last(last), row_length(layout.row_length) {
        const int64_t position = (layout.start + first) % row_length;
        left = row_length - position;
        size = std::min({BLOCK - position % BLOCK, left, last - i});
    }
    void next() {
        i += size, left -= size;
        if (left == 0) left = row_length;
        size = std::min({BLOCK, left, last - i});
    }
    Part part() const { return {i, size, i + BLOCK <= last}; }
};

// The factors of the squared codes of up to eight blocks.
struct Units {
    alignas(4 * LANES) float of[LANES];
    Units(const uint16_t *scales, int64_t count) {
        HalfShorts eight{};
        std::memcpy(&eight, scales, count * sizeof *scales);
        write(of, widen(eight) * (1.0f / LEVELS));
    }
};

// New values of up to eight blocks, and the factors that turn them into codes once the largest value of each block is
// known.
struct Group {
    Pair values[LANES][2];
    Ints peaks[LANES];
    alignas(4 * LANES) float inverses[LANES], tops[LANES]; // a top of 0 makes the whole block NaN
    Part parts[LANES] = {};

    // The block with `values` is `part` of the tensor.
    void set(int64_t block, Part part) {
        const Pair &first = values[block][0], &second = values[block][1];
        peaks[block] = larger(larger(magnitude(first.first), magnitude(first.second)),
                              larger(magnitude(second.first), magnitude(second.second)));
        parts[block] = part;
    }
    void scale(uint16_t *scales, int64_t count) {
        const Floats peak = from_bits(reinterpret_cast<Words>(largest_lanes(peaks)));
        const Words scale = (peak < SMALLEST_SCALE ? Words{} : nearest_even(peak)) & 0xffff0000u;
        const HalfShorts eight = __builtin_convertvector(scale >> 16, HalfShorts);
        std::memcpy(scales, &eight, count * sizeof *scales);
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
            pairs[half] = {root(value.first), root(value.second)};
        }
    }
    // Writes the block's codes; `codes` points to the tensor's first code.
    template <Order ORDER> void encode(const Group &group, int64_t block, int8_t *codes) const {
        const Part &part = group.parts[block];
        if (part.size == BLOCK) {
            write_codes(codes + part.i, encoded<ORDER>(group.values[block][0], pairs[0]),
                        encoded<ORDER>(group.values[block][1], pairs[1]));
        } else if (part.size > 0) {
            Staging staging(part.size, part.has_room);
            write_codes(staging.copy(codes + part.i), encoded<ORDER>(group.values[block][0], pairs[0]),
                        encoded<ORDER>(group.values[block][1], pairs[1]));
            staging.put_back();
        }
    }

  private:
    // 16 codes with the signs of `value`, in memory order.
    template <Order ORDER> static Shorts encoded(const Pair &value, const Pair &root) {
        const auto code = [](Floats value, Floats root) { // in the lower halves of words
            return to_bits(from_bits(to_bits(root) | (to_bits(value) & SIGN)) + ROUNDS);
        };
        return reinterpret_cast<Shorts>(
            lower_halves<ORDER>(code(value.first, root.first), code(value.second, root.second)));
    }
};

} // namespace
