// Windows and byte sums of AVX2. Included inside the anonymous namespace of that tier.
//
// A vector holds one row of a block, 16 columns in 16-bit lanes. AVX2 has no variable shift of such lanes and no byte
// shuffle across halves, but here it needs neither: all windows of a row start at the same bit of their column, so what
// brings them down is a shift by a constant. A 32-bit lane takes two columns: the window of one is shifted down into its
// lower half, that of another, eight columns on, up into its upper half, and a blend joins them. At 2 bits, where a
// column is 32 bits, the bytes to shift are plain loads, which neighbouring rows share.
#pragma once

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// Sixteen ring bytes from byte AT of a block on; before its first stands its last.
template <int W, int AT>
inline __m128i piece(const uint8_t* block) {
    static_assert(AT >= -16 && AT <= 16 * W - 16);
    if constexpr (AT >= 0) return load_half(block + AT);
    else return _mm_alignr_epi8(load_half(block), load_half(block + 16 * W - 16), 16 + AT);
}

template <int W, int AT, int AT2>
inline __m256i pieces(const uint8_t* block) {
    if constexpr (AT >= 0 && AT2 == AT + 16) return load(block + AT);
    else return _mm256_inserti128_si256(_mm256_castsi128_si256(piece<W, AT>(block)), piece<W, AT2>(block), 1);
}

struct Bytes {
    alignas(32) int8_t of[32];
};

// For every half and column c of `columns` in a piece that ends with the last of them: its bytes q ... q + size - 1, from
// byte `to` of the half on. Bytes that are not in the piece are not in a window either.
constexpr Bytes shuffle(int w, int columns, int q, int size, int to) {
    Bytes b{};
    for (int k = 0; k < 32; k++) b.of[k] = -128;
    for (int h = 0; h < 2; h++)
        for (int c = 0; c < columns; c++)
            for (int k = 0; k < size; k++) {
                const int from = 16 - w * (columns - c) + q + k;
                if (from >= 0 && from < 16) b.of[16 * h + to + size * c + k] = static_cast<int8_t>(from);
            }
    return b;
}

// At 0.5 bit: the bytes c + q and c + q + 1 of the ring of 16, for every column c.
constexpr Bytes ring_shuffle(int q) {
    Bytes b{};
    for (int k = 0; k < 32; k++) b.of[k] = static_cast<int8_t>((k / 2 + k % 2 + q + 16) % 16);
    return b;
}

// 32-bit lane k: four bytes, from byte Q on, of the k-th column of the first (SIDE 0) or the last eight (SIDE 1).
template <int W, int SIDE, int Q>
inline __m256i four_bytes(const uint8_t* block) {
    constexpr int AT = 8 * W * SIDE;
    if constexpr (W == 3) {
        static constexpr Bytes index = shuffle(W, 4, Q, 4, 0);
        return _mm256_shuffle_epi8(pieces<W, AT + 4 * W - 16, AT + 8 * W - 16>(block), load(index.of));
    } else if constexpr (W == 4) {
        return pieces<W, AT + Q, AT + Q + 16>(block);
    } else if constexpr (W == 8) {  // columns 0 4 1 5 2 6 3 7
        return _mm256_blend_epi32(pieces<W, AT + Q, AT + Q + 16>(block), load(block + AT + 28 + Q), 0xAA);
    } else {
        static constexpr Bytes first = shuffle(W, 2, Q, 4, 0), second = shuffle(W, 2, Q, 4, 8);
        return _mm256_or_si256(
            _mm256_shuffle_epi8(pieces<W, AT + 2 * W - 16, AT + 6 * W - 16>(block), load(first.of)),
            _mm256_shuffle_epi8(pieces<W, AT + 4 * W - 16, AT + 8 * W - 16>(block), load(second.of)));
    }
}

// 16-bit lane c: two bytes, from byte Q on, of column c.
template <int W, int Q>
inline __m256i two_bytes(const uint8_t* block) {
    if constexpr (W == 1) {
        static constexpr Bytes index = ring_shuffle(Q);
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(block)), load(index.of));
    } else {
        return pieces<W, Q, Q + 16>(block);
    }
}

// The column in 16-bit lane k of what follows.
constexpr int column_of(int w, int k) {
    if (w <= 2) return k;
    const int lane = w == 8 ? k / 2 % 2 * 4 + k / 4 : k / 2;
    return lane + k % 2 * 8;
}

// The 16 ring bits that end with the window of every column in row ROW.
template <int W, int ROW>
inline __m256i windows(const uint8_t* block) {
    constexpr int START = (W * (ROW + 1) + 1) / 2 - 16, Q = (START + 16) / 8 - 2, DOWN = START - 8 * Q;
    if constexpr (W <= 2) {
        if constexpr (DOWN == 0) return two_bytes<W, Q>(block);
        else
            return _mm256_or_si256(_mm256_srli_epi16(two_bytes<W, Q>(block), DOWN),
                                   _mm256_slli_epi16(two_bytes<W, Q + 1>(block), 8 - DOWN));
    } else if constexpr (DOWN == 0) {
        return _mm256_blend_epi16(four_bytes<W, 0, Q>(block), four_bytes<W, 1, Q - 2>(block), 0xAA);
    } else {
        return _mm256_blend_epi16(_mm256_srli_epi32(four_bytes<W, 0, Q>(block), DOWN),
                                  _mm256_slli_epi32(four_bytes<W, 1, Q - 1>(block), 8 - DOWN), 0xAA);
    }
}

struct Multipliers {
    __m256i low[2], high[2];  // even and odd rows
    __m128i drop;             // oldest bits that are not in the window

    explicit Multipliers(const Matrix& m) : drop(_mm_cvtsi32_si128(16 - m.window)) {
        for (int p = 0; p < 2; p++) {
            const uint32_t multiplier = p ? m.odd : m.even;
            low[p] = _mm256_set1_epi16(static_cast<int16_t>(multiplier & 0xFFFF));
            high[p] = _mm256_set1_epi16(static_cast<int16_t>(multiplier >> 16));
        }
    }
};

// The byte sums of row ROW. Paired: the multipliers have equal halves, and are one if all rows take as many bits.
template <int W, bool PAIRED, int ROW>
inline __m256i byte_sums(const uint8_t* block, const Multipliers& g) {
    __m256i v = windows<W, ROW>(block);
    if (!PAIRED) v = _mm256_srl_epi16(v, g.drop);
    constexpr int P = PAIRED && W % 2 == 0 ? 0 : ROW % 2;
    const __m256i lo = _mm256_mullo_epi16(v, g.low[P]);
    const __m256i hi =
        _mm256_add_epi16(_mm256_mulhi_epu16(v, g.low[P]), PAIRED ? lo : _mm256_mullo_epi16(v, g.high[P]));
    const __m256i ones = _mm256_set1_epi8(1);
    return _mm256_add_epi16(_mm256_maddubs_epi16(lo, ones), _mm256_maddubs_epi16(hi, ones));
}

// Calls use(k, byte sums of row (FIRST + k) mod 16) for K = 0 ... COUNT - 1, unrolled.
template <int W, bool PAIRED, int FIRST, int COUNT, int K = 0, class F>
[[gnu::always_inline]] inline void each_row(const uint8_t* block, const Multipliers& g, const F& use) {
    if constexpr (K < COUNT) {
        use(K, byte_sums<W, PAIRED, (FIRST + K) % EDGE>(block, g));
        each_row<W, PAIRED, FIRST, COUNT, K + 1>(block, g, use);
    }
}
