// AVX-512 with VBMI and VNNI: ten instructions for 32 weights and one float activation row, two for each further row.
#include <immintrin.h>

#include <algorithm>
#include <cmath>

#include "trellis.h"

namespace rbe {
namespace {
#include "generate_avx512.h"
#include "tier_common.h"

// Packed: for each batch row and digit, one 32-bit word a pair of columns, then one start value a chunk of columns,
// -510 times the digits' sum. Words are two 16-bit digits, or for int8 each value twice: x0 x0 x1 x1.
struct Plan {
    int64_t pairs, chunks, planes;
    Plan(int64_t cols, bool int8) : pairs(cols / 2), chunks((cols + CHUNK - 1) / CHUNK), planes(int8 ? 1 : 2) {}
    int64_t words() const { return pairs + chunks; }
};

size_t packed_bytes(const Matrix&, int64_t batch, int64_t cols, bool int8) {
    const Plan plan(cols, int8);
    return static_cast<size_t>(batch * plan.planes * plan.words() * 4);
}

void pack(const Matrix&, Activations& a) {
    const Plan plan(a.cols, a.int8);
    for (int64_t row = 0; row < a.batch * plan.planes; row++) {
        const int32_t* x = a.values + row / plan.planes * a.cols;
        const bool upper = !a.int8 && row % 2 == 0;
        int32_t* out = static_cast<int32_t*>(a.packed) + row * plan.words();
        const auto digit = [&](int32_t v) {
            const int32_t low = static_cast<int16_t>(v);
            return upper ? (v - low) >> 16 : low;
        };
        if (a.int8)
            for (int64_t k = 0; k < plan.pairs; k++)
                out[k] = (x[2 * k] & 255) * 0x0101 | static_cast<int32_t>((x[2 * k + 1] & 255) * 0x01010000u);
        else
            for (int64_t k = 0; k < plan.pairs; k++)
                out[k] = (digit(x[2 * k]) & 0xFFFF) | static_cast<int32_t>(static_cast<uint32_t>(digit(x[2 * k + 1])) << 16);
        for (int64_t c = 0; c < plan.chunks; c++) {
            int32_t sum = 0;
            for (int64_t j = c * CHUNK; j < std::min((c + 1) * CHUNK, a.cols); j++) sum += digit(x[j]);
            out[plan.pairs + c] = -OFFSET * sum;
        }
    }
}

// One block row times NB rows of x.
template <bool PAIRED, Gather HOW, bool INT8, int NB>
void block_row(const Matrix& m, const Generator& g, const int32_t* x, const Plan& plan, int64_t i, int64_t* sums,
               int64_t stride) {
    constexpr int PLANES = INT8 ? 1 : 2;
    constexpr int CHAINS = NB == 1 ? 2 : 1;  // independent accumulators, where one row alone would wait for itself
    Padded padded;
    __m512i total[NB][2] = {};
    for (int64_t c = 0; c < plan.chunks; c++) {
        __m512i acc[NB][2][CHAINS];  // for int8 the second index is the half of the product
        for (int b = 0; b < NB; b++)
            for (int d = 0; d < 2; d++)
                for (int k = 0; k < CHAINS; k++) {
                    const int32_t* start = x + (b * PLANES + (INT8 ? 0 : d)) * plan.words() + plan.pairs + c;
                    acc[b][d][k] = k || (INT8 && d) ? _mm512_setzero_si512() : _mm512_set1_epi32(*start);
                }
        const int64_t last = std::min((c + 1) * (CHUNK / EDGE), m.block_cols);
        for (int64_t j = c * (CHUNK / EDGE); j < last; j++) {
            const uint8_t* block = readable(m, m.block(i, j), padded);
            const int32_t* word = x + j * (EDGE / 2);
#pragma GCC unroll 8
            for (int p = 0; p < EDGE / 2; p++) {
                __m512i lo, hi;
                g.products<PAIRED, HOW>(block, p, lo, hi);
                const __m512i s = INT8 ? lo : byte_sums(lo, hi);
                for (int b = 0; b < NB; b++) {
                    const int32_t* w = word + b * PLANES * plan.words() + p;
                    __m512i* a = acc[b][0];
                    constexpr int SECOND = CHAINS;
                    const int k = p % CHAINS;
                    if (INT8) {
                        const __m512i v = _mm512_set1_epi32(w[0]);
                        a[k] = _mm512_dpbusd_epi32(a[k], lo, v);
                        a[SECOND + k] = _mm512_dpbusd_epi32(a[SECOND + k], hi, v);
                    } else {
                        a[k] = _mm512_dpwssd_epi32(a[k], s, _mm512_set1_epi32(w[0]));
                        a[SECOND + k] = _mm512_dpwssd_epi32(a[SECOND + k], s, _mm512_set1_epi32(w[plan.words()]));
                    }
                }
            }
        }
        for (int b = 0; b < NB; b++) {
            __m512i first = acc[b][0][0], second = acc[b][1][0];
            if (CHAINS == 2) first = _mm512_add_epi32(first, acc[b][0][CHAINS - 1]), second = _mm512_add_epi32(second, acc[b][1][CHAINS - 1]);
            for (int h = 0; h < 2; h++) {
                const __m256i f = h ? _mm512_extracti64x4_epi64(first, 1) : _mm512_castsi512_si256(first);
                const __m256i s = h ? _mm512_extracti64x4_epi64(second, 1) : _mm512_castsi512_si256(second);
                __m512i upper = _mm512_cvtepi32_epi64(f);
                if (!INT8) upper = _mm512_slli_epi64(upper, 16);
                total[b][h] = _mm512_add_epi64(total[b][h], _mm512_add_epi64(upper, _mm512_cvtepi32_epi64(s)));
            }
        }
    }
    for (int b = 0; b < NB; b++) {
        _mm512_storeu_si512(sums + b * stride, total[b][0]);
        _mm512_storeu_si512(sums + b * stride + 8, total[b][1]);
    }
}

template <bool PAIRED, Gather HOW, bool INT8>
void rows_of(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const Generator g(m);
    const Plan plan(a.cols, INT8);
    for (int64_t i = begin; i < end; i++)
        for (int64_t b = 0; b < a.batch;) {
            const int32_t* x = static_cast<const int32_t*>(a.packed) + b * plan.planes * plan.words();
            int64_t* to = sums + b * stride + (i - begin) * EDGE;
            const int64_t left = a.batch - b;
            if (left >= 4) block_row<PAIRED, HOW, INT8, 4>(m, g, x, plan, i, to, stride), b += 4;
            else if (left >= 2) block_row<PAIRED, HOW, INT8, 2>(m, g, x, plan, i, to, stride), b += 2;
            else block_row<PAIRED, HOW, INT8, 1>(m, g, x, plan, i, to, stride), b += 1;
        }
}

void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const auto run = [&](auto f, auto g) { (a.int8 ? f : g)(m, a, begin, end, sums, stride); };
    if (!m.paired()) return run(rows_of<false, PERMUTE, true>, rows_of<false, PERMUTE, false>);
    if (m.w > 3) return run(rows_of<true, PERMUTE, true>, rows_of<true, PERMUTE, false>);
    run(rows_of<true, BROADCAST, true>, rows_of<true, BROADCAST, false>);
}

}  // namespace

const Tier& avx512_tier() {
    static const Tier t{"avx512", rotate, rotate_back, fixed_point, largest, codes, packed_bytes, pack, product,
                        nothing, nothing};
    return t;
}

}  // namespace rbe
