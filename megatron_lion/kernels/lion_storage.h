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

// Copies of the streams of an incomplete block, so that vectors may read and write all of its 32 elements.
class Staging {
  public:
    // Of a block of `elements`.
    Staging &of(int64_t elements) {
        size = elements, count = 0;
        return *this;
    }

    // A copy of the elements from `home` on. The first is repeated after the last.
    template <class Value> Value *copy(Value *home) {
        Stream &stream = streams[count++];
        stream.home = home, stream.bytes = size * sizeof(Value);
        Value *const copy = reinterpret_cast<Value *>(stream.copy);
        std::memcpy(copy, home, stream.bytes);
        std::fill(copy + size, copy + BLOCK, *home);
        return copy;
    }
    // Writes all copies to their homes.
    void put_back() const {
        for (int64_t i = 0; i < count; ++i) std::memcpy(streams[i].home, streams[i].copy, streams[i].bytes);
    }

  private:
    static constexpr int64_t STREAMS = 3;
    struct Stream {
        void *home;
        int64_t bytes;
        alignas(32) uint8_t copy[BLOCK * sizeof(float)];
    };

    int64_t size, count;
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
