// One pass of Lion over memory on a CPU: reads gradient, parameter and momentum, writes parameter, momentum and, if
// requested, a 16-bit copy of the parameter. Compiled at first use by megatron_lion/kernels/compiler.py and called through
// ctypes by megatron_lion/kernels/fused.py.
//
// Bit-identical to megatron_lion/update.py and precision.py: every product and every sum is rounded separately
// (-ffp-contract=off), sign(0) and sign(NaN) are 0, arithmetic is fp32 for every storage format, rounded to storage once.

#include "lion_blocks.h"
#include "lion_storage.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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

template <class Float> struct StepResult { Float theta, momentum, sign; };

// The Lion step for one element or lanes of them.
template <class Float> inline StepResult<Float> lion_step(Float theta, Float m, Float g, const Hyper &h) {
    const Float c = m * h.beta1 + g * h.rest1;
    const Float sign = sign_of(c);
    return {theta - (sign + theta * h.weight_decay) * h.lr, m * h.beta2 + g * h.rest2, sign};
}

// Updates 16 elements from index i on, with momentum `m`. Returns their new momentum.
template <class P, class G, class C>
inline Pair update_pair(const P param, const G grad, const C copy, int64_t i, const Pair m, const Hyper &h,
                        LaneSums &sums) {
    const Pair theta = param.load_pair(i), unscaled = grad.load_pair(i);
    const Pair g = {unscaled.even * h.grad_scale, unscaled.odd * h.grad_scale};
    const auto even = lion_step(theta.even, m.even, g.even, h), odd = lion_step(theta.odd, m.odd, g.odd, h);
    const Pair new_theta = {even.theta, odd.theta};
    param.store_pair(i, new_theta);
    copy.store_pair(i, new_theta);
    sums.add(even.theta, m.even, g.even, even.sign);
    sums.add(odd.theta, m.odd, g.odd, odd.sign);
    return {even.momentum, odd.momentum};
}

// Starts to fetch the piece AHEAD elements after index i, if it ends before `last`.
template <class P, class G, class M, class C>
inline void fetch_ahead(const P param, const G grad, const M momentum, int64_t shift, const C copy, int64_t i,
                        int64_t last) {
    if (i + AHEAD + PIECE > last) return;
    param.fetch_piece(i + AHEAD), grad.fetch_piece(i + AHEAD), copy.fetch_piece(i + AHEAD);
    momentum.fetch_piece(i + AHEAD - shift);
}

// Updates elements `first` to `last`; element i of the momentum is stored at i - `shift`.
template <class P, class G, class M, class C>
Sums update(const P param, const G grad, const M momentum, int64_t shift, const C copy, int64_t first, int64_t last,
            const Hyper h) {
    LaneSums lanes;
    double l1 = 0, squares = 0, inner = 0;
    int32_t zeros = 0, flipped = 0, largest = 0;
    while (first < last) {
        const int64_t end = std::min(first + PIECE, last);
        fetch_ahead(param, grad, momentum, shift, copy, first, last);
        if constexpr (P::NARROW || G::NARROW || M::NARROW)
            for (; first + PAIR <= end; first += PAIR) {
                const Pair m = momentum.load_pair(first - shift);
                momentum.store_pair(first - shift, update_pair(param, grad, copy, first, m, h, lanes));
            }
        // The rest; and all elements in pure fp32, which the compiler vectorizes in memory order.
#pragma omp simd reduction(+ : l1, squares, inner, zeros, flipped) reduction(max : largest)
        for (int64_t i = first; i < end; ++i) {
            const float before = param.load(i), m = momentum.load(i - shift), g = grad.load(i) * h.grad_scale;
            const auto [theta, new_m, sign] = lion_step(before, m, g, h);
            param.store(i, theta);
            momentum.store(i - shift, new_m);
            copy.store(i, theta);
            if (TELEMETRY) {
                const double exact = g;
                const int32_t size = static_cast<int32_t>(to_bits(theta) & MAGNITUDE);
                l1 += std::fabs(exact);
                squares += exact * exact;
                inner += static_cast<double>(sign) * exact;
                zeros += sign == 0.0f;
                flipped += sign * m < 0.0f;
                largest = std::max(largest, size);
            }
        }
        first = end;
    }
    Sums sums = lanes.total();
    sums.add({l1, squares, inner, zeros, flipped, largest});
    return sums;
}

