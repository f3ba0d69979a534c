// AVX-512: the vectors of a byte's signs in twice as many registers, and masks from comparisons.
#include <immintrin.h>

#include <type_traits>

#include "outer.h"

namespace rbe {
namespace {

typedef float V8 __attribute__((vector_size(32), aligned(4), may_alias));

// Bit k is set where entry k is 0 or more.
inline unsigned positive(V8 v) {
    return _mm256_cmp_ps_mask(reinterpret_cast<__m256>(v), _mm256_setzero_ps(), _CMP_GE_OQ);
}

#include "outer_tier.h"
}  // namespace

const OuterTier& outer_avx512() {
    static const OuterTier t{points, product, transposed, expand, contract, pack};
    return t;
}

}  // namespace rbe
