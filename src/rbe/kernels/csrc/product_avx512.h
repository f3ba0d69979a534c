// The product without tiles, by dot-product instructions. Included inside the anonymous namespace of the avx512 and amx
// tiers, after generate_avx512.h.
#pragma once

constexpr int64_t RING = 4;  // blocks

// Whether the blocks of a matrix are read as words that are shifted.
inline bool shifted(const Matrix& m) { return SHIFTS && m.w == 4 && m.paired(); }

// Packed: for each batch row and digit, 32-bit words, one a pair of columns (each twice in a row if halved), then one
// start value a chunk of columns, -510 times the digits' sum. A word is two 16-bit digits, or for int8 x0 x0 x1 x1.
struct Words {
    bool half;
    int64_t pairs, chunks, planes, size;
    Words(const Matrix& m, int64_t cols, bool int8)
        : half(m.w == 4 && !shifted(m)), pairs(cols / 2), chunks((cols + CHUNK - 1) / CHUNK), planes(int8 ? 1 : 2),
          size(pairs * (half ? 2 : 1) + (chunks + 15) / 16 * 16) {}
};

size_t words_bytes(const Matrix& m, const Activations& a) {
    const Words words(m, a.cols, a.int8);
    return static_cast<size_t>(a.batch * words.planes * words.size * 4);
}

void pack_words(const Matrix& m, const Activations& a, int64_t b, const int32_t* x) {
    const Words words(m, a.cols, a.int8);
    const __m512i twice = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    for (int64_t d = 0; d < words.planes; d++) {
        int32_t* out = static_cast<int32_t*>(a.packed) + (b * words.planes + d) * words.size;
        const bool upper = words.planes == 2 && d == 0;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t j = 0; j < a.cols; j += 16) {
            const __m512i v = _mm512_loadu_si512(x + j);
            __m512i digit = upper ? _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(0x8000)), 16)
                                  : _mm512_srai_epi32(_mm512_slli_epi32(v, 16), 16);
            sum = _mm512_add_epi32(sum, digit);
            if (a.int8) digit = _mm512_mullo_epi16(_mm512_and_si512(digit, _mm512_set1_epi32(255)), _mm512_set1_epi32(257));
            const __m256i pairs = _mm512_cvtepi32_epi16(digit);
            if (words.half)
                _mm512_storeu_si512(out + j, _mm512_permutexvar_epi32(twice, _mm512_castsi256_si512(pairs)));
            else
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + j / 2), pairs);
            if ((j + 16) % CHUNK == 0 || j + 16 == a.cols) {
                out[words.size - (words.chunks + 15) / 16 * 16 + j / CHUNK] = -OFFSET * _mm512_reduce_add_epi32(sum);
                sum = _mm512_setzero_si512();
            }
        }
    }
}

