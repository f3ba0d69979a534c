// Products with small packed128 blocks and their derivatives, quarter by quarter (see `Tables`). Included after
// packed_tier.h.
//
// With E = amp f u cos and O = amp f v sin of the left upper quarter, pair i of rows gives
//   even part of y_i = sum_j E_ij (x_j + s x_{w-1-j}),   odd part = sum_j O_ij (x_j - s x_{w-1-j}),   s = (-1)^q:
// where q is odd, sums and differences change places.
#pragma once

constexpr int64_t CHUNK = 16 << 10;  // bytes of weights between generation and product: a third of a first-level cache

// E and O of a record, one after the other: 2 * quarter vectors.
template <int KIND>
inline void quarters(const Tables& t, const Record& r, const float* profile, float* out) {
    const VF u = splat(r.amp * r.u), v = splat(r.amp * r.v);
    const int64_t n = t.quarter * LANES;
    const float* wave = t.quarters + r.q * 2 * n;
    for (int64_t k = 0; k < n; k += LANES) {
        VF e = u, o = v;
        if (KIND == RADIAL) {
            const VF f = lookup(profile, t.classes, loadi(t.quarter_class + k));
            e *= f, o *= f;
        }
        store(out + k, e * load(wave + k)), store(out + n + k, o * load(wave + n + k));
    }
}

// NV vectors from `first` on of NB rows of x, over a chunk of records.
template <int HALF, int NV, int NB>
inline void chunk_product(const Tables& t, int64_t count, int64_t per_block, const Record* r, const float* weights,
                          const float* x, int64_t x_stride, int64_t first, float* sums) {
    const int64_t n = t.quarter * LANES, half = HALF <= LANES ? HALF : t.half, wide = half / LANES;
    weights += first * LANES;
    VF acc[NB][2][NV];
    for (int b = 0; b < NB; b++)
        for (int m = 0; m < 2; m++)
            for (int v = 0; v < NV; v++) acc[b][m][v] = load(sums + (b * 2 + m) * n + (first + v) * LANES);
    for (const Record* end = r + count; r != end; x += 2 * half)
        for (const Record* next = r + per_block; r != next; r++, weights += 2 * n) {
            const int64_t odd = r->q & 1;
            const float *even_x = x + odd * half, *odd_x = x + (1 - odd) * half;
            VF e[NV], o[NV];
            for (int v = 0; v < NV; v++)
                e[v] = load(weights + v * LANES), o[v] = load(weights + n + v * LANES);
            for (int b = 0; b < NB; b++)
                if (HALF <= LANES) {
                    const VF a = spread<HALF>(even_x + b * x_stride), c = spread<HALF>(odd_x + b * x_stride);
                    for (int v = 0; v < NV; v++) acc[b][0][v] += e[v] * a, acc[b][1][v] += o[v] * c;
                } else {
                    for (int v = 0; v < NV; v++) {
                        const int64_t at = (first + v) % wide * LANES + b * x_stride;
                        acc[b][0][v] += e[v] * load(even_x + at), acc[b][1][v] += o[v] * load(odd_x + at);
                    }
                }
        }
    for (int b = 0; b < NB; b++)
        for (int m = 0; m < 2; m++)
            for (int v = 0; v < NV; v++) store(sums + (b * 2 + m) * n + (first + v) * LANES, acc[b][m][v]);
}

