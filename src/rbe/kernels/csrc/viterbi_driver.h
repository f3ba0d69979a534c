// Encoding of a whole matrix: blocks out of a row-major matrix, threads, the ring of bits, sums for the scale.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace rbe::viterbi {

struct Encoding {
    const float* matrix;      // (rows, columns), row-major
    const float* importance;  // like matrix, not negative; null: all ones
    const float* row_energy;  // (rows): multiplies `sums` only; null: all ones
    int64_t rows, columns;
    float unit;  // the matrix divided by this is in units of the code
    int window, w, starts, reach;
    uint32_t multipliers[2];
    int threads;
    uint64_t* seeds;  // (blocks, 2 w), out
    double* sums;     // (blocks, 3), out: weighted sums of x x, x c and c c, with x from the matrix and c the code
};

// The highest tier of this machine, or the one named by `forced` if that is lower.
std::string encoder_tier(const char* forced);

// `tick` is called from this thread a few times a second with the number of finished blocks; when it returns false the
// work stops early and the result is false. The seeds do not depend on the number of threads, nor on the tier.
bool encode_matrix(const Encoding& work, const std::string& tier, const std::function<bool(int64_t)>& tick);

}  // namespace rbe::viterbi
