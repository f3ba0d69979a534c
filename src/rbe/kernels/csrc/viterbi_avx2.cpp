// Vector operations of AVX2.
#include <immintrin.h>

#include "viterbi.h"

#define RBE_VITERBI_TIER avx2

namespace rbe::viterbi::avx2 {

constexpr int kLanes = 8;
constexpr size_t kMostKept = 65536;  // bytes a weight; a comparison takes three instructions to get into memory
using Vector = __m256;

inline Vector load(const float* p) { return _mm256_load_ps(p); }
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline void store_less(uint8_t* to, Vector a, Vector b) {
    *to = uint8_t(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));
}
// Lane i goes to vector i mod 2^kIn of `to`, at lane i / 2^kIn.
template <int kIn>
inline void store_split(float* to, Vector v) {
    if constexpr (kIn == 0) {
        _mm256_store_ps(to, v);
    } else if constexpr (kIn == 1) {
        v = _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
        _mm_store_ps(to, _mm256_castps256_ps128(v));
        _mm_store_ps(to + kLanes, _mm256_extractf128_ps(v, 1));
    } else if constexpr (kIn == 2) {
        v = _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        const __m128d low = _mm_castps_pd(_mm256_castps256_ps128(v)), high = _mm_castps_pd(_mm256_extractf128_ps(v, 1));
        _mm_storel_pd(reinterpret_cast<double*>(to), low);
        _mm_storeh_pd(reinterpret_cast<double*>(to + kLanes), low);
        _mm_storel_pd(reinterpret_cast<double*>(to + 2 * kLanes), high);
        _mm_storeh_pd(reinterpret_cast<double*>(to + 3 * kLanes), high);
    } else {
        alignas(32) float lane[kLanes];
        _mm256_store_ps(lane, v);
        for (int i = 0; i < kLanes; i++) to[(i & ((1 << kIn) - 1)) * kLanes + (i >> kIn)] = lane[i];
    }
}

}  // namespace rbe::viterbi::avx2

#include "viterbi_kernel.h"

const rbe::viterbi::Tier rbe::viterbi::avx2_tier = {"avx2", rbe::viterbi::avx2::order,
    rbe::viterbi::avx2::kept_bytes, rbe::viterbi::avx2::encode};
