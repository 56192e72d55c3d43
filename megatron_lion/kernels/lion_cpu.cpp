// One pass of Lion over memory on a CPU: reads gradient, parameter and momentum, writes parameter, momentum and, where it
// is asked for, a 16-bit copy of the parameter. Compiled at first use by megatron_lion/kernels/compiler.py, called through
// ctypes by megatron_lion/kernels/fused.py.
//
// The bits are those of megatron_lion/update.py and precision.py: every product and every sum is rounded on its own
// (-ffp-contract=off), sign(0) and sign(NaN) are 0, arithmetic is fp32 whatever the storage, rounded to storage once.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#ifndef TELEMETRY // compiled a second time with -DTELEMETRY where sums are asked for: without them they cost nothing
#define TELEMETRY 0
#endif

namespace {

constexpr int64_t BLOCK = 32;        // elements of momentum that share a scale
constexpr float LEVELS = 127 * 127;  // codes hold the square root of a magnitude
constexpr float SMALLEST_SCALE = 0x1p-100f;

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

inline float widen(uint16_t bf16) { return from_bits(static_cast<uint32_t>(bf16) << 16); }

inline uint16_t nearest_even(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : 0x7fc0u); // NaN is not equal to itself
}

// What a role is stored in. Each reads and writes fp32 values.

struct Fp32 {
    float *values;
    float load(int64_t i) const { return values[i]; }
    void store(int64_t i, float value) const { values[i] = value; }
};

struct Bf16 {
    uint16_t *values;
    float load(int64_t i) const { return widen(values[i]); }
    void store(int64_t i, float value) const { values[i] = nearest_even(value); }
};

struct Remainder { // a bf16 and the 16 bits that it lacks: it is rounded half away from zero
    uint16_t *high;
    int16_t *low;
    float load(int64_t i) const {
        return from_bits((static_cast<uint32_t>(high[i]) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low[i])));
    }
    void store(int64_t i, float value) const {
        const uint32_t bits = value == value ? to_bits(value) : 0x7fc00000u;
        high[i] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
        low[i] = static_cast<int16_t>(bits);
    }
};

struct Nothing { void store(int64_t, float) const {} };

struct Place { // where in its parameter a tensor begins, and how long the parameter's rows are
    int64_t start, row;
    int64_t block_of(int64_t i) const { return block_at(start + i) - block_at(start); } // its number in the tensor
    int64_t blocks(int64_t count) const { return count ? block_of(count - 1) + 1 : 0; }
    // The beginning of the block of element i.
    int64_t cut(int64_t i) const { return std::max<int64_t>(i - (start + i) % row % BLOCK, 0); }

  private:
    int64_t block_at(int64_t i) const { return i / row * ((row + BLOCK - 1) / BLOCK) + i % row / BLOCK; }
};

struct Codes { // int8 codes and a bf16 scale a block
    int8_t *codes;
    uint16_t *scales;
    Place place;
};

template <class Size> inline void dequantise(const int8_t *codes, uint16_t scale, float *values, Size count) {
    const float unit = widen(scale) * (1.0f / LEVELS);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const float code = codes[j];
        values[j] = (code * std::fabs(code)) * unit; // the first product is exact
    }
}

template <class Size> inline uint16_t scale_of(const float *values, Size count) {
    int32_t largest = 0; // of magnitudes as integers, among which a NaN is the largest
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < count; ++j) {
        const int32_t magnitude = static_cast<int32_t>(to_bits(values[j]) & 0x7fffffffu);
        largest = std::max(largest, magnitude);
    }
    const float peak = from_bits(static_cast<uint32_t>(largest));
    return peak < SMALLEST_SCALE ? 0 : nearest_even(peak);
}

template <class Size> inline void quantise(const float *values, uint16_t scale, int8_t *codes, Size count) {
    const float inverse = scale == 0 ? 0.0f : LEVELS / widen(scale);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
        const uint32_t root = to_bits(std::sqrt(std::fabs(values[j]) * inverse)), top = to_bits(127.0f);
        const float code = from_bits(std::min(root, top) | (to_bits(values[j]) & 0x80000000u));
        // A number near 2^23 has its units in the last place: the sum rounds to nearest even, and ends in the code.
        codes[j] = static_cast<int8_t>(to_bits(code + 0x1.8p23f));
    }
    if (!(widen(scale) < std::numeric_limits<float>::infinity())) std::memset(codes, 0, static_cast<size_t>(count));
}

struct Hyper { float lr, beta1, rest1, beta2, rest2, weight_decay, grad_scale; };

