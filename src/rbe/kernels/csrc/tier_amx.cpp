// AMX: generated weights are written to the first-level cache, and the tile unit multiplies them by up to 16 rows of
// 8-bit digits at once, while the vector unit generates the next ones. Float activations are four digits a value.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <memory>
#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "trellis.h"

namespace rbe {
namespace {
#include "generate_avx512.h"
#include "tiles.h"
#include "product_bytes.h"
#include "tier_common.h"

// A tile of generated weights: the byte sums s of 16 rows and 32 columns, 16-bit numbers as generated, which are two
// unsigned digits of base 256. Tile row p of one row of x has its signed digits p and p - 1 side by side, so that its sum
// is the coefficient of 256^p of the product: digits + 1 tile rows for a row of x.
constexpr int TILES = 4;    // tiles of activations multiplied at once
constexpr int PANEL = 8;    // tiles of generated weights along a panel
constexpr int BANDS = 8;    // block rows of a panel
constexpr int MOST_TILES = 32;  // 96 rows of x, as many as a call brings
constexpr int LAG = 2;      // tiles between writing and reading, so that no read waits for a write

struct Plan {
    int digits, per_row, per_tile, tiles, rows;  // digits of a value; tile rows of a row of x; rows of x in a tile; ...
    int64_t steps;
    explicit Plan(const Activations& a)
        : digits(a.int8 ? 1 : 4), per_row(digits + 1), per_tile(ROWS / per_row),
          tiles(static_cast<int>((a.batch + per_tile - 1) / per_tile)),
          rows(static_cast<int>(std::min<int64_t>(a.batch, per_tile)) * per_row), steps((a.cols + STEP - 1) / STEP) {}
    int64_t tile_bytes() const { return int64_t{64} * rows; }
    int64_t apart() const { return steps * tile_bytes(); }  // from one tile of activations to the next
};

size_t packed_bytes(const Matrix& m, const Activations& a) {
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
    if (const BytePlan few(m, a); few.fits()) return pack_bytes(a, few, b, x);
    static const Spread wide(4), narrow(1);
    const Spread& spread = a.int8 ? narrow : wide;
    const Plan plan(a);
    uint8_t* out = static_cast<uint8_t*>(a.packed) + b / plan.per_tile * plan.apart() + b % plan.per_tile * plan.per_row * 64;
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
inline void load_sums(const int32_t (*sums)[ROWS * 16]) {
    load_tile<0>(sums[0]);
    if (COUNT > 1) load_tile<1>(sums[1]);
    if (COUNT > 2) load_tile<2>(sums[2]);
    if (COUNT > 3) load_tile<3>(sums[3]);
}

template <int COUNT>
inline void store_sums(int32_t (*sums)[ROWS * 16]) {
    store_tile<0>(sums[0]);
    if (COUNT > 1) store_tile<1>(sums[1]);
    if (COUNT > 2) store_tile<2>(sums[2]);
    if (COUNT > 3) store_tile<3>(sums[3]);
}

// One tile of generated weights times COUNT tiles of activations.
template <int COUNT>
inline void multiply(const uint8_t* weights, const uint8_t* x, int64_t apart) {
    load_tile<6>(weights);
    load_tile<4>(x);
    dot_tile<0, 4, 6>();
    if (COUNT > 1) {
        load_tile<5>(x + apart);
        dot_tile<1, 5, 6>();
    }
    if (COUNT > 2) {
        load_tile<4>(x + 2 * apart);
        dot_tile<2, 4, 6>();
    }
    if (COUNT > 3) {
        load_tile<5>(x + 3 * apart);
        dot_tile<3, 5, 6>();
    }
}

// Tile `step` of block row i.
template <bool PAIRED, Gather HOW>
[[gnu::always_inline]] inline void generate(const Matrix& m, const Generator& g, int64_t i, int64_t step, Padded& padded, uint8_t* out) {
    for (int64_t j = 2 * step; j < 2 * step + 2; j++, out += 512) {
        // Past an odd number of blocks the activations are zero: any readable block will do.
        const uint8_t* block = readable(m, m.block(i, std::min(j, m.block_cols - 1)), padded);
#pragma GCC unroll 8
        for (int p = 0; p < EDGE / 2; p++) {
            __m512i lo, hi;
            g.products<PAIRED, HOW>(block, p, lo, hi);
            _mm512_store_si512(out + 64 * p, byte_sums(lo, hi));
        }
    }
}

// Few activations: each tile of weights is multiplied shortly after it was generated.
template <bool PAIRED, Gather HOW, int COUNT>
void stream(const Matrix& m, const Generator& constants, const Plan& plan, const uint8_t* x, int64_t i, int32_t (*sums)[ROWS * 16]) {
    alignas(64) uint8_t ring[2 * LAG][1024];
    const Generator g = constants;  // a copy stays in registers
    Padded padded;
    load_sums<COUNT>(sums);
    for (int64_t s = 0; s < plan.steps + LAG; s++) {
        if (s < plan.steps) generate<PAIRED, HOW>(m, g, i, s, padded, ring[s % (2 * LAG)]);
        if (s >= LAG) multiply<COUNT>(ring[(s - LAG) % (2 * LAG)], x + (s - LAG) * plan.tile_bytes(), plan.apart());
    }
    store_sums<COUNT>(sums);
}

// Many activations: a panel of weights, BANDS block rows high and PANEL tiles wide, is generated once and multiplied by
// all of them, so ordered that four tiles of activations stay in the first-level cache for all its block rows.
struct Workspace {
    alignas(64) uint8_t weights[BANDS][PANEL][1024];
    alignas(64) int32_t sums[BANDS][MOST_TILES][ROWS * 16];
};
thread_local std::unique_ptr<Workspace> workspace;

template <int COUNT>
void multiply_panel(Workspace& ws, const Plan& plan, const uint8_t* x, int bands, int64_t steps, int t) {
    for (int i = 0; i < bands; i++) {
        load_sums<COUNT>(ws.sums[i] + t);
        for (int64_t s = 0; s < steps; s++) multiply<COUNT>(ws.weights[i][s], x + s * plan.tile_bytes(), plan.apart());
        store_sums<COUNT>(ws.sums[i] + t);
    }
}

template <bool PAIRED, Gather HOW>
void panels(const Matrix& m, const Generator& constants, const Plan& plan, const uint8_t* x, int64_t begin, int bands) {
    Workspace& ws = *workspace;
    const Generator g = constants;  // a copy stays in registers
    Padded padded;
    for (int64_t first = 0; first < plan.steps; first += PANEL) {
        const int64_t steps = std::min<int64_t>(PANEL, plan.steps - first);
        for (int i = 0; i < bands; i++)
            for (int64_t s = 0; s < steps; s++)
                generate<PAIRED, HOW>(m, g, begin + i, first + s, padded, ws.weights[i][s]);
        for (int t = 0; t < plan.tiles; t += TILES) {
            const uint8_t* tile = x + t * plan.apart() + first * plan.tile_bytes();
            const int count = std::min(plan.tiles - t, TILES);
            if (count == 1) multiply_panel<1>(ws, plan, tile, bands, steps, t);
            if (count == 2) multiply_panel<2>(ws, plan, tile, bands, steps, t);
            if (count == 3) multiply_panel<3>(ws, plan, tile, bands, steps, t);
            if (count == 4) multiply_panel<4>(ws, plan, tile, bands, steps, t);
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
        for (int i = 0; i < bands; i++) {
            int32_t(*out)[ROWS * 16] = workspace->sums[i];
            std::memset(out, 0, static_cast<size_t>(plan.tiles) * sizeof out[0]);
            if (plan.tiles == 1) stream<PAIRED, HOW, 1>(m, g, plan, x, at + i, out);
            if (plan.tiles == 2) stream<PAIRED, HOW, 2>(m, g, plan, x, at + i, out);
            if (plan.tiles == 3) stream<PAIRED, HOW, 3>(m, g, plan, x, at + i, out);
            if (plan.tiles == 4) stream<PAIRED, HOW, 4>(m, g, plan, x, at + i, out);
        }
        if (plan.tiles > TILES) panels<PAIRED, HOW>(m, g, plan, x, at, bands);
        for (int64_t b = 0; b < a.batch; b++) {
            int64_t total;
            std::memcpy(&total, x + plan.tiles * plan.apart() + 8 * b, 8);
            for (int i = 0; i < bands; i++) {
                int64_t* sum = sums + b * stride + (at + i - begin) * EDGE;
                const int32_t* lines = workspace->sums[i][b / plan.per_tile] + b % plan.per_tile * plan.per_row * 16;
                for (int h = 0; h < 2; h++) {
                    __m512i s = _mm512_setzero_si512();
                    for (int p = plan.per_row - 1; p >= 0; p--) {
                        const __m256i line = _mm256_load_si256(reinterpret_cast<const __m256i*>(lines + 16 * p + 8 * h));
                        s = _mm512_add_epi64(_mm512_slli_epi64(s, 8), _mm512_cvtepi32_epi64(line));
                    }
                    _mm512_storeu_si512(sum + 8 * h, _mm512_add_epi64(s, _mm512_set1_epi64(-OFFSET * total)));
                }
            }
        }
    }
}

void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
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
