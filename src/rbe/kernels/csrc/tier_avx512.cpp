// AVX-512 with VBMI and VNNI: ten instructions for 32 weights and one float activation row, two for each further row.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "trellis.h"

namespace rbe {
namespace {
constexpr bool SHIFTS = false;
#include "generate_avx512.h"
#include "product_avx512.h"
#include "tier_common.h"

}  // namespace

const Tier& avx512_tier() {
    static const Tier t{"avx512", rotate, rotate_back, fixed_point, largest, finish, codes, words_bytes, pack_words,
                        product_words, nothing};
    return t;
}

}  // namespace rbe
