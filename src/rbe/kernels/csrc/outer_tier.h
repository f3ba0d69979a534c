// The outer128 kernels, compiled once a tier. Included inside an anonymous namespace after <algorithm> and outer.h
// and the tier's own `V8`, `pairs`, `halves` and `positive`. Vectors have eight floats on every tier, the signs of a byte.
#pragma once

typedef int32_t I8 __attribute__((vector_size(32), aligned(4), may_alias));

inline V8 load(const float* p) { return *reinterpret_cast<const V8*>(p); }
inline void store(float* p, V8 v) { *reinterpret_cast<V8*>(p) = v; }
inline V8 splat(float x) { return V8{} + x; }

// The sums of eight vectors d(0) ... d(7).
template <class F>
inline V8 sum8(const F& d) {
    const V8 low = pairs(pairs(d(0), d(1)), pairs(d(2), d(3)));
    return halves(low, pairs(pairs(d(4), d(5)), pairs(d(6), d(7))));
}

// Where the signs of a term stand in its code word.
template <int SIDE>
struct Form {
    static constexpr int TERMS = SIDE == 32 ? 1 : 2, VECTORS = SIDE / BYTE, GROUP = BYTE / TERMS;  // records of 8 terms
    static constexpr int u(int term, int byte) { return (SIDE == 32 ? 32 : 48 - 32 * term) + BYTE * byte; }
    static constexpr int v(int term, int byte) { return (SIDE == 32 ? 0 : 32 - 32 * term) + BYTE * byte; }
};

inline V8 signs_at(uint64_t code, int shift) { return load(SIGNS.at[code >> shift & 255]); }

template <class F>
inline void by_side(const Outer& p, const F& run) {
    using std::integral_constant;
    if (p.side() == 8) run(integral_constant<int, 8>());
    else if (p.side() == 16) run(integral_constant<int, 16>());
    else run(integral_constant<int, 32>());
}

// ---- points: 2 artanh r, cos theta, sin theta, in loops that vectorise over records ----

// 2 artanh r = k ln 2 + 2 artanh s with s = (q - 2^k) / (q + 2^k), q = (1 + r) / (1 - r): the nearest power of two is
// found from the bits of the two floats, which are piecewise linear in the logarithm. k = 0 and s = r for small r.
inline float length_of(float r) {
    const float above = 1.0f + r, below = 1.0f - r;
    int32_t bits, under;
    std::memcpy(&bits, &above, 4), std::memcpy(&under, &below, 4);
    const int32_t k = (bits - under + (1 << 22)) >> 23, power_bits = (k + 127) << 23;
    float power;
    std::memcpy(&power, &power_bits, 4);
    const float part = power * below, s = (k == 0 ? r + r : above - part) / (k == 0 ? 2.0f : above + part), z = s * s;
    float sum = 2.0f / 13;
    sum = sum * z + 2.0f / 11, sum = sum * z + 2.0f / 9, sum = sum * z + 2.0f / 7;
    sum = sum * z + 2.0f / 5, sum = sum * z + 2.0f / 3;
    return static_cast<float>(k) * 0.693147181f + (s + s + s * z * sum);
}

void points(const Outer& p, int64_t first, int count, Points& out) {
    constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer in the low bits
    alignas(64) float radius[RUN], angle[RUN], rest[RUN];
    alignas(64) int32_t quarter[RUN];
    for (int k = 0; k < RUN; k++) radius[k] = angle[k] = 0;
    if (p.radius) {
        std::copy_n(p.radius + first, count, radius);
        std::copy_n(p.angle + first, count, angle);
    } else {
        const int64_t* word = p.seeds + 2 * first + 1;
        for (int k = 0; k < count; k++) {
            float point[2];
            std::memcpy(point, word + 2 * k, 8);  // little end first: the angle
            radius[k] = point[1], angle[k] = point[0];
        }
    }
    const int n = (count + BYTE - 1) / BYTE * BYTE;  // a record's numbers do not depend on its neighbours
    for (int k = 0; k < n; k++) {
        const double turns = angle[k] * 0.63661977236758134308, shifted = turns + MAGIC;
        rest[k] = static_cast<float>((turns - (shifted - MAGIC)) * 1.57079632679489661923);
        int64_t bits;
        std::memcpy(&bits, &shifted, 8);
        quarter[k] = static_cast<int32_t>(bits);
    }
    for (int k = 0; k < n; k++) {
        const float t = rest[k], z = t * t;
        const float sine = t + t * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
        const float cosine = 1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
        const bool odd = (quarter[k] & 1) != 0;
        const float s = odd ? cosine : sine, c = odd ? sine : cosine;
        out.sine[k] = quarter[k] & 2 ? -s : s;
        out.cosine[k] = (quarter[k] + 1) & 2 ? -c : c;
        out.length[k] = length_of(radius[k]);
        out.slope[k] = 2.0f / ((1.0f - radius[k]) * (1.0f + radius[k]));
    }
}

