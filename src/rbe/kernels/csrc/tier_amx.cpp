// AMX: products of 32 weights are written to the first-level cache, and the tile unit multiplies them by up to 16 rows
// of 8-bit digits at once, while the vector unit generates the next ones. Float activations are four digits a value.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "trellis.h"

namespace rbe {
namespace {
#include "generate_avx512.h"
#include "tier_common.h"

constexpr int64_t SPAN = 16384;  // columns whose sums of 8-bit digits times four bytes fit 32 bits
constexpr int ROWS = 16;         // of a tile
constexpr int TILES = 4;         // tiles of activations for one generation
constexpr int RING = 4;          // blocks (or pairs of blocks) of products in flight

// The lanes of the `halved` arrangement, for w = 4 and few rows: a vector holds 8 rows of four columns, 64-bit lanes
// taking columns (0, 1) and (2, 3) in turn, because then a plain 16-byte broadcast brings every bit in place and the
// byte permutation is not needed. Even and odd lanes then belong to different columns: activations take two tile rows.
bool halved(const Matrix& m, int64_t batch, bool int8) { return m.w == 4 && batch * (int8 ? 1 : 4) * 2 <= ROWS; }

struct Plan {
    int digits, rows, tiles;  // digits a value; tile rows of a tile; tiles of activations
    bool half;
    int64_t steps;  // along the columns: blocks, or pairs of blocks if halved
    Plan(const Matrix& m, int64_t batch, bool int8) : digits(int8 ? 1 : 4), half(halved(m, batch, int8)) {
        const int64_t all = batch * digits * (half ? 2 : 1);
        rows = static_cast<int>(std::min<int64_t>(all, ROWS));
        tiles = static_cast<int>((all + ROWS - 1) / ROWS);
        steps = half ? (m.block_cols + 1) / 2 : m.block_cols;
    }
    // Bytes of a tile of activations, and of all of them; followed by one sum of X a batch row.
    int64_t bytes() const { return int64_t{64} * rows; }
    int64_t all_bytes() const { return bytes() * tiles * steps; }
};

size_t packed_bytes(const Matrix& m, int64_t batch, int64_t, bool int8) {
    return static_cast<size_t>(Plan(m, batch, int8).all_bytes() + 8 * batch);
}

// Balanced digit d in base 256 of v: v = sum of digit(v, d) * 256^d.
inline uint32_t digit(int32_t v, int d) {
    for (; d > 0; d--) v = (v - static_cast<int8_t>(v)) >> 8;
    return static_cast<uint8_t>(v);
}

void pack(const Matrix& m, Activations& a) {
    const Plan plan(m, a.batch, a.int8);
    uint8_t* out = static_cast<uint8_t*>(a.packed);
    int64_t* sums = reinterpret_cast<int64_t*>(out + plan.all_bytes());
    const int per_row = plan.digits * (plan.half ? 2 : 1);
    if (plan.tiles > 1 || plan.half) std::memset(out, 0, static_cast<size_t>(plan.all_bytes()));
    for (int64_t b = 0; b < a.batch; b++) {
        const int32_t* x = a.values + b * a.cols;
        sums[b] = 0;
        for (int64_t j = 0; j < a.cols; j++) sums[b] += x[j];
        for (int d = 0; d < plan.digits; d++)
            for (int64_t pair = 0; pair < a.cols / 2; pair++) {
                const int64_t parity = plan.half ? pair & 1 : 0;
                const int64_t row = b * per_row + (plan.half ? 2 * d + parity : d);
                const int64_t step = plan.half ? pair / 16 : pair / 8;
                const int64_t word = plan.half ? pair % 16 / 2 : pair % 8;
                const uint64_t twice = (digit(x[2 * pair], d) * 0x0101u) | (digit(x[2 * pair + 1], d) * 0x01010000u);
                const uint64_t both = twice | twice << 32;  // for the lower and the upper halves of the products
                std::memcpy(out + ((row / ROWS) * plan.steps + step) * plan.bytes() + row % ROWS * 64 + word * 8, &both, 8);
            }
    }
}

struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

void configure(int rows) {
    Config c;
    for (int t = 0; t < 8; t++) c.row_bytes[t] = 64, c.rows[t] = static_cast<uint8_t>(t < 5 ? rows : ROWS);
    _tile_loadconfig(&c);
}

// Tiles 0 ... 3 are sums, 4 activations, 5 products.
template <int COUNT>
inline void zero() {
    _tile_zero(0);
    if (COUNT > 1) _tile_zero(1);
    if (COUNT > 2) _tile_zero(2);
    if (COUNT > 3) _tile_zero(3);
}

template <int COUNT>
inline void store(int32_t (*out)[ROWS * 16]) {
    _tile_stored(0, out[0], 64);
    if (COUNT > 1) _tile_stored(1, out[1], 64);
    if (COUNT > 2) _tile_stored(2, out[2], 64);
    if (COUNT > 3) _tile_stored(3, out[3], 64);
}

// One block of products times COUNT tiles of activations.
template <int COUNT>
inline void multiply(const uint8_t* products, const uint8_t* x, int64_t apart) {
    _tile_loadd(5, products, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbsud(0, 4, 5);
    if (COUNT > 1) {
        _tile_loadd(4, x + apart, 64);
        _tile_dpbsud(1, 4, 5);
    }
    if (COUNT > 2) {
        _tile_loadd(4, x + 2 * apart, 64);
        _tile_dpbsud(2, 4, 5);
    }
    if (COUNT > 3) {
        _tile_loadd(4, x + 3 * apart, 64);
        _tile_dpbsud(3, 4, 5);
    }
}

// One block row times COUNT tiles of activations, columns of blocks [first, last).
template <bool PAIRED, Gather HOW, int COUNT>
void span(const Matrix& m, const Generator& g, const Plan& plan, const uint8_t* x, int64_t i, int64_t first, int64_t last,
          int32_t (*out)[ROWS * 16]) {
    alignas(64) uint8_t ring[RING][1024];
    Padded padded;
    const int64_t apart = plan.steps * plan.bytes();
    zero<COUNT>();
    for (int64_t j = first; j < last + RING / 2; j++) {
        if (j < last) {
            const uint8_t* block = readable(m, m.block(i, j), padded);
            uint8_t* to = ring[j % RING];
#pragma GCC unroll 8
            for (int p = 0; p < EDGE / 2; p++) {
                __m512i lo, hi;
                g.products<PAIRED, HOW>(block, p, lo, hi);
                _mm512_store_si512(to + 128 * p, lo);
                _mm512_store_si512(to + 128 * p + 64, hi);
            }
        }
        if (j >= first + RING / 2) {
            const int64_t k = j - RING / 2;
            multiply<COUNT>(ring[k % RING], x + k * plan.bytes(), apart);
        }
    }
    store<COUNT>(out);
}

template <bool PAIRED>
inline void halves_of_block(const Generator& g, __m512i control, __m512i index, const uint8_t* block, uint8_t* lower,
                            uint8_t* upper) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
        const int group = v / 2, half = v % 2;
        __m512i bytes, lo, hi;
        if (v == 0)
            bytes = _mm512_permutexvar_epi8(index, g.first(block));
        else
            bytes = _mm512_broadcast_i32x4(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 16 * group - 2 + 2 * half)));
        g.multiply<PAIRED>(_mm512_multishift_epi64_epi8(control, bytes), lo, hi);
        uint8_t* to = (half ? upper : lower) + 128 * group;
        _mm512_store_si512(to, lo);
        _mm512_store_si512(to + 64, hi);
    }
}

