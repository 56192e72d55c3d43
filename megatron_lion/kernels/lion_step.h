// One step of Lion on vectors: the arithmetic, and the sums of its telemetry.

#pragma once

#include "lion_storage.h"

#ifndef TELEMETRY // a second library is compiled with -DTELEMETRY, so that the sums cost nothing when they are off
#define TELEMETRY 0
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

// The same sums per lane; without TELEMETRY they stay zero and cost nothing.
struct LaneSums {
    Doubles l1{}, squares{}, inner{};
    Ints zeros{}, flipped{}, largest{};

    void add(Floats theta, Floats m, Floats g, Floats sign) {
        if (!TELEMETRY) return;
        const WidenedToDouble exact(g), signed_g(sign * g);
        l1 += absolute(exact.low) + absolute(exact.high);
        squares += exact.low * exact.low + exact.high * exact.high;
        inner += signed_g.low + signed_g.high;
        zeros -= sign == 0.0f; // true is -1
        flipped -= sign * m < 0.0f;
        largest = larger(largest, magnitude(theta));
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

// What a step reads and writes in addition to the momentum.
template <class P, class G, class C> struct Streams {
    P param;
    G grad;
    C copy;

    void fetch_piece(int64_t i) const { param.fetch_piece(i), grad.fetch_piece(i), copy.fetch_piece(i); }
};

struct AllElements {
    Pair operator()(Pair pair) const { return pair; }
};

// Keeps the first `size` elements of a pair. The others become 0, and so does the step's sign for them.
template <Order ORDER> struct FirstElements {
    int32_t size;

    Pair operator()(Pair pair) const {
        constexpr bool IS_ODD = ORDER == EVEN_ODD;
        const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7};
        const Ints first = IS_ODD ? 2 * lane : lane, second = IS_ODD ? 2 * lane + 1 : lane + int32_t{LANES};
        return {kept(pair.first, first), kept(pair.second, second)};
    }

  private:
    Floats kept(Floats values, Ints index) const {
        return from_bits(to_bits(values) & reinterpret_cast<Words>(index < size));
    }
};

// Updates 16 elements from index i on, with momentum `m`. Returns their new momentum.
template <class P, class G, class C, class Keep = AllElements>
inline Pair update_pair(const Streams<P, G, C> &streams, int64_t i, Pair m, const Hyper &h, LaneSums &sums,
                        Keep keep = {}) {
    const Pair theta = keep(streams.param.load_pair(i)), unscaled = streams.grad.load_pair(i);
    const Pair g = keep({unscaled.first * h.grad_scale, unscaled.second * h.grad_scale});
    const StepResult first = lion_step(theta.first, m.first, g.first, h);
    const StepResult second = lion_step(theta.second, m.second, g.second, h);
    const Pair new_theta = {first.theta, second.theta};
    streams.param.store_pair(i, new_theta);
    streams.copy.store_pair(i, new_theta); // further outputs of each element belong here
    sums.add(first.theta, m.first, g.first, first.sign);
    sums.add(second.theta, m.second, g.second, second.sign);
    return {first.momentum, second.momentum};
}

// Part of a block: `size` elements from index i on.
struct Part {
    int64_t i, size;
    bool has_room; // the 32 elements from i on belong to this thread
};

// Updates `part`. load_pair(j) returns the momentum of 16 elements from i + j on, of which those after the part are
// ignored, and store_pair(j, m) receives their new momentum, 0 after the part.
template <class P, class G, class C, class Load, class Store>
[[gnu::noinline]] void update_part(const Streams<P, G, C> &streams, const Part part, const Hyper &h, LaneSums &sums, Load load_pair,
                        Store store_pair) {
    Staging only_read(part.size, part.has_room), written(part.size, part.has_room);
    const Streams<P, G, C> staged = {streams.param.staged(written, part.i), streams.grad.staged(only_read, part.i),
                                     streams.copy.staged(written, part.i)};
    for (int64_t j = 0; j < BLOCK; j += PAIR) {
        const FirstElements<P::ORDER> keep = {static_cast<int32_t>(part.size - j)};
        store_pair(j, update_pair(staged, j, keep(load_pair(j)), h, sums, keep));
    }
    if (TELEMETRY) sums.zeros[0] -= static_cast<int32_t>(BLOCK - part.size);
    written.put_back();
}

} // namespace
