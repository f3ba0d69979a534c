// AVX2 and FMA: vectors of eight floats.
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "packed.h"

namespace rbe {
namespace {
typedef float VF __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(32), aligned(4), may_alias));

inline VF lookup(const float* table, int, VI at) {
    return reinterpret_cast<VF>(_mm256_i32gather_ps(table, reinterpret_cast<__m256i>(at), 4));
}

#include "packed_tier.h"
}  // namespace

const PackedTier& packed_avx2() {
    static const PackedTier t{records, profiles, expand, product, contract, dot};
    return t;
}

}  // namespace rbe
