// AVX2 and FMA: the compiler makes two registers of a vector.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "packed.h"

namespace rbe {
namespace {
typedef float VF __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(64), aligned(4), may_alias));

inline VF join(__m256 low, __m256 high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline VF lookup(const float* table, int, VI at) {
    const __m256i* index = reinterpret_cast<const __m256i*>(&at);
    return join(_mm256_i32gather_ps(table, _mm256_loadu_si256(index), 4),
                _mm256_i32gather_ps(table, _mm256_loadu_si256(index + 1), 4));
}

// HALF floats, over and over.
template <int HALF>
inline VF spread(const float* from) {
    if (HALF == 16) return join(_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8));
    const __m256 all = HALF == 8   ? _mm256_loadu_ps(from)
                       : HALF == 4 ? _mm256_broadcast_ps(reinterpret_cast<const __m128*>(from))
                       : HALF == 2 ? _mm256_setr_ps(from[0], from[1], from[0], from[1], from[0], from[1], from[0], from[1])
                                   : _mm256_broadcast_ss(from);
    return join(all, all);
}

inline void hold(VF&) {}

inline VF reciprocal(VF x) { return 1.0f / x; }

// What the registers hold: vectors of one row of x, and vectors and rows of a product of many.
constexpr int VECTORS = 1, TOGETHER = 1, BATCH = 2;

#include "packed_tier.h"
#include "packed_product.h"
}  // namespace

const PackedTier& packed_avx2() {
    static const PackedTier t{records, profiles, expand, product, backward, contract, dot};
    return t;
}

}  // namespace rbe
