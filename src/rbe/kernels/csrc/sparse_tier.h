// The products of sparse.h, compiled once a tier. Included inside an anonymous namespace after <cstring> and sparse.h,
// with WIDE, the floats of a vector.
#pragma once

typedef float V __attribute__((vector_size(WIDE * 4), aligned(4), may_alias));

// Sums of four neighbours at a time: a chain of additions would wait for every one of them.
template <class Index>
inline float gathered(const Index* columns, int64_t count, const float* x) {
    float a = 0, b = 0, c = 0, d = 0;
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        a += x[columns[k]], b += x[columns[k + 1]];
        c += x[columns[k + 2]], d += x[columns[k + 3]];
    }
    for (; k < count; k++) a += x[columns[k]];
    return (a + b) + (c + d);
}

template <class Index>
float single(const Sparse<Index>& p, int64_t row, const float* x) {
    const int32_t* at = p.starts + 4 * row;
    const int32_t end = at[4];
    float sum = gathered(p.columns + at[0], at[1] - at[0], x) - gathered(p.columns + at[1], at[2] - at[1], x);
    const Index* columns = p.columns + at[2];
    const int16_t* levels = p.levels + at[3];
    float a = 0, b = 0;
    int64_t k = 0, count = end - at[2];
    for (; k + 2 <= count; k += 2) {
        a += static_cast<float>(levels[k]) * x[columns[k]];
        b += static_cast<float>(levels[k + 1]) * x[columns[k + 1]];
    }
    if (k < count) a += static_cast<float>(levels[k]) * x[columns[k]];
    sum += a + b;
    return (p.bias ? sum + p.bias[row] : sum) * p.factor;
}

template <int N, class Index>
inline void strip(const Sparse<Index>& p, int64_t row, const int32_t* table, const float* in, float* out) {
    const int32_t* at = p.starts + 4 * row;
    V sum[N] = {};
    for (int32_t k = at[0]; k < at[1]; k++) {
        const V* from = reinterpret_cast<const V*>(in + table[p.columns[k]]);
        for (int j = 0; j < N; j++) sum[j] += from[j];
    }
    for (int32_t k = at[1]; k < at[2]; k++) {
        const V* from = reinterpret_cast<const V*>(in + table[p.columns[k]]);
        for (int j = 0; j < N; j++) sum[j] -= from[j];
    }
    const int16_t* levels = p.levels + at[3] - at[2];
    for (int32_t k = at[2]; k < at[4]; k++) {
        const V* from = reinterpret_cast<const V*>(in + table[p.columns[k]]);
        const float level = static_cast<float>(levels[k]);
        for (int j = 0; j < N; j++) sum[j] += level * from[j];
    }
    const float bias = p.bias ? p.bias[row] : 0.0f;
    for (int j = 0; j < N; j++) reinterpret_cast<V*>(out)[j] = (sum[j] + bias) * p.factor;
}

template <class Index>
void run(const Sparse<Index>& p, int64_t row, const int32_t* table, const float* in, int64_t length, float* out) {
    int64_t k = 0;
    for (; k + 8 * WIDE <= length; k += 8 * WIDE) strip<8>(p, row, table, in + k, out + k);
    for (; k + 4 * WIDE <= length; k += 4 * WIDE) strip<4>(p, row, table, in + k, out + k);
    for (; k + 2 * WIDE <= length; k += 2 * WIDE) strip<2>(p, row, table, in + k, out + k);
    for (; k < length; k += WIDE) strip<1>(p, row, table, in + k, out + k);
}
