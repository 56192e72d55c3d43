// One pass of Lion over memory on a CPU: reads gradient, parameter and momentum, writes parameter, momentum and, if
// requested, a 16-bit copy of the parameter and the digits of the step. Compiled at first use by
// megatron_lion/kernels/compiler.py and called through ctypes by megatron_lion/kernels/fused.py.
//
// Bit-identical to megatron_lion/update.py and precision.py: every product and every sum is rounded separately
// (-ffp-contract=off), sign(0) and sign(NaN) are 0, arithmetic is fp32 for every storage format, rounded to storage once.

#include "lion_blocks.h"

#include <vector>

namespace {

// Updates elements `first` to `last` with momentum in fp32 or bf16.
template <class P, class G, class M, class C>
Sums update_chunk(const Streams<P, G, C> streams, const M momentum, int64_t first, int64_t last, const Hyper h) {
    LaneSums sums;
    for (; first + PIECE <= last; first += PIECE) {
        if (first + AHEAD + PIECE <= last) streams.fetch_piece(first + AHEAD), momentum.fetch_piece(first + AHEAD);
        for (int64_t i = first; i < first + PIECE; i += PAIR)
            momentum.store_pair(i, update_pair(streams, i, momentum.load_pair(i), h, sums));
    }
    for (; first < last; first += BLOCK) {
        const int64_t size = std::min(BLOCK, last - first);
        Staging only_read, written, momenta;
        const Streams<P, G, C> staged = streams.from(first).staged(only_read.of(size), written.of(size));
        const M m = momentum.from(first).staged(momenta.of(size));
        for (int64_t j = 0; j < BLOCK; j += PAIR)
            m.store_pair(j, update_pair(staged, j, m.load_pair(j), h, sums, size - j));
        written.put_back(), momenta.put_back();
    }
    return sums.total();
}

// Updates the blocks of `group` and writes the codes of the group before it, `done`. Starts to fetch pieces from
// `fetched` on that end before `stop`, and moves `fetched` to their end.
template <class P, class G, class C>
[[gnu::noinline]] void update_group(Group<Streams<P, G, C>> &group, const Group<Streams<P, G, C>> &done,
                                    const Streams<P, G, C> tensor, const Codes momentum, int64_t &fetched, int64_t stop,
                                    const Hyper h, LaneSums &all) {
    LaneSums sums;
    if (TELEMETRY) sums = all;
    int64_t piece = fetched;
    for (int64_t block = 0; block < LANES; ++block) {
        if (block % 2 == 0 && piece + PIECE <= stop) {
            tensor.fetch_piece(piece), momentum.fetch_piece(piece);
            piece += PIECE;
        }
        const Roots roots(done, block); // the update hides their latency
        if (block < group.count) {
            const Streams<P, G, C> streams = group.streams[block];
            const auto new_momentum = [&](int64_t j, auto only_first) __attribute__((always_inline)) {
                const Pair m = dequantize<P::ORDER>(group.codes[block] + j, group.units[block]);
                return update_pair<only_first>(streams, j, m, h, sums, group.sizes[block] - j);
            };
            const bool has_second = group.sizes[block] > PAIR;
            // Written out: GCC 12's code for one lambda that does both was 1.4 to 1.6 times as slow for one storage.
            if (group.is_part[block]) {
                const Pair first = new_momentum(0, std::true_type());
                group.set(block, first, has_second ? new_momentum(PAIR, std::true_type()) : Pair{});
            } else {
                const Pair first = new_momentum(0, std::false_type());
                group.set(block, first, has_second ? new_momentum(PAIR, std::false_type()) : Pair{});
            }
        }
        roots.encode(done, block);
    }
    fetched = piece;
    if (TELEMETRY) all = sums;
}

// Updates elements `first` to `last`, whole blocks, with quantized momentum.
template <class P, class G, class C>
Sums update_chunk(const Streams<P, G, C> streams, const Codes momentum, int64_t first, int64_t last, const Hyper &h) {
    LaneSums sums;
    Group<Streams<P, G, C>> groups[2], *group = &groups[0], *done = &groups[1];
    int64_t fetched = first + AHEAD;
    Blocks blocks(momentum.layout, first, last);
    do {
        group->place(blocks, streams, momentum);
        update_group(*group, *done, streams, momentum, fetched, std::min(blocks.i + AHEAD, last), h, sums);
        group->scale(), group->put_back_streams(), done->put_back_codes();
        std::swap(group, done);
    } while (done->count > 0);
    return sums.total();
}

enum Kind { FP32, BF16, PACKED };
enum Role { PARAM, GRAD, MOMENTUM, COPY, REMAINDER, SCALES, DIGIT, ROLES };

// Elements `first` to `last` of one tensor. run() selects the storage format of each role, then updates the elements.
struct Chunk {
    void *roles[ROLES]; // nullptr if a role is absent
    BlockLayout layout;
    int64_t first, last;
    const Hyper &hyper;

    Sums run(Kind param, Kind grad, Kind momentum, bool copy) const {
        if (momentum == FP32) return with_momentum<FP32>(param, grad, copy);
        if (momentum == BF16) return with_momentum<BF16>(param, grad, copy);
        return with_momentum<PACKED>(param, grad, copy);
    }

  private:
    Digits digits() const { return {at<uint8_t>(DIGIT)}; }
    template <class T> T *at(Role role) const { return static_cast<T *>(roles[role]); }

    template <Kind STORED> Sums with_momentum(Kind param, Kind grad, bool copy) const {
        constexpr Order ORDER = STORED == FP32 ? IN_MEMORY : EVEN_ODD; // with 16-bit parameters; the faster of the two
        uint16_t *const high = at<uint16_t>(PARAM);
        if (param == FP32) return with_param<STORED>(Fp32<IN_MEMORY>{at<float>(PARAM)}, grad, copy);
        if (param == BF16) return with_param<STORED>(Bf16<ORDER>{high}, grad, copy);
        return with_param<STORED>(Remainder<ORDER>{high, at<int16_t>(REMAINDER)}, grad, copy);
    }
    template <Kind STORED, class P> Sums with_param(P param, Kind grad, bool copy) const {
        if (grad == FP32) return with_grad<STORED>(param, Fp32<P::ORDER>{at<float>(GRAD)}, copy);
        return with_grad<STORED>(param, Bf16<P::ORDER>{at<uint16_t>(GRAD)}, copy);
    }
    template <Kind STORED, class P, class G> Sums with_grad(P param, G grad, bool copy) const {
        if (copy) return update<STORED, P, G, ModelCopy<P::ORDER>>({param, grad, {{at<uint16_t>(COPY)}}, digits()});
        return update<STORED, P, G, NoCopy>({param, grad, {}, digits()});
    }
    template <Kind STORED, class P, class G, class C> Sums update(Streams<P, G, C> streams) const {
        if constexpr (STORED == FP32)
            return update_chunk(streams, Fp32<P::ORDER>{at<float>(MOMENTUM)}, first, last, hyper);
        else if constexpr (STORED == BF16)
            return update_chunk(streams, Bf16<P::ORDER>{at<uint16_t>(MOMENTUM)}, first, last, hyper);
        else
            return update_chunk(streams, Codes{at<int8_t>(MOMENTUM), at<uint16_t>(SCALES), layout}, first, last, hyper);
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