template <class P, class G, class M, class C>
Sums update_chunk(const P param, const G grad, const M momentum, const C copy, int64_t first, int64_t last,
                  const Hyper &h) {
    return update(param, grad, momentum, 0, copy, first, last, h);
}

// Updates whole groups of blocks from `first` on that end before `last`, and sets `first` to their end.
template <class P, class G, class C>
Sums update_groups(const P param, const G grad, const Codes momentum, const C copy, int64_t &first, int64_t last,
                   const Hyper h) {
    LaneSums sums;
    Group groups[2] = {};
    int8_t nowhere[GROUP], *before = nowhere; // codes of the previous group, which is encoded in this iteration
    uint16_t *scales = momentum.scales + momentum.layout.block_of(first);
    int64_t number = 0;
    for (; first + GROUP <= last; first += GROUP, scales += LANES, ++number) {
        Group &group = groups[number % 2];
        const Group &done = groups[1 - number % 2];
        const Units units(scales);
        for (int64_t block = 0; block < LANES; ++block) {
            const int64_t i = first + block * BLOCK;
            if (block * BLOCK % PIECE == 0) fetch_ahead(param, grad, momentum, 0, copy, i, last);
            const auto new_momentum = [&](int64_t i) {
                return update_pair(param, grad, copy, i, dequantize(momentum.codes + i, units.of[block]), h, sums);
            };
            const Roots roots(done, block); // the update hides their latency
            group.set(block, new_momentum(i), new_momentum(i + PAIR));
            roots.encode(done, block, before);
        }
        group.scale(scales);
        before = momentum.codes + first;
    }
    for (int64_t block = 0; block < LANES; ++block) {
        const Group &done = groups[1 - number % 2];
        Roots(done, block).encode(done, block, before);
    }
    return sums.total();
}

// Calls `work` with the size of a block, as a compile-time constant for a whole block.
template <class Work> inline void for_block(int64_t size, Work work) {
    if (size == BLOCK)
        work(std::integral_constant<int64_t, BLOCK>{});
    else
        work(size);
}

// Quantized momentum: whole groups in vectors, the rest through an fp32 strip that stays in the cache. `first` is the
// beginning of a block.
template <class P, class G, class C>
Sums update_chunk(const P param, const G grad, const Codes momentum, const C copy, int64_t first, int64_t last,
                  const Hyper &h) {
    constexpr int64_t STRIP = 1024;
    alignas(64) float strip[STRIP];
    Sums sums;
    const BlockLayout layout = momentum.layout;
    if (layout.row_length % BLOCK == 0 && (layout.start + first) % BLOCK == 0)
        sums.add(update_groups(param, grad, momentum, copy, first, last, h));
    while (first < last) {
        uint16_t *const scales = momentum.scales + layout.block_of(first);
        int8_t *const codes = momentum.codes + first;
        int64_t ends[STRIP], blocks = 0, length = 0, in_row = (layout.start + first) % layout.row_length;
        while (first + length < last && length + BLOCK <= STRIP) {
            const int64_t size = std::min({BLOCK - in_row % BLOCK, layout.row_length - in_row, last - first - length});
            in_row = in_row + size == layout.row_length ? 0 : in_row + size;
            for_block(size, [&](auto count) { dequantize(codes + length, scales[blocks], strip + length, count); });
            ends[blocks++] = length += size;
        }
        sums.add(update(param, grad, Fp32{strip}, first, copy, first, first + length, h));
        for (int64_t block = 0, begin = 0; block < blocks; begin = ends[block++])
            for_block(ends[block] - begin, [&](auto size) { scales[block] = scale_of(strip + begin, size); });
        for (int64_t block = 0, begin = 0; block < blocks; begin = ends[block++])
            for_block(ends[block] - begin,
                      [&](auto size) { quantize(strip + begin, scales[block], codes + begin, size); });
        first += length;
    }
    return sums;
}

