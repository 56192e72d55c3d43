// Storage formats, read and written as fp32, 16 elements at a time.

#pragma once

#include "lion_vectors.h"

#include <algorithm>
#include <type_traits>

namespace {

// Elements are fetched into the cache in pieces of PIECE, AHEAD elements before they are used. Hardware prefetchers keep
// too few lines in flight to use the full memory bandwidth (tools/benchmark/step.py), because a step has many streams.
constexpr int64_t PIECE = 64, AHEAD = 512, LINE_BYTES = 64;
// Elements of a block: the part of a step that may be incomplete.
constexpr int64_t BLOCK = 32;

template <class Value> inline void fetch(const Value *piece) {
    asm volatile(""); // otherwise GCC sees a function without effect and drops calls of it
    const char *const bytes = reinterpret_cast<const char *>(piece);
    for (int64_t i = 0; i < PIECE * int64_t{sizeof(Value)}; i += LINE_BYTES) __builtin_prefetch(bytes + i);
}

// `size` elements from index i on. `has_room` says that there are 32 elements from i on.
struct Part {
    int64_t i, size;
    bool has_room;
};

// As many ones as a block of fp32 has bytes, then as many zeros.
constexpr int64_t LONGEST = BLOCK * sizeof(float);
struct Masks {
    uint8_t bytes[2 * LONGEST];
    constexpr Masks() : bytes{} {
        for (int64_t i = 0; i < LONGEST; ++i) bytes[i] = 0xff;
    }
};
constexpr Masks MASKS;

// Copies of the streams of an incomplete block, so that vectors may read and write all of its 32 elements.
class Staging {
  public:
    Staging &of(Part part) {
        size = part.size, has_room = part.has_room, count = 0;
        return *this;
    }

    // A copy of the elements from `home` on. The first is repeated after the last.
    template <class Value> Value *copy(Value *home) {
        typedef std::remove_const_t<Value> Repeated __attribute__((vector_size(sizeof(Words))));
        Stream &stream = streams[count++];
        stream.home = reinterpret_cast<uint8_t *>(const_cast<std::remove_const_t<Value> *>(home));
        stream.width = sizeof(Value);
        const uint8_t *from = stream.home;
        if (!has_room) from = static_cast<uint8_t *>(std::memcpy(stream.copy, home, size * sizeof(Value)));
        const Words first = reinterpret_cast<Words>(Repeated{} + *home);
        for (int64_t i = 0; i < BLOCK * int64_t{sizeof(Value)}; i += sizeof(Words)) {
            const Words mask = read<Words>(masks(sizeof(Value)) + i);
            write(stream.copy + i, (read<Words>(from + i) & mask) | (first & ~mask));
        }
        return reinterpret_cast<Value *>(stream.copy);
    }
    // Writes all copies to their homes. What follows them there is read and written, but not changed, if there is room.
    void put_back() const {
        for (int64_t stream = 0; stream < count; ++stream) {
            const Stream &from = streams[stream];
            if (!has_room) {
                std::memcpy(from.home, from.copy, size * from.width);
                continue;
            }
            for (int64_t i = 0; i < BLOCK * from.width; i += sizeof(Words)) {
                const Words mask = read<Words>(masks(from.width) + i);
                write(from.home + i, (read<Words>(from.copy + i) & mask) | (read<Words>(from.home + i) & ~mask));
            }
        }
    }

  private:
    static constexpr int64_t STREAMS = 3;
    struct Stream {
        alignas(32) uint8_t copy[LONGEST];
        uint8_t *home;
        int64_t width;
    };
    // Ones for the first `size` elements, of `width` bytes each.
    const uint8_t *masks(int64_t width) const { return MASKS.bytes + LONGEST - size * width; }

