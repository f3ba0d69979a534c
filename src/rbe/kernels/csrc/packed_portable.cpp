// Plain C++: the compiler maps vectors to what the processor has (SSE2, NEON).
#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "packed.h"

namespace rbe {
namespace {
typedef float VF __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(64), aligned(4), may_alias));

inline VF lookup(const float* table, int, VI at) {
    VF out;
    for (int k = 0; k < LANES; k++) out[k] = table[at[k]];
    return out;
}

// HALF floats, over and over.
template <int HALF>
inline VF spread(const float* from) {
    VF out;
    for (int k = 0; k < LANES; k++) out[k] = from[k % HALF];
    return out;
}

inline void hold(VF&) {}

inline VF reciprocal(VF x) { return 1.0f / x; }

// What the registers hold: vectors of one row of x, and vectors and rows of a product of many.
constexpr int VECTORS = 1, TOGETHER = 1, BATCH = 1;

#include "packed_tier.h"
#include "packed_product.h"
}  // namespace

const PackedTier& packed_portable() {
    static const PackedTier t{records, profiles, expand, product, backward, contract, dot};
    return t;
}

}  // namespace rbe
