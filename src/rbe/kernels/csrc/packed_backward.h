// Derivatives of products with small packed128 blocks, quarter by quarter (see `Tables`). Included after
// packed_walk.h.
//
// With C = f cos and S = f sin of the left upper quarter, a row of y gives P = C^T y_even and Q = S^T y_odd, from which
// follows all that a block has to say: amp u P and amp v Q are derivatives by folded x, and their products with folded
// x are the sums over the block of G C and G S, where G is the gradient by the weights, which nobody forms. Radial
// blocks need P and Q of their slopes g = rho f' too.
#pragma once

// What is constant for a record while rows of y pass by: the matrices of its even and odd part (f, then g), where its
// rows of folded x and of derivatives by them start, and the amplitudes of the parts.
struct Passing {
    const float *matrix[2][2], *x[2];
    float *d[2], amp[2];
};

// Floats of a quarter: a constant where a block of 2 HALF columns has as many rows, else read.
template <int HALF, bool SQUARE>
inline int64_t cells_of(const Tables& t) {
    return SQUARE ? std::max<int64_t>(LANES, HALF * HALF) : t.quarter * LANES;
}

// Pairs of rows of a vector.
template <int HALF>
constexpr int64_t PAIRS_OF = HALF < W ? W / HALF : 1;

// What a record has found at a vector of columns, the parts found[0 ... PER) of one row of y: derivatives by folded x,
// and products with it for the seeds.
template <int HALF, int PER, bool BY_X, bool BY_SEEDS>
inline void settle(const Passing& of, int m, int64_t first, int64_t wide, int64_t x_at, int64_t d_at, const VF* found,
                   VF* of_seeds) {
    if (BY_X) {
        float* to = of.d[m] + d_at + first * W;
        store(to, load(to) + found[0] * of.amp[m]);
    }
    if (BY_SEEDS) {
        const VF x = columns_of<HALF>(of.x[m] + x_at, first, wide);
        for (int k = 0; k < PER; k++) of_seeds[k] += found[k] * x;
    }
}

// NB rows of y from row `at` on, with OWNERS records of the same block row, PER matrices each. What is found stays in
// registers only where every loop over it is unrolled.
template <int HALF, bool SQUARE, int OWNERS, int PER, int NB, bool BY_X, bool BY_SEEDS>
inline void pass(const Tables& t, const Passing* of, const float* y, int64_t at, int64_t x_row, int64_t d_row,
                 VF (*acc)[2 * PER]) {
    const int64_t n = cells_of<HALF, SQUARE>(t), vectors = n / W, wide = wide_of<HALF>(t), y_part = n / half_of<HALF>(t);
    for (int m = 0; m < 2; m++)
        for (int64_t first = 0; first < wide; first++) {
            VF found[OWNERS][NB][PER] = {};
            const float* from = y + (2 * at + m) * y_part;
#pragma GCC unroll 8
            for (int64_t v = first; v < vectors; v += wide, from += PAIRS_OF<HALF>) {
                VF part[OWNERS][PER];
                for (int o = 0; o < OWNERS; o++)
                    for (int k = 0; k < PER; k++) part[o][k] = load(of[o].matrix[m][k] + v * W);
                for (int b = 0; b < NB; b++) {
                    VF some = repeat<HALF>(from + 2 * b * y_part);
                    hold(some);
                    for (int o = 0; o < OWNERS; o++)
                        for (int k = 0; k < PER; k++) found[o][b][k] += part[o][k] * some;
                }
            }
#pragma GCC unroll 4
            for (int o = 0; o < OWNERS; o++) {
                VF of_seeds[PER] = {};
#pragma GCC unroll 8
                for (int b = 0; b < NB; b++)
                    settle<HALF, PER, BY_X, BY_SEEDS>(of[o], m, first, wide, (at + b) * x_row, (at + b) * d_row,
                                                      found[o][b], of_seeds);
                if (BY_SEEDS)
                    for (int k = 0; k < PER; k++) acc[o][2 * k + m] += of_seeds[k];
            }
        }
}