// Coefficients in the order record, term; those of records beyond the run are zero.
template <int TERMS>
inline void coefficients(const Outer& p, int64_t first, int count, float* out) {
    Points at;
    points(p, first, count, at);
    for (int k = 0; k < count; k++) {
        out[k * TERMS] = at.length[k] * at.cosine[k];
        if (TERMS == 2) out[k * TERMS + 1] = at.length[k] * at.sine[k];
    }
    std::fill(out + count * TERMS, out + RUN * TERMS, 0.0f);
}

// ---- products ----

// A run of records of one block row: codes, coefficients, and where each one's columns begin.
template <int SIDE>
struct Run {
    static constexpr int TERMS = Form<SIDE>::TERMS;
    uint64_t code[RUN];
    int64_t at[RUN];
    alignas(64) float factor[RUN * TERMS];
    int padded;

    // Records [first, first + count) of block row I.
    void read(const Outer& p, int64_t I, int64_t first, int count) {
        const int64_t begin = I * p.block_cols * p.stages;
        const int64_t apart = p.radius ? 1 : 2;
        const int64_t* word = p.seeds + (begin + first) * apart;
        for (int k = 0; k < count; k++) code[k] = static_cast<uint64_t>(word[k * apart]);
        for (int k = 0; k < count; k++) at[k] = (p.stages == 1 ? first + k : (first + k) / p.stages) * SIDE;
        std::fill(code + count, code + RUN, 0);  // times zero
        std::fill(at + count, at + RUN, at[0]);
        coefficients<TERMS>(p, begin + first, count, factor);
        padded = (count + Form<SIDE>::GROUP - 1) / Form<SIDE>::GROUP * Form<SIDE>::GROUP;
    }
};

// Signs as they come from the table, or, for many rows of x, written out once.
template <int SIDE>
struct Straight {
    const Run<SIDE>& run;
    V8 u(int k, int term, int byte) const { return signs_at(run.code[k], Form<SIDE>::u(term, byte)); }
    V8 v(int k, int term, int byte) const { return signs_at(run.code[k], Form<SIDE>::v(term, byte)); }
};
template <int SIDE>
struct Written {
    static constexpr int TERMS = Form<SIDE>::TERMS, VECTORS = Form<SIDE>::VECTORS;
    alignas(64) float us[RUN * TERMS * SIDE], vs[RUN * TERMS * SIDE];
    explicit Written(const Run<SIDE>& run) {
        const Straight<SIDE> from{run};
        for (int k = 0; k < run.padded; k++)
            for (int t = 0; t < TERMS; t++)
                for (int m = 0; m < VECTORS; m++) {
                    const int to = (k * TERMS + t) * SIDE + m * BYTE;
                    store(us + to, from.u(k, t, m)), store(vs + to, from.v(k, t, m));
                }
    }
    V8 u(int k, int term, int byte) const { return load(us + (k * TERMS + term) * SIDE + byte * BYTE); }
    V8 v(int k, int term, int byte) const { return load(vs + (k * TERMS + term) * SIDE + byte * BYTE); }
};