// One row of x: the few inputs are scaled instead of the weights.
template <int KIND, int HALF, int NV>
inline void row_product(const Packed& p, const Record* r, const float* profile, const float* x, int64_t first,
                        float* sums) {
    const Tables& t = *p.tables;
    const int64_t n = t.quarter * LANES, half = t.half, wide = half / LANES, per_block = p.records();
    VF acc[2][NV] = {};
    VI at[NV];
    if (KIND == RADIAL)
        for (int v = 0; v < NV; v++) at[v] = loadi(t.quarter_class + (first + v) * LANES);
    for (int64_t J = 0; J < p.block_cols; J++, x += 2 * half)
        for (int64_t s = 0; s < per_block; s++, r++, profile += KIND == RADIAL ? t.classes : 0) {
            const int64_t odd = r->q & 1;
            const float *even_x = x + odd * half, *odd_x = x + (1 - odd) * half;
            const float* wave = t.quarters + r->q * 2 * n + first * LANES;
            const float u = r->amp * r->u, w = r->amp * r->v;
            VF a, c;
            if (HALF <= LANES) a = spread<HALF>(even_x) * u, c = spread<HALF>(odd_x) * w;
            for (int v = 0; v < NV; v++) {
                if (HALF > LANES)
                    a = load(even_x + (first + v) % wide * LANES) * u, c = load(odd_x + (first + v) % wide * LANES) * w;
                if (KIND == RADIAL) {
                    const VF f = lookup(profile, t.classes, at[v]);
                    acc[0][v] += a * f * load(wave + v * LANES), acc[1][v] += c * f * load(wave + n + v * LANES);
                } else {
                    acc[0][v] += a * load(wave + v * LANES), acc[1][v] += c * load(wave + n + v * LANES);
                }
            }
        }
    for (int m = 0; m < 2; m++)
        for (int v = 0; v < NV; v++) store(sums + m * n + (first + v) * LANES, acc[m][v]);
}

template <int HALF, int NV, int NB>
inline void rows_of_chunk(const Tables& t, int64_t count, int64_t per_block, const Record* r, const float* weights,
                          const float* x, int64_t x_stride, int64_t batch, int64_t& b, float* sums) {
    const int64_t n = t.quarter * LANES;
    for (; b + NB <= batch; b += NB) {
        int64_t v = 0;
        for (; v + NV <= t.quarter; v += NV)
            chunk_product<HALF, NV, NB>(t, count, per_block, r, weights, x + b * x_stride, x_stride, v, sums + b * 2 * n);
        for (; v < t.quarter; v++)
            chunk_product<HALF, 1, NB>(t, count, per_block, r, weights, x + b * x_stride, x_stride, v, sums + b * 2 * n);
    }
}

// Memory of a thread, kept from call to call; standard containers compiled for one tier could be linked into another.
struct Memory {
    float* at = nullptr;
    size_t size = 0;
    float* get(int64_t floats) {
        const size_t bytes = (static_cast<size_t>(floats) * 4 + 63) / 64 * 64;
        if (bytes > size) {
            std::free(at);
            at = static_cast<float*>(std::aligned_alloc(64, bytes)), size = at ? bytes : 0;
            if (!at) std::abort();
        }
        return at;
    }
    ~Memory() { std::free(at); }
};

