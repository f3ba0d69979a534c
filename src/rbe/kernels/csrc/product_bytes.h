// The product with few rows of x, on tiles. Included inside the anonymous namespace of the amx tier, after tiles.h.
//
// The bytes of the products go to the tile unit as they are generated, `lo` and `hi` one after the other, and a row of
// x has each value twice in a row, for the two bytes of either half. So 32 weights take four vector instructions and
// two stores, whatever x is, and the sums of the bytes are never formed. What limits this is the stores, 1.3 cycles
// each: measured 32 G weights/s for floats, where dot-product instructions (nine for 32 weights, or six for 8-bit
// values, but no stores) come to 22, or 27.
//
// A step is two neighbouring blocks of a block row, in two tiles of eight generated vectors each: block by block, or,
// if halved, even vectors and odd vectors (the upper and the lower eight rows). Halved vectors have other columns in
// odd 64-bit lanes than in even ones, so there a digit of x is two tile rows, and half of their sums is thrown away.
#pragma once

constexpr int BYTE_LAG = 4;   // tiles between writing and reading: fewer, and reads wait for writes to leave the buffer
constexpr int BYTE_RING = 8;  // more would only push x out of the first-level cache
constexpr int64_t BYTE_STEPS = 512;  // steps summed in 32 bits: 1020 * 128 * 32 * 512 < 2^31

struct BytePlan {
    bool half;
    int digits, rows;  // tile rows
    int64_t steps;
    BytePlan(const Matrix& m, const Activations& a)
        : half(m.w == 4), digits(a.int8 ? 1 : 4),
          rows(static_cast<int>(std::min<int64_t>(a.batch, 2 * ROWS)) * digits * (half ? 2 : 1)),
          steps((a.cols + STEP - 1) / STEP) {}
    int64_t step_bytes() const { return int64_t{64} * rows * (half ? 1 : 2); }
    size_t bytes(const Activations& a) const { return static_cast<size_t>(steps * step_bytes() + 8 * a.batch); }
    bool fits() const { return rows <= ROWS; }
};

// Which byte of 32 values goes where.
struct ByteSpread {
    __m512i index[4][2];
    explicit ByteSpread(bool half) {
        for (int d = 0; d < 4; d++)
            for (int c = 0; c < 2; c++) {
                alignas(64) uint8_t from[64];
                for (int k = 0; k < 64; k++)
                    from[k] = static_cast<uint8_t>(
                        4 * ((half ? 4 * (k / 8) + 2 * c : 2 * (k / 8) + 16 * c) + k % 4 / 2) + d);
                index[d][c] = _mm512_load_si512(from);
            }
    }
};

void pack_bytes(const Activations& a, const BytePlan& plan, int64_t b, const int32_t* x) {
    static const ByteSpread whole(false), halved(true);
    const ByteSpread& spread = plan.half ? halved : whole;
    uint8_t* out = static_cast<uint8_t*>(a.packed);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t s = 0; s < plan.steps; s++, out += plan.step_bytes()) {
        __m512i v[2];
        for (int h = 0; h < 2; h++) {
            v[h] = _mm512_loadu_si512(x + STEP * s + 16 * h);
            sum = _mm512_add_epi64(sum, widened(v[h]));
            v[h] = signed_digits(v[h]);
        }
        for (int d = 0; d < plan.digits; d++)
            for (int c = 0; c < 2; c++) {
                const int64_t row = plan.half ? 2 * (b * plan.digits + d) + c : b * plan.digits + d + c * plan.rows;
                _mm512_storeu_si512(out + 64 * row, _mm512_permutex2var_epi8(v[0], spread.index[d][c], v[1]));
            }
    }
    const int64_t total = _mm512_reduce_add_epi64(sum);
    std::memcpy(static_cast<uint8_t*>(a.packed) + plan.steps * plan.step_bytes() + 8 * b, &total, 8);
}

enum Step {
    ONLY_GENERATE,
    INNER,  // generate and multiply, away from the ends of the matrix
    OUTER,
    ONLY_MULTIPLY,
};