enum Kind { FP32, BF16, PACKED };
enum Role { PARAM, GRAD, MOMENTUM, COPY, REMAINDER, SCALES, ROLES };

// Elements `first` to `last` of one tensor. run() selects the storage format of each role, then updates the elements.
struct Chunk {
    void *roles[ROLES]; // nullptr if a role is absent
    BlockLayout layout;
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
        return with_momentum(param, grad, Codes{at<int8_t>(MOMENTUM), at<uint16_t>(SCALES), layout}, copy);
    }
    template <class P, class G, class M> Sums with_momentum(P param, G grad, M momentum, bool copy) const {
        if (copy) return update_chunk(param, grad, momentum, Bf16{at<uint16_t>(COPY)}, first, last, hyper);
        return update_chunk(param, grad, momentum, NoCopy{}, first, last, hyper);
    }
};

// Elements per chunk, the unit of work of a thread: long enough for hardware prefetchers, short enough to balance the load
// between fast and slow cores.
constexpr int64_t CHUNK = 262144;

} // namespace

// Updates `tensors` tensors of `counts` elements. `addresses` has those of all masters, then those of the next role.
// `blocks` is read if momentum is packed; the caller checks the numbers of scales. `hyper`: lr, beta1, beta2, weight
// decay, gradient scale. `telemetry` receives the six values of Sums if they are compiled in.
extern "C" void lion_cpu_update(int64_t tensors, void *const *addresses, const int64_t *counts, const BlockLayout *blocks,
                                const double *hyper, int param, int grad, int momentum, int copy, int threads,
                                double *telemetry) {
    const Hyper h = {float(hyper[0]),       float(hyper[1]), float(1.0 - hyper[1]), float(hyper[2]),
                     float(1.0 - hyper[2]), float(hyper[3]), float(hyper[4])};
    int64_t total = 0, chunks = 0, next = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        total += counts[t];
        chunks += (counts[t] + CHUNK - 1) / CHUNK;
    }
    if (total < CHUNK) threads = 1;
    std::vector<Sums> sums(TELEMETRY ? chunks : 0);
#pragma omp parallel num_threads(threads)
    {
        // A thread's chunk numbers increase, so it walks the list of tensors once.
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
            const BlockLayout layout = momentum == PACKED ? blocks[tensor] : BlockLayout{0, BLOCK};
            const int64_t start = (mine - before) * CHUNK, stop = start + CHUNK;
            const int64_t end = stop < counts[tensor] ? layout.begin_of_block(stop) : counts[tensor];
            Chunk chunk = {{}, layout, layout.begin_of_block(start), end, h};
            for (int64_t role = 0; role < ROLES; ++role) chunk.roles[role] = addresses[role * tensors + tensor];
            const Sums of_chunk =
                chunk.run(static_cast<Kind>(param), static_cast<Kind>(grad), static_cast<Kind>(momentum), copy != 0);
            if (TELEMETRY) sums[mine] = of_chunk;
        }
    }
    if (TELEMETRY) { // in the order of chunks, so that the result does not depend on threads
        Sums all;
        for (const Sums &of_chunk : sums) all.add(of_chunk);
        const double largest = from_bits(static_cast<uint32_t>(all.largest));
        const double values[] = {all.l1, all.squares, all.inner, double(all.zeros), double(all.flipped), largest};
        std::memcpy(telemetry, values, sizeof values);
    }
}
