// One pass of Lion over memory on a CPU: reads gradient, parameter and momentum, writes parameter, momentum and, where it
// is asked for, a 16-bit copy of the parameter. Compiled at first use by megatron_lion/kernels/compiler.py, called through
// ctypes by megatron_lion/kernels/fused.py.
//
// The bits are those of megatron_lion/update.py: every product and every sum is rounded on its own (-ffp-contract=off),
// sign(0) and sign(NaN) are 0, arithmetic is fp32 whatever the storage, rounded to storage once, to nearest even.

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
    uint16_t bits;
};

inline float load(const float *from) { return *from; }

inline float load(const bf16 *from) {
    uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float *to, float value) { *to = value; }

inline void store(bf16 *to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : nearest_even);
}

struct Hyper {
    float lr, beta1, rest1, beta2, rest2, weight_decay, grad_scale;
};

template <class P, class G, class M, bool copy>
void update(P *__restrict param, const G *__restrict grad, M *__restrict momentum, bf16 *__restrict model, int64_t count,
            const Hyper h) {
    for (int64_t i = 0; i < count; ++i) {
        const float theta = load(param + i), m = load(momentum + i), g = load(grad + i) * h.grad_scale;
        const float c = m * h.beta1 + g * h.rest1;
        const float sign = static_cast<float>((c > 0.0f) - (c < 0.0f));
        const float new_theta = theta - (sign + theta * h.weight_decay) * h.lr;
        store(param + i, new_theta);
        store(momentum + i, m * h.beta2 + g * h.rest2);
        if (copy) store(model + i, new_theta);
    }
}

using Update = void (*)(void *, const void *, void *, void *, int64_t, const Hyper &);

template <class P, class G, class M, bool copy>
void update_untyped(void *param, const void *grad, void *momentum, void *model, int64_t count, const Hyper &h) {
    update<P, G, M, copy>(static_cast<P *>(param), static_cast<const G *>(grad), static_cast<M *>(momentum),
                          static_cast<bf16 *>(model), count, h);
}

template <class P, class G, class M> Update choose(bool copy) {
    return copy ? update_untyped<P, G, M, true> : update_untyped<P, G, M, false>;
}
template <class P, class G> Update choose(bool momentum_is_bf16, bool copy) {
    return momentum_is_bf16 ? choose<P, G, bf16>(copy) : choose<P, G, float>(copy);
}
template <class P> Update choose(bool grad_is_bf16, bool momentum_is_bf16, bool copy) {
    return grad_is_bf16 ? choose<P, bf16>(momentum_is_bf16, copy) : choose<P, float>(momentum_is_bf16, copy);
}

// Elements that a thread takes at a time: long enough for the memory's prefetchers, short enough to share the work when
// a core is slower than another.
constexpr int64_t CHUNK = 262144;

inline void *at(void *base, int64_t elements, int64_t size) { return static_cast<char *>(base) + elements * size; }

} // namespace

// Update `tensors` tensors. `pointers` holds, tensor by tensor, the addresses of parameter, gradient, momentum and, with
// `copy`, copy; `counts` their numbers of elements. A flag of 1 says that the tensors of that role are bf16, 0 fp32.
extern "C" void lion_cpu_update(int64_t tensors, void *const *pointers, const int64_t *counts, int param_is_bf16,
                                int grad_is_bf16, int momentum_is_bf16, int copy, double lr, double beta1, double beta2,
                                double weight_decay, double grad_scale, int threads) {
    const Hyper hyper = {static_cast<float>(lr),    static_cast<float>(beta1),        static_cast<float>(1.0 - beta1),
                         static_cast<float>(beta2), static_cast<float>(1.0 - beta2), static_cast<float>(weight_decay),
                         static_cast<float>(grad_scale)};
    const Update step = param_is_bf16 ? choose<bf16>(grad_is_bf16, momentum_is_bf16, copy)
                                      : choose<float>(grad_is_bf16, momentum_is_bf16, copy);
    const int64_t param_size = param_is_bf16 ? 2 : 4, grad_size = grad_is_bf16 ? 2 : 4;
    const int64_t momentum_size = momentum_is_bf16 ? 2 : 4;
    int64_t total = 0, chunks = 0, next = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        total += counts[t];
        chunks += (counts[t] + CHUNK - 1) / CHUNK;
    }
    if (total < CHUNK) threads = 1;
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
            const int64_t start = (mine - before) * CHUNK;
            const int64_t count = counts[tensor] - start < CHUNK ? counts[tensor] - start : CHUNK;
            void *const *roles = pointers + (copy ? 4 : 3) * tensor;
            step(at(roles[0], start, param_size), at(roles[1], start, grad_size), at(roles[2], start, momentum_size),
                 copy ? at(roles[3], start, 2) : nullptr, count, hyper);
        }
    }
}
