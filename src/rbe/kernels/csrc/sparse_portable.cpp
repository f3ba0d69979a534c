// Plain C++: the compiler maps vectors to what the processor has (SSE2, NEON).
#include <cstring>

#include "sparse.h"

namespace rbe {
namespace {
constexpr int WIDE = 4;
#include "sparse_tier.h"
}  // namespace

template <class Index>
const SparseTier<Index>& sparse_portable() {
    static const SparseTier<Index> t{single<Index>, run<Index>};
    return t;
}
template const SparseTier<uint16_t>& sparse_portable<uint16_t>();
template const SparseTier<int32_t>& sparse_portable<int32_t>();

}  // namespace rbe
