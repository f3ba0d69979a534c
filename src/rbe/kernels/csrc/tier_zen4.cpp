// AVX-512 on AMD's processors: as avx512, but windows of two bits a weight are put together by shifts.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "trellis.h"

namespace rbe {
namespace {
constexpr bool SHIFTS = true;
#include "generate_avx512.h"
#include "product_avx512.h"
#include "tier_common.h"

}  // namespace

const Tier& zen4_tier() {
    static const Tier t{"zen4", rotate, rotate_back, fixed_point, largest, finish, codes, words_bytes, pack_words,
                        product_words, nothing};
    return t;
}

}  // namespace rbe
