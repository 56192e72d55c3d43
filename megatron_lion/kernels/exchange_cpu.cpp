// Digits, messages and their replay on a CPU: the bits of megatron_lion/exchange. Compiled at first use by
// megatron_lion/kernels/compiler.py, called through ctypes by megatron_lion/kernels/exchange_cpu.py.

#include "lion_exchange.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t ROW = 64, ROWS = 5, GROUP = ROWS * ROW; // 320 trits in 64 bytes
constexpr int64_t CHUNK = 65536;                          // elements that a 16-bit offset reaches
// A thread takes a block at a time: the smallest number of elements that is whole groups and whole chunks.
constexpr int64_t BLOCK_CHUNKS = 5, BLOCK = BLOCK_CHUNKS * CHUNK;

// A row of a group. The compiler splits it if the CPU's vectors are shorter.
typedef uint8_t Bytes __attribute__((vector_size(ROW)));

struct Run { int64_t start, stop; };           // in elements of the bucket, ascending
struct Rate { double lr, weight_decay; };      // of a run
struct Exception { uint32_t element; uint16_t code; }; // element of a block

struct Message { // the sections of a message
    int64_t *header;
    uint8_t *signs, *residuals;
    int32_t *counts;
    uint16_t *offsets, *values;
};

// Trits are stored as 0, 1 and 2 here.

// Packs the trits in bits `SHIFT` and `SHIFT` + 1 of a group's digits.
template <int SHIFT> inline Bytes pack(const Bytes *rows) {
    Bytes packed = {};
    for (int64_t row = ROWS - 1; row >= 0; --row) packed = packed + packed + packed + (((rows[row] >> SHIFT) + 1) & 3);
    return packed;
}

inline void unpack(const uint8_t *bytes, uint8_t *trits) {
#pragma omp simd
    for (int64_t j = 0; j < ROW; ++j) {
        uint16_t rest = bytes[j];
        for (int64_t row = 0; row < ROWS - 1; ++row) {
            const uint16_t third = static_cast<uint16_t>(rest * 171) >> 9; // rest / 3 below 384
            trits[j + row * ROW] = static_cast<uint8_t>(rest - 3 * third);
            rest = third;
        }
        trits[j + (ROWS - 1) * ROW] = static_cast<uint8_t>(rest);
    }
}

inline uint32_t weight(int64_t i) { return 2 * static_cast<uint32_t>(i) + 1; }
inline uint32_t summand(uint16_t code) { return code; }
inline uint32_t summand(uint32_t code) { return (code & MAGNITUDE) > 0x7f800000u ? 0x7fc00000u : code; }

// The part of the checksum of elements `first` to `last`, which are `codes[first]` to `codes[last]`.
template <class Code> inline uint32_t checksum(const Code *codes, int64_t first, int64_t last) {
    uint32_t sum = 0;
    codes += first;
    const uint32_t weight_of_first = weight(first), count = static_cast<uint32_t>(last - first);
#pragma omp simd reduction(+ : sum)
    for (uint32_t i = 0; i < count; ++i) sum += summand(codes[i]) * (weight_of_first + 2 * i);
    return sum;
}

// Appends the exceptions among the digits of a group, the first of which is element `start` of its block.
inline void collect(const Bytes *rows, int64_t start, const uint16_t *codes, std::vector<Exception> &found) {
    constexpr uint64_t MARKS = 0x8080808080808080u;
    for (int64_t row = 0; row < ROWS; ++row) {
        uint64_t words[ROW / 8], any = 0;
        std::memcpy(words, rows + row, sizeof words);
        for (uint64_t word : words) any |= word;
        if (!(any & MARKS)) continue;
        for (int64_t word = 0; word < ROW / 8; ++word)
            for (uint64_t marks = words[word] & MARKS; marks; marks &= marks - 1) {
                const int64_t i = row * ROW + word * 8 + __builtin_ctzll(marks) / 8;
                found.push_back({static_cast<uint32_t>(start + i), codes[i]});
            }
    }
}

// Packs elements `first` to `last`, which begin a block, and appends its exceptions. Returns their part of the checksum.
template <class Code>
uint32_t pack_block(const Message &message, const uint8_t *digits, const Code *codes, int64_t first, int64_t last,
                std::vector<Exception> &exceptions) {
    uint32_t sum = 0;
    for (int64_t start = first; start < last; start += GROUP) {
        Bytes rows[ROWS] = {};
        const int64_t end = std::min(start + GROUP, last);
        if (end - start == GROUP)
            std::memcpy(rows, digits + start, sizeof rows); // inline, as the size is constant
        else
            std::memcpy(rows, digits + start, end - start);
        sum += checksum(codes, start, end);
        write(message.signs + start / ROWS, pack<0>(rows));
        if constexpr (sizeof(Code) == 2) {
            write(message.residuals + start / ROWS, pack<2>(rows));
            collect(rows, start - first, codes + start, exceptions);
        }
    }
    return sum;
}

