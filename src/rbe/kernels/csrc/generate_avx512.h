// Windows and their products, 32 weights at a time, with AVX-512 VBMI. Included inside the anonymous namespace of the
// avx512 and amx tiers, after <immintrin.h> and trellis.h.
//
// One vector holds the 16 rows of two neighbouring columns: 32-bit lane i is row i, its lower half column j, its upper
// half column j + 1. The window is 16 bits wide there (the unused upper bits masked away), and the 32-bit product
// window * multiplier is kept as two vectors of 16-bit halves, `lo` and `hi`. Only four or five instructions make them:
// one or none to bring the bytes of each row to its lane, one to shift, two multiplications, one addition.
#pragma once

// How the bytes of a pair of columns reach the lanes.
enum Gather {
    PERMUTE,    // any rate: a byte permutation
    BROADCAST,  // w <= 3: both columns lie within one 64-bit word, which is broadcast by the shift instruction itself
    HALVED,     // w = 4: as below
    SHIFTED,    // w = 4, where shifts are cheap: as below that
};

// At w = 4 a 64-bit word holds 8 rows of two columns, and the word after it the same rows of the next two columns. So a
// 16-byte broadcast and the shift alone make a vector of 8 rows and four columns: vector v of a block has columns
// 4 (v / 2) ... + 3 and rows 8 (v % 2) ... + 7; of its 64-bit lanes the even ones have the first two columns, the odd
// ones the last two, and lanes 2 k and 2 k + 1 have rows 2 k and 2 k + 1 of the eight.

// AMD's Zen 4 starts a shift of lanes, each by its own count, beside a multiplication, but a multishift, a rotation or a
// funnel shift in place of one. So there a window is put together from the 16-bit word in which it begins and the next.
// The words of a block are ordered once, so that 64 bits have those of two columns for rows 0 ... 7 and then those for
// rows 8 ... 15: broadcast and shifted by 2, 4, ... 16 bits they are all windows of two columns, 32-bit lane k being row
// k / 2 + 8 (k % 2). What comes before a block's first word is its own last one, so nothing around the block is read.

struct Generator {
    __m512i index, control, direct, halved, low, high, mask, here, after, right, left, turned;
    int w;

    explicit Generator(const Matrix& m) : w(m.w) {
        alignas(64) uint8_t from[64], shift[64], straight[64], eight[64];
        for (int q = 0; q < 8; q++)
            for (int c = 0; c < 2; c++) {
                // Bits count from two bytes before the first column; a 4-byte group serves both rows of the lane pair.
                const int base = (8 * m.w * c + m.start(2 * q) + 16) / 8;
                for (int k = 0; k < 4; k++) from[8 * q + 4 * c + k] = static_cast<uint8_t>(base + k);
                for (int i = 0; i < 2; i++)
                    for (int k = 0; k < 2; k++) {
                        const int bit = 8 * m.w * c + m.start(2 * q + i) + 16 + 8 * k, to = 8 * q + 4 * i + 2 * c + k;
                        shift[to] = static_cast<uint8_t>(32 * c + bit - 8 * base);
                        straight[to] = static_cast<uint8_t>(bit & 63);
                    }
            }
        for (int k = 0; k < 64; k++) {
            const int row = k / 16 * 2 + k % 8 / 4, column = k % 4 / 2;
            eight[k] = static_cast<uint8_t>((8 * m.w * column + m.start(row) + 16 + 8 * (k % 2)) & 63);
        }
        alignas(64) uint16_t first[32], next[32], down[32], up[32];
        for (int k = 0; k < 32; k++) {
            const int word = k / 4 * 4 + (k % 2) * 2 + k % 4 / 2;
            first[k] = static_cast<uint16_t>((word + 31) % 32), next[k] = static_cast<uint16_t>(word);
            down[k] = static_cast<uint16_t>(k / 4 * 2 + 2), up[k] = static_cast<uint16_t>(16 - down[k]);
        }
        here = _mm512_load_si512(first), after = _mm512_load_si512(next);
        right = _mm512_load_si512(down), left = _mm512_load_si512(up);
        turned = _mm512_unpacklo_epi64(_mm512_set1_epi16(static_cast<int16_t>(m.even)),
                                       _mm512_set1_epi16(static_cast<int16_t>(m.odd)));
        index = _mm512_load_si512(from);
        halved = _mm512_load_si512(eight);
        control = _mm512_load_si512(shift);
        direct = _mm512_load_si512(straight);
        low = halves(m.even & 0xFFFF, m.odd & 0xFFFF);
        high = halves(m.even >> 16, m.odd >> 16);
        mask = _mm512_set1_epi16(static_cast<int16_t>((1u << m.window) - 1));
    }

    static __m512i halves(uint64_t even, uint64_t odd) {
        return _mm512_set1_epi64(static_cast<int64_t>((even * 0x10001) | (odd * 0x10001) << 32));
    }

    // The first pair of a block sees the last two bytes of the ring before it.
    __m512i first(const uint8_t* block) const {
        const __m512i body = _mm512_maskz_loadu_epi8(~__mmask64{3}, block - 2);
        return _mm512_mask_loadu_epi8(body, 3, block + 16 * w - 2);
    }

