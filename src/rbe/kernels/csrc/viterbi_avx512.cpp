// Vector operations of AVX-512.
#include <immintrin.h>

#include "viterbi.h"

#define RBE_VITERBI_TIER avx512

namespace rbe::viterbi::avx512 {

constexpr int kLanes = 16;
constexpr size_t kMostKept = 0;
using Vector = __m512;

inline Vector load(const float* p) { return _mm512_load_ps(p); }
inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline void store_less(uint8_t* to, Vector a, Vector b) {
    const __mmask16 bits = _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
    __builtin_memcpy(to, &bits, 2);
}
// Lane i goes to vector i mod 2^kIn of `to`, at lane i / 2^kIn.
template <int kIn>
inline void store_split(float* to, Vector v) {
    if constexpr (kIn == 0) {
        _mm512_store_ps(to, v);
    } else if constexpr (kIn == 1) {
        v = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15), v);
        _mm256_store_ps(to, _mm512_castps512_ps256(v));
        _mm256_store_ps(to + kLanes, _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    } else if constexpr (kIn == 2) {
        v = _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
        _mm_store_ps(to, _mm512_castps512_ps128(v));
        _mm_store_ps(to + kLanes, _mm512_extractf32x4_ps(v, 1));
        _mm_store_ps(to + 2 * kLanes, _mm512_extractf32x4_ps(v, 2));
        _mm_store_ps(to + 3 * kLanes, _mm512_extractf32x4_ps(v, 3));
    } else {
        alignas(64) float lane[kLanes];
        _mm512_store_ps(lane, v);
        for (int i = 0; i < kLanes; i++) to[(i & ((1 << kIn) - 1)) * kLanes + (i >> kIn)] = lane[i];
    }
}

}  // namespace rbe::viterbi::avx512

#include "viterbi_kernel.h"

const rbe::viterbi::Tier rbe::viterbi::avx512_tier = {"avx512", rbe::viterbi::avx512::order,
    rbe::viterbi::avx512::kept_bytes, rbe::viterbi::avx512::encode};
