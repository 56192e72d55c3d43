// Storage formats, read and written as fp32: one element, or 16 at a time in two vectors of lanes.
//
// 16 elements are loaded as the eight with even index and the eight with odd index. Two 16-bit elements are the halves of
// one 32-bit word, so this order needs only a shift and a mask, where memory order would need shuffles.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "only little-endian machines have the even element of two in the low half of a word"
#endif

namespace {

constexpr int64_t LANES = 8, PAIR = 2 * LANES;
constexpr uint32_t MAGNITUDE = 0x7fffffffu, SIGN = 0x80000000u;

// Vector types of GCC and Clang. They work on any CPU; the compiler splits them if its vectors are shorter.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * PAIR)));
typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));

// Pick lanes of two vectors by index.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

struct Pair {
    Floats even, odd;
};

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline Words to_bits(Floats values) { return reinterpret_cast<Words>(values); }
inline Floats from_bits(Words bits) { return reinterpret_cast<Floats>(bits); }

inline Floats absolute(Floats values) { return from_bits(to_bits(values) & MAGNITUDE); }
inline Doubles absolute(Doubles values) { return values < 0.0 ? -values : values; }

// 0 for zero and for NaN.
inline float sign_of(float value) { return static_cast<float>((value > 0.0f) - (value < 0.0f)); }
inline Floats sign_of(Floats value) { return value > 0.0f ? Floats{} + 1.0f : (value < 0.0f ? Floats{} - 1.0f : Floats{}); }

// Magnitudes as integers, where a NaN is the largest.
inline Ints magnitude(Floats values) { return reinterpret_cast<Ints>(to_bits(values) & MAGNITUDE); }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

template <class Vector> inline Vector read(const void *address) {
    Vector vector;
    std::memcpy(&vector, address, sizeof vector);
    return vector;
}
template <class Vector> inline void write(void *address, Vector vector) {
    std::memcpy(address, &vector, sizeof vector);
}

// Elements are fetched into the cache in pieces of PIECE, AHEAD elements before they are used. Hardware prefetchers keep
// too few lines in flight to use the full memory bandwidth (tools/benchmark/step.py), because a step has many streams.
constexpr int64_t PIECE = 64, AHEAD = 512, LINE_BYTES = 64;

template <class Value> inline void fetch(const Value *piece) {
    asm volatile(""); // otherwise GCC sees a function without effect and drops calls of it
    const char *const bytes = reinterpret_cast<const char *>(piece);
    for (int64_t i = 0; i < PIECE * int64_t{sizeof(Value)}; i += LINE_BYTES) __builtin_prefetch(bytes + i);
}

// The functions below work on one fp32 or its bits, or on lanes of them.

// A NaN is not equal to itself.
template <class Float, class Bits> inline Bits unless_nan(Float value, Bits bits, uint32_t otherwise) {
    return value == value ? bits : Bits{} + otherwise;
}

// The bf16 of a number, rounded to nearest even, in the upper half of 32 bits; ignore the lower half.
template <class Float> inline auto nearest_even(Float value) {
    const auto bits = to_bits(value);
    return unless_nan(value, bits + 0x7fffu + ((bits >> 16) & 1u), 0x7fc00000u);
}

// 16 elements of 16 bits: even ones from lower halves, odd ones from upper halves.
inline Words halves(Words even, Words odd) {
    return reinterpret_cast<Words>(SHUFFLE(reinterpret_cast<Shorts>(even), reinterpret_cast<Shorts>(odd), //
                                           0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31));
}

struct Fp32 {
    static constexpr bool NARROW = false;
    float *values;
    void fetch_piece(int64_t i) const { fetch(values + i); }
    float load(int64_t i) const { return values[i]; }
    void store(int64_t i, float value) const { values[i] = value; }

    Pair load_pair(int64_t i) const {
        const Floats first = read<Floats>(values + i), second = read<Floats>(values + i + LANES);
        const Floats a = SHUFFLE(first, second, 0, 1, 2, 3, 8, 9, 10, 11);
        const Floats b = SHUFFLE(first, second, 4, 5, 6, 7, 12, 13, 14, 15);
        return {SHUFFLE(a, b, 0, 2, 8, 10, 4, 6, 12, 14), SHUFFLE(a, b, 1, 3, 9, 11, 5, 7, 13, 15)};
    }
    void store_pair(int64_t i, Pair pair) const {
        const Floats a = SHUFFLE(pair.even, pair.odd, 0, 8, 1, 9, 4, 12, 5, 13);
        const Floats b = SHUFFLE(pair.even, pair.odd, 2, 10, 3, 11, 6, 14, 7, 15);
        write(values + i, SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11));
        write(values + i + LANES, SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15));
    }
};

struct Bf16 {
    static constexpr bool NARROW = true;
    uint16_t *values;
    void fetch_piece(int64_t i) const { fetch(values + i); }
    float load(int64_t i) const { return from_bits(static_cast<uint32_t>(values[i]) << 16); }
    void store(int64_t i, float value) const { values[i] = static_cast<uint16_t>(nearest_even(value) >> 16); }

    Pair load_pair(int64_t i) const {
        const Words both = read<Words>(values + i);
        return {from_bits(both << 16), from_bits(both & 0xffff0000u)};
    }
    void store_pair(int64_t i, Pair pair) const {
        write(values + i, halves(nearest_even(pair.even) >> 16, nearest_even(pair.odd)));
    }
};

struct Remainder { // fp32 as a bf16, rounded half away from zero, and a 16-bit remainder
    static constexpr bool NARROW = true;
    uint16_t *high;
    int16_t *low;
    void fetch_piece(int64_t i) const { fetch(high + i), fetch(low + i); }
    float load(int64_t i) const {
        return from_bits((static_cast<uint32_t>(high[i]) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low[i])));
    }
    void store(int64_t i, float value) const {
        const uint32_t bits = unless_nan(value, to_bits(value), 0x7fc00000u);
        high[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
        low[i] = static_cast<int16_t>(bits);
    }

    Pair load_pair(int64_t i) const {
        const Words highs = read<Words>(high + i), lows = read<Words>(low + i);
        // Sign-extended lower halves: shifting a signed number to the right repeats its sign.
        const Words even = reinterpret_cast<Words>(reinterpret_cast<Ints>(lows << 16) >> 16);
        const Words odd = reinterpret_cast<Words>(reinterpret_cast<Ints>(lows) >> 16);
        return {from_bits((highs << 16) + even), from_bits((highs & 0xffff0000u) + odd)};
    }
    void store_pair(int64_t i, Pair pair) const {
        const Words even = unless_nan(pair.even, to_bits(pair.even), 0x7fc00000u);
        const Words odd = unless_nan(pair.odd, to_bits(pair.odd), 0x7fc00000u);
        write(high + i, halves((even + 0x8000u) >> 16, odd + 0x8000u));
        write(low + i, halves(even, odd << 16));
    }
};

struct NoCopy { // in place of a model copy
    static constexpr bool NARROW = false;
    void fetch_piece(int64_t) const {}
    void store(int64_t, float) const {}
    void store_pair(int64_t, Pair) const {}
};

} // namespace
