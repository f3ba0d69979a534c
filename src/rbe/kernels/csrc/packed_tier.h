// The packed kernels, compiled once a tier. Included inside an anonymous namespace after <algorithm>, packed.h and the
// tier's own `lookup` and `spread`. Vectors have sixteen floats on every tier; the compiler cuts them where it must.
#pragma once

constexpr int64_t W = LANES;

inline VF load(const float* p) { return *reinterpret_cast<const VF*>(p); }
inline void store(float* p, VF v) { *reinterpret_cast<VF*>(p) = v; }
inline VF splat(float x) { return VF{} + x; }
inline VI loadi(const int32_t* p) { return *reinterpret_cast<const VI*>(p); }

typedef float Four __attribute__((vector_size(16)));

inline Four fold(VF v) {
    return (__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 8, 9, 10, 11)) +
           (__builtin_shufflevector(v, v, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 12, 13, 14, 15));
}

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

// ---- records: per-seed scalars, in double, in loops that vectorise over seeds ----

constexpr int AT_ONCE = 32;
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds to an integer

inline double nearest(double x) { return (x + MAGIC) - MAGIC; }

// exp(x) - 1 with a small relative error, |x| < 700.
inline double expm1_wide(double x) {
    const double shifted = x * 1.4426950408889634 + MAGIC, n = shifted - MAGIC;
    const double t = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.0 / 39916800;
    p = p * t + 1.0 / 3628800, p = p * t + 1.0 / 362880, p = p * t + 1.0 / 40320, p = p * t + 1.0 / 5040;
    p = p * t + 1.0 / 720, p = p * t + 1.0 / 120, p = p * t + 1.0 / 24, p = p * t + 1.0 / 6, p = p * t + 0.5;
    int64_t bits;
    std::memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    double power;
    std::memcpy(&power, &bits, 8);
    return power * (p * t * t + t) + (power - 1);
}

// sin and cos of 2 pi turns.
inline void wave_wide(double turns, double& s, double& c) {
    const double t = (turns - nearest(turns)) * 6.283185307179586477, z = t * t;
    double a = 1.0 / 51090942171709440000.0;
    a = a * z - 1.0 / 121645100408832000.0, a = a * z + 1.0 / 355687428096000.0, a = a * z - 1.0 / 1307674368000.0;
    a = a * z + 1.0 / 6227020800.0, a = a * z - 1.0 / 39916800, a = a * z + 1.0 / 362880, a = a * z - 1.0 / 5040;
    a = a * z + 1.0 / 120, a = a * z - 1.0 / 6;
    s = t + t * z * a;
    double b = -1.0 / 1124000727777607680000.0;
    b = b * z + 1.0 / 2432902008176640000.0, b = b * z - 1.0 / 6402373705728000.0, b = b * z + 1.0 / 20922789888000.0;
    b = b * z - 1.0 / 87178291200.0, b = b * z + 1.0 / 479001600, b = b * z - 1.0 / 3628800, b = b * z + 1.0 / 40320;
    b = b * z - 1.0 / 720, b = b * z + 1.0 / 24, b = b * z - 0.5;
    c = 1 + z * b;
}

// f and f' of the quadrants' functions, with one division.
inline void basis(int64_t quadrant, double x, double& f, double& slope) {
    const double e = expm1_wide(x), e2 = e * (e + 2);
    const double w = 1 / (quadrant < 2 ? e + 1 : e2 + 2);
    const double sinh = 0.5 * e2 * w, cosh = 0.5 * (e2 + 2) * w, tanh = e2 * w, bell = 4 * (e2 + 1) * w * w;
    f = quadrant < 2 ? (quadrant == 0 ? sinh : cosh) : (quadrant == 2 ? tanh : bell);
    slope = quadrant < 2 ? (quadrant == 0 ? cosh : sinh) : (quadrant == 2 ? bell : -2 * tanh * bell);
}

// The sum of d_k atan(2^-k) over the 20 steps, in turns: one table for each half of the bits.
struct Turns {
    double low[1024], high[1024];
    Turns() {
        for (int half = 0; half < 2; half++)
            for (int b = 0; b < 1024; b++) {
                double total = 0;
                for (int k = 0; k < 10; k++)
                    total += (b >> k & 1 ? 1 : -1) * __builtin_atan(__builtin_ldexp(1.0, -(k + 10 * half)));
                (half ? high : low)[b] = total / 6.283185307179586477;
            }
    }
    double operator()(int64_t code) const { return low[code & 1023] + high[code >> 10 & 1023]; }
};

// Stretches of the steps up to each clamp.
constexpr double STRETCH[5] = {1.6424840657522373, 1.646743506596901, 1.6467601926846949, 1.6467602578654548,
                               CORDIC_GAIN};

