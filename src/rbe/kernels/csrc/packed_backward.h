// Derivatives of products with small packed128 blocks, quarter by quarter (see `Tables`). Included after
// packed_product.h.
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

// NB rows of y, spread over the vectors of a quarter, with OWNERS records of the same block row, PER matrices each.
template <int HALF, int OWNERS, int PER, int NB, bool BY_X, bool BY_SEEDS>
inline void pass(const Tables& t, const Passing* of, const float* y, int64_t x_row, int64_t d_row, VF (*acc)[2 * PER]) {
    const int64_t n = t.quarter * LANES, vectors = n / W, wide = wide_of<HALF>(t);
    for (int m = 0; m < 2; m++)
        for (int64_t first = 0; first < wide; first++) {
            VF found[OWNERS * PER][NB] = {};
#pragma GCC unroll 4
            for (int64_t v = first; v < vectors; v += wide) {
                VF part[OWNERS * PER];
                for (int k = 0; k < OWNERS * PER; k++) part[k] = load(of[k / PER].matrix[m][k % PER] + v * W);
                for (int b = 0; b < NB; b++) {
                    const VF some = load(y + (2 * b + m) * n + v * W);
                    for (int k = 0; k < OWNERS * PER; k++) found[k][b] += part[k] * some;
                }
            }
            for (int o = 0; o < OWNERS; o++) {
                const float amp = of[o].amp[m];
                VF of_seeds[PER] = {};
                for (int b = 0; b < NB; b++) {
                    if (BY_X) {
                        float* to = of[o].d[m] + b * d_row + first * W;
                        store(to, load(to) + found[o * PER][b] * amp);
                    }
                    if (BY_SEEDS) {
                        const VF x = columns_of<HALF>(of[o].x[m] + b * x_row, first, wide);
                        for (int k = 0; k < PER; k++) of_seeds[k] += found[o * PER + k][b] * x;
                    }
                }
                if (BY_SEEDS)
                    for (int k = 0; k < PER; k++) acc[o][2 * k + m] += of_seeds[k];
            }
        }
}

// One row of y, for which the matrices of a radial record are not worth being stored.
template <int KIND, int HALF, bool BY_X, bool BY_SEEDS>
inline void pass_row(const Tables& t, const Record& r, const float* profile, const float* slopes, const Passing& of,
                     const float* y, VF* acc) {
    const int64_t n = t.quarter * LANES, vectors = n / W, wide = wide_of<HALF>(t);
    const float* wave = t.quarters + r.q * 2 * n;
    for (int64_t first = 0; first < wide; first++) {
        // Two sums of each, or every addition would wait for the one before.
        VF found[2][2] = {}, sloped[2][2] = {};
        const auto add = [&](int64_t v, int side) __attribute__((always_inline)) {
            VF f, g;
            if (KIND == RADIAL) {
                const VI at = loadi(t.quarter_class + v * W);
                f = lookup(profile, t.classes, at), g = BY_SEEDS ? lookup(slopes, t.classes, at) : f;
            }
            for (int m = 0; m < 2; m++) {
                const VF cells = load(wave + m * n + v * W), some = load(y + m * n + v * W);
                if (KIND == RADIAL) {
                    const VF both = cells * some;
                    found[side][m] += f * both;
                    if (BY_SEEDS) sloped[side][m] += g * both;
                } else {
                    found[side][m] += cells * some;
                }
            }
        };
        int64_t v = first;
#pragma GCC unroll 4
        for (; v + wide < vectors; v += 2 * wide) add(v, 0), add(v + wide, 1);
        if (v < vectors) add(v, 0);
        for (int m = 0; m < 2; m++) {
            if (BY_X) {
                float* to = of.d[m] + first * W;
                store(to, load(to) + (found[0][m] + found[1][m]) * of.amp[m]);
            }
            if (BY_SEEDS) {
                const VF x = columns_of<HALF>(of.x[m], first, wide);
                acc[m] += (found[0][m] + found[1][m]) * x;
                if (KIND == RADIAL) acc[2 + m] += (sloped[0][m] + sloped[1][m]) * x;
            }
        }
    }
}

