// AMX: generated weights are written to the first-level cache, and the tile unit multiplies them by up to 16 rows of
// 8-bit digits at once, while the vector unit generates the next ones. Float activations are four digits a value.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "trellis.h"

namespace rbe {
namespace {
constexpr bool SHIFTS = false;
#include "generate_avx512.h"
#include "product_avx512.h"
#include "tiles.h"
#include "product_bytes.h"
#include "tier_common.h"

// A tile of generated weights: the byte sums s of 16 rows and 32 columns, 16-bit numbers as generated, which are two
// unsigned digits of base 256. Tile row p of one row of x has its signed digits p and p - 1 side by side, so that its sum
// is the coefficient of 256^p of the product: digits + 1 tile rows for a row of x.
constexpr int TILES = 4;    // tiles of activations multiplied at once
constexpr int PANEL = 12;   // tiles of generated weights along a panel
constexpr int BANDS = 8;    // block rows of a panel
constexpr int MOST_TILES = 88;  // 256 rows of x, as many as a call brings
constexpr int LAG = 2;      // tiles between writing and reading, so that no read waits for a write

struct Plan {
    int digits, per_row, per_tile, tiles, rows;  // digits of a value; tile rows of a row of x; rows of x in a tile; ...
    int64_t steps;
    explicit Plan(const Activations& a)
        : digits(a.int8 ? 1 : 4), per_row(digits + 1), per_tile(ROWS / per_row),
          tiles(static_cast<int>((a.batch + per_tile - 1) / per_tile)),
          rows(static_cast<int>(std::min<int64_t>(a.batch, per_tile)) * per_row), steps((a.cols + STEP - 1) / STEP) {}
    int64_t tile_bytes() const { return int64_t{64} * rows; }
    int64_t total(const Activations& a, int64_t b) const {  // of the values of row b
        int64_t sum;
        std::memcpy(&sum, static_cast<const uint8_t*>(a.packed) + tiles * apart() + 8 * b, 8);
        return sum;
    }
    int64_t apart() const { return steps * tile_bytes(); }  // from one tile of activations to the next
};

// One row of 8-bit values takes six vector instructions for 32 weights where the bytes need no permutation, and no
// stores: faster by a tenth than tiles (benchmarks/kernels.py).
bool by_dots(const Matrix& m, const Activations& a) { return a.int8 && a.batch == 1 && m.w == 4; }

size_t packed_bytes(const Matrix& m, const Activations& a) {
    if (by_dots(m, a)) return words_bytes(m, a);
    if (const BytePlan few(m, a); few.fits()) return few.bytes(a);
    const Plan plan(a);
    return static_cast<size_t>(plan.tiles * plan.apart() + 8 * a.batch);
}

// Which byte of 32 values goes where in tile row p: their digits p and p - 1, nothing where there is no such digit.
struct Spread {
    __m512i index[5];
    __mmask64 used[5] = {};
    explicit Spread(int digits) {
        for (int p = 0; p <= digits; p++) {
            alignas(64) uint8_t from[64];
            for (int k = 0; k < 64; k++) {
                const int digit = p - k % 2;
                from[k] = static_cast<uint8_t>(k / 2 * 4 + (digit & 3));
                used[p] |= __mmask64{digit >= 0 && digit < digits} << k;
            }
            index[p] = _mm512_load_si512(from);
        }
    }
};

void pack(const Matrix& m, const Activations& a, int64_t b, const int32_t* x) {
    if (by_dots(m, a)) return pack_words(m, a, b, x);
    if (const BytePlan few(m, a); few.fits()) return pack_bytes(a, few, b, x);
    static const Spread wide(4), narrow(1);
    const Spread& spread = a.int8 ? narrow : wide;
    const Plan plan(a);
    uint8_t* out = static_cast<uint8_t*>(a.packed) + b / plan.per_tile * plan.apart();
    out += b % plan.per_tile * plan.per_row * 64;
    for (int64_t s = 0; s < plan.steps; s++) {
        __m512i v[2];
        for (int h = 0; h < 2; h++) v[h] = signed_digits(_mm512_loadu_si512(x + STEP * s + 16 * h));
        for (int p = 0; p < plan.per_row; p++)
            _mm512_storeu_si512(out + s * plan.tile_bytes() + 64 * p,
                                _mm512_maskz_permutex2var_epi8(spread.used[p], v[0], spread.index[p], v[1]));
    }
    int64_t sum = 0;
    for (int64_t j = 0; j < a.cols; j++) sum += x[j];
    std::memcpy(static_cast<uint8_t*>(a.packed) + plan.tiles * plan.apart() + 8 * b, &sum, 8);
}

template <int COUNT>
inline void store_sums(int32_t (*sums)[ROWS * 16]) {
    store_tile<0>(sums[0]);
    if (COUNT > 1) store_tile<1>(sums[1]);
    if (COUNT > 2) store_tile<2>(sums[2]);
    if (COUNT > 3) store_tile<3>(sums[3]);
}

// Block j of block row i, half a tile.
template <bool PAIRED, Gather HOW>
[[gnu::always_inline]] inline void generate(const Matrix& m, const Generator& g, int64_t i, int64_t j, Padded& padded,
                                            uint8_t* out) {
    // Past an odd number of blocks the activations are zero: any readable block will do.
    const uint8_t* block = readable(m, m.block(i, std::min(j, m.block_cols - 1)), padded);
#pragma GCC unroll 8
    for (int p = 0; p < EDGE / 2; p++) {
        __m512i lo, hi;
        g.products<PAIRED, HOW>(block, p, lo, hi);
        _mm512_store_si512(out + 64 * p, byte_sums(lo, hi));
    }
}

// Few activations: each tile of weights is multiplied shortly after it was generated, its tile instructions among the
// vector instructions that generate another, so that both units are busy at once.
template <bool PAIRED, Gather HOW, int COUNT, int WEIGHTS>
[[gnu::always_inline]] inline void stream_step(const Matrix& m, const Generator& g, const Plan& plan, const uint8_t* x,
                                               int64_t i, int64_t s, uint8_t (*ring)[1024], Padded& padded) {
    uint8_t* out = ring[s % (2 * LAG)];
    const bool more = s < plan.steps, multiply = s >= LAG && s < plan.steps + LAG;
    const int64_t apart = plan.apart();
    x += (s - LAG) * plan.tile_bytes();
    if (more) generate<PAIRED, HOW>(m, g, i, 2 * s, padded, out);
    if (multiply) {
        load_tile<WEIGHTS>(ring[(s - LAG) % (2 * LAG)]);
        load_tile<4>(x);
        dot_tile<0, 4, WEIGHTS>();
        if constexpr (COUNT > 1) load_tile<5>(x + apart);
        if constexpr (COUNT > 1) dot_tile<1, 5, WEIGHTS>();
    }
    if (more) generate<PAIRED, HOW>(m, g, i, 2 * s + 1, padded, out + 512);
    if (multiply) {
        if constexpr (COUNT > 2) load_tile<4>(x + 2 * apart);
        if constexpr (COUNT > 2) dot_tile<2, 4, WEIGHTS>();
        if constexpr (COUNT > 3) load_tile<5>(x + 3 * apart);
        if constexpr (COUNT > 3) dot_tile<3, 5, WEIGHTS>();
    }
}

template <bool PAIRED, Gather HOW, int COUNT>
void stream(const Matrix& m, const Generator& constants, const Plan& plan, const uint8_t* x, int64_t i,
            int32_t (*sums)[ROWS * 16]) {
    alignas(64) uint8_t ring[2 * LAG][1024];
    const Generator g = constants;  // a copy stays in registers
    Padded padded;
    zero_sums();
    for (int64_t s = 0; s < plan.steps + LAG; s += 2) {
        stream_step<PAIRED, HOW, COUNT, 6>(m, g, plan, x, i, s, ring, padded);
        stream_step<PAIRED, HOW, COUNT, 7>(m, g, plan, x, i, s + 1, ring, padded);
    }
    store_sums<COUNT>(sums);
}

// Adds the sums of one tile of activations and one block row, which begins at `sums`.
inline void add_sums(const Activations& a, const Plan& plan, int64_t tile, const int32_t* lines, int64_t* sums,
                     int64_t stride) {
    for (int64_t b = tile * plan.per_tile; b < std::min(a.batch, (tile + 1) * plan.per_tile); b++) {
        for (int h = 0; h < 2; h++) {
            __m512i s = _mm512_setzero_si512();
            for (int p = plan.per_row - 1; p >= 0; p--) {
                const __m256i line = _mm256_load_si256(reinterpret_cast<const __m256i*>(lines + 16 * p + 8 * h));
                s = _mm512_add_epi64(_mm512_slli_epi64(s, 8), _mm512_cvtepi32_epi64(line));
            }
            const __m512i less = _mm512_set1_epi64(-OFFSET * plan.total(a, b));
            _mm512_storeu_si512(sums + b * stride + 8 * h, _mm512_add_epi64(s, less));
        }
        lines += 16 * plan.per_row;
    }
}

// Many activations: a panel of weights, BANDS block rows high and PANEL tiles wide, is generated once and multiplied by
// all of them, two block rows and two tiles of activations at a time: these two stay in the first-level cache for all
// block rows, and the weights come from the second.
struct Workspace {
    alignas(64) uint8_t weights[BANDS][PANEL][1024];
    alignas(64) int32_t sums[BANDS][MOST_TILES][ROWS * 16];
};
thread_local std::unique_ptr<Workspace> workspace;

struct Corner {
    int32_t* sums[4];  // two tiles of activations of the first block row, then of the second
    const uint8_t *weights, *x;
    int64_t steps;
};

template <int HIGH, int WIDE>
void multiply_panel(const Plan& plan, const Corner& c, bool first, int32_t* const (&to)[4]) {
    zero_sums();
    if (!first) {
        load_tile<0>(c.sums[0]);
        if constexpr (WIDE > 1) load_tile<1>(c.sums[1]);
        if constexpr (HIGH > 1) load_tile<2>(c.sums[2]);
        if constexpr (HIGH > 1 && WIDE > 1) load_tile<3>(c.sums[3]);
    }
    for (int64_t s = 0; s < c.steps; s++) {
        load_tile<4>(c.x + s * plan.tile_bytes());
        load_tile<6>(c.weights + s * 1024);
        dot_tile<0, 4, 6>();
        if constexpr (WIDE > 1) load_tile<5>(c.x + s * plan.tile_bytes() + plan.apart());
        if constexpr (WIDE > 1) dot_tile<1, 5, 6>();
        if constexpr (HIGH > 1) load_tile<7>(c.weights + (PANEL + s) * 1024);
        if constexpr (HIGH > 1) dot_tile<2, 4, 7>();
        if constexpr (HIGH > 1 && WIDE > 1) dot_tile<3, 5, 7>();
    }
    store_tile<0>(to[0]);
    if constexpr (WIDE > 1) store_tile<1>(to[1]);
    if constexpr (HIGH > 1) store_tile<2>(to[2]);
    if constexpr (HIGH > 1 && WIDE > 1) store_tile<3>(to[3]);
}

// Block rows from `begin`, whose sums begin at `sums`.
template <bool PAIRED, Gather HOW>
void panels(const Matrix& m, const Generator& constants, const Activations& a, const Plan& plan, int64_t begin,
            int bands, int64_t* sums, int64_t stride) {
    Workspace& ws = *workspace;
    const Generator g = constants;  // a copy stays in registers
    Padded padded;
    alignas(64) int32_t corner[4][ROWS * 16];
    const int64_t count = (plan.steps + PANEL - 1) / PANEL;
    for (int64_t k = 0; k < count; k++) {
        const int64_t first = k * plan.steps / count, steps = (k + 1) * plan.steps / count - first;
        for (int i = 0; i < bands; i++)
            for (int64_t j = 0; j < 2 * steps; j++)
                generate<PAIRED, HOW>(m, g, begin + i, 2 * first + j, padded, ws.weights[i][0] + 512 * j);
        for (int t = 0; t < plan.tiles; t += 2)
            for (int i = 0; i < bands; i += 2) {
                const int high = std::min(2, bands - i), wide = std::min(2, plan.tiles - t);
                Corner c{{}, ws.weights[i][0], static_cast<const uint8_t*>(a.packed), steps};
                c.x += t * plan.apart() + first * plan.tile_bytes();
                for (int q = 0; q < 4; q++) c.sums[q] = ws.sums[std::min(i + q / 2, bands - 1)][t + q % 2];
                // The last sums are used at once, while they are near.
                const bool last = k == count - 1;
                int32_t* to[4];
                for (int q = 0; q < 4; q++) to[q] = last ? corner[q] : c.sums[q];
                if (high == 2 && wide == 2) multiply_panel<2, 2>(plan, c, k == 0, to);
                if (high == 2 && wide == 1) multiply_panel<2, 1>(plan, c, k == 0, to);
                if (high == 1 && wide == 2) multiply_panel<1, 2>(plan, c, k == 0, to);
                if (high == 1 && wide == 1) multiply_panel<1, 1>(plan, c, k == 0, to);
                for (int q = 0; last && q < 4; q++)
                    if (q / 2 < high && q % 2 < wide)
                        add_sums(a, plan, t + q % 2, corner[q], sums + (i + q / 2) * EDGE, stride);
            }
    }
}

template <bool PAIRED, Gather HOW>
void rows_of(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const Generator& g = generator(m);
    const Plan plan(a);
    const uint8_t* x = static_cast<const uint8_t*>(a.packed);
    if (!workspace) workspace = std::make_unique<Workspace>();
    configure(plan.rows);
    for (int64_t at = begin; at < end; at += BANDS) {
        const int bands = static_cast<int>(std::min<int64_t>(BANDS, end - at));
        int64_t* to = sums + (at - begin) * EDGE;
        if (plan.tiles > TILES) panels<PAIRED, HOW>(m, g, a, plan, at, bands, to, stride);
        for (int i = 0; plan.tiles <= TILES && i < bands; i++) {
            alignas(64) int32_t out[TILES][ROWS * 16];
            if (plan.tiles == 1) stream<PAIRED, HOW, 1>(m, g, plan, x, at + i, out);
            if (plan.tiles == 2) stream<PAIRED, HOW, 2>(m, g, plan, x, at + i, out);
            if (plan.tiles == 3) stream<PAIRED, HOW, 3>(m, g, plan, x, at + i, out);
            if (plan.tiles == 4) stream<PAIRED, HOW, 4>(m, g, plan, x, at + i, out);
            for (int t = 0; t < plan.tiles; t++) add_sums(a, plan, t, out[t], to + i * EDGE, stride);
        }
    }
}

void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    if (by_dots(m, a)) return product_words(m, a, begin, end, sums, stride);
    if (BytePlan(m, a).fits()) return product_bytes(m, a, begin, end, sums, stride);
    if (!m.paired()) return rows_of<false, PERMUTE>(m, a, begin, end, sums, stride);
    if (m.w > 3) return rows_of<true, PERMUTE>(m, a, begin, end, sums, stride);
    rows_of<true, BROADCAST>(m, a, begin, end, sums, stride);
}

void leave() { release_tiles(); }

}  // namespace

const Tier& amx_tier() {
    static const Tier t{"amx", rotate, rotate_back, fixed_point, largest, finish, codes, packed_bytes, pack, product,
                        leave};
    return t;
}

bool amx_permitted() {
#if defined(__linux__)
    static const bool permitted = [] {
        unsigned a, b, c, d, low, high;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        if ((low >> 17 & 3) != 3) return false;
        // Linux gives the tile registers on request: ARCH_REQ_XCOMP_PERM for component 18.
        return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    }();
    return permitted;
#else
    return false;
#endif
}

}  // namespace rbe
