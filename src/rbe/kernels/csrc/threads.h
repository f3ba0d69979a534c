// What the drivers of the kernels share: threads, scratch memory, half floats.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace rbe {

// OpenMP and not a pool of our own: torch runs the same runtime in the process, and two pools that spin on the same
// cores cost each other whole time slices. Work is handed out in small pieces because the cores may be shared.
#ifdef _OPENMP
// The OpenMP runtime's threads do not survive a fork, and waiting for them would never end.
extern std::atomic<bool> in_child;
#endif

template <class F>
void parallel(int64_t pieces, int threads, const F& work) {
    threads = static_cast<int>(std::min<int64_t>(threads, pieces));
#ifdef _OPENMP
    if (threads > 1 && !in_child) {
        std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads)
        for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(k);
        return;
    }
#endif
    for (int64_t k = 0; k < pieces; k++) work(k);
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7F800000u | (fraction << 13);
    } else if (exponent != 0) {
        bits = sign | ((exponent + 112) << 23) | (fraction << 13);
    } else {
        const float tiny = static_cast<float>(fraction) * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}

// Reused by a thread from call to call; large ones are given back.
class Scratch {
  public:
    void* get(size_t bytes) {
        if (bytes > size_) {
            memory_.reset();
            memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_.get();
    }
    void trim() {
        if (size_ > (size_t{4} << 20)) memory_.reset(), size_ = 0;
    }

  private:
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };
    std::unique_ptr<uint8_t, Free> memory_;
    size_t size_ = 0;
};

}  // namespace rbe
