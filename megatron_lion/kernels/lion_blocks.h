// 8-bit momentum: blocks of 32 int8 codes with one bf16 scale each, as defined in megatron_lion/precision.py.
//
// Eight blocks are a group. Work per block is done for all eight at once, one block per lane. Blocks at the end of a row
// or of a shard are incomplete.

#pragma once

#include "lion_step.h"

namespace {

constexpr float LEVELS = 127 * 127; // codes hold the square root of a magnitude
constexpr float SMALLEST_SCALE = 0x1p-100f;
constexpr int32_t INFINITE = 0x7f800000; // bits of infinity, below those of NaN

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

inline Floats widened(const int8_t *codes) { // eight of them
#ifdef __AVX2__
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(codes))));
#else
    typedef int8_t HalfBytes __attribute__((vector_size(LANES)));
    return __builtin_convertvector(__builtin_convertvector(read<HalfBytes>(codes), Ints), Floats);
#endif
}

// 16 codes of one block.
template <Order ORDER> [[gnu::always_inline]] inline Pair dequantize(const int8_t *codes, float unit) {
    if constexpr (ORDER == IN_MEMORY) {
        const Floats first = widened(codes), second = widened(codes + LANES);
        return {first * absolute(first) * unit, second * absolute(second) * unit};
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

// 16 magnitudes with the signs of `signs`, which are 0 only where the magnitude is.
inline Shorts with_signs(Shorts magnitudes, Shorts signs) {
#ifdef __AVX2__
    return reinterpret_cast<Shorts>(
        _mm256_sign_epi16(reinterpret_cast<__m256i>(magnitudes), reinterpret_cast<__m256i>(signs)));
#else
    return signs < 0 ? -magnitudes : magnitudes;
#endif
}

// 16 numbers of 16 bits: those of two vectors, where they are too large the nearest that fits. With AVX2 quarters of the
// two vectors are in turn, which write_codes() undoes.
inline Shorts narrowed(Ints first, Ints second) {
#ifdef __AVX2__
    return reinterpret_cast<Shorts>(
        _mm256_packs_epi32(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second)));
#else
    const Ints least = Ints{} - 32768, most = Ints{} + 32767;
    return reinterpret_cast<Shorts>(packed(reinterpret_cast<Words>(larger(least, smaller(first, most))) & 0xffffu,
                                           reinterpret_cast<Words>(larger(least, smaller(second, most))) & 0xffffu));
#endif
}

// Rounded to nearest even.
inline Ints rounded(Floats values) {
#ifdef __AVX__
    return reinterpret_cast<Ints>(_mm256_cvtps_epi32(values));
#else // near this number the last place has value 1
    constexpr float ROUNDS = 0x1.8p23f;
    return reinterpret_cast<Ints>(values + ROUNDS) - reinterpret_cast<Ints>(Floats{} + ROUNDS);
#endif
}

// Writes 32 codes, from two of narrowed().
template <Order ORDER> inline void write_codes(int8_t *codes, Shorts first, Shorts second) {
#ifdef __AVX2__
    const __m256i packed = _mm256_packs_epi16(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second));
    if constexpr (ORDER == EVEN_ODD) {
        const __m128i each = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
        const __m256i in_turn = _mm256_shuffle_epi8(packed, _mm256_broadcastsi128_si256(each));
        write(codes, _mm256_permute4x64_epi64(in_turn, 0b11011000));
    } else
        write(codes, _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#else
    if constexpr (ORDER == EVEN_ODD) first = interleaved(first), second = interleaved(second);
    write(codes, __builtin_convertvector(first, Bytes));
    write(codes + PAIR, __builtin_convertvector(second, Bytes));
#endif
}

inline Floats widen(HalfShorts scales) { return from_bits(__builtin_convertvector(scales, Words) << 16); }

// The blocks of elements `i` to `last`, one after the other.
struct Blocks {
    int64_t i, last, row_length;
    int64_t left;  // elements from i to the end of the row
    int64_t size;  // of the block at i; 0 at the end
    int64_t index; // of the block at i

    Blocks(BlockLayout layout, int64_t first, int64_t last)
        : i(first), last(last), row_length(layout.row_length), index(layout.block_of(first)) {
        const int64_t position = (layout.start + first) % row_length;
        left = row_length - position;
        size = std::min({BLOCK - position % BLOCK, left, last - i});
    }
    // Whether vectors may also write what follows the block at i: there are 32 elements, and their own blocks are written
    // later. Their codes must have been read before, and update_group() has read eight blocks more than it has written.
    bool may_write_after() const { return i + BLOCK <= last && row_length >= BLOCK / LANES; }
    // Number of complete blocks from i on in its row.
    int64_t complete() const { return size == BLOCK ? std::min(left, last - i) / BLOCK : 0; }
    // Moves over `count` blocks of one row: complete ones, or the one at i.
    void skip(int64_t count) {
        const int64_t elements = count * size;
        i += elements, left -= elements, index += count;
        if (left == 0) left = row_length;
        size = std::min({BLOCK, left, last - i});
    }
};

// Up to eight blocks: where they are, their new momentum, and the factors that turn it into codes once the largest value of
// each block is known. Incomplete blocks are updated in copies if nothing may be written after them.
template <class Streams> struct Group {
    static constexpr Order ORDER = Streams::ORDER;
    int64_t count = 0;      // of blocks
    Streams streams[LANES]; // of each block, from its first element on
    int8_t *codes[LANES];
    uint16_t *scales;
    int64_t sizes[LANES] = {};
    bool is_part[LANES]; // whether the block is incomplete and updated in place
    alignas(4 * LANES) float units[LANES]; // the factors of the squared old codes
    Pair magnitudes[LANES][2]; // of the new momentum
    Shorts signs[LANES][2];    // numbers with the signs of the new momentum
    Ints peaks[LANES];
    alignas(4 * LANES) float inverses[LANES];

    Group() { std::fill_n(codes, LANES, static_cast<int8_t *>(nowhere)); }

    // Sets where the next blocks are, and reads their scales.
    void place(Blocks &blocks, const Streams &tensor, const Codes &momentum) {
        scales = momentum.scales + blocks.index;
        count = incomplete = 0;
        while (count < LANES && blocks.size > 0) {
            const int64_t complete = std::min(blocks.complete(), LANES - count), next = std::max<int64_t>(complete, 1);
            for (int64_t block = 0; block < next; ++block, ++count)
                set_place(blocks.i + block * BLOCK, blocks.size, tensor, momentum);
            if (complete == 0) {
                is_part[count - 1] = blocks.may_write_after();
                if (!is_part[count - 1]) copy_last();
            }
            blocks.skip(next);
        }
        if (count < LANES) std::fill(codes + count, codes + LANES, static_cast<int8_t *>(nowhere));
        HalfShorts eight{};
        if (count == LANES)
            eight = read<HalfShorts>(scales);
        else
            std::memcpy(&eight, scales, count * sizeof *scales);
        write(units, widen(eight) * (1.0f / LEVELS));
    }
    void put_back_streams() const {
        for (int64_t i = 0; i < incomplete; ++i) written[i].put_back();
    }
    void put_back_codes() const {
        for (int64_t i = 0; i < incomplete; ++i) written_codes[i].put_back();
    }
    [[gnu::always_inline]] void set(int64_t block, const Pair &first, const Pair &second) {
        const Pair both[2] = {first, second};
        Ints largest[2];
        for (int64_t half = 0; half < 2; ++half) {
            const Pair &values = both[half], sizes = {absolute(values.first), absolute(values.second)};
            magnitudes[block][half] = sizes;
            signs[block][half] = narrowed(reinterpret_cast<Ints>(values.first), reinterpret_cast<Ints>(values.second));
            largest[half] = larger(magnitude(sizes.first), magnitude(sizes.second));
        }
        peaks[block] = larger(largest[0], largest[1]);
    }
    // Writes the new scales.
    void scale() {
        const Floats peak = from_bits(reinterpret_cast<Words>(largest_lanes(peaks)));
        const Words scale = (peak < SMALLEST_SCALE ? Words{} : nearest_even(peak)) & 0xffff0000u;
        const HalfShorts eight = __builtin_convertvector(scale >> 16, HalfShorts);
        if (count == LANES)
            write(scales, eight);
        else
            std::memcpy(scales, &eight, count * sizeof *scales);
        write(inverses, scale == 0u ? Floats{} : LEVELS / from_bits(scale));
        const Ints is_not_finite = reinterpret_cast<Ints>(scale) >= INFINITE;
        if (!is_any(is_not_finite)) return;
        for (int64_t block = 0; block < LANES; ++block) // all elements of these become NaN; their codes are 0
            if (is_not_finite[block]) magnitudes[block][0] = magnitudes[block][1] = Pair{}, inverses[block] = 0;
    }

  private:
    void set_place(int64_t i, int64_t size, const Streams &tensor, const Codes &momentum) {
        streams[count] = tensor.from(i);
        codes[count] = momentum.codes + i;
        sizes[count] = size;
        is_part[count] = false;
    }
    // Replaces the streams of the last block by copies.
    void copy_last() {
        Streams &last = streams[count - 1];
        const int64_t size = sizes[count - 1];
        last = last.staged(only_read[incomplete].of(size), written[incomplete].of(size));
        codes[count - 1] = written_codes[incomplete].of(size).copy(codes[count - 1]);
        ++incomplete;
    }

    int8_t nowhere[BLOCK];  // receives the codes of absent blocks
    int64_t incomplete = 0; // number of copied blocks
    Staging only_read[LANES], written[LANES], written_codes[LANES];
};

// Square roots of a block's magnitudes. encode() is separate because they have a long latency.
struct Roots {
    Pair pairs[2];

    template <class Group> [[gnu::always_inline]] Roots(const Group &group, int64_t block) {
        const float inverse = group.inverses[block];
        const auto roots = [&](const Pair &sizes) __attribute__((always_inline)) {
            return Pair{square_root(sizes.first * inverse), square_root(sizes.second * inverse)};
        };
        pairs[0] = roots(group.magnitudes[block][0]);
        pairs[1] = group.sizes[block] > PAIR ? roots(group.magnitudes[block][1]) : Pair{};
    }
    // Writes the block's codes. A scale is rounded, by so little that no root rounds to 128.
    template <class Group> [[gnu::always_inline]] void encode(const Group &group, int64_t block) const {
        Shorts codes[2];
        for (int64_t half = 0; half < 2; ++half) {
            const Shorts magnitudes = narrowed(rounded(pairs[half].first), rounded(pairs[half].second));
            codes[half] = with_signs(magnitudes, group.signs[block][half]);
        }
        write_codes<Group::ORDER>(group.codes[block], codes[0], codes[1]);
    }
};

} // namespace