// Numbers of a group of seeds, side by side; `n` is rounded up to whole vectors, and what is beyond the seeds is zero.
struct Group {
    double r[AT_ONCE], turns[AT_ONCE], at[AT_ONCE], sine[AT_ONCE], cosine[AT_ONCE], amp[AT_ONCE], slope[AT_ONCE];
    double argument[AT_ONCE], d_angle[AT_ONCE];
    float u[AT_ONCE], v[AT_ONCE];
    int64_t code[AT_ONCE];
};

// Radius, angle (in turns) and code of seeds [first, first + n) in the order of storage.
inline void points(const Packed& p, int64_t first, int n, Group& g) {
    constexpr double PER_RADIAN = 0.15915494309189533577;
    const int64_t* word = p.seeds + first * p.words;
    if (p.radius) {
        for (int k = 0; k < n; k++) g.r[k] = p.radius[first + k], g.turns[k] = p.angle[first + k] * PER_RADIAN;
        if (p.kind != PACKED64) std::copy_n(p.seeds + first, n, g.code);
    } else if (p.kind != PACKED64) {
        for (int k = 0; k < n; k++) {
            float point[2];
            std::memcpy(point, word + 2 * k + 1, 8);  // little end first: the angle
            g.r[k] = point[1], g.turns[k] = point[0] * PER_RADIAN, g.code[k] = word[2 * k];
        }
    } else if (p.words == 1) {
        for (int k = 0; k < n; k++) {
            const uint64_t w = static_cast<uint64_t>(word[k]);
            g.r[k] = static_cast<double>(w >> 32) * 0x1p-32, g.turns[k] = static_cast<double>(w & 0xFFFFFFFFu) * 0x1p-32;
        }
    } else {
        for (int k = 0; k < n; k++) {
            const uint64_t r = static_cast<uint64_t>(word[2 * k]), turns = static_cast<uint64_t>(word[2 * k + 1]);
            g.r[k] = std::min(static_cast<double>(r) * 0x1p-64, 0x1.fffffffffffffp-1);
            g.turns[k] = static_cast<double>(turns) * 0x1p-64;
        }
    }
}

void records64(Group& g, int n) {
    for (int k = 0; k < n; k++) {
        double s, c;
        wave_wide(g.turns[k], s, c);
        const double r = g.r[k], one = 1 / (1 + r * r), value = 2 * r * one;
        g.amp[k] = value * s, g.d_angle[k] = value * c;
        g.slope[k] = 2 * (1 - r) * (1 + r) * one * one * s;
        g.u[k] = 1, g.v[k] = static_cast<float>(g.d_angle[k]), g.argument[k] = 0;
    }
}

// Amplitude A / max f and argument at cell radius 1.
void radial(Group& g, int n) {
    for (int k = 0; k < n; k++) {
        const int64_t quadrant = g.code[k] >> 62 & 3;
        const double A = 2 * static_cast<double>(g.code[k] >> 38 & 4095) / 4095 - 1;
        const double alpha = std::max(static_cast<double>(g.code[k] >> 50 & 4095), 1.0) * (10.0 / 4095);
        const double top = alpha * CORDIC_GAIN, e = expm1_wide(top), e2 = e * (e + 2);
        const double over = quadrant < 2 ? 2 * (e + 1) : (quadrant == 2 ? e2 + 2 : 1);
        const double under = quadrant < 2 ? (quadrant == 0 ? e2 : e2 + 2) : (quadrant == 2 ? e2 : 1);
        g.amp[k] = A * over / under, g.slope[k] = g.amp[k] * top, g.argument[k] = top * g.r[k];
    }
}

// Amplitude A f(alpha R) and its slope in r.
void faithful(Group& g, int n) {
    for (int k = 0; k < n; k++) {
        const int64_t quadrant = g.code[k] >> 62 & 3;
        const double A = 2 * static_cast<double>(g.code[k] >> 38 & 4095) / 4095 - 1;
        const double alpha = static_cast<double>(g.code[k] >> 50 & 4095) * (10.0 / 4095), r = g.r[k];
        // The first clamp that sets in is the last: tanh(R) < 1 and the steps after it stretch by less than 1.003.
        double before = STRETCH[4], after = 1;
        for (int c = 3; c >= 0; c--) {
            const bool outside = r * STRETCH[c] >= 1;
            before = outside ? STRETCH[c] : before, after = outside ? STRETCH[4] / STRETCH[c] : after;
        }
        double tanh, bell, f, slope;
        basis(2, r * before, tanh, bell);
        const bool clamped = r * before >= 1;
        const double R = clamped ? tanh * after : r * STRETCH[4];
        const double d_R = clamped ? bell * before * after : STRETCH[4];
        basis(quadrant, alpha * R, f, slope);
        g.amp[k] = A * f, g.slope[k] = A * alpha * d_R * slope, g.argument[k] = 0;
    }
}

