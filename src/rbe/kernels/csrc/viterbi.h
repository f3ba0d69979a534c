// Trellis encoder: the ring of bits whose computed codes come nearest to a block of 256 weights (docs/format.md).
// The definition is formats/trellis.py. Every tier gives the same bits: float32 costs, each operation rounded alone.
#pragma once
#include <cstddef>
#include <cstdint>

namespace rbe::viterbi {

constexpr int kBlock = 16;
constexpr int kWeights = kBlock * kBlock;

// One tensor's search, shared by all threads and read only.
struct Trellis {
    int window;             // L, 2^L states
    int w;                  // w / 2 bits a weight
    int starts;             // full passes; the best one is kept
    int reach;              // weights on either side of the seam that the first, open pass walks
    const float* codes[2];  // the code of every state, for even and odd t, in the order in which the pass reads them
};

// One thread's memory; every pointer is aligned to 64 bytes.
struct Scratch {
    float* costs[2];  // 2^L floats each: the cheapest way into every group of states
    uint8_t* kept;    // 257 rows of `kept_bytes`: what tells which predecessor won
    size_t kept_bytes;
    int32_t* path;  // 256 states
    int32_t* best;  // 256 states
};

// `static`: a copy compiled for one tier must never be shared with another.
// Weight t takes new_bits(w, t) fresh bits of the ring; they end before ring bit ring_end(w, t).
static inline int ring_end(int w, int t) { return (w * (t + 1) + 1) / 2; }
static inline int new_bits(int w, int t) { return ring_end(w, t & 1) - (w * (t & 1) + 1) / 2; }

// A tier's entry points. `order` is the position of state s of parity p in codes[p]. `kept_bytes` is the memory that it
// wants for every weight. `encode` finds the states of one
// block: x (256) in units of the code, weight (256, or null for all ones) multiplies the squared errors; returns the cost.
struct Tier {
    const char* name;
    size_t (*order)(const Trellis&, int parity, uint32_t state);
    size_t (*kept_bytes)(const Trellis&);
    float (*encode)(const Trellis&, const Scratch&, const float* x, const float* weight);
};

extern const Tier portable_tier;
#if defined(__x86_64__)
extern const Tier avx2_tier;
extern const Tier avx512_tier;
#endif

}  // namespace rbe::viterbi