// Adds a run's part of N rows of the product to y (N, side). Sums of even and odd terms, and of several rows, are apart:
// additions wait for each other.
template <int SIDE, int N, class S>
inline void forward(const Run<SIDE>& run, const S& signs, const float* x, int64_t x_stride, float* y) {
    using F = Form<SIDE>;
    V8 total[N][2][F::VECTORS] = {};
    for (int k0 = 0; k0 < run.padded; k0 += F::GROUP) {
        alignas(32) float part[N][BYTE];
        for (int b = 0; b < N; b++) {
            const V8 inner = sum8([&](int n) __attribute__((always_inline)) {
                const int k = k0 + n / F::TERMS, t = n % F::TERMS;
                const float* from = x + b * x_stride + run.at[k];
                V8 d = signs.v(k, t, 0) * load(from);
                for (int m = 1; m < F::VECTORS; m++) d += signs.v(k, t, m) * load(from + m * BYTE);
                return d;
            });
            store(part[b], inner * load(run.factor + k0 * F::TERMS));
        }
        for (int n = 0; n < BYTE; n++)
            for (int m = 0; m < F::VECTORS; m++) {
                const V8 sign = signs.u(k0 + n / F::TERMS, n % F::TERMS, m);
                for (int b = 0; b < N; b++) total[b][n % 2][m] += part[b][n] * sign;
            }
    }
    for (int b = 0; b < N; b++)
        for (int m = 0; m < F::VECTORS; m++) {
            float* to = y + b * SIDE + m * BYTE;
            store(to, load(to) + (total[b][0][m] + total[b][1][m]));
        }
}

// Adds a run's part of N rows of the transposed product to x, from y.
template <int SIDE, int N, class S>
inline void backward(const Run<SIDE>& run, const S& signs, const float* y, int64_t y_stride, float* x, int64_t x_stride) {
    using F = Form<SIDE>;
    V8 given[N][F::VECTORS];
    for (int b = 0; b < N; b++)
        for (int m = 0; m < F::VECTORS; m++) given[b][m] = load(y + b * y_stride + m * BYTE);
    for (int k0 = 0; k0 < run.padded; k0 += F::GROUP) {
        alignas(32) float part[N][BYTE];
        for (int b = 0; b < N; b++) {
            const V8 inner = sum8([&](int n) __attribute__((always_inline)) {
                const int k = k0 + n / F::TERMS, t = n % F::TERMS;
                V8 d = signs.u(k, t, 0) * given[b][0];
                for (int m = 1; m < F::VECTORS; m++) d += signs.u(k, t, m) * given[b][m];
                return d;
            });
            store(part[b], inner * load(run.factor + k0 * F::TERMS));
        }
        for (int k = 0; k < F::GROUP; k++)
            for (int b = 0; b < N; b++) {
                float* to = x + b * x_stride + run.at[k0 + k];
                for (int m = 0; m < F::VECTORS; m++) {
                    V8 sum = load(to + m * BYTE);
                    for (int t = 0; t < F::TERMS; t++) sum += part[b][k * F::TERMS + t] * signs.v(k0 + k, t, m);
                    store(to + m * BYTE, sum);
                }
            }
    }
}

template <int SIDE>
void product_of(const Outer& p, int64_t I, const float* x, int64_t x_stride, int64_t batch, float* y) {
    std::fill(y, y + batch * SIDE, 0.0f);
    const int64_t records = p.block_cols * p.stages;
    Run<SIDE> run;
    for (int64_t first = 0; first < records; first += RUN) {
        run.read(p, I, first, static_cast<int>(std::min<int64_t>(RUN, records - first)));
        if (batch == 1) {
            forward<SIDE, 1>(run, Straight<SIDE>{run}, x, x_stride, y);
        } else {
            const Written<SIDE> signs(run);
            constexpr int N = SIDE == 32 ? 1 : 2;  // what the registers hold
            int64_t b = 0;
            for (; b + N <= batch; b += N) forward<SIDE, N>(run, signs, x + b * x_stride, x_stride, y + b * SIDE);
            if (b < batch) forward<SIDE, 1>(run, signs, x + b * x_stride, x_stride, y + b * SIDE);
        }
    }
}