template <int KIND, int HALF>
void product_of(const Packed& p, const Record* r, const float* profile, const float* x, int64_t batch, float* parts) {
    thread_local Memory sums_memory, weights_memory;
    const Tables& t = *p.tables;
    const int64_t n = t.quarter * LANES, per_block = p.records(), x_stride = folded_stride(p);
    float* sums = sums_memory.get(batch * 2 * n);
    if (batch <= 2) {
        for (int64_t b = 0; b < batch; b++) {
            int64_t v = 0;
            for (; v + VECTORS <= t.quarter; v += VECTORS)
                row_product<KIND, HALF, VECTORS>(p, r, profile, x + b * x_stride, v, sums + b * 2 * n);
            for (; v < t.quarter; v++)
                row_product<KIND, HALF, 1>(p, r, profile, x + b * x_stride, v, sums + b * 2 * n);
        }
    } else {
        const int64_t blocks = std::max<int64_t>(1, CHUNK / 4 / (2 * n * per_block));
        float* weights = weights_memory.get(blocks * per_block * 2 * n);
        std::fill_n(sums, batch * 2 * n, 0.0f);
        for (int64_t J = 0; J < p.block_cols; J += blocks) {
            const int64_t count = std::min(blocks, p.block_cols - J) * per_block;
            const Record* some = r + J * per_block;
            for (int64_t k = 0; k < count; k++)
                quarters<KIND>(t, some[k], profile + (J * per_block + k) * (KIND == RADIAL ? t.classes : 0),
                               weights + k * 2 * n);
            int64_t b = 0;
            const float* from = x + J * 2 * t.half;
            rows_of_chunk<HALF, TOGETHER, BATCH>(t, count, per_block, some, weights, from, x_stride, batch, b, sums);
            rows_of_chunk<HALF, TOGETHER, 2>(t, count, per_block, some, weights, from, x_stride, batch, b, sums);
            rows_of_chunk<HALF, TOGETHER, 1>(t, count, per_block, some, weights, from, x_stride, batch, b, sums);
        }
    }
    // The columns of a pair of rows are neighbours, in one vector or over several.
    for (int64_t b = 0; b < batch * 2; b++) {
        const float* from = sums + b * n;
        float* to = parts + b * t.pairs;
        int64_t i = 0;
        if (HALF == 8)
            for (; i + 4 <= t.pairs; i += 4) {
                const VF v = load(from + i * 8), w = load(from + i * 8 + LANES);
                const Four found = across(
                    __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7),
                    __builtin_shufflevector(v, v, 8, 9, 10, 11) + __builtin_shufflevector(v, v, 12, 13, 14, 15),
                    __builtin_shufflevector(w, w, 0, 1, 2, 3) + __builtin_shufflevector(w, w, 4, 5, 6, 7),
                    __builtin_shufflevector(w, w, 8, 9, 10, 11) + __builtin_shufflevector(w, w, 12, 13, 14, 15));
                std::memcpy(to + i, &found, sizeof found);
            }
        for (; i < t.pairs; i++) {
            float total[8] = {};
            for (int64_t j = 0; j < t.half; j++) total[j & 7] += from[i * t.half + j];
            to[i] = ((total[0] + total[4]) + (total[2] + total[6])) + ((total[1] + total[5]) + (total[3] + total[7]));
        }
    }
}

// Calls run(kind, half) with both as constants; halves above the vector are all the same.
template <class F>
inline void choose_half(const Packed& p, const F& run) {
    using std::integral_constant;
    const auto halved = [&](auto kind) {
        switch (p.tables->half) {
            case 1: return run(kind, integral_constant<int, 1>());
            case 2: return run(kind, integral_constant<int, 2>());
            case 4: return run(kind, integral_constant<int, 4>());
            case 8: return run(kind, integral_constant<int, 8>());
            case 16: return run(kind, integral_constant<int, 16>());
            default: return run(kind, integral_constant<int, 32>());
        }
    };
    if (p.kind == FAITHFUL) halved(integral_constant<int, FAITHFUL>());
    else halved(integral_constant<int, RADIAL>());
}

void product(const Packed& p, const Record* r, const float* profile, const float* x, int64_t batch, float* parts) {
    choose_half(p, [&](auto kind, auto half) { product_of<kind(), half()>(p, r, profile, x, batch, parts); });
}

// ---- derivatives ----

