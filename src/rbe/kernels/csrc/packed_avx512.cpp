// AVX-512: vectors of sixteen floats; the 22 radii of a 16x16 block are two registers and one permutation.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "packed.h"

namespace rbe {
namespace {
typedef float VF __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

inline VF lookup(const float* table, int classes, VI at) {
    const __m512i index = reinterpret_cast<__m512i>(at);
    if (classes > 32) return reinterpret_cast<VF>(_mm512_i32gather_ps(index, table, 4));
    return reinterpret_cast<VF>(_mm512_permutex2var_ps(_mm512_loadu_ps(table), index, _mm512_loadu_ps(table + 16)));
}

// Entries of a table of eight, given twice, by the last three bits.
inline VI of_eight(const int32_t* table, VI at) {
    return reinterpret_cast<VI>(_mm512_permutexvar_epi32(reinterpret_cast<__m512i>(at), _mm512_loadu_si512(table)));
}

// HALF floats, over and over.
template <int HALF>
inline VF spread(const float* from) {
    if (HALF == 16) return reinterpret_cast<VF>(_mm512_loadu_ps(from));
    if (HALF == 8) return reinterpret_cast<VF>(_mm512_broadcast_f32x8(_mm256_loadu_ps(from)));
    if (HALF == 4) return reinterpret_cast<VF>(_mm512_broadcast_f32x4(_mm_loadu_ps(from)));
    if (HALF == 2) {
        double both;
        std::memcpy(&both, from, 8);
        return reinterpret_cast<VF>(_mm512_set1_pd(both));
    }
    return reinterpret_cast<VF>(_mm512_set1_ps(*from));
}

inline Four fold(VF v) {
    return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 8, 9, 10, 11)) +
           (__builtin_shufflevector(v, v, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 12, 13, 14, 15));
}

// Keeps a vector in its register: the compiler would load it again for every use.
inline void hold(VF& v) { __asm__("" : "+v"(v)); }

// One Newton step after 14 bits.
inline VF reciprocal(VF x) {
    const VF near = reinterpret_cast<VF>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
    return near * (2.0f - x * near);
}

// Entries of a vector, and two numbers in half a vector each.
inline VF pick(VF v, VI at) {
    return reinterpret_cast<VF>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(at), reinterpret_cast<__m512>(v)));
}
inline VF halves(float first, float second) {
    return reinterpret_cast<VF>(_mm512_mask_broadcastss_ps(_mm512_set1_ps(first), 0xFF00, _mm_set_ss(second)));
}

// What the registers hold: vectors of one row of x, vectors and rows of a product of many.
constexpr int VECTORS = 4, TOGETHER = 2, BATCH = 6;
// Rows for which nothing of a record is stored.
constexpr int64_t FEW = 1;

#include "packed_tier.h"
#include "packed_product.h"
#include "packed_walk.h"

// The sums of the halves of four vectors.
inline void sum_halves(VF a, VF b, VF c, VF d, Four* out) {
    const VF ab = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const VF cd = __builtin_shufflevector(c, d, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                  __builtin_shufflevector(c, d, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const VF all = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    out[0] = __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
    out[1] = __builtin_shufflevector(all, all, 8, 9, 10, 11) + __builtin_shufflevector(all, all, 12, 13, 14, 15);
}

#include "packed_joined.h"

// Elsewhere the shorter vectors are as fast or faster (python -m benchmarks.packed, with RBE_TIER=avx2 and without).
void backward(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
              float* const* out) {
    const bool side_by_side = p.tables->joined && (p.kind == RADIAL || batch <= FEW);
    (side_by_side ? backward_joined : packed_avx2().backward)(p, J0, J1, x, y, batch, d_x, out);
}
}  // namespace

const PackedTier& packed_avx512() {
    static const PackedTier t{records, profiles, expand, product, backward, contract, dot};
    return t;
}

}  // namespace rbe