// One row of y, for which the matrices of a radial record are not worth being stored.
template <int KIND, int HALF, bool SQUARE, int OWNERS, int PER, bool BY_X, bool BY_SEEDS>
inline void pass_row(const Tables& t, const Record* r, const float* profile, const float* slopes, const Passing* of,
                     const float* y, int64_t at, int64_t x_row, int64_t d_row, VF (*acc)[2 * PER]) {
    const int64_t n = cells_of<HALF, SQUARE>(t), vectors = n / W, wide = wide_of<HALF>(t), y_part = n / half_of<HALF>(t);
    for (int64_t first = 0; first < wide; first++) {
        VF found[OWNERS][2][PER] = {};
        const float* from = y + 2 * at * y_part;
#pragma GCC unroll 8
        for (int64_t v = first; v < vectors; v += wide, from += PAIRS_OF<HALF>) {
            VF some[2];
            for (int m = 0; m < 2; m++) some[m] = repeat<HALF>(from + m * y_part), hold(some[m]);
#pragma GCC unroll 4
            for (int o = 0; o < OWNERS; o++) {
                const float* wave = t.quarters + r[o].q * 2 * n + v * W;
                VF f[PER];
                if (KIND == RADIAL) {
                    const VI cell = loadi(t.quarter_class + v * W);
                    f[0] = lookup(profile + o * t.classes, t.classes, cell);
                    if (PER == 2) f[PER - 1] = lookup(slopes + o * t.classes, t.classes, cell);
                }
                for (int m = 0; m < 2; m++) {
                    const VF both = load(wave + m * n) * some[m];
                    for (int k = 0; k < PER; k++)
                        found[o][m][k] = KIND == RADIAL ? found[o][m][k] + f[k] * both : found[o][m][k] + both;
                }
            }
        }
#pragma GCC unroll 4
        for (int o = 0; o < OWNERS; o++)
            for (int m = 0; m < 2; m++) {
                VF of_seeds[PER] = {};
                settle<HALF, PER, BY_X, BY_SEEDS>(of[o], m, first, wide, at * x_row, at * d_row, found[o][m], of_seeds);
                if (BY_SEEDS)
                    for (int k = 0; k < PER; k++) acc[o][2 * k + m] += of_seeds[k];
            }
    }
}

// G of DEEP vectors of a quarter and a few records, from many rows of x and y, and its products with their matrices.
template <int HALF, bool SQUARE, int OWNERS, int DEEP, int PER>
inline void gather(const Tables& t, const Passing* of, const float* y, int64_t rows, int64_t x_row, int m, int64_t first,
                   int64_t v, VF (*acc)[2 * PER]) {
    const int64_t n = cells_of<HALF, SQUARE>(t), wide = wide_of<HALF>(t), y_part = n / half_of<HALF>(t);
    VF g[OWNERS][DEEP] = {};
    const float* from = y + m * y_part + v / wide * PAIRS_OF<HALF>;
    for (int64_t b = 0; b < rows; b++) {
        VF x[OWNERS];
        for (int k = 0; k < OWNERS; k++) x[k] = columns_of<HALF>(of[k].x[m] + b * x_row, first, wide);
        for (int d = 0; d < DEEP; d++) {
            VF some = repeat<HALF>(from + 2 * b * y_part + d * PAIRS_OF<HALF>);
            hold(some);
            for (int k = 0; k < OWNERS; k++) g[k][d] += some * x[k];
        }
    }
    for (int k = 0; k < OWNERS; k++)
        for (int d = 0; d < DEEP; d++)
            for (int e = 0; e < PER; e++)
                acc[k][2 * e + m] += g[k][d] * load(of[k].matrix[m][e] + (v + d * wide) * W);
}