// G of DEEP vectors of a quarter and a few records, from many rows of x and y, and its products with their matrices.
template <int HALF, int OWNERS, int DEEP, int PER>
inline void gather(const Tables& t, const Passing* of, const float* y, int64_t rows, int64_t x_row, int m, int64_t first,
                   int64_t v, VF (*acc)[2 * PER]) {
    const int64_t n = t.quarter * LANES, wide = wide_of<HALF>(t);
    VF g[OWNERS][DEEP] = {};
    const float* from = y + m * n + v * W;
    for (int64_t b = 0; b < rows; b++, from += 2 * n) {
        VF x[OWNERS];
        for (int k = 0; k < OWNERS; k++) x[k] = columns_of<HALF>(of[k].x[m] + b * x_row, first, wide);
        for (int d = 0; d < DEEP; d++) {
            const VF some = load(from + d * wide * W);
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
template <int HALF, int OWNERS, int PER>
inline void weigh(const Tables& t, const Passing* of, const float* y, int64_t rows, int64_t x_row, VF (*acc)[2 * PER]) {
    const int64_t vectors = t.quarter * LANES / W, wide = wide_of<HALF>(t);
    for (int m = 0; m < 2; m++)
        for (int64_t first = 0; first < wide; first++) {
            int64_t v = first;
            for (; v + (DEPTH - 1) * wide < vectors; v += DEPTH * wide)
                gather<HALF, OWNERS, DEPTH, PER>(t, of, y, rows, x_row, m, first, v, acc);
            for (; v < vectors; v += wide) gather<HALF, OWNERS, 1, PER>(t, of, y, rows, x_row, m, first, v, acc);
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

// y of `rows` rows, every pair of rows of the block repeated over its columns.
template <int HALF>
inline void spread_pairs(const Tables& t, const float* y, int64_t rows, float* out) {
    const int64_t n = t.quarter * LANES, half = half_of<HALF>(t);
    for (int64_t b = 0; b < rows; b++)
        for (int m = 0; m < 2; m++, out += n) {
            const float* from = y + (2 * b + m) * t.pairs;
            for (int64_t i = 0; i < t.pairs; i++)
                for (int64_t j = 0; j < half; j++) out[i * half + j] = from[i];
            std::fill(out + t.pairs * half, out + n, 0.0f);
        }
}

// The derivatives of four records, from their sums: as `add_sums`, side by side; times the scale but for the value.
template <int KIND, int SUMS>
inline void conclude(const Record* r, const VF (*sums)[SUMS], float scale, Four* out) {
    Four total[4], field[4];
    if constexpr (SUMS == 4) {
        turned(sum4(sums[0]), sum4(sums[1]), sum4(sums[2]), sum4(sums[3]), total);
    } else {
        const Four a = sum4(sums[0]), b = sum4(sums[2]);  // of two records each
        total[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6), total[1] = __builtin_shufflevector(a, b, 1, 3, 5, 7);
    }
    turned(four(&r[0].u), four(&r[1].u), four(&r[2].u), four(&r[3].u), field);
    const Four q = {static_cast<float>(r[0].q), static_cast<float>(r[1].q), static_cast<float>(r[2].q),
                    static_cast<float>(r[3].q)};
    const Four u = field[0], v = field[1], amp = field[2], slope = field[3];
    const Four value = u * total[0] + v * total[1];
    out[0] = amp * value;
    out[1] = scale * slope * (KIND == RADIAL ? u * total[2] + v * total[3] : value);
    out[2] = scale * amp * q * (v * total[0] - u * total[1]);
}

template <int KIND, int HALF, bool BY_X, bool BY_SEEDS>
void backward_of(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
                 float* const* out) {
    thread_local Memory records_memory, profile_memory, slopes_memory, matrix_memory, y_memory, x_memory, d_memory,
        sums_memory;
    // Rows of x whose derivatives are added up before the seeds are read again, and rows of y at once: what they need
    // fits the second and the first level of the cache.
    constexpr int64_t ROWS = 128, SPREAD = 32;
    // Rows for which nothing of a record is stored, and from which on the gradient by a block is formed.
    constexpr int64_t FEW = 2, MANY = 8;
    constexpr int PER = KIND == RADIAL && BY_SEEDS ? 2 : 1;
    const Tables& t = *p.tables;
    const int64_t n = t.quarter * LANES, per_block = p.records(), blocks = J1 - J0, count = blocks * per_block;
    const int64_t classes = KIND == RADIAL ? t.classes : 0, half = half_of<HALF>(t);
    const int64_t d_part = std::max<int64_t>(half, W), x_row = 2 * half, d_row = 2 * d_part;
    const int64_t x_stride = folded_stride(p);
    const int64_t most = std::min(ROWS, batch);
    Record* r = reinterpret_cast<Record*>(
        records_memory.get((count + AT_ONCE * p.parts()) * static_cast<int64_t>(sizeof(Record) / 4)));
    float* profile = profile_memory.get(count * classes + LANES);
    float* slopes = BY_SEEDS ? slopes_memory.get(count * classes + LANES) : nullptr;
    float* matrices = KIND == RADIAL ? matrix_memory.get(count * 2 * PER * n) : nullptr;
    float* spread_y = y_memory.get(std::min(SPREAD, most) * 2 * n);
    float* own_x = BY_SEEDS ? x_memory.get(blocks * most * x_row) : nullptr;
    float* d = BY_X ? d_memory.get(blocks * most * d_row) : nullptr;
    constexpr int SUMS = 2 * PER;
    VF(*sums)[SUMS] = reinterpret_cast<VF(*)[SUMS]>(sums_memory.get((count + 3) * SUMS * W));
    for (int64_t first = 0; first < batch; first += ROWS) {
        const int64_t rows = std::min(ROWS, batch - first);
        const bool few = rows <= FEW;
        if (BY_X) std::fill_n(d, blocks * rows * d_row, 0.0f);
        if (BY_SEEDS)
            for (int64_t J = 0; J < blocks; J++)
                for (int64_t b = 0; b < rows; b++)
                    std::copy_n(x + (first + b) * x_stride + (J0 + J) * x_row, x_row, own_x + (J * rows + b) * x_row);
        for (int64_t I = 0; I < p.block_rows; I++) {
            records(p, I * p.block_cols + J0, blocks, r);
            if (KIND == RADIAL) {
                profiles(t, r, count, profile, slopes);
                for (int64_t k = 0; k < (few ? 0 : count); k++)
                    radial_quarters(t, r[k], profile + k * classes, BY_SEEDS ? slopes + k * classes : nullptr,
                                    matrices + k * 2 * PER * n);
            }
            if (BY_SEEDS) std::fill_n(&sums[0][0], (count + 3) * SUMS, VF{});
            for (int64_t some = 0; some < rows; some += SPREAD) {
                const int64_t here = std::min(SPREAD, rows - some);
                spread_pairs<HALF>(t, y + (I * batch + first + some) * 2 * t.pairs, here, spread_y);
                // What `number` records from k on need, at the first row.
                const auto passing = [&](int64_t k, int number, Passing* of) {
                    for (int o = 0; o < number; o++) {
                        const Record& at = r[k + o];
                        // A division takes as long as a block of one row.
                        const int64_t J = per_block == 1 ? k + o : (k + o) / per_block, odd = at.q & 1;
                        for (int m = 0; m < 2; m++) {
                            const int64_t side = m ? 1 - odd : odd;
                            for (int e = 0; e < PER; e++)
                                of[o].matrix[m][e] = KIND == RADIAL ? matrices + ((k + o) * 2 * PER + 2 * e + m) * n
                                                                    : t.quarters + (at.q * 2 + m) * n;
                            of[o].x[m] = BY_SEEDS ? own_x + (J * rows + some) * x_row + side * half : nullptr;
                            of[o].d[m] = BY_X ? d + (J * rows + some) * d_row + side * d_part : nullptr;
                            of[o].amp[m] = at.amp * (m ? at.v : at.u);
                        }
                    }
                };
                const auto next = [&](Passing* of, int number, int64_t by) {
                    for (int o = 0; o < number; o++)
                        for (int m = 0; m < 2; m++) {
                            if (BY_SEEDS) of[o].x[m] += by * x_row;
                            if (BY_X) of[o].d[m] += by * d_row;
                        }
                };
                if (few) {
                    for (int64_t k = 0; k < count; k++) {
                        Passing of;
                        passing(k, 1, &of);
                        for (int64_t b = 0; b < here; b++, next(&of, 1, 1))
                            pass_row<KIND, HALF, BY_X, BY_SEEDS>(t, r[k], profile + k * classes,
                                                                 BY_SEEDS ? slopes + k * classes : nullptr, of,
                                                                 spread_y + b * 2 * n, sums[k]);
                    }
                    continue;
                }
                // Records whose rows are read together, and whether their seeds are served, too.
                const auto passes = [&](auto number, auto seeds_too) {
                    constexpr int OWNERS = number(), MATRICES = seeds_too() ? PER : 1;
                    const auto of_records = [&](int64_t k, auto together) {
                        Passing of[together()];
                        passing(k, together(), of);
                        int64_t b = 0;
                        const auto of_rows = [&](auto at_once) {
                            for (; b + at_once() <= here; b += at_once(), next(of, together(), at_once()))
                                pass<HALF, together(), MATRICES, at_once(), BY_X, seeds_too()>(
                                    t, of, spread_y + b * 2 * n, x_row, d_row,
                                    reinterpret_cast<VF(*)[2 * MATRICES]>(sums + k));
                        };
                        of_rows(std::integral_constant<int, BACK>());
                        of_rows(std::integral_constant<int, 1>());
                    };
                    int64_t k = 0;
                    for (; k + OWNERS <= count; k += OWNERS) of_records(k, number);
                    for (; k < count; k++) of_records(k, std::integral_constant<int, 1>());
                };
                if (!BY_SEEDS || PER == 1 || here < MANY) {
                    passes(std::integral_constant<int, 2 / PER>(), std::bool_constant<BY_SEEDS>());
                    continue;
                }
                if (BY_X) passes(std::integral_constant<int, 2>(), std::false_type());
                int64_t k = 0;
                Passing of[OWNED];
                for (; k + OWNED <= count; k += OWNED) {
                    passing(k, OWNED, of);
                    weigh<HALF, OWNED, PER>(t, of, spread_y, here, x_row, sums + k);
                }
                for (; k < count; k++) {
                    passing(k, 1, of);
                    weigh<HALF, 1, PER>(t, of, spread_y, here, x_row, sums + k);
                }
            }
            if (!BY_SEEDS) continue;
            const int64_t before = (I * p.block_cols + J0) * p.stages;
            for (int64_t k = 0; k < count; k += 4) {
                const int many = static_cast<int>(std::min<int64_t>(4, count - k));
                Four found[3];
                conclude<KIND, SUMS>(r + k, sums + k, *p.scale, found);
                for (int m = 0; m < 3; m++)
                    for (int o = 0; o < many; o++) {
                        float& at = out[m][before + k + o];
                        at = first ? at + found[m][o] : found[m][o];
                    }
            }
        }
        if (!BY_X) continue;
        for (int64_t J = 0; J < blocks; J++)
            for (int64_t b = 0; b < rows; b++)
                for (int m = 0; m < 2; m++) {
                    const float* from = d + (J * rows + b) * d_row + m * d_part;
                    float* to = d_x + (first + b) * x_stride + (J0 + J) * x_row + m * half;
                    for (int64_t j = 0; j < half; j++) {
                        float total = 0;
                        for (int64_t k = j; k < d_part; k += half) total += from[k];
                        to[j] = total;
                    }
                }
    }
}

void backward(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
              float* const* out) {
    choose_half(p, [&](auto kind, auto half) {
        constexpr int KIND = kind(), HALF = half();
        if (d_x && out) backward_of<KIND, HALF, true, true>(p, J0, J1, x, y, batch, d_x, out);
        else if (d_x) backward_of<KIND, HALF, true, false>(p, J0, J1, x, y, batch, d_x, out);
        else backward_of<KIND, HALF, false, true>(p, J0, J1, x, y, batch, d_x, out);
    });
}
