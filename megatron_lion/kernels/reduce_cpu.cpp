// Packed gradients on a CPU: the bits of megatron_lion/exchange/pieces.py. Compiled at first use by
// megatron_lion/kernels/compiler.py, called through ctypes by megatron_lion/kernels/reduce_cpu.py.

#include "lion_exchange.h"

#include <algorithm>
#include <type_traits>

namespace {

constexpr int64_t BLOCK = 64, GROUP = 5;   // elements that share a scale; blocks whose trits share 64 bytes
constexpr int64_t PIECE = 64 * GROUP;      // blocks that a thread takes at a time
constexpr int INT8 = 0, INT4 = 1, TERNARY = 2; // the order in exchange/blocks.py's CODES
constexpr int NONE = 0, AS_INT8 = 1, AS_BF16 = 2;
constexpr uint16_t NAN_SCALE = 0x7fc0;

inline float widened(uint16_t bf16) { return CodeBf16::widen(bf16); }

// The sum of a block in a fixed order: halves are added until one element is left. `values` is overwritten.
inline float sum(float *values) {
    for (int64_t half = BLOCK / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
    return values[0];
}

// To the nearest integer, ties to even, below 2^22: a float has no fraction beyond 2^23.
inline float nearest(float value) {
    constexpr float SHIFT = 12582912.0f;
    return (value + SHIFT) - SHIFT;
}

template <int CODE> float scale_of(const float *values, float *threshold) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < BLOCK; ++i) largest = std::max(largest, to_bits(values[i]) & MAGNITUDE);
    if (largest >= 0x7f800000u) return from_bits(0x7fc00000u);
    if constexpr (CODE != TERNARY) return from_bits(largest) / (CODE == INT8 ? 127.0f : 7.0f);
    float magnitudes[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) magnitudes[i] = from_bits(to_bits(values[i]) & MAGNITUDE);
    *threshold = sum(magnitudes) * 0.015625f * 0.7f;
    int32_t kept = 0;
    for (int64_t i = 0; i < BLOCK; ++i) {
        const float magnitude = from_bits(to_bits(values[i]) & MAGNITUDE);
        const bool keeps = magnitude > *threshold;
        magnitudes[i] = keeps ? magnitude : 0.0f;
        kept += keeps;
    }
    return sum(magnitudes) / static_cast<float>(std::max(kept, 1));
}

// Integers and scale of a block. Returns the scale's bf16.
template <int CODE> uint16_t quantize(const float *values, int8_t *codes) {
    float threshold = 0.0f;
    const float exact = scale_of<CODE>(values, &threshold);
    if (!(exact - exact == 0.0f)) { // NaN or infinite
        std::memset(codes, 0, BLOCK);
        return NAN_SCALE;
    }
    const uint16_t rounded = CodeBf16::round(exact);
    const float scale = widened(rounded);
    constexpr float LEVELS = CODE == INT8 ? 127.0f : 7.0f;
    for (int64_t i = 0; i < BLOCK; ++i) {
        if constexpr (CODE == TERNARY) {
            const float value = values[i];
            codes[i] = static_cast<int8_t>((value > threshold) - (value < -threshold));
        } else {
            const float quotient = scale > 0.0f ? values[i] / scale : 0.0f;
            codes[i] = static_cast<int8_t>(static_cast<int32_t>(nearest(std::min(std::max(quotient, -LEVELS), LEVELS))));
        }
    }
    return rounded;
}

// The codes of block `block`, packed into `bytes`, which all blocks share.
template <int CODE> void pack(const int8_t *codes, uint8_t *bytes, int64_t block) {
    if constexpr (CODE == INT8) {
        std::memcpy(bytes + block * BLOCK, codes, BLOCK);
    } else if constexpr (CODE == INT4) {
        uint8_t *out = bytes + block * BLOCK / 2;
        for (int64_t j = 0; j < BLOCK / 2; ++j)
            out[j] = static_cast<uint8_t>((codes[j] & 15) | static_cast<uint8_t>(codes[j + BLOCK / 2]) << 4);
    } else {
        uint8_t *out = bytes + block / GROUP * BLOCK;
        constexpr int POWERS[GROUP] = {1, 3, 9, 27, 81};
        const int power = POWERS[block % GROUP];
        if (power == 1) std::memset(out, 120, BLOCK); // 3 + 9 + 27 + 81: zeros in the other blocks
        for (int64_t j = 0; j < BLOCK; ++j) out[j] = static_cast<uint8_t>(out[j] + power * (codes[j] + (power == 1)));
    }
}

template <int CODE> void unpack(const uint8_t *bytes, int64_t block, int8_t *codes) {
    if constexpr (CODE == INT8) {
        std::memcpy(codes, bytes + block * BLOCK, BLOCK);
    } else if constexpr (CODE == INT4) {
        const uint8_t *in = bytes + block * BLOCK / 2;
        for (int64_t j = 0; j < BLOCK / 2; ++j) {
            codes[j] = static_cast<int8_t>(static_cast<int8_t>(in[j] << 4) >> 4);
            codes[j + BLOCK / 2] = static_cast<int8_t>(static_cast<int8_t>(in[j]) >> 4);
        }
    } else {
        // byte / 3^place as a product and a shift, which are exact for all bytes up to 242
        constexpr uint16_t FACTORS[GROUP] = {1, 171, 57, 19, 203}, SHIFTS[GROUP] = {0, 9, 9, 9, 14};
        const uint8_t *in = bytes + block / GROUP * BLOCK;
        const uint16_t factor = FACTORS[block % GROUP], shift = SHIFTS[block % GROUP];
#pragma omp simd
        for (int64_t j = 0; j < BLOCK; ++j) {
            const uint16_t rest = static_cast<uint16_t>(in[j] * factor) >> shift;
            const uint16_t third = static_cast<uint16_t>(rest * 171) >> 9;
            codes[j] = static_cast<int8_t>(rest - 3 * third - 1);
        }
    }
}