template <class Code>
void write(const Message &message, const uint8_t *digits, const Code *codes, int64_t numel, int64_t capacity, int threads) {
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK;
    std::vector<std::vector<Exception>> exceptions(blocks);
    uint32_t sum = 0;
#pragma omp parallel for schedule(dynamic) num_threads(threads) reduction(+ : sum) if (blocks > 1)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * BLOCK, last = std::min(first + BLOCK, numel);
        sum += pack_block(message, digits, codes, first, last, exceptions[block]);
    }
    int64_t total = 0;
    for (int64_t block = 0; block < blocks; ++block)
        for (const Exception &exception : exceptions[block]) {
            ++message.counts[block * BLOCK_CHUNKS + exception.element / CHUNK];
            if (total < capacity) {
                message.offsets[total] = static_cast<uint16_t>(exception.element % CHUNK);
                message.values[total] = exception.code;
            }
            ++total;
        }
    message.header[0] = total, message.header[1] = sum;
}

// Elements `first` to `last` of a shard, all in one group that begins at `start`. Returns their part of the checksum.
template <class Format>
uint32_t replay_group(typename Format::Code *codes, const uint8_t *signs, const uint8_t *residuals, int64_t start,
                      int64_t first, int64_t last, float lr, float weight_decay) {
    uint32_t sum = 0;
    codes += first, signs += first - start, residuals += first - start;
    const uint32_t weight_of_first = weight(first), count = static_cast<uint32_t>(last - first);
#pragma omp simd reduction(+ : sum)
    for (uint32_t i = 0; i < count; ++i) {
        const float sign = static_cast<float>(static_cast<int32_t>(signs[i]) - 1);
        auto code = Format::round(stepped(Format::widen(codes[i]), sign, lr, weight_decay));
        if constexpr (sizeof code == 2) code = static_cast<uint16_t>(code + residuals[i] - 1);
        codes[i] = code;
        sum += summand(code) * (weight_of_first + 2 * i);
    }
    return sum;
}

// Elements `first` to `last` of a message, which begin a block. The message begins at element `origin` of its bucket, and
// `run` is the first of the runs that ends after `origin + first`. Returns their part of the checksum.
template <class Format>
uint32_t replay_block(typename Format::Code *codes, const Message &message, int64_t origin, int64_t first, int64_t last,
                      const Run *run, const Run *runs_end, const Rate *rate) {
    uint8_t signs[GROUP], residuals[GROUP] = {};
    uint32_t sum = 0;
    for (int64_t start = first; start < last; start += GROUP) {
        unpack(message.signs + start / ROWS, signs);
        if (sizeof *codes == 2) unpack(message.residuals + start / ROWS, residuals);
        const int64_t end = std::min(start + GROUP, last);
        for (int64_t i = start; i < end;) {
            for (; run != runs_end && run->stop <= origin + i; ++run) ++rate;
            const int64_t next = run == runs_end ? end : std::clamp(run->start - origin, i, end);
            sum += checksum(codes, i, next); // of elements between runs, which stay as they are
            i = next;
            if (i == end) break;
            const int64_t stop = std::min(run->stop - origin, end);
            sum += replay_group<Format>(codes, signs, residuals, start, i, stop, static_cast<float>(rate->lr),
                                        static_cast<float>(rate->weight_decay));
            i = stop;
        }
    }
    return sum;
}

// Writes the exceptions of a shard over what was replayed. Returns what that adds to the checksum.
inline uint32_t replace(uint16_t *codes, const Message &message, int64_t numel) {
    uint32_t sum = 0;
    const uint16_t *offset = message.offsets, *value = message.values;
    for (int64_t first = 0, chunk = 0; first < numel; first += CHUNK, ++chunk)
        for (int32_t count = message.counts[chunk]; count > 0; --count, ++offset, ++value) {
            const int64_t i = first + *offset;
            if (i >= numel) continue; // the message was damaged, as its checksum will say
            sum += (static_cast<uint32_t>(*value) - codes[i]) * weight(i);
            codes[i] = *value;
        }
    return sum;
}

