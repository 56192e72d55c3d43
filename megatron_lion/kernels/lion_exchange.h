// What receivers of a parameter need to know about a step of Lion, as megatron_lion/exchange/digits.py defines it.

#pragma once

#include "lion_vectors.h"

namespace {

constexpr uint8_t EXCEPTION = 0x80; // a digit: s in bits 0 and 1, r in bits 2 and 3, or this

// Formats of parameters: code to fp32 and back. Every NaN rounds to the same code.

struct CodeFp32 {
    typedef uint32_t Code;
    static float widen(uint32_t code) { return from_bits(code); }
    static uint32_t round(float value) { return to_bits(value); }
};

struct CodeBf16 {
    typedef uint16_t Code;
    static float widen(uint16_t code) { return from_bits(static_cast<uint32_t>(code) << 16); }
    static uint16_t round(float value) { return static_cast<uint16_t>(nearest_even(value) >> 16); }
};

struct CodeBf16HalfAway : CodeBf16 { // as the upper half of a master that has a remainder
    static uint16_t round(float value) {
        return static_cast<uint16_t>((unless_nan(value, to_bits(value), 0x7fc00000u) + 0x8000u) >> 16);
    }
};

struct CodeFp16 { // in integers, so that compilers vectorize it for any CPU
    typedef uint16_t Code;
    static float widen(uint16_t code) {
        constexpr uint32_t INFINITE = 0x7c00u << 13, SMALLEST = 113u << 23; // 2^-14, the smallest normal number
        const uint32_t shifted = (code & 0x7fffu) << 13, exponent = shifted & INFINITE;
        const uint32_t biased = shifted + (112u << 23);
        const uint32_t normal = exponent == INFINITE ? biased + (112u << 23) : biased;
        const uint32_t denormal = to_bits(from_bits(biased + (1u << 23)) - from_bits(SMALLEST));
        return from_bits((exponent == 0 ? denormal : normal) | (code & 0x8000u) << 16);
    }
    static uint16_t round(float value) {
        constexpr uint32_t SMALLEST = 113u << 23, OVERFLOWS = 143u << 23; // 2^16
        const uint32_t sign = to_bits(value) & SIGN, bits = to_bits(value) & MAGNITUDE;
        const uint32_t normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
        // The unit in the last place of 0.5 is the smallest denormal of fp16: the sum rounds to nearest even.
        const uint32_t denormal = to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f);
        const uint32_t finite = bits < SMALLEST ? denormal : normal;
        const uint32_t code = (bits >= OVERFLOWS ? 0x7c00u : finite) | sign >> 16;
        return static_cast<uint16_t>(unless_nan(value, code, 0x7e00u));
    }
};

// theta - (s + theta wd) lr.
inline float stepped(float theta, float sign, float lr, float weight_decay) {
    return theta - (sign + theta * weight_decay) * lr;
}

// The digit of an element whose code was `old` and is `now`.
template <class Format>
inline uint8_t digit_of(typename Format::Code old, typename Format::Code now, float sign, float lr, float weight_decay) {
    const uint32_t s = static_cast<uint32_t>(static_cast<int32_t>(sign)) & 3u;
    if (sizeof now == 4) return static_cast<uint8_t>(s);
    const uint32_t guess = Format::round(stepped(Format::widen(old), sign, lr, weight_decay));
    const uint32_t residual = (now - guess) & 0xffffu, above = (residual + 1u) & 0xffffu;
    return static_cast<uint8_t>(above > 2u ? EXCEPTION : s | (residual & 3u) << 2);
}

} // namespace
