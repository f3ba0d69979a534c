// Plain C++: the compiler maps vectors to what the processor has (SSE2, NEON).
#include <type_traits>

#include "outer.h"

namespace rbe {
namespace {

typedef float V8 __attribute__((vector_size(32), aligned(4), may_alias));

// Sums of pairs of neighbours, within halves: a0+a1, a2+a3, b0+b1, b2+b3 | the same of entries 4 to 7.
inline V8 pairs(V8 a, V8 b) {
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) + __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}
// The halves of a summed, then those of b.
inline V8 halves(V8 a, V8 b) {
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}

// Bit k is set where entry k is 0 or more.
inline unsigned positive(V8 v) {
    unsigned bits = 0;
    for (int k = 0; k < BYTE; k++) bits |= (v[k] >= 0 ? 1u : 0u) << k;
    return bits;
}

#include "outer_tier.h"
}  // namespace

const OuterTier& outer_portable() {
    static const OuterTier t{points, product, transposed, expand, contract, pack};
    return t;
}

}  // namespace rbe
