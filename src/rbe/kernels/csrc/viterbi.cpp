#include "viterbi.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "viterbi_driver.h"

namespace rbe::viterbi {
namespace {

// An outlier this many code units from zero already outvotes its neighbours; further out, float32 costs lose their grain.
constexpr float kFar = 4096.0f;
constexpr auto kTick = std::chrono::milliseconds(100);

struct Aligned {
    void* memory;
    explicit Aligned(size_t bytes) : memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
        if (!memory) throw std::bad_alloc();
    }
    Aligned(const Aligned&) = delete;
    Aligned& operator=(const Aligned&) = delete;
    ~Aligned() { std::free(memory); }
    template <class T>
    T* as() const {
        return static_cast<T*>(memory);
    }
};

int code_of(uint32_t state, uint32_t multiplier) {
    const uint32_t p = state * multiplier;
    return int((p & 255) + (p >> 8 & 255) + (p >> 16 & 255) + (p >> 24)) - 510;
}

const Tier& find_tier(const std::string& name) {
#if defined(__x86_64__)
    if (name == "avx512") return avx512_tier;
    if (name == "avx2") return avx2_tier;
#endif
    (void)name;
    return portable_tier;
}

struct Worker {
    const Encoding& work;
    const Trellis& trellis;
    const Tier& tier;
    Aligned costs0, costs1, kept, path, best;
    Scratch scratch;

    Worker(const Encoding& work, const Trellis& trellis, const Tier& tier)
        : work(work),
          trellis(trellis),
          tier(tier),
          costs0(sizeof(float) << trellis.window),
          costs1(sizeof(float) << trellis.window),
          kept((kWeights + 1) * tier.kept_bytes(trellis)),
          path(kWeights * sizeof(int32_t)),
          best(kWeights * sizeof(int32_t)),
          scratch{{costs0.as<float>(), costs1.as<float>()}, kept.as<uint8_t>(), tier.kept_bytes(trellis),
                  path.as<int32_t>(), best.as<int32_t>()} {}

    void block(int64_t index) {
        const int64_t across = (work.columns + kBlock - 1) / kBlock;
        const int64_t row0 = index / across * kBlock, column0 = index % across * kBlock;
        alignas(64) float x[kWeights];
        alignas(64) float weight[kWeights];
        double energy[kWeights];
        bool plain = true;
        float largest = 0.0f;
        for (int t = 0; t < kWeights; t++) {
            const int64_t i = row0 + t % kBlock, j = column0 + t / kBlock;
            const bool inside = i < work.rows && j < work.columns;
            const float value = inside ? work.matrix[i * work.columns + j] / work.unit : 0.0f;
            x[t] = std::clamp(value, -kFar, kFar);
            weight[t] = !inside ? 0.0f : work.importance ? work.importance[i * work.columns + j] : 1.0f;
            energy[t] = double(weight[t]) * (inside && work.row_energy ? work.row_energy[i] : 1.0f);
            plain = plain && weight[t] == 1.0f;
            largest = std::max(largest, weight[t]);
        }
        if (!plain && largest > 0.0f)
            for (float& v : weight) v /= largest;

        tier.encode(trellis, scratch, x, plain ? nullptr : weight);

        uint64_t* ring = work.seeds + index * 2 * work.w;
        std::fill(ring, ring + 2 * work.w, 0);
        double xx = 0, xc = 0, cc = 0;
        for (int t = 0; t < kWeights; t++) {
            const uint32_t state = uint32_t(scratch.best[t]);
            const int bits = new_bits(work.w, t);
            const int start = ring_end(work.w, t) - bits;
            for (int k = 0; k < bits; k++) {
                const uint64_t bit = state >> (work.window - bits + k) & 1;
                ring[(start + k) / 64] |= bit << ((start + k) % 64);
            }
            const int64_t i = row0 + t % kBlock, j = column0 + t / kBlock;
            if (i >= work.rows || j >= work.columns) continue;
            const double value = work.matrix[i * work.columns + j];
            const double code = code_of(state, work.multipliers[t & 1]);
            xx += energy[t] * value * value;
            xc += energy[t] * value * code;
            cc += energy[t] * code * code;
        }
        work.sums[3 * index] = xx;
        work.sums[3 * index + 1] = xc;
        work.sums[3 * index + 2] = cc;
    }
};

}  // namespace

std::string encoder_tier(const char* forced) {
    const char* names[] = {"portable", "avx2", "avx512"};
    int highest = 0;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) highest = 1;
    if (highest == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
        highest = 2;
#endif
    for (int i = 0; forced && i < highest; i++)
        if (std::string(forced) == names[i]) return names[i];
    return names[highest];
}

bool encode_matrix(const Encoding& work, const std::string& tier_name, const std::function<bool(int64_t)>& tick) {
    const Tier& tier = find_tier(tier_name);
    const uint32_t states = 1u << work.window;
    Aligned even(sizeof(float) * states), odd(sizeof(float) * states);
    // Equal tables are one: half as much to keep in cache.
    const bool same = work.w % 2 == 0 && work.multipliers[0] == work.multipliers[1];
    const Trellis trellis{
        work.window, work.w, work.starts, work.reach, {even.as<float>(), same ? even.as<float>() : odd.as<float>()}};
    for (uint32_t s = 0; s < states; s++) {
        even.as<float>()[tier.order(trellis, 0, s)] = float(code_of(s, work.multipliers[0]));
        odd.as<float>()[tier.order(trellis, 1, s)] = float(code_of(s, work.multipliers[1]));
    }

    const int64_t blocks = ((work.rows + kBlock - 1) / kBlock) * ((work.columns + kBlock - 1) / kBlock);
    const int count = int(std::clamp<int64_t>(work.threads, 1, std::max<int64_t>(blocks, 1)));
    std::vector<std::unique_ptr<Worker>> workers;  // memory is taken here, where running out of it can be reported
    for (int k = 0; k < count; k++) workers.push_back(std::make_unique<Worker>(work, trellis, tier));

    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> stop{false};
    int running = 0;
    std::mutex mutex;
    std::condition_variable finished;
    std::vector<std::thread> threads;
    auto run = [&](Worker& worker) {
        for (int64_t index; !stop && (index = next++) < blocks; done++) worker.block(index);
        std::lock_guard lock(mutex);
        running--;
        finished.notify_all();
    };
    std::exception_ptr failure;
    {
        std::unique_lock lock(mutex);
        try {
            for (auto& worker : workers) {
                threads.emplace_back(run, std::ref(*worker));
                running++;
            }
        } catch (...) {
            failure = std::current_exception();
            stop = true;
        }
        while (running > 0) {
            finished.wait_for(lock, kTick);
            if (stop || running == 0) continue;
            lock.unlock();
            try {
                if (!tick(done)) stop = true;
            } catch (...) {
                failure = std::current_exception();
                stop = true;
            }
            lock.lock();
        }
    }
    for (auto& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
    return !stop;
}

}  // namespace rbe::viterbi