// What the seeds of some records have to say, from many rows: G is formed, a piece at a time, and read PER times, where
// `pass` would read every row PER times.
template <int HALF, bool SQUARE, int OWNERS, int PER>
inline void weigh(const Tables& t, const Passing* of, const float* y, int64_t rows, int64_t x_row, VF (*acc)[2 * PER]) {
    static_assert(!SQUARE || HALF * HALF % (DEPTH * std::max<int64_t>(HALF, W)) == 0, "pieces leave a rest");
    const int64_t vectors = cells_of<HALF, SQUARE>(t) / W, wide = wide_of<HALF>(t);
    for (int m = 0; m < 2; m++)
        for (int64_t first = 0; first < wide; first++) {
            int64_t v = first;
            for (; v + (DEPTH - 1) * wide < vectors; v += DEPTH * wide)
                gather<HALF, SQUARE, OWNERS, DEPTH, PER>(t, of, y, rows, x_row, m, first, v, acc);
            if (!SQUARE)
                for (; v < vectors; v += wide) gather<HALF, SQUARE, OWNERS, 1, PER>(t, of, y, rows, x_row, m, first, v, acc);
        }
}

// f cos, f sin and, where wanted, g cos, g sin of a radial record.
inline void radial_quarters(const Tables& t, const Record& r, const float* profile, const float* slopes, float* out) {
    const int64_t n = t.quarter * LANES;
    const float* wave = t.quarters + r.q * 2 * n;
    for (int64_t k = 0; k < n; k += W) {
        const VI at = loadi(t.quarter_class + k);
        const VF c = load(wave + k), s = load(wave + n + k), f = lookup(profile, t.classes, at);
        store(out + k, f * c), store(out + n + k, f * s);
        if (!slopes) continue;
        const VF g = lookup(slopes, t.classes, at);
        store(out + 2 * n + k, g * c), store(out + 3 * n + k, g * s);
    }
}

// Rows from which on the gradient by a block is formed.
constexpr int64_t MANY = 8;

// COUNT records of one block row, NUMBER of them at once where there are that many: run(first, number).
template <int COUNT, int NUMBER, class F>
inline __attribute__((always_inline)) void in_groups(const F& run) {
    constexpr int TOGETHER = COUNT < NUMBER ? 1 : NUMBER;
    static_assert(COUNT % TOGETHER == 0);
    unrolled<COUNT / TOGETHER>([&](auto k) __attribute__((always_inline)) {
        run(std::integral_constant<int, k() * TOGETHER>(), std::integral_constant<int, TOGETHER>());
    });
}

// COUNT records of one block row and some rows of y.
template <int COUNT, int KIND, int HALF, bool SQUARE, bool BY_X, bool BY_SEEDS, int PER>
inline void serve(const Tables& t, const Passing* of, const float* y, int64_t rows, int64_t x_row, int64_t d_row,
                  VF (*sums)[2 * PER]) {
    // Records whose rows are read together, and whether their seeds are served, too.
    const auto passes = [&](auto shared, auto seeds_too) {
        constexpr int MATRICES = seeds_too() ? PER : 1;
        in_groups<COUNT, shared()>([&](auto o, auto number) __attribute__((always_inline)) {
            int64_t b = 0;
            const auto of_rows = [&](auto together) {
                for (; b + together() <= rows; b += together())
                    pass<HALF, SQUARE, number(), MATRICES, together(), BY_X, seeds_too()>(
                        t, of + o(), y, b, x_row, d_row, reinterpret_cast<VF(*)[2 * MATRICES]>(sums + o()));
            };
            of_rows(std::integral_constant<int, BACK>());
            of_rows(std::integral_constant<int, 1>());
        });
    };
    if (!BY_SEEDS || PER == 1 || rows < MANY)
        return passes(std::integral_constant<int, SHARED / PER>(), std::bool_constant<BY_SEEDS>());
    if (BY_X) passes(std::integral_constant<int, SHARED>(), std::false_type());
    in_groups<COUNT, OWNED>([&](auto o, auto number) __attribute__((always_inline)) {
        weigh<HALF, SQUARE, number(), PER>(t, of + o(), y, rows, x_row, sums + o());
    });
}