// One block row in the halved arrangement, pairs of blocks [first, last): sums of rows 0 ... 7 and of rows 8 ... 15.
template <bool PAIRED>
void span_halved(const Matrix& m, const Generator& g, const Plan& plan, const uint8_t* x, int64_t i, int64_t first,
                 int64_t last, int32_t (*out)[ROWS * 16]) {
    alignas(64) uint8_t ring[RING][2][1024];
    alignas(64) uint8_t shift[64], from[64];
    for (int k = 0; k < 64; k++) {
        const int q = k / 8, i_ = q / 2 * 2 + k % 8 / 4, column = k % 4 / 2;
        shift[k] = static_cast<uint8_t>((32 * column + m.start(i_) + 16 + 8 * (k % 2)) & 63);
        from[k] = static_cast<uint8_t>(k % 16);
    }
    const __m512i control = _mm512_load_si512(shift), index = _mm512_load_si512(from);
    Padded padded;
    zero<2>();
    for (int64_t j = first; j < last + RING / 2; j++) {
        if (j < last)
            for (int64_t b = 2 * j; b < 2 * j + 2; b++) {
                // Past an odd number of blocks the activations are zero: any readable block will do.
                const uint8_t* block = readable(m, m.block(i, std::min(b, m.block_cols - 1)), padded);
                uint8_t(*to)[1024] = ring[j % RING];
                halves_of_block<PAIRED>(g, control, index, block, to[0] + 512 * (b & 1), to[1] + 512 * (b & 1));
            }
        if (j >= first + RING / 2) {
            const int64_t k = j - RING / 2;
            _tile_loadd(4, x + k * plan.bytes(), 64);
            _tile_loadd(5, ring[k % RING][0], 64);
            _tile_dpbsud(0, 4, 5);
            _tile_loadd(6, ring[k % RING][1], 64);
            _tile_dpbsud(1, 4, 6);
        }
    }
    store<2>(out);
}