// What telemetry.py's Telemetry sums, over a range of elements.
struct Sums {
    double l1 = 0, squares = 0, inner = 0;
    int64_t zeros = 0, flipped = 0;
    int32_t largest = 0; // magnitude of a parameter as an integer, among which a NaN is the largest

    void add(const Sums &other) {
        l1 += other.l1, squares += other.squares, inner += other.inner;
        zeros += other.zeros, flipped += other.flipped;
        largest = std::max(largest, other.largest);
    }
};

// Elements `first` to `last`; element i of the momentum is stored at i - `shift`.
template <class P, class G, class M, class C>
Sums update(const P param, const G grad, const M momentum, int64_t shift, const C copy, int64_t first, int64_t last,
            const Hyper h) {
    double l1 = 0, squares = 0, inner = 0;
    int32_t zeros = 0, flipped = 0, largest = 0;
#pragma omp simd reduction(+ : l1, squares, inner, zeros, flipped) reduction(max : largest)
    for (int64_t i = first; i < last; ++i) {
        const float theta = param.load(i), m = momentum.load(i - shift), g = grad.load(i) * h.grad_scale;
        const float c = m * h.beta1 + g * h.rest1;
        const float sign = static_cast<float>((c > 0.0f) - (c < 0.0f));
        const float new_theta = theta - (sign + theta * h.weight_decay) * h.lr;
        param.store(i, new_theta);
        momentum.store(i - shift, m * h.beta2 + g * h.rest2);
        copy.store(i, new_theta);
        if (TELEMETRY) {
            const double exact = g;
            const int32_t magnitude = static_cast<int32_t>(to_bits(new_theta) & 0x7fffffffu);
            l1 += std::fabs(exact);
            squares += exact * exact;
            inner += static_cast<double>(sign) * exact;
            zeros += sign == 0.0f;
            flipped += (sign > 0.0f && m < 0.0f) || (sign < 0.0f && m > 0.0f);
            largest = std::max(largest, magnitude);
        }
    }
    return {l1, squares, inner, zeros, flipped, largest};
}

template <class P, class G, class M, class C>
Sums update_chunk(const P param, const G grad, const M momentum, const C copy, int64_t first, int64_t last,
                  const Hyper &h) {
    return update(param, grad, momentum, 0, copy, first, last, h);
}

// Calls `work` with the size of a block, as a constant where the block is a whole one.
template <class Work> inline void for_block(int64_t size, Work work) {
    if (size == BLOCK)
        work(std::integral_constant<int64_t, BLOCK>{});
    else
        work(size);
}

// Quantised momentum goes through a strip in fp32 that stays in the cache; `first` is where a block begins.
template <class P, class G, class C>
Sums update_chunk(const P param, const G grad, const Codes momentum, const C copy, int64_t first, int64_t last,
                  const Hyper &h) {
    constexpr int64_t STRIP = 1024;
    alignas(64) float strip[STRIP];
    Sums sums;
    const Place place = momentum.place;
    while (first < last) {
        uint16_t *const scales = momentum.scales + place.block_of(first);
        int8_t *const codes = momentum.codes + first;
        int64_t ends[STRIP], blocks = 0, length = 0, in_row = (place.start + first) % place.row;
        while (first + length < last && length + BLOCK <= STRIP) {
            const int64_t size = std::min({BLOCK - in_row % BLOCK, place.row - in_row, last - first - length});
            in_row = in_row + size == place.row ? 0 : in_row + size;
            for_block(size, [&](auto count) { dequantise(codes + length, scales[blocks], strip + length, count); });
            ends[blocks++] = length += size;
        }
        sums.add(update(param, grad, Fp32{strip}, first, copy, first, first + length, h));
        for (int64_t block = 0, begin = 0; block < blocks; begin = ends[block++])
            for_block(ends[block] - begin, [&](auto size) { scales[block] = scale_of(strip + begin, size); });
        for (int64_t block = 0, begin = 0; block < blocks; begin = ends[block++])
            for_block(ends[block] - begin,
                      [&](auto size) { quantise(strip + begin, scales[block], codes + begin, size); });
        first += length;
    }
    return sums;
}

enum Kind { FP32, BF16, PACKED };
enum Role { PARAM, GRAD, MOMENTUM, COPY, REMAINDER, SCALES, ROLES };

// Elements `first` to `last` of one tensor: picks the storage of each role in turn, and then updates them.
struct Chunk {
    void *roles[ROLES]; // nullptr where a role is absent
    Place place;
    int64_t first, last;
    const Hyper &hyper;

