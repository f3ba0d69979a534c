// Plain C++ for any little-endian processor. It is also the yardstick of the other tiers.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "trellis.h"

namespace rbe {
namespace {
#include "tier_common.h"

inline int byte_sum(uint32_t v) {
    v = (v & 0x00FF00FFu) + ((v >> 8) & 0x00FF00FFu);
    return static_cast<int>((v & 0xFFFFu) + (v >> 16));
}

void codes(const Matrix& m, int64_t block_row, int64_t first, int64_t count, int16_t* out) {
    Padded padded;
    const uint32_t mask = (1u << m.window) - 1;
    for (int64_t b = first; b < first + count; b++, out += EDGE * EDGE) {
        const uint8_t* ring = padded.fill(m.block(block_row, b), m.block_bytes());
        for (int i = 0; i < EDGE; i++) {
            const int start = m.start(i) + 16, shift = start & 7;
            const uint8_t* from = ring - 2 + (start >> 3);
            const uint32_t multiplier = i & 1 ? m.odd : m.even;
            for (int j = 0; j < EDGE; j++) {
                uint32_t bits;
                std::memcpy(&bits, from + j * m.w, 4);
                out[EDGE * j + i] = static_cast<int16_t>(byte_sum(((bits >> shift) & mask) * multiplier) - OFFSET);
            }
        }
    }
}

void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const int16_t* digits = static_cast<const int16_t*>(a.packed);
    int16_t tile[256];
    for (int64_t i = begin; i < end; i++) {
        for (int64_t b = 0; b < a.batch; b++) std::fill_n(sums + b * stride + (i - begin) * EDGE, EDGE, int64_t{0});
        for (int64_t j = 0; j < m.block_cols; j++) {
            codes(m, i, j, 1, tile);
            for (int64_t b = 0; b < a.batch; b++) {
                int64_t* sum = sums + b * stride + (i - begin) * EDGE;
                const int planes = a.int8 ? 1 : 2;
                for (int d = 0; d < planes; d++) {
                    const int16_t* x = digits + (b * planes + d) * a.cols + j * EDGE;
                    int32_t acc[EDGE] = {};
                    for (int c = 0; c < EDGE; c++)
                        for (int r = 0; r < EDGE; r++) acc[r] += static_cast<int32_t>(tile[EDGE * c + r]) * x[c];
                    const int shift = !a.int8 && d == 0 ? 16 : 0;
                    for (int r = 0; r < EDGE; r++) sum[r] += static_cast<int64_t>(acc[r]) * (int64_t{1} << shift);
                }
            }
        }
    }
}

}  // namespace

const Tier& portable_tier() {
    static const Tier t{"portable",   rotate, rotate_back, fixed_point, largest, finish, codes, digits_bytes,
                        pack_digits, product, nothing};
    return t;
}

}  // namespace rbe
