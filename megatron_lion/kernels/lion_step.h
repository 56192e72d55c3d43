// One step of Lion on vectors: the arithmetic, and the sums of its telemetry.

#pragma once

#include "lion_exchange.h"
#include "lion_storage.h"

// Further libraries are compiled with -DTELEMETRY and -DDIGITS, so that these cost nothing when they are off.
#ifndef TELEMETRY
#define TELEMETRY 0
#endif
#ifndef DIGITS
#define DIGITS 0
#endif

namespace {

struct Hyper { float lr, beta1, rest1, beta2, rest2, weight_decay, grad_scale; };

// The sums of Telemetry in telemetry.py, over a range of elements.
struct Sums {
    double l1 = 0, squares = 0, inner = 0;
    int64_t zeros = 0, flipped = 0;
    int32_t largest = 0; // magnitude of a parameter as an integer, where a NaN is the largest

    void add(const Sums &other) {
        l1 += other.l1, squares += other.squares, inner += other.inner;
        zeros += other.zeros, flipped += other.flipped;
        largest = std::max(largest, other.largest);
    }
};

struct WidenedToDouble {
    Doubles low, high;
    explicit WidenedToDouble(Floats values) {
        HalfFloats parts[2];
        std::memcpy(parts, &values, sizeof parts);
        low = __builtin_convertvector(parts[0], Doubles), high = __builtin_convertvector(parts[1], Doubles);
    }
};

// The same sums per lane.
struct LaneSums {
    Doubles l1{}, squares{}, inner{};
    Ints zeros{}, flipped{}, largest{};

