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

// W / HALF floats, HALF times each; one where HALF is no less than W.
template <int HALF>
inline VF repeat(const float* from) {
    if (HALF >= 16) return reinterpret_cast<VF>(_mm512_set1_ps(*from));
    if (HALF == 8)  // two loads: permutations share a port with multiplications
        return reinterpret_cast<VF>(_mm512_mask_broadcastss_ps(_mm512_set1_ps(from[0]), 0xFF00, _mm_load_ss(from + 1)));
    VI at;
    for (int k = 0; k < 16; k++) at[k] = k / HALF;
    return reinterpret_cast<VF>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(at), _mm512_loadu_ps(from)));
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

// What the registers hold: vectors of one row of x, vectors and rows of a product of many, rows of y.
constexpr int VECTORS = 4, TOGETHER = 2, BATCH = 6, BACK = 4;
// Of backward passes: records whose rows of y are read together; of gradients of blocks: records and vectors at once.
constexpr int SHARED = 4, OWNED = 4, DEPTH = 4;

#include "packed_tier.h"
#include "packed_product.h"
#include "packed_backward.h"

// With many rows, backward passes are bound by stores, of which Zen 4 takes as long for 64 bytes as for two of 32: there
// the shorter vectors are faster by a tenth to a third (python -m benchmarks.packed, with RBE_TIER=avx2 and without).
void backward_by_rows(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
                      float* const* out) {
    (batch > FEW ? packed_avx2().backward : backward)(p, J0, J1, x, y, batch, d_x, out);
}
}  // namespace

const PackedTier& packed_avx512() {
    static const PackedTier t{records, profiles, expand, product, backward_by_rows, contract, dot};
    return t;
}

}  // namespace rbe