template <class Format, int CODE>
void write(const typename Format::Code *gradient, uint16_t *scales, uint8_t *packed, int feedback, void *residual,
           uint16_t *residual_scales, int64_t numel, int threads) {
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK, pieces = (blocks + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (pieces > 1)
    for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t block = piece * PIECE; block < std::min((piece + 1) * PIECE, blocks); ++block) {
            const int64_t first = block * BLOCK, count = std::min(BLOCK, numel - first);
            float values[BLOCK] = {};
            for (int64_t i = 0; i < count; ++i) values[i] = Format::widen(gradient[first + i]);
            int8_t *const kept = static_cast<int8_t *>(residual) + first;
            uint16_t *const rounded = static_cast<uint16_t *>(residual) + first;
            if (feedback == AS_INT8) {
                const float scale = widened(residual_scales[block]);
                for (int64_t i = 0; i < count; ++i) values[i] += static_cast<float>(kept[i]) * scale;
            } else if (feedback == AS_BF16) {
                for (int64_t i = 0; i < count; ++i) values[i] += widened(rounded[i]);
            }
            int8_t codes[BLOCK];
            scales[block] = quantize<CODE>(values, codes);
            pack<CODE>(codes, packed, block);
            if (feedback == NONE) continue;
            const float scale = widened(scales[block]);
            for (int64_t i = 0; i < count; ++i) values[i] -= static_cast<float>(codes[i]) * scale;
            if (feedback == AS_INT8)
                residual_scales[block] = quantize<INT8>(values, kept);
            else
                for (int64_t i = 0; i < count; ++i) rounded[i] = CodeBf16::round(values[i]);
        }
}

template <class Format, int CODE>
void add_up(const typename Format::Code *own, const uint8_t *messages, int64_t others, int64_t bytes, int64_t scales_at,
            int64_t codes_at, int64_t rank, float *total, int64_t numel, int threads) {
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK, pieces = (blocks + PIECE - 1) / PIECE;
#pragma omp parallel for schedule(static) num_threads(threads) if (pieces > 1)
    for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t block = piece * PIECE; block < std::min((piece + 1) * PIECE, blocks); ++block) {
            const int64_t first = block * BLOCK, count = std::min(BLOCK, numel - first);
            float sums[BLOCK] = {};
            for (int64_t other = 0; other <= others; ++other) {
                if (other == rank)
                    for (int64_t i = 0; i < count; ++i) sums[i] += Format::widen(own[first + i]);
                if (other == others) break;
                int8_t codes[BLOCK];
                const uint8_t *const message = messages + other * bytes;
                unpack<CODE>(message + codes_at, block, codes);
                const float scale = widened(read<uint16_t>(message + scales_at + 2 * block));
                for (int64_t i = 0; i < BLOCK; ++i) sums[i] += static_cast<float>(codes[i]) * scale;
            }
            std::memcpy(total + first, sums, count * sizeof(float));
        }
}

// Calls `work` with the format of the gradient and the code. Formats: 0 fp32, 1 bf16, 2 fp16.
template <class Work> void for_kind(int format, int code, Work work) {
    const auto with_code = [&](auto kind) {
        if (code == INT8) return work(kind, std::integral_constant<int, INT8>{});
        if (code == INT4) return work(kind, std::integral_constant<int, INT4>{});
        return work(kind, std::integral_constant<int, TERNARY>{});
    };
    if (format == 0) return with_code(CodeFp32{});
    if (format == 1) return with_code(CodeBf16{});
    return with_code(CodeFp16{});
}

} // namespace

// Writes scales and codes of `gradient` plus the residual, and the new residual in the form `feedback`.
extern "C" void reduce_write(int format, int code, const void *gradient, uint16_t *scales, uint8_t *packed, int feedback,
                             void *residual, uint16_t *residual_scales, int64_t numel, int threads) {
    for_kind(format, code, [&](auto kind, auto chosen) {
        typedef decltype(kind) Format;
        write<Format, decltype(chosen)::value>(static_cast<const typename Format::Code *>(gradient), scales, packed,
                                               feedback, residual, residual_scales, numel, threads);
    });
}

// Sums `own`, as that of rank `rank`, and `others` messages of `bytes` bytes into `total`.
extern "C" void reduce_sum(int format, int code, const void *own, const uint8_t *messages, int64_t others, int64_t bytes,
                           int64_t scales_at, int64_t codes_at, int64_t rank, float *total, int64_t numel, int threads) {
    for_kind(format, code, [&](auto kind, auto chosen) {
        typedef decltype(kind) Format;
        add_up<Format, decltype(chosen)::value>(static_cast<const typename Format::Code *>(own), messages, others, bytes,
                                                scales_at, codes_at, rank, total, numel, threads);
    });
}