template <bool PAIRED, Gather HOW>
void rows_of(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const Generator g(m);
    const Plan plan(m, a.batch, a.int8);
    const uint8_t* x = static_cast<const uint8_t*>(a.packed);
    const int64_t* totals = reinterpret_cast<const int64_t*>(x + plan.all_bytes());
    const int64_t pace = SPAN / EDGE / (plan.half ? 2 : 1);
    alignas(64) int32_t out[TILES][ROWS * 16];
    configure(plan.rows);
    for (int64_t i = begin; i < end; i++) {
        for (int64_t b = 0; b < a.batch; b++)
            for (int r = 0; r < EDGE; r++) sums[b * stride + (i - begin) * EDGE + r] = -OFFSET * totals[b];
        for (int t = 0; t < plan.tiles; t += TILES)
            for (int64_t first = 0; first < plan.steps; first += pace) {
                const int64_t last = std::min(first + pace, plan.steps);
                const int count = std::min(plan.tiles - t, TILES);
                const uint8_t* tile = x + t * plan.steps * plan.bytes();
                if (plan.half) span_halved<PAIRED>(m, g, plan, tile, i, first, last, out);
                else if (count == 1) span<PAIRED, HOW, 1>(m, g, plan, tile, i, first, last, out);
                else if (count == 2) span<PAIRED, HOW, 2>(m, g, plan, tile, i, first, last, out);
                else if (count == 3) span<PAIRED, HOW, 3>(m, g, plan, tile, i, first, last, out);
                else span<PAIRED, HOW, 4>(m, g, plan, tile, i, first, last, out);
                const int64_t per_tile = ROWS / plan.digits;
                for (int64_t b = t * per_tile; b < std::min(a.batch, (t + count) * per_tile); b++)
                    for (int d = 0; d < plan.digits; d++)
                        for (int n = 0; n < EDGE; n++) {
                            int64_t* sum = sums + b * stride + (i - begin) * EDGE;
                            const int64_t weight = int64_t{1} << 8 * d;
                            if (plan.half) {
                                const int row = n / 4 * 2 + n % 2, parity = n / 2 % 2;
                                const int64_t line = ((b * plan.digits + d) * 2 + parity) * 16 + n;
                                sum[row] += out[0][line] * weight;
                                sum[row + 8] += out[1][line] * weight;
                            } else {
                                const int64_t line = b * plan.digits + d;
                                sum[n] += out[line / ROWS - t][line % ROWS * 16 + n] * weight;
                            }
                        }
            }
    }
}

void product(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    if (!m.paired()) return rows_of<false, PERMUTE>(m, a, begin, end, sums, stride);
    if (m.w > 3) return rows_of<true, PERMUTE>(m, a, begin, end, sums, stride);
    rows_of<true, BROADCAST>(m, a, begin, end, sums, stride);
}

void leave() { _tile_release(); }

}  // namespace

const Tier& amx_tier() {
    static const Tier t{"amx", rotate, rotate_back, fixed_point, largest, codes, packed_bytes, pack, product,
                        nothing, leave};
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
