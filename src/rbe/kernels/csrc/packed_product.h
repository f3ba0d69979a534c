// Products with small packed128 blocks, quarter by quarter (see `Tables`). Included after packed_tier.h.
//
// With E = amp f u cos and O = amp f v sin of the left upper quarter, pair i of rows gives
//   even part of y_i = sum_j E_ij (x_j + s x_{w-1-j}),   odd part = sum_j O_ij (x_j - s x_{w-1-j}),   s = (-1)^q:
// where q is odd, sums and differences change places.
#pragma once

// Columns of a quarter, a constant but for the largest blocks, and the vectors that they are.
template <int HALF>
inline int64_t half_of(const Tables& t) {
    return HALF < 32 ? HALF : t.half;
}
template <int HALF>
inline int64_t wide_of(const Tables& t) {
    return std::max<int64_t>(1, half_of<HALF>(t) / W);
}

// Vector `v` of a quarter's cells, of the inputs of their columns.
template <int HALF>
inline VF columns_of(const float* x, int64_t v, int64_t wide) {
    if constexpr (HALF <= W) return spread<HALF>(x);
    else return load(x + (v & (wide - 1)) * W);
}

constexpr int64_t CHUNK = 16 << 10;  // bytes of weights between generation and product: a third of a first-level cache

// E and O of a record, one after the other: 2 * quarter vectors.
template <int KIND>
inline void quarters(const Tables& t, const Record& r, const float* profile, float* out) {
    const VF u = splat(r.amp * r.u), v = splat(r.amp * r.v);
    const int64_t n = t.quarter * LANES;
    const float* wave = t.quarters + r.q * 2 * n;
    for (int64_t k = 0; k < n; k += W) {
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
    const int64_t n = t.quarter * LANES, half = half_of<HALF>(t), wide = wide_of<HALF>(t);
    weights += first * W;
    VF acc[2][NB][NV];
    for (int m = 0; m < 2; m++)
        for (int b = 0; b < NB; b++)
            for (int v = 0; v < NV; v++) acc[m][b][v] = load(sums + (b * 2 + m) * n + (first + v) * W);
    for (const Record* end = r + count; r != end; x += 2 * half)
        for (const Record* next = r + per_block; r != next; r++, weights += 2 * n) {
            const int64_t odd = r->q & 1;
            for (int m = 0; m < 2; m++) {
                const float* from = x + (m ? 1 - odd : odd) * half;
                VF part[NV];
                for (int v = 0; v < NV; v++) part[v] = load(weights + m * n + v * W);
                for (int b = 0; b < NB; b++)
                    for (int v = 0; v < NV; v++)
                        acc[m][b][v] += part[v] * columns_of<HALF>(from + b * x_stride, first + v, wide);
            }
        }
    for (int m = 0; m < 2; m++)
        for (int b = 0; b < NB; b++)
            for (int v = 0; v < NV; v++) store(sums + (b * 2 + m) * n + (first + v) * W, acc[m][b][v]);
}

// One row of x: the few inputs are scaled instead of the weights.
template <int KIND, int HALF, int NV>
inline void row_product(const Packed& p, const Record* r, const float* profile, const float* x, int64_t first,
                        float* sums) {
    const Tables& t = *p.tables;
    const int64_t n = t.quarter * LANES, half = half_of<HALF>(t), wide = wide_of<HALF>(t), per_block = p.records();
    VF acc[2][NV] = {};
    VI at[NV];
    if (KIND == RADIAL)
        for (int v = 0; v < NV; v++) at[v] = loadi(t.quarter_class + (first + v) * W);
    for (int64_t J = 0; J < p.block_cols; J++, x += 2 * half)
        for (int64_t s = 0; s < per_block; s++, r++, profile += KIND == RADIAL ? t.classes : 0) {
            const int64_t odd = r->q & 1;
            const float *even_x = x + odd * half, *odd_x = x + (1 - odd) * half;
            const float* wave = t.quarters + r->q * 2 * n + first * W;
            const float u = r->amp * r->u, w = r->amp * r->v;
            for (int v = 0; v < NV; v++) {
                VF a = columns_of<HALF>(even_x, first + v, wide) * u, c = columns_of<HALF>(odd_x, first + v, wide) * w;
                if (KIND == RADIAL) {
                    const VF f = lookup(profile, t.classes, at[v]);
                    a *= f, c *= f;
                }
                acc[0][v] += a * load(wave + v * W), acc[1][v] += c * load(wave + n + v * W);
            }
        }
    for (int m = 0; m < 2; m++)
        for (int v = 0; v < NV; v++) store(sums + m * n + (first + v) * W, acc[m][v]);
}

template <int HALF, int NV, int NB>
inline void rows_of_chunk(const Tables& t, int64_t count, int64_t per_block, const Record* r, const float* weights,
                          const float* x, int64_t x_stride, int64_t batch, int64_t& b, float* sums) {
    const int64_t n = t.quarter * LANES, vectors = n / W;
    for (; b + NB <= batch; b += NB) {
        int64_t v = 0;
        for (; v + NV <= vectors; v += NV)
            chunk_product<HALF, NV, NB>(t, count, per_block, r, weights, x + b * x_stride, x_stride, v, sums + b * 2 * n);
        for (; v < vectors; v++)
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
            for (; v + VECTORS <= n / W; v += VECTORS)
                row_product<KIND, HALF, VECTORS>(p, r, profile, x + b * x_stride, v, sums + b * 2 * n);
            for (; v < n / W; v++)
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
                Four row[4];
                for (int k = 0; k < 4; k++) row[k] = four(from + (i + k) * 8) + four(from + (i + k) * 8 + 4);
                const Four found = across(row[0], row[1], row[2], row[3]);
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
