// Tile instructions. Included inside the anonymous namespace of the amx tier.
//
// Written here because the compiler's own intrinsics do not say that loading a tile reads memory.
#pragma once

constexpr int ROWS = 16;  // of a tile
constexpr int STEP = 32;  // columns of a step

template <int TILE>
inline void load_tile(const void* at) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(int64_t{64}), "i"(TILE) : "memory");
}

template <int TILE>
inline void store_tile(void* at) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(int64_t{64}), "i"(TILE) : "memory");
}

// Tile SUMS += signed bytes of tile X times unsigned bytes of tile WEIGHTS.
template <int SUMS, int X, int WEIGHTS>
inline void dot_tile() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(X), "i"(WEIGHTS));
}

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 ... 3 are sums, 4 and 5 activations, 6 and 7 generated weights.
inline void configure(int rows) {
    Config c;
    for (int t = 0; t < 8; t++) c.row_bytes[t] = 64, c.rows[t] = static_cast<uint8_t>(t < 6 ? rows : ROWS);
    __asm__ volatile("ldtilecfg %0" ::"m"(c));
}

inline void release_tiles() { __asm__ volatile("tilerelease"); }

inline void zero_sums() { __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3"); }

// Adding and flipping 0x80 in every byte turns 32-bit numbers into signed digits of base 256.
inline __m512i signed_digits(__m512i v) {
    const __m512i bias = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
    return _mm512_xor_si512(_mm512_add_epi32(v, bias), bias);
}

// The 64-bit sums of numbers eight apart.
inline __m512i widened(__m512i v) {
    return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(v)),
                            _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(v, 1)));
}