    // Adds the lanes with all ones in `counted`.
    void add(Floats theta, Floats m, Floats g, Floats sign, Ints counted) {
        const Floats counted_g = from_bits(to_bits(g) & reinterpret_cast<Words>(counted));
        const WidenedToDouble exact(counted_g), signed_g(sign * counted_g);
        l1 += absolute(exact.low) + absolute(exact.high);
        squares += exact.low * exact.low + exact.high * exact.high;
        inner += signed_g.low + signed_g.high;
        zeros -= (sign == 0.0f) & counted; // true is -1
        flipped -= (sign * m < 0.0f) & counted;
        largest = larger(largest, magnitude(theta) & counted);
    }
    Sums total() const {
        Sums sums;
        for (int64_t i = 0; i < LANES / 2; ++i) sums.add({l1[i], squares[i], inner[i], 0, 0, 0});
        for (int64_t i = 0; i < LANES; ++i) sums.add({0, 0, 0, zeros[i], flipped[i], largest[i]});
        return sums;
    }
};

struct StepResult { Floats theta, momentum, sign; };

inline StepResult lion_step(Floats theta, Floats m, Floats g, const Hyper &h) {
    const Floats c = m * h.beta1 + g * h.rest1;
    const Floats sign = sign_of(c);
    return {theta - (sign + theta * h.weight_decay) * h.lr, m * h.beta2 + g * h.rest2, sign};
}

// Receives a digit of each element (lion_exchange.h), if they are compiled in.
struct Digits {
    uint8_t *values;
    Digits from(int64_t i) const { return {DIGITS ? values + i : nullptr}; }
    Digits staged(Staging &staging) const { return {DIGITS ? staging.copy(values) : nullptr}; }
    template <Order ORDER> void store_pair(int64_t i, Words first, Words second) const {
        typedef uint8_t Sixteen __attribute__((vector_size(PAIR)));
        const Shorts both = reinterpret_cast<Shorts>(lower_halves<ORDER>(first, second));
        write(values + i, __builtin_convertvector(both, Sixteen));
    }
};

// The bits of the model's parameter of a master: the copy's, or the upper half of a master that has a remainder.
template <class P, class C> inline Words model_param(Floats master) {
    if constexpr (std::is_same_v<P, Remainder<P::ORDER>> && std::is_same_v<C, NoCopy>)
        return (unless_nan(master, to_bits(master), 0x7fc00000u) + 0x8000u) & 0xffff0000u;
    return nearest_even(master) & 0xffff0000u;
}

// Digits of a step from master `theta`. As digit_of() for a model with the rounded masters as parameters.
template <class P, class C> inline Words digits_of(Floats theta, const StepResult &now, const Hyper &h) {
    const Words sign = reinterpret_cast<Words>(__builtin_convertvector(now.sign, Ints)) & 3u;
    if constexpr (std::is_same_v<P, Fp32<P::ORDER>> && std::is_same_v<C, NoCopy>) return sign;
    const Floats old = from_bits(model_param<P, C>(theta));
    const Words guess = model_param<P, C>(old - (now.sign + old * h.weight_decay) * h.lr);
    const Words residual = (model_param<P, C>(now.theta) - guess) >> 16, above = (residual + 1u) & 0xffffu;
    return above > 2u ? Words{} + EXCEPTION : sign | (residual & 3u) << 2;
}

// What a step reads and writes in addition to the momentum.
template <class P, class G, class C> struct Streams {
    static constexpr Order ORDER = P::ORDER;
    P param;
    G grad;
    C copy;
    Digits digits;

    void fetch_piece(int64_t i) const { param.fetch_piece(i), grad.fetch_piece(i), copy.fetch_piece(i); }
    Streams from(int64_t i) const { return {param.from(i), grad.from(i), copy.from(i), digits.from(i)}; }
    Streams staged(Staging &only_read, Staging &written) const {
        return {param.staged(written), grad.staged(only_read), copy.staged(written), digits.staged(written)};
    }
};

// The first `size` elements of a pair: all ones there, zero elsewhere.
template <Order ORDER> struct FirstElements {
    Ints first, second;

    explicit FirstElements(int64_t size) {
        constexpr bool IS_ODD = ORDER == EVEN_ODD;
        const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
        first = (IS_ODD ? 2 * lane : lane) < static_cast<int32_t>(size);
        second = (IS_ODD ? 2 * lane + 1 : lane + int32_t{LANES}) < static_cast<int32_t>(size);
    }
};

// `values` where a mask of ones is, `otherwise` elsewhere.
inline Floats chosen(Ints mask, Floats values, Floats otherwise) { return mask ? values : otherwise; }

// Updates 16 elements from index i on, with momentum `m`. Returns their new momentum. The sums count the first `size`. If
// ONLY_FIRST, parameters after these stay as they are, and the momentum returned for them is 0; copies and digits are
// written for all 16.
template <bool ONLY_FIRST = false, class P, class G, class C>
[[gnu::always_inline]] inline Pair update_pair(const Streams<P, G, C> &streams, int64_t i, Pair m, const Hyper &h, LaneSums &sums,
                        int64_t size = PAIR) {
    const Pair theta = streams.param.load_pair(i), unscaled = streams.grad.load_pair(i);
    const Pair g = {unscaled.first * h.grad_scale, unscaled.second * h.grad_scale};
    const StepResult first = lion_step(theta.first, m.first, g.first, h);
    const StepResult second = lion_step(theta.second, m.second, g.second, h);
    Pair new_theta = {first.theta, second.theta}, new_m = {first.momentum, second.momentum};
    const FirstElements<P::ORDER> counted(size);
    if constexpr (ONLY_FIRST) {
        new_theta = {chosen(counted.first, new_theta.first, theta.first),
                     chosen(counted.second, new_theta.second, theta.second)};
        new_m = {chosen(counted.first, new_m.first, Floats{}), chosen(counted.second, new_m.second, Floats{})};
    }
    streams.param.store_pair(i, new_theta);
    streams.copy.store_pair(i, new_theta);
    if (DIGITS)
        streams.digits.template store_pair<P::ORDER>(i, digits_of<P, C>(theta.first, first, h),
                                                     digits_of<P, C>(theta.second, second, h));
    if (TELEMETRY) {
        sums.add(first.theta, m.first, g.first, first.sign, counted.first);
        sums.add(second.theta, m.second, g.second, second.sign, counted.second);
    }
    return new_m;
}

} // namespace