template <int SIDE>
void transposed_of(const Outer& p, int64_t J0, int64_t J1, const float* y, int64_t y_stride, int64_t batch, float* x,
                   int64_t x_stride) {
    const int64_t end = J1 * p.stages;
    Run<SIDE> run;
    for (int64_t I = 0; I < p.block_rows; I++)
        for (int64_t first = J0 * p.stages; first < end; first += RUN) {
            run.read(p, I, first, static_cast<int>(std::min<int64_t>(RUN, end - first)));
            if (batch == 1) {
                backward<SIDE, 1>(run, Straight<SIDE>{run}, y + I * SIDE, y_stride, x, x_stride);
            } else {
                const Written<SIDE> signs(run);
                const float* from = y + I * SIDE;
                constexpr int N = SIDE == 32 ? 1 : 2;
                int64_t b = 0;
                for (; b + N <= batch; b += N)
                    backward<SIDE, N>(run, signs, from + b * y_stride, y_stride, x + b * x_stride, x_stride);
                if (b < batch) backward<SIDE, 1>(run, signs, from + b * y_stride, y_stride, x + b * x_stride, x_stride);
            }
        }
}

void product(const Outer& p, int64_t I, const float* x, int64_t x_stride, int64_t batch, float* y) {
    by_side(p, [&](auto side) { product_of<side()>(p, I, x, x_stride, batch, y); });
}

void transposed(const Outer& p, int64_t J0, int64_t J1, const float* y, int64_t y_stride, int64_t batch, float* x,
                int64_t x_stride) {
    by_side(p, [&](auto side) { transposed_of<side()>(p, J0, J1, y, y_stride, batch, x, x_stride); });
}

// ---- dense rows, and the contraction of a dense gradient ----

template <int SIDE>
void expand_of(const Outer& p, int64_t I, int64_t i0, int64_t i1, const float* factors, float* out) {
    using F = Form<SIDE>;
    const bool twice = p.edge > SIDE;
    std::fill(out, out + (i1 - i0) * p.cols, 0.0f);
    const int64_t records = p.block_cols * p.stages;
    Run<SIDE> run;
    for (int64_t first = 0; first < records; first += RUN) {
        const int count = static_cast<int>(std::min<int64_t>(RUN, records - first));
        run.read(p, I, first, count);
        for (int k = 0; k < count; k++) {
            const int64_t column = run.at[k] / SIDE * p.edge, room = std::min<int64_t>(p.edge, p.cols - column);
            V8 v[F::TERMS][F::VECTORS];
            for (int t = 0; t < F::TERMS; t++)
                for (int m = 0; m < F::VECTORS; m++)
                    v[t][m] = run.factor[k * F::TERMS + t] * signs_at(run.code[k], F::v(t, m));
            for (int64_t i = i0; i < i1; i++) {
                float* to = out + (i - i0) * p.cols + column;
                float sign[F::TERMS];
                for (int t = 0; t < F::TERMS; t++) {
                    const int bit = F::u(t, 0) + static_cast<int>(i % SIDE);
                    const float size = factors[i - i0] * (twice ? FIXED.at[i] : 1.0f);
                    sign[t] = run.code[k] >> bit & 1 ? size : -size;
                }
                for (int half = 0; half <= (twice ? 1 : 0); half++)
                    for (int m = 0; m < F::VECTORS; m++) {
                        V8 w = sign[0] * v[0][m];
                        if (F::TERMS == 2) w += sign[1] * v[1][m];
                        const int j = half * SIDE + m * BYTE;
                        if (twice) w *= load(FIXED.at + j);
                        if (room >= j + BYTE) {
                            store(to + j, load(to + j) + w);
                        } else {
                            for (int64_t l = 0; l < room - j; l++) to[j + l] += w[l];
                        }
                    }
            }
        }
    }
}

void expand(const Outer& p, int64_t I, int64_t i0, int64_t i1, const float* factors, float* out) {
    by_side(p, [&](auto side) { expand_of<side()>(p, I, i0, i1, factors, out); });
}

// One block of a gradient, padded with zeros, folded where the block is one of 64: (SIDE, SIDE).
template <int SIDE>
inline void block_of(const Outer& p, const float* gradient, int64_t count, int64_t room, float* to) {
    std::fill(to, to + SIDE * SIDE, 0.0f);
    if (p.edge == SIDE) {
        for (int64_t i = 0; i < count; i++) std::copy_n(gradient + i * p.cols, room, to + i * SIDE);
        return;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < room; j++)
            to[i % SIDE * SIDE + j % SIDE] += FIXED.at[i] * FIXED.at[j] * gradient[i * p.cols + j];
}

