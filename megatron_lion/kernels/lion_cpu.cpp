// One pass of Lion over memory on a CPU: reads gradient, parameter and momentum, writes parameter, momentum and, if
// requested, a 16-bit copy of the parameter. Compiled at first use by megatron_lion/kernels/compiler.py and called through
// ctypes by megatron_lion/kernels/fused.py.
//
// Bit-identical to megatron_lion/update.py and precision.py: every product and every sum is rounded separately
// (-ffp-contract=off), sign(0) and sign(NaN) are 0, arithmetic is fp32 for every storage format, rounded to storage once.

#include "lion_blocks.h"

#include <vector>

namespace {

// Updates elements `first` to `last` with momentum in fp32 or bf16.
template <class P, class G, class M, class C>
Sums update_chunk(const Streams<P, G, C> streams, const M momentum, int64_t first, int64_t last, const Hyper h) {
    LaneSums sums, sums_of_parts;
    for (; first + PIECE <= last; first += PIECE) {
        if (first + AHEAD + PIECE <= last) streams.fetch_piece(first + AHEAD), momentum.fetch_piece(first + AHEAD);
        for (int64_t i = first; i < first + PIECE; i += PAIR)
            momentum.store_pair(i, update_pair(streams, i, momentum.load_pair(i), h, sums));
    }
    for (; first < last; first += BLOCK) {
        const Part part = {first, std::min(BLOCK, last - first), first + BLOCK <= last};
        Staging staging(part.size, part.has_room);
        const M staged = momentum.staged(staging, first);
        update_part(
            streams, part, h, sums_of_parts, [&](int64_t j) { return staged.load_pair(j); },
            [&](int64_t j, Pair m) { staged.store_pair(j, m); });
        staging.put_back();
    }
    Sums all = sums.total();
    all.add(sums_of_parts.total());
    return all;
}

// Updates elements `first` to `last`, whole blocks, with quantized momentum.
template <class P, class G, class C>
Sums update_chunk(const Streams<P, G, C> streams, const Codes momentum, int64_t first, int64_t last, const Hyper h) {
    constexpr Order ORDER = P::ORDER;
    LaneSums sums, sums_of_parts;
    Group groups[2];
    Blocks blocks(momentum.layout, first, last);
    int64_t next_piece = first + AHEAD, number = 0;
    const int64_t end = momentum.layout.block_of(last - 1) + 1;
    for (int64_t block_of_group = momentum.layout.block_of(first); block_of_group < end; block_of_group += LANES) {
        Group &group = groups[number % 2];
        const Group &done = groups[1 - number % 2]; // is encoded in this iteration
        ++number;
        const int64_t count = std::min(LANES, end - block_of_group);
        const Units units(momentum.scales + block_of_group, count);
        for (int64_t block = 0; block < LANES; ++block, blocks.next()) {
            const Part part = blocks.part();
            if (next_piece <= part.i + AHEAD && next_piece + PIECE <= last) {
                streams.fetch_piece(next_piece), momentum.fetch_piece(next_piece);
                next_piece += PIECE;
            }
            const Roots roots(done, block); // the update hides their latency
            Pair *const values = group.values[block];
            const float unit = units.of[block];
            if (part.size == BLOCK) {
                for (int64_t j = 0; j < BLOCK; j += PAIR)
                    values[j / PAIR] = update_pair(streams, part.i + j,
                                                   dequantize<ORDER>(momentum.codes + part.i + j, unit), h, sums);
            } else {
                Staging staging(part.size, part.has_room);
                const int8_t *const codes = staging.copy(momentum.codes + part.i);
                update_part(
                    streams, part, h, sums_of_parts, [&](int64_t j) { return dequantize<ORDER>(codes + j, unit); },
                    [&](int64_t j, Pair m) { values[j / PAIR] = m; });
            }
            group.set(block, part);
            roots.encode<ORDER>(done, block, momentum.codes);
        }
        group.scale(momentum.scales + block_of_group, count);
    }
    for (int64_t block = 0; block < LANES; ++block) {
        const Group &done = groups[1 - number % 2];
        Roots(done, block).encode<ORDER>(done, block, momentum.codes);
    }
    Sums all = sums.total();
    all.add(sums_of_parts.total());
    return all;
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
        if (param == FP32) return with_param(Fp32<IN_MEMORY>{at<float>(PARAM)}, grad, momentum, copy);
        if (param == BF16) return with_param(Bf16<EVEN_ODD>{high}, grad, momentum, copy);
        return with_param(Remainder{high, at<int16_t>(REMAINDER)}, grad, momentum, copy);
    }

  private:
    template <class T> T *at(Role role) const { return static_cast<T *>(roles[role]); }

    template <class P> Sums with_param(P param, Kind grad, Kind momentum, bool copy) const {
        if (grad == FP32) return with_grad(param, Fp32<P::ORDER>{at<float>(GRAD)}, momentum, copy);
        return with_grad(param, Bf16<P::ORDER>{at<uint16_t>(GRAD)}, momentum, copy);
    }
    template <class P, class G> Sums with_grad(P param, G grad, Kind momentum, bool copy) const {
        if (copy) return with_copy<P, G, Bf16<P::ORDER>>({param, grad, {at<uint16_t>(COPY)}}, momentum);
        return with_copy<P, G, NoCopy>({param, grad, {}}, momentum);
    }
    template <class P, class G, class C> Sums with_copy(Streams<P, G, C> streams, Kind momentum) const {
        if (momentum == FP32) return update(streams, Fp32<P::ORDER>{at<float>(MOMENTUM)});
        if (momentum == BF16) return update(streams, Bf16<P::ORDER>{at<uint16_t>(MOMENTUM)});
        return update(streams, Codes{at<int8_t>(MOMENTUM), at<uint16_t>(SCALES), layout});
    }
    template <class S, class M> Sums update(S streams, M momentum) const {
        return update_chunk(streams, momentum, first, last, hyper);
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