    template <bool PAIRED>
    [[gnu::always_inline]] void multiply(__m512i windows, __m512i& lo, __m512i& hi) const {
        if (!PAIRED) windows = _mm512_and_si512(windows, mask);
        lo = _mm512_mullo_epi16(windows, low);
        hi = _mm512_add_epi16(_mm512_mulhi_epu16(windows, low), PAIRED ? lo : _mm512_mullo_epi16(windows, high));
    }

    // The words of a block of 64 bytes in the order of `SHIFTED`, and after them those that follow each.
    [[gnu::always_inline]] const uint8_t* ordered(const uint8_t* block, uint8_t* out) const {
        const __m512i words = _mm512_loadu_si512(block);
        _mm512_store_si512(out, _mm512_permutexvar_epi16(here, words));
        _mm512_store_si512(out + 64, _mm512_permutexvar_epi16(after, words));
        return out;
    }

    // Columns 2 pair and 2 pair + 1 of a block; its vector `pair`, if halved; of an ordered block, if shifted.
    template <bool PAIRED, Gather HOW>
    [[gnu::always_inline]] void products(const uint8_t* block, int pair, __m512i& lo, __m512i& hi) const {
        __m512i windows;
        if (HOW == SHIFTED) {
            int64_t word, next;
            std::memcpy(&word, block + 8 * pair, 8), std::memcpy(&next, block + 64 + 8 * pair, 8);
            windows = _mm512_or_si512(_mm512_srlv_epi16(_mm512_set1_epi64(word), right),
                                      _mm512_sllv_epi16(_mm512_set1_epi64(next), left));
            lo = _mm512_mullo_epi16(windows, turned);
            hi = _mm512_add_epi16(_mm512_mulhi_epu16(windows, turned), lo);
            return;
        }
        if (HOW == HALVED) {
            const uint8_t* at = block + 16 * (pair / 2) + 2 * (pair % 2) - 2;
            __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
            if (pair == 0) {
                int16_t ring;
                std::memcpy(&ring, block + 62, 2);
                bytes = _mm512_mask_set1_epi16(bytes, 0x01010101, ring);
            }
            windows = _mm512_multishift_epi64_epi8(halved, bytes);
        } else if (HOW == BROADCAST && pair > 0) {
            int64_t word;
            std::memcpy(&word, block + 2 * w * pair - 2, 8);
            windows = _mm512_multishift_epi64_epi8(direct, _mm512_set1_epi64(word));
        } else {
            const __m512i bytes = pair == 0 ? first(block) : _mm512_loadu_si512(block + 2 * w * pair - 2);
            windows = _mm512_multishift_epi64_epi8(control, _mm512_permutexvar_epi8(index, bytes));
        }
        multiply<PAIRED>(windows, lo, hi);
    }
};

// The constants of the matrix that this thread multiplied last: building them takes longer than a block.
inline const Generator& generator(const Matrix& m) {
    thread_local Matrix last{};
    thread_local Generator constants{Matrix{nullptr, 1, 1, 1, 1, 4, 16, 0, 0, nullptr, nullptr, 0, 0}};
    if (m.w != last.w || m.window != last.window || m.even != last.even || m.odd != last.odd) {
        constants = Generator(m);
        last = m;
    }
    return constants;
}

// How far ahead seeds are asked for. A block takes longer to multiply than to stream, but the processor's own
// prefetcher gives up at every page: without this a product from memory takes three times as long as one from cache.
constexpr int AHEAD = 4096;

inline void ask_ahead(const uint8_t* block, int64_t bytes) {
    for (int64_t k = 0; k < bytes; k += 64)
        _mm_prefetch(reinterpret_cast<const char*>(block + AHEAD + k), _MM_HINT_T0);
}

// Reads begin before a block and run past its end; at the ends of the seeds they go to a copy.
inline const uint8_t* inside(const Matrix& m, const uint8_t* block, Padded& padded) {
    const uint8_t* end = m.seeds + m.block_rows * m.block_cols * m.block_bytes();
    return block != m.seeds && block + m.block_bytes() + 64 <= end ? block : padded.fill(block, m.block_bytes());
}

inline const uint8_t* readable(const Matrix& m, const uint8_t* block, Padded& padded) {
    ask_ahead(block, m.block_bytes());
    return inside(m, block, padded);
}

// Sums of the four bytes, one 16-bit half a column.
inline __m512i byte_sums(__m512i lo, __m512i hi) {
    const __m512i ones = _mm512_set1_epi8(1);
    return _mm512_add_epi16(_mm512_maddubs_epi16(lo, ones), _mm512_maddubs_epi16(hi, ones));
}

template <bool PAIRED>
void codes_of(const Matrix& m, int64_t i, int64_t first, int64_t count, int16_t* out) {
    const Generator g = generator(m);
    Padded padded;
    for (int64_t j = first; j < first + count; j++, out += EDGE * EDGE) {
        const uint8_t* block = readable(m, m.block(i, j), padded);
        for (int p = 0; p < EDGE / 2; p++) {
            __m512i lo, hi;
            g.products<PAIRED, PERMUTE>(block, p, lo, hi);
            const __m512i code = _mm512_sub_epi16(byte_sums(lo, hi), _mm512_set1_epi16(OFFSET));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * p), _mm512_cvtepi32_epi16(code));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * p + 16),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(code, 16)));
        }
    }
}

inline void codes(const Matrix& m, int64_t i, int64_t first, int64_t count, int16_t* out) {
    m.paired() ? codes_of<true>(m, i, first, count, out) : codes_of<false>(m, i, first, count, out);
}