inline bool is_valid(const Message &message, int64_t chunks, int64_t capacity) {
    int64_t total = 0;
    bool negative = false;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += message.counts[chunk];
        negative |= message.counts[chunk] < 0;
    }
    return !negative && total == message.header[0] && total <= capacity;
}

template <class Format>
void replay(typename Format::Code *codes, const Message *messages, int64_t ranks, int64_t own, int64_t shard_numel,
            int64_t start, int64_t numel, int64_t capacity, const Run *runs, const Rate *rates, int64_t run_count,
            int64_t *mismatches, int threads) {
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK, chunks = sizeof *codes == 2 ? (numel + CHUNK - 1) / CHUNK : 0;
    std::vector<uint32_t> sums(ranks);
    std::vector<char> replayed(ranks);
    for (int64_t rank = 0; rank < ranks; ++rank) replayed[rank] = rank != own && is_valid(messages[rank], chunks, capacity);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (ranks * numel > BLOCK)
    for (int64_t task = 0; task < ranks * blocks; ++task) {
        const int64_t rank = task / blocks, origin = rank * shard_numel + start;
        if (!replayed[rank]) continue;
        const int64_t first = task % blocks * BLOCK, last = std::min(first + BLOCK, numel);
        const Run *const run = std::partition_point(runs, runs + run_count,
                                                    [&](const Run &each) { return each.stop <= origin + first; });
        const uint32_t sum = replay_block<Format>(codes + origin, messages[rank], origin, first, last, run,
                                                  runs + run_count, rates + (run - runs));
#pragma omp atomic
        sums[rank] += sum;
    }
    for (int64_t rank = 0; rank < ranks; ++rank) {
        mismatches[rank] = rank == own ? 0 : -1;
        if (!replayed[rank]) continue;
        if constexpr (sizeof *codes == 2)
            sums[rank] += replace(codes + rank * shard_numel + start, messages[rank], numel);
        mismatches[rank] = static_cast<uint32_t>(sums[rank] - static_cast<uint32_t>(messages[rank].header[1]));
    }
}

// Calls `work` with the format of this number, which is that in exchange/digits.py's FORMATS.
template <class Work> void for_format(int format, Work work) {
    if (format == 0) return work(CodeFp32{});
    if (format == 1) return work(CodeBf16{});
    if (format == 2) return work(CodeBf16HalfAway{});
    return work(CodeFp16{});
}

} // namespace

// `out` receives the digits of `numel` elements that share a learning rate and weight decay.
extern "C" void exchange_digits(int format, const void *before, const void *after, const int8_t *signs, uint8_t *out,
                                int64_t numel, double lr, double weight_decay) {
    for_format(format, [&](auto kind) {
        typedef decltype(kind) Format;
        const auto *old = static_cast<const typename Format::Code *>(before);
        const auto *now = static_cast<const typename Format::Code *>(after);
        const float rate = static_cast<float>(lr), decay = static_cast<float>(weight_decay);
#pragma omp simd
        for (int64_t i = 0; i < numel; ++i) out[i] = digit_of<Format>(old[i], now[i], signs[i], rate, decay);
    });
}

// The number of exceptions among digits.
extern "C" void exchange_count(const uint8_t *digits, int64_t numel, int64_t *count) {
    int64_t total = 0;
    for (int64_t first = 0; first < numel; first += CHUNK) {
        const int64_t last = std::min(first + CHUNK, numel);
        uint32_t found = 0;
#pragma omp simd reduction(+ : found)
        for (int64_t i = first; i < last; ++i) found += digits[i] >> 7;
        total += found;
    }
    *count = total;
}

// Writes a message whose table is zeros.
extern "C" void exchange_write(int format, const Message *message, const uint8_t *digits, const void *params,
                               int64_t numel, int64_t capacity, int threads) {
    for_format(format, [&](auto kind) {
        const auto *codes = static_cast<const typename decltype(kind)::Code *>(params);
        write(*message, digits, codes, numel, capacity, threads);
    });
}

// Replays `ranks` messages of `numel` elements, from element `start` of each shard of a bucket on. `mismatches` receives a
// number for each of them.
extern "C" void exchange_replay(int format, void *params, const Message *messages, int64_t ranks, int64_t own,
                                int64_t shard_numel, int64_t start, int64_t numel, int64_t capacity, const Run *runs,
                                const Rate *rates, int64_t run_count, int64_t *mismatches, int threads) {
    for_format(format, [&](auto kind) {
        typedef decltype(kind) Format;
        replay<Format>(static_cast<typename Format::Code *>(params), messages, ranks, own, shard_numel, start, numel,
                       capacity, runs, rates, run_count, mismatches, threads);
    });
}