// Where a pair of block rows is.
struct ByteRun {
    const Matrix& m;
    const uint8_t *row, *x;
    int64_t row_bytes, tile_bytes, step_bytes;
    uint8_t* ring;
    Padded padded;
};

// Tile T of step s: T / 2 is the block row, T % 2 the tile. It is generated, and the one BYTE_LAG before it in the
// ring is multiplied.
template <bool PAIRED, Gather HOW, Step DO, int COUNT, int T>
[[gnu::always_inline]] inline void byte_tile(ByteRun& run, const Generator& g, int64_t s, int64_t at) {
    constexpr bool HALF = HOW == HALVED;
    const int64_t block_bytes = HALF ? 64 : 16 * run.m.w;
    const auto generate = [&](int part) __attribute__((always_inline)) {
        const int k = HALF ? part : T % 2;
        const uint8_t* block = run.row + T / 2 * run.row_bytes + (2 * s + k) * block_bytes;
        if (part == T % 2) ask_ahead(block, block_bytes);
        // Past an odd number of blocks the activations are zero: any readable block will do.
        if (DO != INNER) block = inside(run.m, 2 * s + k < run.m.block_cols ? block : run.m.seeds, run.padded);
        uint8_t* out = run.ring + (at + T) % BYTE_RING * 1024 + part * 512;
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            __m512i lo, hi;
            g.products<PAIRED, HOW>(block, HALF ? 2 * p + T % 2 : 4 * part + p, lo, hi);
            _mm512_store_si512(out + 128 * p, lo);
            _mm512_store_si512(out + 128 * p + 64, hi);
        }
    };
    if (DO != ONLY_MULTIPLY) generate(0);
    if (DO != ONLY_GENERATE) {
        const uint8_t* x = run.x + (s - BYTE_LAG / (2 * COUNT)) * run.step_bytes;
        if constexpr (T < (HALF ? 1 : 2)) load_tile<4 + T>(x + T * run.tile_bytes);
        load_tile<6 + T % 2>(run.ring + (at + T + BYTE_RING - BYTE_LAG) % BYTE_RING * 1024);
    }
    if (DO != ONLY_MULTIPLY) generate(1);
    if (DO != ONLY_GENERATE) dot_tile<T, HALF ? 4 : 4 + T % 2, 6 + T % 2>();
}

template <bool PAIRED, Gather HOW, Step DO, int COUNT>
[[gnu::always_inline]] inline void byte_steps(ByteRun& run, const Generator& g, int64_t& s, int64_t end, int64_t& at) {
    for (; s < end; s++, at += 2 * COUNT) {
        byte_tile<PAIRED, HOW, DO, COUNT, 0>(run, g, s, at);
        byte_tile<PAIRED, HOW, DO, COUNT, 1>(run, g, s, at);
        if (COUNT > 1) byte_tile<PAIRED, HOW, DO, COUNT, 2>(run, g, s, at);
        if (COUNT > 1) byte_tile<PAIRED, HOW, DO, COUNT, 3>(run, g, s, at);
    }
}

// Steps [begin, end) of COUNT block rows: their tiles of sums.
template <bool PAIRED, Gather HOW, int COUNT>
void byte_sums_of(const Matrix& m, const Generator& constants, const BytePlan& plan, const uint8_t* x, int64_t i,
                  int64_t begin, int64_t end, int32_t (*sums)[ROWS * 16]) {
    constexpr int64_t BEHIND = BYTE_LAG / (2 * COUNT);
    alignas(4096) uint8_t ring[BYTE_RING * 1024];
    const Generator g = constants;  // a copy stays in registers
    ByteRun run{m,    m.block(i, 0), x, m.block_cols * m.block_bytes(), int64_t{64} * plan.rows, plan.step_bytes(),
                ring, {}};
    zero_sums();
    int64_t s = begin, at = 0;
    byte_steps<PAIRED, HOW, ONLY_GENERATE, COUNT>(run, g, s, std::min(begin + BEHIND, end), at);
    // The last blocks may be an odd one, and reads past their ends the end of the seeds.
    byte_steps<PAIRED, HOW, INNER, COUNT>(run, g, s, end - 3, at);
    byte_steps<PAIRED, HOW, OUTER, COUNT>(run, g, s, end, at);
    s = std::max(s, begin + BEHIND), at = 2 * COUNT * (s - begin);
    byte_steps<PAIRED, HOW, ONLY_MULTIPLY, COUNT>(run, g, s, end + BEHIND, at);
    store_tile<0>(sums[0]), store_tile<1>(sums[1]), store_tile<2>(sums[2]), store_tile<3>(sums[3]);
}

