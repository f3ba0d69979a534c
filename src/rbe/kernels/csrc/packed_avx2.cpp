// AVX2 and FMA: vectors of eight floats.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "packed.h"

namespace rbe {
namespace {
typedef float VF __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// Up to 24 entries are three registers; a gather costs several times as much.
inline VF lookup(const float* table, int classes, VI at) {
    const __m256i index = reinterpret_cast<__m256i>(at);
    if (classes > 24) return reinterpret_cast<VF>(_mm256_i32gather_ps(table, index, 4));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);
    const __m256 middle = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 16), index);
    const __m256 some = _mm256_blendv_ps(low, middle, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    return reinterpret_cast<VF>(_mm256_blendv_ps(some, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 27))));
}

// Entries of a table of eight, by the last three bits.
inline VI of_eight(const int32_t* table, VI at) {
    const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table));
    return reinterpret_cast<VI>(_mm256_permutevar8x32_epi32(entries, reinterpret_cast<__m256i>(at)));
}

// HALF floats, over and over.
template <int HALF>
inline VF spread(const float* from) {
    if (HALF == 8) return reinterpret_cast<VF>(_mm256_loadu_ps(from));
    if (HALF == 4) return reinterpret_cast<VF>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(from)));
    if (HALF == 2) {
        double both;
        std::memcpy(&both, from, 8);
        return reinterpret_cast<VF>(_mm256_set1_pd(both));
    }
    return reinterpret_cast<VF>(_mm256_broadcast_ss(from));
}

// W / HALF floats, HALF times each; one where HALF is no less than W.
template <int HALF>
inline VF repeat(const float* from) {
    if (HALF >= 8) return reinterpret_cast<VF>(_mm256_broadcast_ss(from));
    VI at;
    for (int k = 0; k < 8; k++) at[k] = k / HALF;
    return reinterpret_cast<VF>(_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), reinterpret_cast<__m256i>(at)));
}

inline Four fold(VF v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

inline void hold(VF&) {}

// An estimate of twelve bits and a step of Newton's: a division takes as long as all the rest of a profile.
inline VF reciprocal(VF x) {
    const VF r = reinterpret_cast<VF>(_mm256_rcp_ps(reinterpret_cast<__m256>(x)));
    return r + r * (1.0f - x * r);
}

// What the registers hold: vectors of one row of x, vectors and rows of a product of many, rows of y.
constexpr int VECTORS = 4, TOGETHER = 2, BATCH = 3, BACK = 4;
// Of backward passes: records whose rows of y are read together; of gradients of blocks: records and vectors at once.
constexpr int SHARED = 2, OWNED = 2, DEPTH = 4;
// Rows for which nothing of a record is stored.
constexpr int64_t FEW = 2;

#include "packed_tier.h"
#include "packed_product.h"
#include "packed_walk.h"
#include "packed_backward.h"
}  // namespace

const PackedTier& packed_avx2() {
    static const PackedTier t{records, profiles, expand, product, backward, contract, dot};
    return t;
}

}  // namespace rbe