    int64_t size, count;
    bool has_room;
    Stream streams[STREAMS];
};

template <Order O> struct Fp32 {
    static constexpr Order ORDER = O;
    float *values;
    void fetch_piece(int64_t i) const { fetch(values + i); }
    Fp32 from(int64_t i) const { return {values + i}; }
    Fp32 staged(Staging &staging) const { return {staging.copy(values)}; }

    [[gnu::always_inline]] Pair load_pair(int64_t i) const {
        const Floats first = read<Floats>(values + i), second = read<Floats>(values + i + LANES);
        if constexpr (ORDER == IN_MEMORY) return {first, second};
        const Floats a = SHUFFLE(first, second, 0, 1, 2, 3, 8, 9, 10, 11);
        const Floats b = SHUFFLE(first, second, 4, 5, 6, 7, 12, 13, 14, 15);
        return {SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14), SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15)};
    }
    [[gnu::always_inline]] void store_pair(int64_t i, Pair pair) const {
        if constexpr (ORDER == EVEN_ODD) {
            const Floats a = SHUFFLE(pair.first, pair.second, 0, 8, 1, 9, 4, 12, 5, 13);
            const Floats b = SHUFFLE(pair.first, pair.second, 2, 10, 3, 11, 6, 14, 7, 15);
            pair = {SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11), SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15)};
        }
        write(values + i, pair.first);
        write(values + i + LANES, pair.second);
    }
};

template <Order O> struct Bf16 {
    static constexpr Order ORDER = O;
    uint16_t *values;
    void fetch_piece(int64_t i) const { fetch(values + i); }
    Bf16 from(int64_t i) const { return {values + i}; }
    Bf16 staged(Staging &staging) const { return {staging.copy(values)}; }

    [[gnu::always_inline]] Pair load_pair(int64_t i) const {
        const Words both = read<Words>(values + i);
        if constexpr (ORDER == EVEN_ODD) return {from_bits(both << 16), from_bits(both & 0xffff0000u)};
        Words first, second;
        join_halves<ORDER>(Words{}, both, first, second);
        return {from_bits(first), from_bits(second)};
    }
    [[gnu::always_inline]] void store_pair(int64_t i, Pair pair) const {
        Words first = nearest_even_of_number(to_bits(pair.first)), second = nearest_even_of_number(to_bits(pair.second));
        if (may_have_nan(pair)) first = nearest_even(pair.first), second = nearest_even(pair.second);
        write(values + i, upper_halves<ORDER>(first, second));
    }
};

// fp32 as a bf16, rounded half away from zero, and a 16-bit remainder.
template <Order O> struct Remainder {
    static constexpr Order ORDER = O;
    uint16_t *high;
    int16_t *low;
    void fetch_piece(int64_t i) const { fetch(high + i), fetch(low + i); }
    Remainder from(int64_t i) const { return {high + i, low + i}; }
    Remainder staged(Staging &staging) const { return {staging.copy(high), staging.copy(low)}; }

    [[gnu::always_inline]] Pair load_pair(int64_t i) const {
        const Shorts lower = read<Shorts>(low + i);
        const Shorts upper = read<Shorts>(high + i) + (lower >> 15); // a negative remainder borrows
        Words first, second;
        join_halves<ORDER>(reinterpret_cast<Words>(lower), reinterpret_cast<Words>(upper), first, second);
        return {from_bits(first), from_bits(second)};
    }
    [[gnu::always_inline]] void store_pair(int64_t i, Pair pair) const {
        Words first = to_bits(pair.first), second = to_bits(pair.second);
        if (may_have_nan(pair))
            first = unless_nan(pair.first, first, 0x7fc00000u), second = unless_nan(pair.second, second, 0x7fc00000u);
        write(high + i, upper_halves<ORDER>(first + 0x8000u, second + 0x8000u));
        write(low + i, lower_halves<ORDER>(first, second));
    }
};

// bf16 of an fp32 master. Ties are rare there (but not in bf16 momentum that decays), so a branch on them saves work:
// only they differ from rounding half away from zero.
template <Order O> struct ModelCopy : Bf16<O> {
    ModelCopy from(int64_t i) const { return {Bf16<O>::from(i)}; }
    ModelCopy staged(Staging &staging) const { return {Bf16<O>::staged(staging)}; }
    [[gnu::always_inline]] void store_pair(int64_t i, Pair pair) const {
        Words first = to_bits(pair.first) + 0x8000u, second = to_bits(pair.second) + 0x8000u;
        if (may_have_nan_or_tie(pair)) first = nearest_even(pair.first), second = nearest_even(pair.second);
        write(this->values + i, upper_halves<O>(first, second));
    }
};

struct NoCopy { // in place of a model copy
    void fetch_piece(int64_t) const {}
    NoCopy from(int64_t) const { return {}; }
    NoCopy staged(Staging &) const { return {}; }
    void store_pair(int64_t, Pair) const {}
};

} // namespace