void records128(int kind, Group& g, int n) {
    static const Turns steps;
    for (int k = 0; k < n; k++) g.at[k] = steps(g.code[k]);
    for (int k = 0; k < n; k++) g.at[k] = static_cast<double>(g.code[k] >> 32 & 63) * (g.turns[k] + g.at[k]);
    for (int k = 0; k < n; k++) wave_wide(g.at[k], g.sine[k], g.cosine[k]);
    kind == RADIAL ? radial(g, n) : faithful(g, n);
    for (int k = 0; k < n; k++) {
        const bool odd = (g.code[k] >> 37 & 1) != 0;
        g.u[k] = static_cast<float>(odd ? g.sine[k] : g.cosine[k]);
        g.v[k] = static_cast<float>(odd ? g.cosine[k] : -g.sine[k]);
    }
}

// Replaces records by those of the derivative along (d_radius, d_angle).
void along(const Packed& p, int64_t first, int n, Record* out) {
    for (int k = 0; k < n; k++) {
        Record& o = out[k * p.parts()];
        const float dr = p.d_radius[first + k], dt = p.d_angle[first + k];
        const float turned = o.amp * static_cast<float>(o.q) * dt, stretched = o.slope * dr;
        if (p.kind == PACKED64) {
            o.amp = stretched + o.v * dt;
        } else if (p.kind == FAITHFUL) {
            const float u = o.u, v = o.v;
            o.u = stretched * u + turned * v, o.v = stretched * v - turned * u, o.amp = 1;
        } else {
            Record& second = (&o)[1];
            second = o;
            second.u = o.v, second.v = -o.u, second.amp = turned;
            o.amp = stretched, o.shape |= 4;
        }
    }
}

void records(const Packed& p, int64_t first, int64_t count, Record* out) {
    constexpr int GROUP = 8;
    Group g = {};
    const int64_t end = (first + count) * p.stages;
    for (int64_t at = first * p.stages; at < end; at += AT_ONCE, out += AT_ONCE * p.parts()) {
        const int n = static_cast<int>(std::min<int64_t>(AT_ONCE, end - at));
        const int whole = (n + GROUP - 1) / GROUP * GROUP;  // a seed's numbers do not depend on its neighbours
        points(p, at, n, g);
        p.kind == PACKED64 ? records64(g, whole) : records128(p.kind, g, whole);
        for (int k = 0; k < n; k++) {
            Record& o = out[k * p.parts()];
            o = {g.u[k], g.v[k], static_cast<float>(g.amp[k]), static_cast<float>(g.slope[k]),
                 static_cast<float>(g.argument[k]), static_cast<int32_t>(g.code[k] >> 62 & 3),
                 static_cast<int32_t>(g.code[k] >> 32 & 63), static_cast<int32_t>(p.stages == 1 ? 0 : (at + k) % p.stages)};
            // At the origin the angle of every cell is 0: the block is constant, and so is it in theta.
            if (p.kind == FAITHFUL && g.r[k] == 0) o.u = o.q >= 32 ? 0.0f : 1.0f, o.v = 0, o.q = 0;
        }
        if (p.d_radius) along(p, at, n, out);
    }
}

// ---- profiles: f and rho f' at many radii ----

inline VF expm1_lanes(VF x) {
    const VF shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const VF t = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    VF p = splat(1.0f / 5040);
    p = p * t + 1.0f / 720, p = p * t + 1.0f / 120, p = p * t + 1.0f / 24, p = p * t + 1.0f / 6, p = p * t + 0.5f;
    const VI bits = (reinterpret_cast<VI>(shifted) + 127) << 23;
    const VF power = reinterpret_cast<VF>(bits);
    return power * (p * t * t + t) + (power - 1.0f);
}

// f and its derivative at x = argument * rho >= 0.
inline void profile_lanes(int shape, VF x, VF& f, VF& slope) {
    if (shape < 2) {
        const VF e = expm1_lanes(x), w = reciprocal(e + 1.0f);
        const VF sinh = 0.5f * (e * w + e), cosh = 0.5f * (e + 1.0f + w);
        f = shape ? cosh : sinh, slope = shape ? sinh : cosh;
    } else {
        const VF e = expm1_lanes(x + x), w = reciprocal(e + 2.0f), tanh = e * w, bell = 4.0f * ((e + 1.0f) * w) * w;
        f = shape == 2 ? tanh : bell, slope = shape == 2 ? bell : -2.0f * (tanh * bell);
    }
}

// What a record's profile is at radii rho: f, or rho f'.
inline VF profile_of(const Record& r, VF rho) {
    VF f, slope;
    profile_lanes(r.shape & 3, rho * r.argument, f, slope);
    return r.shape & 4 ? rho * slope : f;
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
