// AVX2: 16 windows at a time, 8 rows of two columns.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "trellis.h"

namespace rbe {
namespace {
#include "tier_common.h"

// Eight rows of two neighbouring columns: 32-bit lane i is a row, its lower half column j, its upper half column j + 1.
// AVX2 shifts 32-bit lanes by amounts of their own, so the lower window is shifted down from the bottom of its lane and
// the upper one up from the second byte, and a blend joins them.
struct Generator {
    __m256i left_bytes[2], right_bytes[2], left_shift[2], right_shift[2], low, high, mask;
    int offset[2];  // bytes from two before the first column to what half h (rows 8 h ...) reads
    int w;

    explicit Generator(const Matrix& m) : w(m.w) {
        for (int h = 0; h < 2; h++) {
            offset[h] = (m.start(8 * h) + 16) / 8;
            alignas(32) uint8_t lb[32], rb[32];
            alignas(32) int32_t ls[8], rs[8];
            for (int i = 0; i < 8; i++) {
                const int right = m.start(8 * h + i) + 16 - 8 * offset[h], left = right + 8 * w;
                for (int k = 0; k < 4; k++) {
                    rb[4 * i + k] = static_cast<uint8_t>(right / 8 + k < 16 && k < 3 ? right / 8 + k : 128);
                    lb[4 * i + k] = static_cast<uint8_t>(k == 0 || left / 8 + k - 1 > 15 ? 128 : left / 8 + k - 1);
                }
                rs[i] = right % 8, ls[i] = 8 - left % 8;
            }
            right_bytes[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(rb));
            left_bytes[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(lb));
            right_shift[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(rs));
            left_shift[h] = _mm256_load_si256(reinterpret_cast<const __m256i*>(ls));
        }
        low = halves(m.even & 0xFFFF, m.odd & 0xFFFF);
        high = halves(m.even >> 16, m.odd >> 16);
        mask = _mm256_set1_epi16(static_cast<int16_t>((1u << m.window) - 1));
    }

    static __m256i halves(uint64_t even, uint64_t odd) {
        return _mm256_set1_epi64x(static_cast<int64_t>((even * 0x10001) | (odd * 0x10001) << 32));
    }

    // Byte sums of rows 8 half ... 8 half + 7; `columns` points two bytes before the first of the two columns.
    template <bool PAIRED>
    __m256i byte_sums(const uint8_t* columns, int half) const {
        const __m256i bytes =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + offset[half])));
        const __m256i right = _mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, right_bytes[half]), right_shift[half]);
        const __m256i left = _mm256_sllv_epi32(_mm256_shuffle_epi8(bytes, left_bytes[half]), left_shift[half]);
        __m256i windows = _mm256_blend_epi16(right, left, 0xAA);
        if (!PAIRED) windows = _mm256_and_si256(windows, mask);
        const __m256i lo = _mm256_mullo_epi16(windows, low);
        const __m256i hi =
            _mm256_add_epi16(_mm256_mulhi_epu16(windows, low), PAIRED ? lo : _mm256_mullo_epi16(windows, high));
        const __m256i ones = _mm256_set1_epi8(1);
        return _mm256_add_epi16(_mm256_maddubs_epi16(lo, ones), _mm256_maddubs_epi16(hi, ones));
    }
};

// The constants of the matrix that this thread multiplied last: building them takes longer than a block.
inline Generator generator(const Matrix& m) {
    thread_local Matrix last{};
    thread_local Generator constants{Matrix{nullptr, 1, 1, 1, 1, 4, 16, 0, 0, nullptr, nullptr, 0, 0}};
    if (m.w != last.w || m.window != last.window || m.even != last.even || m.odd != last.odd) {
        constants = Generator(m);
        last = m;
    }
    return constants;
}

constexpr int AHEAD = 4096;  // bytes; the processor's own prefetcher gives up at every page

// Where the reads of a block go: its first pair of columns needs the end of the ring before it, and the last blocks
// must not be read past the end of the seeds.
struct Reader {
    const Matrix& m;
    Padded padded;
    uint8_t head[48] = {};

    void open(int64_t i, int64_t j, const uint8_t* (&columns)[EDGE / 2]) {
        const uint8_t* block = m.block(i, j);
        const int n = m.block_bytes();
        for (int k = 0; k < n; k += 64) _mm_prefetch(reinterpret_cast<const char*>(block + AHEAD + k), _MM_HINT_T0);
        if (block + n + 32 > m.seeds + m.block_rows * m.block_cols * n) block = padded.fill(block, n);
        std::memcpy(head, block + n - 2, 2);
        std::memcpy(head + 2, block, 30);
        columns[0] = head;
        for (int p = 1; p < EDGE / 2; p++) columns[p] = block + 2 * m.w * p - 2;
    }
};