// Vectors [first, first + NV) of one record: `batch` rows of folded x and of y spread over the vectors of a quarter.
// Adds to d (rows of two parts of max(half, LANES) lanes), and sums up the outer products of x and y in even and odd.
template <int HALF, int NV, bool BY_X, bool BY_SEEDS>
inline void record_backward(const Tables& t, int64_t odd, const float* weights, const float* x, int64_t x_stride,
                            const float* y, int64_t batch, float* d, int64_t d_row, int64_t d_stride, int64_t first,
                            VF* even_sum, VF* odd_sum) {
    const int64_t n = t.quarter * LANES, half = t.half, wide = std::max<int64_t>(1, half / LANES);
    VF e[NV], o[NV], even[NV] = {}, odds[NV] = {};
    for (int v = 0; v < NV; v++)
        if (BY_X) e[v] = load(weights + (first + v) * LANES), o[v] = load(weights + n + (first + v) * LANES);
    for (int64_t b = 0; b < batch; b++) {
        const float *even_y = y + b * 2 * n + first * LANES, *odd_y = even_y + n;
        VF a, c;
        if (BY_SEEDS && HALF <= LANES)
            a = spread<HALF>(x + b * x_stride + odd * half), c = spread<HALF>(x + b * x_stride + (1 - odd) * half);
        float *to_even = d + b * d_stride + odd * d_row, *to_odd = d + b * d_stride + (1 - odd) * d_row;
        VF sum_even{}, sum_odd{};
        for (int v = 0; v < NV; v++) {
            VF ye = load(even_y + v * LANES), yo = load(odd_y + v * LANES);
            hold(ye), hold(yo);
            if (BY_SEEDS) {
                if (HALF > LANES) {
                    const int64_t at = b * x_stride + (first + v) % wide * LANES;
                    a = load(x + at + odd * half), c = load(x + at + (1 - odd) * half);
                }
                even[v] += a * ye, odds[v] += c * yo;
            }
            if (BY_X && HALF <= LANES) sum_even += e[v] * ye, sum_odd += o[v] * yo;
            if (BY_X && HALF > LANES) {
                const int64_t at = (first + v) % wide * LANES;
                store(to_even + at, load(to_even + at) + e[v] * ye), store(to_odd + at, load(to_odd + at) + o[v] * yo);
            }
        }
        if (BY_X && HALF <= LANES)
            store(to_even, load(to_even) + sum_even), store(to_odd, load(to_odd) + sum_odd);
    }
    if (BY_SEEDS)
        for (int v = 0; v < NV; v++) even_sum[v] = even[v], odd_sum[v] = odds[v];
}

// Adds what the outer products say about one seed.
template <int KIND>
inline void reduce(const Tables& t, const Record& r, const float* profile, const float* slopes, int64_t first,
                   int64_t count, const VF* even, const VF* odd, VF* acc) {
    const float* wave = t.quarters + r.q * 2 * t.quarter * LANES;
    for (int64_t v = 0; v < count; v++) {
        const int64_t at = (first + v) * LANES;
        const VF c = even[v] * load(wave + at), s = odd[v] * load(wave + t.quarter * LANES + at);
        if (KIND == RADIAL) {
            const VI index = loadi(t.quarter_class + at);
            const VF f = lookup(profile, t.classes, index), g = lookup(slopes, t.classes, index);
            acc[0] += c * f, acc[1] += s * f, acc[2] += c * g, acc[3] += s * g;
        } else {
            acc[0] += c, acc[1] += s;
        }
    }
}

