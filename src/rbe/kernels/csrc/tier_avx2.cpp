// AVX2: 16 windows at a time, the columns of one row.
#include <immintrin.h>

#include <cmath>
#include <cstdlib>

#include "trellis.h"

namespace rbe {
namespace {
#include "tier_common.h"

#include "generate_avx2.h"

constexpr int AHEAD = 4096;  // bytes; the processor's own prefetcher gives up at every page

// 16-bit digits of x, X = d1 2^16 + d0, or one digit for int8: (batch, digits, cols), the columns of a block in the order
// of the lanes. Then the sum of X of every row of x.
constexpr int64_t digits(const Activations& a) { return a.int8 ? 1 : 2; }

size_t packed_bytes(const Matrix&, const Activations& a) {
    return static_cast<size_t>(a.batch * (a.cols * digits(a) * 2 + 8));
}

int64_t total(const Activations& a, int64_t b) {
    int64_t sum;
    std::memcpy(&sum, static_cast<const int16_t*>(a.packed) + a.batch * a.cols * digits(a) + 4 * b, 8);
    return sum;
}

void pack(const Matrix& m, const Activations& a, int64_t b, const int32_t* x) {
    int16_t* out = static_cast<int16_t*>(a.packed) + b * a.cols * digits(a);
    const auto digit = [&](int shift, int32_t round) {
        for (int64_t j = 0; j < a.cols; j += EDGE, out += EDGE)
            for (int k = 0; k < EDGE; k++) out[k] = static_cast<int16_t>((x[j + column_of(m.w, k)] + round) >> shift);
    };
    if (!a.int8) digit(16, 0x8000);
    digit(0, 0);
    int64_t sum = 0;
    for (int64_t j = 0; j < a.cols; j++) sum += x[j];
    std::memcpy(static_cast<int16_t*>(a.packed) + a.batch * a.cols * digits(a) + 4 * b, &sum, 8);
}

inline __m256i widened(__m256i v) {
    return _mm256_add_epi64(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(v)),
                            _mm256_cvtepi32_epi64(_mm256_extracti128_si256(v, 1)));
}

// 64-bit partial sums of X from 32-bit ones of its digits.
template <int PLANES>
inline __m256i joined(const __m256i* digit) {
    if constexpr (PLANES == 1) return widened(digit[0]);
    else return _mm256_add_epi64(_mm256_slli_epi64(widened(digit[0]), 16), widened(digit[1]));
}

inline int64_t across(__m256i v) {
    const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

// Blocks whose products 32 bits hold: byte sums up to 1020 times 64 digits of 16 bits, two a block in every lane; digits
// of 8 bits would allow more than the cache.
template <int PLANES>
constexpr int64_t BLOCKS = PLANES == 2 ? 32 : 128;

// The rows that are generated together share loads: at 2 bits, bytes of a column begin with rows 3, 7, 11 and 15.
template <int W>
constexpr int ORDER = W == 4 ? 3 : 0;

// Some rows of a run of blocks, times one row of x.
template <int W, bool PAIRED, int PLANES, int FIRST, int COUNT>
[[gnu::always_inline]] inline void some_rows(const uint8_t* block, const int16_t* x, int64_t cols, int64_t blocks,
                                             const Multipliers& g, __m256i* wide) {
    __m256i acc[COUNT][PLANES] = {};
    for (int64_t j = 0; j < blocks; j++, block += 16 * W, x += EDGE) {
        if (FIRST == ORDER<W>)
            for (int k = 0; k < 16 * W; k += 64)
                _mm_prefetch(reinterpret_cast<const char*>(block + AHEAD + k), _MM_HINT_T0);
        each_row<W, PAIRED, FIRST, COUNT>(block, g, [&](int k, __m256i s) __attribute__((always_inline)) {
            for (int d = 0; d < PLANES; d++) {
                acc[k][d] = _mm256_add_epi32(acc[k][d], _mm256_madd_epi16(s, load(x + d * cols)));
                __asm__("" : "+x"(acc[k][d]));  // in its register: the compiler would move some to memory
            }
        });
    }
    for (int k = 0; k < COUNT; k++) {
        __m256i& sum = wide[(FIRST + k) % EDGE];
        sum = _mm256_add_epi64(sum, joined<PLANES>(acc[k]));
    }
}

template <int W, bool PAIRED, int PLANES>
void one(const Matrix& m, const Multipliers& g, const int16_t* x, int64_t cols, int64_t i, int64_t total, int64_t* sums) {
    __m256i wide[EDGE];
    for (int r = 0; r < EDGE; r++) _mm256_store_si256(wide + r, _mm256_setzero_si256());
    for (int64_t first = 0; first < m.block_cols; first += BLOCKS<PLANES>) {
        const int64_t left = m.block_cols - first, blocks = left < BLOCKS<PLANES> ? left : BLOCKS<PLANES>;
        const uint8_t* block = m.block(i, first);
        const int16_t* digit = x + first * EDGE;
        constexpr int N = 8 / PLANES, O = ORDER<W>;  // as many sums as registers hold
        some_rows<W, PAIRED, PLANES, O, N>(block, digit, cols, blocks, g, wide);
        some_rows<W, PAIRED, PLANES, O + N, N>(block, digit, cols, blocks, g, wide);
        if constexpr (N == 4) {
            some_rows<W, PAIRED, PLANES, O + 8, N>(block, digit, cols, blocks, g, wide);
            some_rows<W, PAIRED, PLANES, O + 12, N>(block, digit, cols, blocks, g, wide);
        }
    }
    for (int r = 0; r < EDGE; r++) sums[r] = across(wide[r]) - OFFSET * total;
}

// Several rows of x share what is generated, some blocks at a time: [row][block].
template <int W, bool PAIRED, int FIRST = 0>
inline void generate(const uint8_t* block, int64_t blocks, int64_t stride, const Multipliers& g, __m256i* panel) {
    for (int64_t j = 0; j < blocks; j++) {
        const uint8_t* from = block + j * 16 * W;
        __m256i s[8];
        each_row<W, PAIRED, ORDER<W> + FIRST, 8>(from, g,
                                                 [&](int k, __m256i v) __attribute__((always_inline)) { s[k] = v; });
        for (int k = 0; k < 8; k++) panel[(ORDER<W> + FIRST + k) % EDGE * stride + j] = s[k];
    }
    if constexpr (FIRST == 0) generate<W, PAIRED, 8>(block, blocks, stride, g, panel);
}

// Two rows of a panel times NB rows of x.
template <int PLANES, int NB>
inline void two_rows(const __m256i* panel, int64_t stride, const int16_t* x, int64_t cols, int64_t blocks, int64_t* sums,
                     int64_t sums_stride) {
    __m256i acc[2][NB][PLANES] = {};
    for (int64_t j = 0; j < blocks; j++, x += EDGE) {
        __m256i digit[NB][PLANES];
        for (int b = 0; b < NB; b++)
            for (int d = 0; d < PLANES; d++) digit[b][d] = load(x + (b * PLANES + d) * cols);
        for (int r = 0; r < 2; r++) {
            const __m256i s = panel[r * stride + j];
            for (int b = 0; b < NB; b++)
                for (int d = 0; d < PLANES; d++)
                    acc[r][b][d] = _mm256_add_epi32(acc[r][b][d], _mm256_madd_epi16(s, digit[b][d]));
        }
    }
    for (int r = 0; r < 2; r++)
        for (int b = 0; b < NB; b++) sums[b * sums_stride + r] += across(joined<PLANES>(acc[r][b]));
}

template <int PLANES>
void all_rows(const __m256i* panel, int64_t stride, const Activations& a, int64_t first, int64_t blocks, int64_t* sums,
              int64_t sums_stride) {
    constexpr int NB = 4 / PLANES;
    for (int64_t b = 0; b < a.batch;) {
        const int16_t* x = static_cast<const int16_t*>(a.packed) + b * PLANES * a.cols + first * EDGE;
        int64_t* to = sums + b * sums_stride;
        const bool full = a.batch - b >= NB;
        for (int r = 0; r < EDGE; r += 2)
            if (full) two_rows<PLANES, NB>(panel + r * stride, stride, x, a.cols, blocks, to + r, sums_stride);
            else two_rows<PLANES, 1>(panel + r * stride, stride, x, a.cols, blocks, to + r, sums_stride);
        b += full ? NB : 1;
    }
}

template <int W, bool PAIRED, int PLANES>
void many(const Matrix& m, const Multipliers& g, const Activations& a, int64_t i, int64_t* sums, int64_t stride) {
    __m256i panel[EDGE * BLOCKS<PLANES>];
    for (int64_t b = 0; b < a.batch; b++)
        for (int r = 0; r < EDGE; r++) sums[b * stride + r] = -OFFSET * total(a, b);
    for (int64_t first = 0; first < m.block_cols; first += BLOCKS<PLANES>) {
        const int64_t left = m.block_cols - first, blocks = left < BLOCKS<PLANES> ? left : BLOCKS<PLANES>;
        generate<W, PAIRED>(m.block(i, first), blocks, BLOCKS<PLANES>, g, panel);
        all_rows<PLANES>(panel, BLOCKS<PLANES>, a, first, blocks, sums, stride);
    }
}

template <int W, bool PAIRED>
struct Kernels {
    static void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
        const Multipliers g(m);
        for (int64_t i = begin; i < end; i++, sums += EDGE) {
            const int16_t* x = static_cast<const int16_t*>(a.packed);
            if (a.batch == 1) (a.int8 ? one<W, PAIRED, 1> : one<W, PAIRED, 2>)(m, g, x, a.cols, i, total(a, 0), sums);
            else (a.int8 ? many<W, PAIRED, 1> : many<W, PAIRED, 2>)(m, g, a, i, sums, stride);
        }
    }

    // 16x16 words turned, in the registers.
    static void codes(const Matrix& m, int64_t i, int64_t first, int64_t count, int16_t* out) {
        const Multipliers g(m);
        for (int64_t j = 0; j < count; j++, out += EDGE * EDGE) {
            __m256i r[EDGE], a[EDGE], b[EDGE];
            const uint8_t* block = m.block(i, first + j);
            each_row<W, PAIRED, 0, EDGE>(block, g, [&](int k, __m256i s) __attribute__((always_inline)) {
                r[k] = _mm256_sub_epi16(s, _mm256_set1_epi16(OFFSET));
            });
            for (int k = 0; k < 8; k++) {
                a[k] = _mm256_unpacklo_epi16(r[2 * k], r[2 * k + 1]);
                a[8 + k] = _mm256_unpackhi_epi16(r[2 * k], r[2 * k + 1]);
            }
            for (int h = 0; h < 2; h++)
                for (int k = 0; k < 4; k++) {
                    b[8 * h + k] = _mm256_unpacklo_epi32(a[8 * h + 2 * k], a[8 * h + 2 * k + 1]);
                    b[8 * h + 4 + k] = _mm256_unpackhi_epi32(a[8 * h + 2 * k], a[8 * h + 2 * k + 1]);
                }
            for (int l = 0; l < 4; l++)  // b[4 l + k]: lanes 2 l and 2 l + 1 of rows 4 k ... 4 k + 3
                for (int k = 0; k < 2; k++) {
                    a[4 * l + k] = _mm256_unpacklo_epi64(b[4 * l + 2 * k], b[4 * l + 2 * k + 1]);
                    a[4 * l + 2 + k] = _mm256_unpackhi_epi64(b[4 * l + 2 * k], b[4 * l + 2 * k + 1]);
                }
            const auto store = [&](int lane, __m256i v) {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + EDGE * column_of(W, lane)), v);
            };
            for (int k = 0; k < 8; k++) {
                store(k, _mm256_permute2x128_si256(a[2 * k], a[2 * k + 1], 0x20));
                store(8 + k, _mm256_permute2x128_si256(a[2 * k], a[2 * k + 1], 0x31));
            }
        }
    }
};

// Calls use(Kernels) of the matrix's rate.
template <int W = 1, class F>
inline void choose(const Matrix& m, const F& use) {
    if constexpr (W < 8)
        if (m.w != W) return choose<W + 1>(m, use);
    m.paired() && (W % 2 == 1 || m.even == m.odd) ? use(Kernels<W, true>{}) : use(Kernels<W, false>{});
}

void codes(const Matrix& m, int64_t i, int64_t first, int64_t count, int16_t* out) {
    choose(m, [&](auto k) { k.codes(m, i, first, count, out); });
}

void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    choose(m, [&](auto k) { k.product(m, a, begin, end, sums, stride); });
}

}  // namespace

const Tier& avx2_tier() {
    static const Tier t{"avx2", rotate, rotate_back, fixed_point, largest, finish, codes, packed_bytes, pack, product, nothing};
    return t;
}

}  // namespace rbe
