// The packed kernels, compiled once a tier. Included inside an anonymous namespace after <algorithm>, packed.h and the
// tier's own `lookup`, `spread` and `fold`. A vector is one register: a wider one would live in memory.
#pragma once

constexpr int64_t W = sizeof(VF) / sizeof(float);
static_assert(LANES % W == 0);

inline VF load(const float* p) { return *reinterpret_cast<const VF*>(p); }
inline void store(float* p, VF v) { *reinterpret_cast<VF*>(p) = v; }
inline VF splat(float x) { return VF{} + x; }
inline VI loadi(const int32_t* p) { return *reinterpret_cast<const VI*>(p); }

inline Four four(const float* p) { return *reinterpret_cast<const Four*>(p); }

// The sums of four vectors of four.
inline Four across(Four a, Four b, Four c, Four d) {
    const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// The sums of four vectors, each in the same order.
inline Four sum4(const VF* v) { return across(fold(v[0]), fold(v[1]), fold(v[2]), fold(v[3])); }

inline float sum(VF v) {
    const Four a = fold(v);
    return (a[0] + a[2]) + (a[1] + a[3]);
}

// Rows and columns change places.
inline void turned(Four a, Four b, Four c, Four d, Four* out) {
    const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Four ba = __builtin_shufflevector(a, b, 2, 6, 3, 7), dc = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    out[0] = __builtin_shufflevector(ab, cd, 0, 1, 4, 5), out[1] = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
    out[2] = __builtin_shufflevector(ba, dc, 0, 1, 4, 5), out[3] = __builtin_shufflevector(ba, dc, 2, 3, 6, 7);
}

// exp(x + rest) - 1 with a small relative error, |x| < 88, where x has no more than some 20 bits or rest is 0.
inline VF expm1_parts(VF x, VF rest) {
    const VF shifted = (x + rest) * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const VF t = (x - n * 0.693145752f) + (rest - n * 1.42860677e-6f);
    VF p = splat(1.0f / 5040);
    p = p * t + 1.0f / 720, p = p * t + 1.0f / 120, p = p * t + 1.0f / 24, p = p * t + 1.0f / 6, p = p * t + 0.5f;
    const VI bits = (reinterpret_cast<VI>(shifted) + 127) << 23;
    const VF power = reinterpret_cast<VF>(bits);
    return power * (p * t * t + t) + (power - 1.0f);
}

inline VF expm1_lanes(VF x) { return expm1_parts(x, VF{}); }

#include "packed_records.h"

// ---- profiles: f and rho f' at many radii ----

// How the functions of a quadrant come from e = exp(times x) - 1, without a branch, which would be guessed wrongly.
struct Mixture {
    float times, more, half, whole, four, turn, stay;
};
constexpr Mixture UNBOUNDED = {1, 0, 0.5f, 0.5f, 0, 0, 1}, BOUNDED = {2, 1, 0, 1, 4, 0, 1};
constexpr Mixture MIXTURES[4] = {UNBOUNDED, UNBOUNDED, BOUNDED, {2, 1, 0, 1, 4, -2, 0}};

// Both functions of a pair of quadrants at x = argument * rho >= 0: sinh and cosh, or tanh and sech^2.
inline void pair_lanes(const Mixture& k, VF x, VF& a, VF& b) {
    const VF e = expm1_lanes(x * k.times), p = e + 1.0f, n = reciprocal(p + k.more);
    a = e * n * k.whole + e * k.half;
    b = p * k.half + n * (p * n * k.four + k.half);
}

// f and its derivative.
inline void profile_lanes(int shape, VF x, VF& f, VF& slope) {
    const Mixture& k = MIXTURES[shape & 3];
    const VI second = VI{} - (shape & 1);
    VF a, b;
    pair_lanes(k, x, a, b);
    f = second ? b : a, slope = (second ? a : b) * (b * k.turn + k.stay);
}

// What a record's profile is at radii rho: f, or rho f'.
inline VF profile_of(const Record& r, VF rho) {
    VF a, b;
    if (!(r.shape & 4)) {
        pair_lanes(MIXTURES[r.shape], rho * r.argument, a, b);
        const VI second = VI{} - (r.shape & 1);
        return second ? b : a;
    }
    profile_lanes(r.shape, rho * r.argument, a, b);
    return rho * b;
}

void profiles(const Tables& t, const Record* r, int64_t count, float* out, float* slopes) {
    for (int64_t k = 0; k < count; k++)
        for (int64_t c = 0; c < t.classes; c += W) {
            const VF rho = load(t.radii + c);
            if (!slopes) {
                store(out + k * t.classes + c, profile_of(r[k], rho));
                continue;
            }
            VF f, slope;
            profile_lanes(r[k].shape, rho * r[k].argument, f, slope);
            store(out + k * t.classes + c, f);
            store(slopes + k * t.classes + c, rho * slope);
        }
}

// ---- cells of large blocks, where no table is kept ----

alignas(64) constexpr float COUNT[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline VF root(VF x) {
    for (int64_t k = 0; k < W; k++) x[k] = __builtin_sqrtf(x[k]);
    return x;
}

inline VI mix(VI h) {
    typedef uint32_t VU __attribute__((vector_size(sizeof(VI))));
    VU x = reinterpret_cast<VU>(h);
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return reinterpret_cast<VI>(x ^ (x >> 16));
}

// sin of 2 pi turns, |turns| <= 1/2.
inline VF sine_lanes(VF turns) {
    // sin(2 pi t) = sin(pi - 2 pi t): fold |t| > 1/4 back, then a series on [-pi/2, pi/2].
    const VF half = (turns < 0.0f) ? splat(-0.5f) : splat(0.5f);
    const VF folded = (turns * turns > 0.0625f) ? half - turns : turns;
    const VF x = folded * 6.28318531f, z = x * x;
    VF p = splat(-1.0f / 39916800);
    p = p * z + 1.0f / 362880, p = p * z - 1.0f / 5040, p = p * z + 1.0f / 120, p = p * z - 1.0f / 6;
    return x + x * z * p;
}

// Columns j ... of row i: cosine and sine of q a, and rho; or phi.
struct Cells {
    VF cosine, sine, rho;
};

template <int KIND>
inline Cells cells(const Packed& p, const Record& r, int64_t i, int64_t j) {
    const VF column = load(COUNT) + static_cast<float>(j);
    if (KIND == PACKED64) {
        uint32_t key = static_cast<uint32_t>(r.stage);
        const auto scalar = [](uint32_t h) {
            h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
            h = (h ^ (h >> 13)) * 0xC2B2AE35u;
            return h ^ (h >> 16);
        };
        key = scalar(static_cast<uint32_t>(i) ^ 0x9E3779B9u ^ scalar(key));
        const VI hash = mix(__builtin_convertvector(column, VI) ^ static_cast<int32_t>(key));
        return {sine_lanes(__builtin_convertvector(hash, VF) * 0x1p-32f) * 0.1f + 1.0f, VF{}, VF{}};
    }
    // Numerators are exact; only directions and their length are rounded.
    const float h1 = static_cast<float>(p.height - 1), w1 = static_cast<float>(p.width - 1);
    const VF y = splat(p.height > 1 ? static_cast<float>(2 * i - (p.height - 1)) / h1 : 0.0f);
    const VF x = p.width > 1 ? (2.0f * column - w1) / w1 : VF{};
    const VF length = root(x * x + y * y);
    const VF safe = (length > 0.0f) ? length : splat(1.0f);
    VF c = (length > 0.0f) ? x / safe : splat(1.0f), s = y / safe;
    VF out_c = splat(1.0f), out_s{};
    for (int n = r.q; n; n >>= 1) {
        if (n & 1) {
            const VF turned = out_c * c - out_s * s;
            out_s = out_c * s + out_s * c, out_c = turned;
        }
        const VF doubled = c * c - s * s;
        s = 2.0f * (c * s), c = doubled;
    }
    return {out_c, out_s, (length > 0.99f) ? splat(0.99f) : length};
}

// ---- rows of weights ----

// Two parts of a weight of pair `row` of rows: their sum is row `row`, their difference the mirrored row.
template <int KIND, bool TABLED>
inline void weights(const Packed& p, const Record& r, const float* profile, int64_t row, int64_t k, VF& even, VF& odd) {
    if (KIND == PACKED64) {
        even = r.amp * (TABLED ? load(p.tables->phi + (r.stage * p.height + row) * p.tables->stride + k)
                               : cells<KIND>(p, r, row, k).cosine);
        odd = VF{};
        return;
    }
    const float u = r.amp * r.u, v = r.amp * r.v;
    if (TABLED) {
        const Tables& t = *p.tables;
        const float* wave = t.waves + (r.q * t.pairs + row) * 2 * t.stride + k;
        even = u * load(wave), odd = v * load(wave + t.stride);
        if (KIND == RADIAL) {
            const VF f = lookup(profile, t.classes, loadi(t.radius_class + row * t.stride + k));
            even *= f, odd *= f;
        }
    } else {
        const Cells c = cells<KIND>(p, r, row, k);
        even = u * c.cosine, odd = v * c.sine;
        if (KIND == RADIAL) {
            const VF f = profile_of(r, c.rho);
            even *= f, odd *= f;
        }
    }
}

inline void put(float* out, VF v, int64_t room) {
    if (room >= W) return store(out, v);
    float lane[W];
    store(lane, v);
    for (int64_t k = 0; k < room; k++) out[k] = lane[k];
}

template <int KIND, bool TABLED>
void expand_of(const Packed& p, int64_t I, int64_t i0, int64_t i1, const Record* r, const float* profile,
               const float* factors, float* out) {
    const int n = p.records();
    const int64_t classes = TABLED && KIND == RADIAL ? p.tables->classes : 0;
    // Pairs of rows only in tables of packed128; elsewhere a row is its own.
    constexpr bool PAIRS = TABLED && KIND != PACKED64;
    const auto inside = [&](int64_t i) { return i >= i0 && i < i1; };
    for (int64_t J = 0; J < p.block_cols; J++, r += n, profile += n * classes) {
        const int64_t columns = std::min(p.width, p.cols - J * p.width);
        for (int64_t i = PAIRS ? 0 : i0; i < (PAIRS ? p.tables->pairs : i1); i++) {
            const int64_t mirrored = PAIRS ? p.height - 1 - i : i;
            if (PAIRS && !inside(i) && !inside(mirrored)) continue;
            for (int64_t k = 0; k < columns; k += W) {
                VF even, odd;
                weights<KIND, TABLED>(p, r[0], profile, i, k, even, odd);
                for (int s = 1; s < n; s++) {
                    VF e, o;
                    weights<KIND, TABLED>(p, r[s], profile + s * classes, i, k, e, o);
                    even += e, odd += o;
                }
                float* to = out + J * p.width + k;
                if (inside(i)) put(to + (i - i0) * p.cols, (even + odd) * factors[i - i0], columns - k);
                if (PAIRS && mirrored != i && inside(mirrored))
                    put(to + (mirrored - i0) * p.cols, (even - odd) * factors[mirrored - i0], columns - k);
            }
        }
    }
    (void)I;
}

template <class F>
inline void choose(const Packed& p, const F& run) {
    using std::integral_constant;
    const auto tabled = [&](auto kind) {
        p.tables ? run(kind, integral_constant<bool, true>()) : run(kind, integral_constant<bool, false>());
    };
    if (p.kind == PACKED64) tabled(integral_constant<int, PACKED64>());
    else if (p.kind == FAITHFUL) tabled(integral_constant<int, FAITHFUL>());
    else tabled(integral_constant<int, RADIAL>());
}

void expand(const Packed& p, int64_t I, int64_t i0, int64_t i1, const Record* r, const float* profile,
            const float* factors, float* out) {
    choose(p, [&](auto kind, auto tabled) { expand_of<kind(), tabled()>(p, I, i0, i1, r, profile, factors, out); });
}

// ---- contraction of an upstream gradient ----

inline VF take(const float* from, int64_t room) {
    if (room >= W) return load(from);
    float lane[W] = {};
    for (int64_t k = 0; k < room; k++) lane[k] = from[k];
    return load(lane);
}

// What the sums over a block of G f cos, G f sin, G rho f' cos and G rho f' sin say about its seed; packed64: of G phi.
template <int KIND>
inline void add_sums(const Record& r, const double* total, Sums& to) {
    if (KIND == PACKED64) {
        to.value += r.amp * total[0], to.radius += r.slope * total[0], to.angle += r.v * total[0];
        return;
    }
    const int m = KIND == RADIAL ? 2 : 0;
    to.value += r.amp * (r.u * total[0] + r.v * total[1]);
    to.radius += r.slope * (r.u * total[m] + r.v * total[m + 1]);
    to.angle += r.amp * static_cast<double>(r.q) * (r.v * total[0] - r.u * total[1]);
}

template <int KIND, bool TABLED>
void contract_of(const Packed& p, int64_t i0, int64_t i1, int64_t J0, int64_t J1, const Record* records,
                 const float* profile, const float* slopes, const float* gradient, Sums* out) {
    const int64_t classes = TABLED && KIND == RADIAL ? p.tables->classes : 0;
    constexpr bool PAIRS = TABLED && KIND != PACKED64;
    const auto inside = [&](int64_t i) { return i >= i0 && i < i1; };
    for (int64_t J = J0; J < J1; J++)
        for (int s = 0; s < p.stages; s++) {
            const Record& r = records[J * p.stages + s];
            const float *f_of = profile + (J * p.stages + s) * classes, *slope_of = slopes + (J * p.stages + s) * classes;
            const int64_t columns = std::min(p.width, p.cols - J * p.width);
            // Sums of G f cos, G f sin, G rho f' cos, G rho f' sin.
            double total[4] = {};
            VF acc[4] = {};
            for (int64_t i = PAIRS ? 0 : i0; i < (PAIRS ? p.tables->pairs : i1); i++) {
                const int64_t mirrored = PAIRS ? p.height - 1 - i : i;
                const bool upper = inside(i), lower = PAIRS && mirrored != i && inside(mirrored);
                if (!upper && !lower) continue;
                const float* from = gradient + J * p.width - i0 * p.cols;
                for (int64_t k = 0; k < columns; k += W) {
                    const VF a = upper ? take(from + i * p.cols + k, columns - k) : VF{};
                    const VF b = lower ? take(from + mirrored * p.cols + k, columns - k) : VF{};
                    const VF even = a + b, odd = a - b;
                    if (KIND == PACKED64) {
                        acc[0] += a * (TABLED ? load(p.tables->phi + (s * p.height + i) * p.tables->stride + k)
                                              : cells<KIND>(p, r, i, k).cosine);
                        continue;
                    }
                    if (TABLED) {
                        const Tables& t = *p.tables;
                        const float* wave = t.waves + (r.q * t.pairs + i) * 2 * t.stride + k;
                        const VF c = load(wave), d = load(wave + t.stride);
                        if (KIND == RADIAL) {
                            const VI at = loadi(t.radius_class + i * t.stride + k);
                            const VF f = lookup(f_of, t.classes, at), g = lookup(slope_of, t.classes, at);
                            acc[0] += even * f * c, acc[1] += odd * f * d;
                            acc[2] += even * g * c, acc[3] += odd * g * d;
                        } else {
                            acc[0] += even * c, acc[1] += odd * d;
                        }
                    } else {
                        const Cells cell = cells<KIND>(p, r, i, k);
                        if (KIND == RADIAL) {
                            VF f, g;
                            profile_lanes(r.shape, cell.rho * r.argument, f, g);
                            acc[2] += a * g * cell.rho * cell.cosine, acc[3] += a * g * cell.rho * cell.sine;
                            acc[0] += a * f * cell.cosine, acc[1] += a * f * cell.sine;
                        } else {
                            acc[0] += a * cell.cosine, acc[1] += a * cell.sine;
                        }
                    }
                }
                if (!TABLED)  // rows of large blocks are long
                        {
                    const Four row = sum4(acc);
                    for (int m = 0; m < 4; m++) total[m] += row[m], acc[m] = VF{};
                }
            }
            if (TABLED) {
                const Four block = sum4(acc);
                for (int m = 0; m < 4; m++) total[m] = block[m];
            }
            add_sums<KIND>(r, total, out[J * p.stages + s]);
        }
}

void contract(const Packed& p, int64_t, int64_t i0, int64_t i1, int64_t J0, int64_t J1, const Record* r,
              const float* profile, const float* slopes, const float* gradient, Sums* out) {
    choose(p, [&](auto kind, auto tabled) {
        contract_of<kind(), tabled()>(p, i0, i1, J0, J1, r, profile, slopes, gradient, out);
    });
}

float dot(const float* a, const float* b, int64_t n) {
    VF acc[4] = {};
    int64_t k = 0;
    for (; k + 4 * W <= n; k += 4 * W)
        for (int m = 0; m < 4; m++) acc[m] += load(a + k + m * W) * load(b + k + m * W);
    for (; k < n; k += W) acc[0] += take(a + k, n - k) * take(b + k, n - k);
    return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}