// Adds the sums of one block row, from its two tiles.
inline void add_byte_sums(const BytePlan& plan, int64_t b, const int32_t (*tiles)[ROWS * 16], int64_t* sums) {
    const __m512i rows = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 13, 12, 9, 8, 5, 4, 1, 0);
    const __m512i others = _mm512_add_epi32(rows, _mm512_set1_epi32(2));
    for (int h = 0; h < 2; h++) {
        __m512i s = _mm512_setzero_si512();
        for (int d = plan.digits - 1; d >= 0; d--) {
            const int64_t line = b * plan.digits + d;
            __m256i one, two;
            if (plan.half) {
                const __m512i first = _mm512_loadu_si512(tiles[h] + 32 * line);
                const __m512i last = _mm512_loadu_si512(tiles[h] + 32 * line + 16);
                one = _mm512_castsi512_si256(_mm512_permutexvar_epi32(rows, first));
                two = _mm512_castsi512_si256(_mm512_permutexvar_epi32(others, last));
            } else {
                one = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tiles[0] + 16 * line + 8 * h));
                two = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tiles[1] + 16 * line + 8 * h));
            }
            s = _mm512_add_epi64(_mm512_slli_epi64(s, 8), _mm512_cvtepi32_epi64(_mm256_add_epi32(one, two)));
        }
        _mm512_storeu_si512(sums + 8 * h, _mm512_add_epi64(_mm512_loadu_si512(sums + 8 * h), s));
    }
}

template <bool PAIRED, Gather HOW>
void byte_rows(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    const Generator& g = generator(m);
    const BytePlan plan(m, a);
    const uint8_t* x = static_cast<const uint8_t*>(a.packed);
    alignas(64) int32_t tiles[4][ROWS * 16];
    configure(plan.rows);
    for (int64_t i = begin; i < end; i += 2) {
        const int count = static_cast<int>(std::min<int64_t>(2, end - i));
        for (int64_t b = 0; b < a.batch; b++) {
            int64_t total;
            std::memcpy(&total, x + plan.steps * plan.step_bytes() + 8 * b, 8);
            std::fill_n(sums + b * stride + (i - begin) * EDGE, count * EDGE, -OFFSET * total);
        }
        for (int64_t s = 0; s < plan.steps; s += BYTE_STEPS) {
            const int64_t last = std::min(s + BYTE_STEPS, plan.steps);
            count == 2 ? byte_sums_of<PAIRED, HOW, 2>(m, g, plan, x, i, s, last, tiles)
                       : byte_sums_of<PAIRED, HOW, 1>(m, g, plan, x, i, s, last, tiles);
            for (int64_t b = 0; b < a.batch; b++)
                for (int r = 0; r < count; r++)
                    add_byte_sums(plan, b, tiles + 2 * r, sums + b * stride + (i + r - begin) * EDGE);
        }
    }
}

void product_bytes(const Matrix& m, const Activations& a, int64_t begin, int64_t end, int64_t* sums, int64_t stride) {
    if (m.w == 4)
        m.paired() ? byte_rows<true, HALVED>(m, a, begin, end, sums, stride)
                   : byte_rows<false, HALVED>(m, a, begin, end, sums, stride);
    else if (!m.paired())
        byte_rows<false, PERMUTE>(m, a, begin, end, sums, stride);
    else if (m.w > 3)
        byte_rows<true, PERMUTE>(m, a, begin, end, sums, stride);
    else
        byte_rows<true, BROADCAST>(m, a, begin, end, sums, stride);
}
