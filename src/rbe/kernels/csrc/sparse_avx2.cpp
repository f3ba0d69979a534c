// AVX2 and FMA.
#include <cstring>

#include "sparse.h"

namespace rbe {
namespace {
constexpr int WIDE = 8;
#include "sparse_tier.h"
}  // namespace

template <class Index>
const SparseTier<Index>& sparse_avx2() {
    static const SparseTier<Index> t{single<Index>, run<Index>};
    return t;
}
template const SparseTier<uint16_t>& sparse_avx2<uint16_t>();
template const SparseTier<int32_t>& sparse_avx2<int32_t>();

}  // namespace rbe
