// The records of seeds: per-seed scalars, in double, in loops that vectorise over seeds. Included by packed_tier.h.
#pragma once

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