// One block row times NB rows of x.
template <bool PAIRED, Gather HOW, bool INT8, int NB>
void block_row(const Matrix& m, const Generator& g, const int32_t* x, const Words& words, int64_t i, int64_t* sums,
               int64_t stride) {
    constexpr bool HALF = HOW == HALVED;
    constexpr int PLANES = INT8 ? 1 : 2;
    // Independent accumulators: the halves of the block, or, for one row of x, even and odd pairs of columns.
    constexpr int CHAINS = HALF || NB == 1 ? 2 : 1;
    const int32_t* starts = x + words.size - (words.chunks + 15) / 16 * 16;
    Padded padded;
    // Blocks are ordered some time before they are read: from a store of a whole vector nothing is passed on to loads.
    alignas(64) uint8_t ring[HOW == SHIFTED ? RING : 1][128];
    const auto order = [&](int64_t j) {
        const uint8_t* block = m.block(i, j);
        ask_ahead(block, 64), g.ordered(block, ring[j % RING]);
    };
    if (HOW == SHIFTED)
        for (int64_t j = 0; j < std::min<int64_t>(RING / 2, m.block_cols); j++) order(j);
    __m512i total[NB][2] = {};
    // Products with 8-bit digits of many chunks fit 32 bits: 127 * 1020 * 64 * 128 < 2^31.
    constexpr int64_t SPAN = INT8 ? 64 : 1;
    for (int64_t c = 0; c < words.chunks; c += SPAN) {
        __m512i acc[NB][2][CHAINS];  // for int8 the second index is the half of the product
        for (int b = 0; b < NB; b++)
            for (int d = 0; d < 2; d++)
                for (int k = 0; k < CHAINS; k++) {
                    int32_t start = 0;
                    for (int64_t part = c; part < std::min(c + SPAN, words.chunks); part++)
                        start += starts[(b * PLANES + (INT8 ? 0 : d)) * words.size + part];
                    const bool used = !(INT8 && d) && (HALF || k == 0);
                    acc[b][d][k] = used ? _mm512_maskz_set1_epi32(HALF ? 0x3333 : 0xFFFF, start) : _mm512_setzero_si512();
                }
        const int64_t last = std::min((c + SPAN) * (CHUNK / EDGE), m.block_cols);
        for (int64_t j = c * (CHUNK / EDGE); j < last; j++) {
            if (HOW == SHIFTED && j + RING / 2 < m.block_cols) order(j + RING / 2);
            const uint8_t* block = HOW == SHIFTED ? ring[j % RING] : readable(m, m.block(i, j), padded);
            const int32_t* word = x + j * (HALF ? EDGE : EDGE / 2);
#pragma GCC unroll 8
            for (int p = 0; p < EDGE / 2; p++) {
                __m512i lo, hi;
                g.products<PAIRED, HOW>(block, p, lo, hi);
                const __m512i s = INT8 ? lo : byte_sums(lo, hi);
                for (int b = 0; b < NB; b++) {
                    const int32_t* one = word + b * PLANES * words.size + (HALF ? p / 2 * 4 : p);
                    const int32_t* two = INT8 ? one : one + words.size;
                    const auto spread = [](const int32_t* w) {
                        return HALF ? _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)))
                                    : _mm512_set1_epi32(*w);
                    };
                    __m512i &first = acc[b][0][p % CHAINS], &second = acc[b][1][p % CHAINS];
                    if (INT8) {
                        first = _mm512_dpbusd_epi32(first, lo, spread(one));
                        second = _mm512_dpbusd_epi32(second, hi, spread(two));
                    } else {
                        first = _mm512_dpwssd_epi32(first, s, spread(one));
                        second = _mm512_dpwssd_epi32(second, s, spread(two));
                    }
                }
            }
        }
        for (int b = 0; b < NB; b++)
            for (int d = 0; d < 2; d++) {
                __m256i half[2];
                if (HALF) {
                    const __m512i even = _mm512_set_epi64(0, 0, 0, 0, 6, 4, 2, 0);
                    for (int h = 0; h < 2; h++) {
                        const __m512i v = acc[b][d][h % CHAINS];
                        const __m512i both = _mm512_add_epi32(v, _mm512_shuffle_epi32(v, _MM_PERM_BADC));
                        half[h] = _mm512_castsi512_si256(_mm512_permutexvar_epi64(even, both));
                    }
                } else {
                    __m512i v = acc[b][d][0];
                    if (CHAINS == 2) v = _mm512_add_epi32(v, acc[b][d][CHAINS - 1]);
                    if (HOW == SHIFTED)
                        v = _mm512_permutexvar_epi32(
                            _mm512_set_epi32(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0), v);
                    half[0] = _mm512_castsi512_si256(v), half[1] = _mm512_extracti64x4_epi64(v, 1);
                }
                for (int h = 0; h < 2; h++) {
                    __m512i v = _mm512_cvtepi32_epi64(half[h]);
                    if (!INT8 && d == 0) v = _mm512_slli_epi64(v, 16);
                    total[b][h] = _mm512_add_epi64(total[b][h], v);
                }
            }
    }
    for (int b = 0; b < NB; b++) {
        _mm512_storeu_si512(sums + b * stride, total[b][0]);
        _mm512_storeu_si512(sums + b * stride + 8, total[b][1]);
    }
}

template <bool PAIRED, Gather HOW, bool INT8>
void block_rows(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const Generator g = generator(m);
    const Words words(m, a.cols, INT8);
    for (int64_t i = begin; i < end; i++)
        for (int64_t b = 0; b < a.batch;) {
            const int32_t* x = static_cast<const int32_t*>(a.packed) + b * words.planes * words.size;
            int64_t* to = sums + b * stride + (i - begin) * EDGE;
            const int64_t left = a.batch - b;
            if (left >= 4) block_row<PAIRED, HOW, INT8, 4>(m, g, x, words, i, to, stride), b += 4;
            else if (left >= 2) block_row<PAIRED, HOW, INT8, 2>(m, g, x, words, i, to, stride), b += 2;
            else block_row<PAIRED, HOW, INT8, 1>(m, g, x, words, i, to, stride), b += 1;
        }
}

void product_words(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const auto run = [&](auto one, auto two) { (a.int8 ? one : two)(m, a, begin, end, sums, stride); };
    if (shifted(m))
        run(block_rows<true, SHIFTED, true>, block_rows<true, SHIFTED, false>);
    else if (m.w == 4)
        m.paired() ? run(block_rows<true, HALVED, true>, block_rows<true, HALVED, false>)
                   : run(block_rows<false, HALVED, true>, block_rows<false, HALVED, false>);
    else if (!m.paired())
        run(block_rows<false, PERMUTE, true>, block_rows<false, PERMUTE, false>);
    else if (m.w > 3)
        run(block_rows<true, PERMUTE, true>, block_rows<true, PERMUTE, false>);
    else
        run(block_rows<true, BROADCAST, true>, block_rows<true, BROADCAST, false>);
}
