// Vectors of four floats, which the compiler maps to what the processor has (SSE2, NEON).
#include <algorithm>
#include <type_traits>

#include "packed.h"

namespace rbe {
namespace {
typedef float VF __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(16), aligned(4), may_alias));

inline VF lookup(const float* table, int, VI at) { return VF{table[at[0]], table[at[1]], table[at[2]], table[at[3]]}; }

#include "packed_tier.h"
}  // namespace

const PackedTier& packed_portable() {
    static const PackedTier t{records, profiles, expand, product, contract, dot};
    return t;
}

}  // namespace rbe