    Sums run(Kind param, Kind grad, Kind momentum, bool copy) const {
        uint16_t *const high = at<uint16_t>(PARAM);
        if (param == FP32) return with_param(Fp32{at<float>(PARAM)}, grad, momentum, copy);
        if (param == BF16) return with_param(Bf16{high}, grad, momentum, copy);
        return with_param(Remainder{high, at<int16_t>(REMAINDER)}, grad, momentum, copy);
    }

  private:
    template <class T> T *at(Role role) const { return static_cast<T *>(roles[role]); }

    template <class P> Sums with_param(P param, Kind grad, Kind momentum, bool copy) const {
        if (grad == FP32) return with_grad(param, Fp32{at<float>(GRAD)}, momentum, copy);
        return with_grad(param, Bf16{at<uint16_t>(GRAD)}, momentum, copy);
    }
    template <class P, class G> Sums with_grad(P param, G grad, Kind momentum, bool copy) const {
        if (momentum == FP32) return with_momentum(param, grad, Fp32{at<float>(MOMENTUM)}, copy);
        if (momentum == BF16) return with_momentum(param, grad, Bf16{at<uint16_t>(MOMENTUM)}, copy);
        return with_momentum(param, grad, Codes{at<int8_t>(MOMENTUM), at<uint16_t>(SCALES), place}, copy);
    }
    template <class P, class G, class M> Sums with_momentum(P param, G grad, M momentum, bool copy) const {
        if (copy) return update_chunk(param, grad, momentum, Bf16{at<uint16_t>(COPY)}, first, last, hyper);
        return update_chunk(param, grad, momentum, Nothing{}, first, last, hyper);
    }
};

// Elements that a thread takes at a time: long enough for the memory's prefetchers, short enough to share the work when
// a core is slower than another.
constexpr int64_t CHUNK = 262144;

} // namespace

// Update `tensors` tensors of `counts` elements. `addresses` holds those of all parameters, then of the next role.
// `places` and `scale_counts` are read where momentum is packed. `hyper`: lr, beta1, beta2, weight decay, gradient scale.
// `telemetry` receives Sums' six where they are compiled in.
// Returns 0, or the number (from 1) of the first tensor with too few or too many scales; then nothing was written.
extern "C" int64_t lion_cpu_update(int64_t tensors, void *const *addresses, const int64_t *counts, const Place *places,
                                   const int64_t *scale_counts, const double *hyper, int param, int grad, int momentum,
                                   int copy, int threads, double *telemetry) {
    const bool packed = momentum == PACKED;
    const Hyper h = {float(hyper[0]),       float(hyper[1]), float(1.0 - hyper[1]), float(hyper[2]),
                     float(1.0 - hyper[2]), float(hyper[3]), float(hyper[4])};
    int64_t total = 0, chunks = 0, next = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        if (packed && places[t].blocks(counts[t]) != scale_counts[t]) return t + 1;
        total += counts[t];
        chunks += (counts[t] + CHUNK - 1) / CHUNK;
    }
    if (total < CHUNK) threads = 1;
    std::vector<Sums> sums(TELEMETRY ? chunks : 0);
#pragma omp parallel num_threads(threads)
    {
        // Chunk numbers grow for each thread, so each walks the list of tensors once.
        int64_t tensor = 0, before = 0;
        for (;;) {
            int64_t mine;
#pragma omp atomic capture
            mine = next++;
            if (mine >= chunks) break;
            while (mine >= before + (counts[tensor] + CHUNK - 1) / CHUNK) {
                before += (counts[tensor] + CHUNK - 1) / CHUNK;
                ++tensor;
            }
            const Place place = packed ? places[tensor] : Place{0, BLOCK};
            const int64_t start = (mine - before) * CHUNK, stop = start + CHUNK;
            Chunk chunk = {{}, place, place.cut(start), stop < counts[tensor] ? place.cut(stop) : counts[tensor], h};
            for (int64_t role = 0; role < ROLES; ++role) chunk.roles[role] = addresses[role * tensors + tensor];
            const Sums of_chunk =
                chunk.run(static_cast<Kind>(param), static_cast<Kind>(grad), static_cast<Kind>(momentum), copy != 0);
            if (TELEMETRY) sums[mine] = of_chunk;
        }
    }
    if (TELEMETRY) { // in the chunks' order, whichever thread took which
        Sums all;
        for (const Sums &of_chunk : sums) all.add(of_chunk);
        const double largest = from_bits(static_cast<uint32_t>(all.largest));
        const double values[] = {all.l1, all.squares, all.inner, double(all.zeros), double(all.flipped), largest};
        std::memcpy(telemetry, values, sizeof values);
    }
    return 0;
}