template <int KIND, int HALF, bool BY_X, bool BY_SEEDS>
void backward_of(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
                 float* out) {
    thread_local Memory records_memory, profile_memory, slopes_memory, weights_memory, y_memory, d_memory;
    constexpr int64_t ROWS = 32;  // of x at once: what they need of y fits the first-level cache
    const Tables& t = *p.tables;
    const int64_t n = t.quarter * LANES, per_block = p.records(), count = (J1 - J0) * per_block;
    const int64_t classes = KIND == RADIAL ? t.classes : 0, half = t.half, d_row = std::max<int64_t>(half, LANES);
    const int64_t x_stride = folded_stride(p), seeds = p.block_rows * p.block_cols * p.stages;
    Record* r = reinterpret_cast<Record*>(
        records_memory.get((count + AT_ONCE * p.parts()) * static_cast<int64_t>(sizeof(Record) / 4)));
    float* profile = profile_memory.get(count * classes + 1);
    float* slopes = BY_SEEDS ? slopes_memory.get(count * classes + 1) : nullptr;
    float* weights = weights_memory.get(2 * n);
    float* spread_y = y_memory.get(ROWS * 2 * n);
    float* d = BY_X ? d_memory.get((J1 - J0) * ROWS * 2 * d_row) : nullptr;
    for (int64_t first = 0; first < batch; first += ROWS) {
        const int64_t some = std::min(ROWS, batch - first);
        if (BY_X) std::fill_n(d, (J1 - J0) * ROWS * 2 * d_row, 0.0f);
        for (int64_t I = 0; I < p.block_rows; I++) {
            records(p, I * p.block_cols + J0, J1 - J0, r);
            if (KIND == RADIAL) profiles(t, r, count, profile, slopes);
            for (int64_t b = 0; b < some; b++)
                for (int m = 0; m < 2; m++) {
                    const float* from = y + (((first + b) * p.block_rows + I) * 2 + m) * t.pairs;
                    float* to = spread_y + (b * 2 + m) * n;
                    std::fill(to + t.pairs * half, to + n, 0.0f);
                    for (int64_t i = 0; i < t.pairs; i++)
                        for (int64_t j = 0; j < (HALF <= LANES ? HALF : half); j++)
                            to[i * (HALF <= LANES ? HALF : half) + j] = from[i];
                }
            for (int64_t k = 0; k < count; k++) {
                const int64_t J = J0 + k / per_block, odd = r[k].q & 1;
                if (BY_X) quarters<KIND>(t, r[k], profile + k * classes, weights);
                const float* x_here = BY_SEEDS ? x + first * x_stride + J * 2 * half : nullptr;
                float* d_here = BY_X ? d + (J - J0) * ROWS * 2 * d_row : nullptr;
                VF acc[4] = {}, even[VECTORS], odds[VECTORS];
                int64_t v = 0;
                for (; v + VECTORS <= t.quarter; v += VECTORS) {
                    record_backward<HALF, VECTORS, BY_X, BY_SEEDS>(t, odd, weights, x_here, x_stride, spread_y, some,
                                                                   d_here, d_row, 2 * d_row, v, even, odds);
                    if (BY_SEEDS)
                        reduce<KIND>(t, r[k], profile + k * classes, slopes + k * classes, v, VECTORS, even, odds, acc);
                }
                for (; v < t.quarter; v++) {
                    record_backward<HALF, 1, BY_X, BY_SEEDS>(t, odd, weights, x_here, x_stride, spread_y, some, d_here,
                                                             d_row, 2 * d_row, v, even, odds);
                    if (BY_SEEDS)
                        reduce<KIND>(t, r[k], profile + k * classes, slopes + k * classes, v, 1, even, odds, acc);
                }
                if (BY_SEEDS) {
                    const Four block = sum4(acc);
                    const double total[4] = {block[0], block[1], block[2], block[3]};
                    Sums sums = {};
                    add_sums<KIND>(r[k], total, sums);
                    const float found[3] = {static_cast<float>(sums.value), static_cast<float>(sums.radius),
                                            static_cast<float>(sums.angle)};
                    float* to = out + (I * p.block_cols + J) * p.stages + k % per_block;
                    for (int m = 0; m < 3; m++, to += seeds) *to = first ? *to + found[m] : found[m];
                }
            }
        }
        if (!BY_X) continue;
        for (int64_t J = J0; J < J1; J++)
            for (int64_t b = 0; b < some; b++)
                for (int m = 0; m < 2; m++) {
                    const float* from = d + ((J - J0) * ROWS + b) * 2 * d_row + m * d_row;
                    float* to = d_x + (first + b) * x_stride + J * 2 * half + m * half;
                    for (int64_t j = 0; j < half; j++) {
                        float total = 0;
                        for (int64_t k = j; k < d_row; k += half) total += from[k];
                        to[j] = total;
                    }
                }
    }
}

void backward(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
              float* out) {
    choose_half(p, [&](auto kind, auto half) {
        constexpr int KIND = kind(), HALF = half();
        if (d_x && out) backward_of<KIND, HALF, true, true>(p, J0, J1, x, y, batch, d_x, out);
        else if (d_x) backward_of<KIND, HALF, true, false>(p, J0, J1, x, y, batch, d_x, out);
        else backward_of<KIND, HALF, false, true>(p, J0, J1, x, y, batch, d_x, out);
    });
}
