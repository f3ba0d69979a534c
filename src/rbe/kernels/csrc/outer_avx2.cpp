// AVX2 and FMA: a vector of eight is one register.
#include <immintrin.h>

#include <type_traits>

#include "outer.h"

namespace rbe {
namespace {

typedef float V8 __attribute__((vector_size(32), aligned(4), may_alias));

// Sums of pairs of neighbours, within halves: a0+a1, a2+a3, b0+b1, b2+b3 | the same of entries 4 to 7.
inline V8 pairs(V8 a, V8 b) {
    return reinterpret_cast<V8>(_mm256_hadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
}
// The halves of a summed, then those of b.
inline V8 halves(V8 a, V8 b) {
    const __m256 x = reinterpret_cast<__m256>(a), y = reinterpret_cast<__m256>(b);
    return reinterpret_cast<V8>(_mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)));
}

// Bit k is set where entry k is 0 or more.
inline unsigned positive(V8 v) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(v), _mm256_setzero_ps(), _CMP_GE_OQ)));
}

#include "outer_tier.h"
}  // namespace

const OuterTier& outer_avx2() {
    static const OuterTier t{points, product, transposed, expand, contract, pack};
    return t;
}

}  // namespace rbe
