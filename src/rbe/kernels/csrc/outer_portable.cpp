// Plain C++: the compiler maps vectors to what the processor has (SSE2, NEON).
#include <type_traits>

#include "outer.h"

namespace rbe {
namespace {

typedef float V8 __attribute__((vector_size(32), aligned(4), may_alias));

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