template <int KIND, int HALF, bool SQUARE, bool BY_X, bool BY_SEEDS>
void backward_of(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
                 float* const* out) {
    thread_local Memory matrix_memory;
    constexpr int PER = KIND == RADIAL && BY_SEEDS ? 2 : 1, SUMS = 2 * PER;
    const Tables& t = *p.tables;
    const int64_t n = cells_of<HALF, SQUARE>(t), classes = KIND == RADIAL ? t.classes : 0, half = half_of<HALF>(t);
    const int64_t d_part = std::max<int64_t>(half, W), x_row = 2 * half, d_row = 2 * d_part;
    float* matrices = KIND == RADIAL ? matrix_memory.get(4 * 2 * PER * n) : nullptr;

    const auto serve_step = [&](auto count, auto few, const Step& at, Four* total) __attribute__((always_inline)) {
        constexpr int COUNT = count();
        const Record* r = at.r;
        Passing of[COUNT];
#pragma GCC unroll 4
        for (int o = 0; o < COUNT; o++) {
            const int64_t column = at.column(o), odd = r[o].q & 1;
            float* matrix = matrices + (KIND == RADIAL ? o * 2 * PER * n : 0);
            if (KIND == RADIAL && !few())
                radial_quarters(t, r[o], at.profile + o * classes, PER == 2 ? at.slopes + o * classes : nullptr, matrix);
            for (int m = 0; m < 2; m++) {
                const int64_t side = m ? 1 - odd : odd;
                for (int e = 0; e < PER; e++)
                    of[o].matrix[m][e] = KIND == RADIAL ? matrix + (2 * e + m) * n : t.quarters + (r[o].q * 2 + m) * n;
                of[o].x[m] = BY_SEEDS ? at.x + column * at.rows * x_row + side * half : nullptr;
                of[o].d[m] = BY_X ? at.d + column * at.rows * d_row + side * d_part : nullptr;
                of[o].amp[m] = r[o].amp * (m ? r[o].v : r[o].u);
            }
        }
        VF sums[4][SUMS];  // as one initializer, the compiler would call on an instruction with a long start
        unrolled<4 * SUMS>([&](auto k) __attribute__((always_inline)) { sums[k() / SUMS][k() % SUMS] = VF{}; });
        if (few()) {
            in_groups<COUNT, KIND == RADIAL ? 2 : SHARED>([&](auto o, auto number) __attribute__((always_inline)) {
                for (int64_t b = 0; b < at.rows; b++)
                    pass_row<KIND, HALF, SQUARE, number(), PER, BY_X, BY_SEEDS>(
                        t, r + o(), at.profile + o() * classes, at.slopes + o() * classes, of + o(), at.y, b, x_row,
                        d_row, sums + o());
            });
        } else {
            serve<COUNT, KIND, HALF, SQUARE, BY_X, BY_SEEDS, PER>(t, of, at.y, at.rows, x_row, d_row, sums);
        }
        if (!BY_SEEDS) return;
        if constexpr (SUMS == 4) {
            turned(sum4(sums[0]), sum4(sums[1]), sum4(sums[2]), sum4(sums[3]), total);
        } else {
            const Four a = sum4(sums[0]), b = sum4(sums[2]);  // of two records each
            total[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6), total[1] = __builtin_shufflevector(a, b, 1, 3, 5, 7);
        }
    };
    walk<KIND, BY_X, BY_SEEDS>(p, J0, J1, x, y, batch, d_x, out, half, 2 * (n / half), d_part, serve_step);
}

void backward(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
              float* const* out) {
    choose_half(p, [&](auto kind, auto half) {
        constexpr int KIND = kind(), HALF = half();
        const auto run = [&](auto square) {
            constexpr bool SQUARE = square();
            if (d_x && out) backward_of<KIND, HALF, SQUARE, true, true>(p, J0, J1, x, y, batch, d_x, out);
            else if (d_x) backward_of<KIND, HALF, SQUARE, true, false>(p, J0, J1, x, y, batch, d_x, out);
            else backward_of<KIND, HALF, SQUARE, false, true>(p, J0, J1, x, y, batch, d_x, out);
        };
        // Larger quarters have too many vectors to be unrolled, smaller ones are rare.
        if (HALF == 8 && p.tables->pairs == HALF) run(std::integral_constant<bool, HALF == 8>());
        else run(std::false_type());
    });
}
