// Vectors of eight 32-bit lanes: their types, bits and rounding. 16 elements are two vectors.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

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
typedef uint16_t HalfShorts __attribute__((vector_size(2 * LANES)));
typedef float HalfFloats __attribute__((vector_size(2 * LANES)));
typedef double Doubles __attribute__((vector_size(4 * LANES)));

// Pick lanes of two vectors by index.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// How 16 elements are held in the two vectors of a Pair.
//
// EVEN_ODD: the eight with even index, then the eight with odd index. Two 16-bit elements are the halves of one 32-bit
// word, so this order needs only a shift and a mask, where memory order needs shuffles.
// IN_MEMORY: the first eight, then the last eight. fp32 elements need no shuffles.
enum Order { IN_MEMORY, EVEN_ODD };

struct Pair {
    Floats first, second;
};

template <class Vector> inline Vector read(const void *address) {
    Vector vector;
    std::memcpy(&vector, address, sizeof vector);
    return vector;
}
template <class Vector> inline void write(void *address, Vector vector) {
    std::memcpy(address, &vector, sizeof vector);
}

inline uint32_t to_bits(float value) { return read<uint32_t>(&value); }
inline float from_bits(uint32_t bits) { return read<float>(&bits); }
inline Words to_bits(Floats values) { return reinterpret_cast<Words>(values); }
inline Floats from_bits(Words bits) { return reinterpret_cast<Floats>(bits); }

inline Floats absolute(Floats values) { return from_bits(to_bits(values) & MAGNITUDE); }
inline Doubles absolute(Doubles values) { return values < 0.0 ? -values : values; }

// 0 for zero and for NaN. A true comparison is -1.
inline Floats sign_of(Floats value) {
#ifdef __AVX512VL__ // with comparisons that give a mask
    const Words is_signed = reinterpret_cast<Words>(_mm256_cmp_ps(value, Floats{}, _CMP_NEQ_OQ));
    return from_bits(((to_bits(value) & SIGN) | to_bits(1.0f)) & is_signed);
#else
    return __builtin_convertvector((value < 0.0f) - (value > 0.0f), Floats);
#endif
}

// Magnitudes as integers, where a NaN is the largest.
inline Ints magnitude(Floats values) { return reinterpret_cast<Ints>(to_bits(values) & MAGNITUDE); }
inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }
inline Ints smaller(Ints a, Ints b) { return a < b ? a : b; }

// The functions below work on one fp32 or its bits, or on lanes of them.

// A NaN is not equal to itself.
template <class Float, class Bits> inline Bits unless_nan(Float value, Bits bits, uint32_t otherwise) {
    return value == value ? bits : Bits{} + otherwise;
}

// Whether any lane of a comparison is true.
inline bool is_any(Ints lanes) {
#ifdef __AVX__
    return _mm256_movemask_ps(reinterpret_cast<Floats>(lanes)) != 0;
#else
    bool any = false;
    for (int64_t lane = 0; lane < LANES; ++lane) any |= lanes[lane] != 0;
    return any;
#endif
}

// Whether a pair may have a NaN. Where this is fast, a branch that is hardly ever taken saves work for each lane.
inline bool may_have_nan(Pair pair) {
#ifdef __AVX__
    return __builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(pair.first, pair.second, _CMP_UNORD_Q)) != 0, false);
#else
    return true;
#endif
}

// The bf16 of a number, rounded to nearest even, in the upper half of 32 bits; ignore the lower half.
template <class Bits> inline Bits nearest_even_of_number(Bits bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }
template <class Float> inline auto nearest_even(Float value) {
    return unless_nan(value, nearest_even_of_number(to_bits(value)), 0x7fc00000u);
}

// Whether a pair may have a NaN, or a number halfway between two bf16.
inline bool may_have_nan_or_tie(Pair pair) {
#ifdef __AVX2__
    const Words first = to_bits(pair.first) + 0x8000u, second = to_bits(pair.second) + 0x8000u; // ties end in 16 zeros now
    const __m256i least = _mm256_min_epu16(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second));
    const __m256i is_zero = _mm256_cmpeq_epi16(least, _mm256_setzero_si256());
    const __m256i has_nan = _mm256_castps_si256(_mm256_cmp_ps(pair.first, pair.second, _CMP_UNORD_Q));
    constexpr uint32_t LOWER_HALVES = 0x33333333u;
    const uint32_t bytes = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_or_si256(is_zero, has_nan)));
    return __builtin_expect((bytes & LOWER_HALVES) != 0, false);
#else
    return true;
#endif
}

// 16 elements of 16 bits: even ones from lower halves, odd ones from upper halves.
inline Words halves(Words even, Words odd) {
#ifdef __AVX2__
    return reinterpret_cast<Words>(
        _mm256_blend_epi16(reinterpret_cast<__m256i>(even), reinterpret_cast<__m256i>(odd), 0b10101010));
#else
    return (even & 0xffffu) | (odd & 0xffff0000u);
#endif
}

// 16 elements in memory order, from those with even and then those with odd index.
inline Shorts interleaved(Shorts values) {
    return SHUFFLE(values, values, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
}

// Two vectors of words in `ORDER`, from 16 lower and 16 upper halves in memory order.
template <Order ORDER> [[gnu::always_inline]] inline void join_halves(Words lower, Words upper, Words &first, Words &second) {
    if constexpr (ORDER == EVEN_ODD) {
        first = halves(lower, upper << 16), second = halves(lower >> 16, upper);
        return;
    }
#ifdef __AVX2__ // interleaves quarters
    const __m256i low = _mm256_permute4x64_epi64(reinterpret_cast<__m256i>(lower), 0b11011000);
    const __m256i high = _mm256_permute4x64_epi64(reinterpret_cast<__m256i>(upper), 0b11011000);
    first = reinterpret_cast<Words>(_mm256_unpacklo_epi16(low, high));
    second = reinterpret_cast<Words>(_mm256_unpackhi_epi16(low, high));
#else
    const Shorts low = reinterpret_cast<Shorts>(lower), high = reinterpret_cast<Shorts>(upper);
    first = reinterpret_cast<Words>(SHUFFLE(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
    second = reinterpret_cast<Words>(SHUFFLE(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
#endif
}

// 16 elements of 16 bits: the words of one vector, then of the other. All are below 2^16.
inline Words packed(Words first, Words second) {
#ifdef __AVX2__ // packs quarters of the two in turn
    const __m256i quarters = _mm256_packus_epi32(reinterpret_cast<__m256i>(first), reinterpret_cast<__m256i>(second));
    return reinterpret_cast<Words>(_mm256_permute4x64_epi64(quarters, 0b11011000));
#else
    return reinterpret_cast<Words>(SHUFFLE(reinterpret_cast<Shorts>(first), reinterpret_cast<Shorts>(second), //
                                           0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
#endif
}

// 16 elements of 16 bits, in memory order, from the lower or upper halves of a pair of words.
template <Order ORDER> inline Words lower_halves(Words first, Words second) {
    if constexpr (ORDER == EVEN_ODD) return halves(first, second << 16);
    return packed(first & 0xffffu, second & 0xffffu);
}
template <Order ORDER> inline Words upper_halves(Words first, Words second) {
    if constexpr (ORDER == EVEN_ODD) return halves(first >> 16, second);
    return packed(first >> 16, second >> 16);
}

inline Floats square_root(Floats values) {
#ifdef __AVX__
    return _mm256_sqrt_ps(values);
#else
    for (int64_t lane = 0; lane < LANES; ++lane) values[lane] = __builtin_sqrtf(values[lane]);
    return values;
#endif
}

} // namespace
