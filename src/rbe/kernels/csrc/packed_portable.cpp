// Plain C++ with vectors of four floats: what SSE2 and NEON have, and what a compiler can do without them.
#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "packed.h"

namespace rbe {
namespace {
typedef float VF __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

inline VF lookup(const float* table, int, VI at) {
    VF out;
    for (int k = 0; k < 4; k++) out[k] = table[at[k]];
    return out;
}

// Entries of a table of eight, by the last three bits.
inline VI of_eight(const int32_t* table, VI at) {
    VI out;
    for (int k = 0; k < 4; k++) out[k] = table[at[k] & 7];
    return out;
}

// HALF floats, over and over.
template <int HALF>
inline VF spread(const float* from) {
    VF out;
    for (int k = 0; k < 4; k++) out[k] = from[k % HALF];
    return out;
}

// W / HALF floats, HALF times each; one where HALF is no less than W.
template <int HALF>
inline VF repeat(const float* from) {
    VF out;
    for (int k = 0; k < 4; k++) out[k] = from[k / HALF];
    return out;
}

inline Four fold(VF v) { return v; }

inline void hold(VF&) {}

inline VF reciprocal(VF x) { return 1.0f / x; }

// What the registers hold: vectors of one row of x, vectors and rows of a product of many, rows of y.
constexpr int VECTORS = 4, TOGETHER = 2, BATCH = 2, BACK = 4;
// Of backward passes: records whose rows of y are read together; of gradients of blocks: records and vectors at once.
constexpr int SHARED = 2, OWNED = 2, DEPTH = 4;
// Rows for which nothing of a record is stored.
constexpr int64_t FEW = 2;

#include "packed_tier.h"
#include "packed_product.h"
#include "packed_walk.h"
#include "packed_backward.h"
}  // namespace

const PackedTier& packed_portable() {
    static const PackedTier t{records, profiles, expand, product, backward, contract, dot};
    return t;
}

}  // namespace rbe