template <int SIDE>
void contract_of(const Outer& p, int64_t I, int64_t count, const float* gradient, const OuterSums& out) {
    using F = Form<SIDE>;
    constexpr int FIELD = 32 / F::TERMS;  // latents of a field; blocks of 8 use half of them
    const int64_t records = p.block_cols * p.stages, begin = I * records;
    alignas(64) float g[SIDE * SIDE];
    int64_t there = -1;
    double value = 0;
    for (int64_t first = 0; first < records; first += RUN) {
        const int n = static_cast<int>(std::min<int64_t>(RUN, records - first));
        Points at;
        points(p, begin + first, n, at);
        for (int k = 0; k < n; k++) {
            const int64_t record = begin + first + k, J = (first + k) / p.stages;
            if (J != there) {
                there = J;
                block_of<SIDE>(p, gradient + J * p.edge, count, std::min<int64_t>(p.edge, p.cols - J * p.edge), g);
            }
            const uint64_t code = p.code(record);
            const float size[2] = {at.length[k] * at.cosine[k], at.length[k] * at.sine[k]};
            float inner[2] = {};  // u^T G v
            for (int t = 0; t < F::TERMS; t++) {
                V8 u[F::VECTORS], v[F::VECTORS], by_u[F::VECTORS], by_v[F::VECTORS] = {};
                for (int m = 0; m < F::VECTORS; m++) u[m] = signs_at(code, F::u(t, m)), v[m] = signs_at(code, F::v(t, m));
                const float* sign = reinterpret_cast<const float*>(u);
                for (int m = 0; m < F::VECTORS; m++)
                    by_u[m] = sum8([&](int i) __attribute__((always_inline)) {
                        const float* row = g + (m * BYTE + i) * SIDE;
                        V8 d{};
                        for (int l = 0; l < F::VECTORS; l++) {
                            const V8 part = load(row + l * BYTE);
                            d += part * v[l], by_v[l] += sign[m * BYTE + i] * part;
                        }
                        return d;
                    });
                V8 all = u[0] * by_u[0];
                for (int m = 1; m < F::VECTORS; m++) all += u[m] * by_u[m];
                for (int l = 0; l < BYTE; l++) inner[t] += all[l];
                if (!out.signs) continue;
                float* to = out.signs + record * 64 + t * 2 * FIELD;
                const float by = size[t] * out.factor;
                if (SIDE < FIELD) std::fill(to, to + 2 * FIELD, 0.0f);
                for (int m = 0; m < F::VECTORS; m++) store(to + m * BYTE, by * by_u[m]), store(to + FIELD + m * BYTE, by * by_v[m]);
            }
            const bool two = F::TERMS == 2;
            value += size[0] * inner[0] + (two ? size[1] * inner[1] : 0.0f);
            if (!out.radius) continue;
            const float a = inner[0], b = two ? inner[1] : 0.0f;
            out.radius[record] = out.factor * at.slope[k] * (at.cosine[k] * a + at.sine[k] * b);
            out.angle[record] = out.factor * at.length[k] * (at.cosine[k] * b - at.sine[k] * a);
        }
    }
    out.value[I] = value;
}

void contract(const Outer& p, int64_t I, int64_t count, const float* gradient, const OuterSums& out) {
    by_side(p, [&](auto side) { contract_of<side()>(p, I, count, gradient, out); });
}

void pack(const float* latent, int64_t count, bool wide, int64_t* code) {
    const int width = wide ? 32 : 16;
    for (int64_t k = 0; k < count; k++) {
        uint64_t word = 0;
        for (int byte = 0; byte < 8; byte++) {
            const uint64_t bits = positive(load(latent + k * 64 + byte * BYTE));
            word |= bits << (64 - (byte * BYTE / width + 1) * width + byte * BYTE % width);
        }
        code[k] = static_cast<int64_t>(word);
    }
}