template <bool PAIRED>
void codes_of(const Matrix& m, int64_t i, int64_t first, int64_t count, int16_t* out) {
    const Generator g = generator(m);
    Reader reader{m, {}, {}};
    const uint8_t* columns[EDGE / 2];
    for (int64_t j = first; j < first + count; j++, out += EDGE * EDGE) {
        reader.open(i, j, columns);
        for (int p = 0; p < EDGE / 2; p++)
            for (int h = 0; h < 2; h++) {
                alignas(32) int16_t both[16];
                const __m256i code = _mm256_sub_epi16(g.byte_sums<PAIRED>(columns[p], h), _mm256_set1_epi16(OFFSET));
                _mm256_store_si256(reinterpret_cast<__m256i*>(both), code);
                int16_t* to = out + 32 * p + 8 * h;
                for (int r = 0; r < 8; r++) to[r] = both[2 * r], to[r + 16] = both[2 * r + 1];
            }
    }
}

void codes(const Matrix& m, int64_t i, int64_t first, int64_t count, int16_t* out) {
    m.paired() ? codes_of<true>(m, i, first, count, out) : codes_of<false>(m, i, first, count, out);
}

// NB rows of x times one block row; accumulators of a chunk of columns, then 64-bit sums.
template <bool PAIRED, int PLANES, int NB>
void block_row(const Matrix& m, const Generator& g, const int16_t* x, int64_t cols, int64_t i, int64_t* sums,
               int64_t stride) {
    Reader reader{m, {}, {}};
    const uint8_t* columns[EDGE / 2];
    for (int b = 0; b < NB; b++) std::fill_n(sums + b * stride, EDGE, int64_t{0});
    // Byte sums up to 1020, digits up to 2^15: 64 columns fit 32 bits before 510 is subtracted.
    constexpr int64_t BLOCKS = CHUNK / 2 / EDGE;
    for (int64_t first = 0; first < m.block_cols; first += BLOCKS) {
        __m256i acc[NB][PLANES][2] = {};
        const int64_t last = std::min(first + BLOCKS, m.block_cols);
        for (int64_t j = first; j < last; j++) {
            reader.open(i, j, columns);
            for (int p = 0; p < EDGE / 2; p++)
                for (int h = 0; h < 2; h++) {
                    const __m256i s = g.byte_sums<PAIRED>(columns[p], h);
                    for (int b = 0; b < NB; b++)
                        for (int d = 0; d < PLANES; d++) {
                            int32_t pair;
                            std::memcpy(&pair, x + (b * PLANES + d) * cols + j * EDGE + 2 * p, 4);
                            acc[b][d][h] = _mm256_add_epi32(acc[b][d][h], _mm256_madd_epi16(s, _mm256_set1_epi32(pair)));
                        }
                }
        }
        for (int b = 0; b < NB; b++)
            for (int d = 0; d < PLANES; d++) {
                const int16_t* digits = x + (b * PLANES + d) * cols;
                int32_t total = 0;
                for (int64_t j = first * EDGE; j < last * EDGE; j++) total += digits[j];
                const int64_t weight = PLANES == 2 && d == 0 ? 65536 : 1;
                for (int h = 0; h < 2; h++) {
                    alignas(32) int32_t lanes[8];
                    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), acc[b][d][h]);
                    for (int r = 0; r < 8; r++)
                        sums[b * stride + 8 * h + r] += (lanes[r] - int64_t{OFFSET} * total) * weight;
                }
            }
    }
}

template <bool PAIRED, int PLANES>
void rows_of(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const Generator g = generator(m);
    const int16_t* x = static_cast<const int16_t*>(a.packed);
    for (int64_t i = begin; i < end; i++)
        for (int64_t b = 0; b < a.batch;) {
            const int16_t* rows = x + b * PLANES * a.cols;
            int64_t* to = sums + b * stride + (i - begin) * EDGE;
            if (a.batch - b >= 2) block_row<PAIRED, PLANES, 2>(m, g, rows, a.cols, i, to, stride), b += 2;
            else block_row<PAIRED, PLANES, 1>(m, g, rows, a.cols, i, to, stride), b += 1;
        }
}

void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const auto run = [&](auto one, auto two) { (a.int8 ? one : two)(m, a, begin, end, sums, stride); };
    m.paired() ? run(rows_of<true, 1>, rows_of<true, 2>) : run(rows_of<false, 1>, rows_of<false, 2>);
}

}  // namespace

const Tier& avx2_tier() {
    static const Tier t{"avx2", rotate, rotate_back, fixed_point, largest, finish, codes, digits_bytes,
                        pack_digits, product, nothing};
    return t;
}

}  // namespace rbe
