// The records of seeds: per-seed scalars, many seeds at once. Included by packed_tier.h. Those of packed64 are computed
// in double, as its radii and angles have more bits than a float; those of packed128 in float and in 2^-32 turns.
#pragma once

constexpr int AT_ONCE = 32;
constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52: adding and subtracting it rounds to an integer

inline double nearest(double x) { return (x + MAGIC) - MAGIC; }

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

// Sums of d_k atan(2^-k) over three steps at a time, by their three bits, in 2^-32 turns; twice, for tables of sixteen.
struct Turns {
    static constexpr int STEPS = 20, BITS = 3, COUNT = (STEPS + BITS - 1) / BITS;
    int32_t sums[COUNT][16];
    Turns() {
        for (int first = 0; first < STEPS; first += BITS)
            for (int b = 0; b < 16; b++) {
                double total = 0;
                for (int k = first; k < std::min(first + BITS, STEPS); k++)
                    total += (b >> (k - first) & 1 ? 1 : -1) * __builtin_atan(__builtin_ldexp(1.0, -k));
                sums[first / BITS][b] = static_cast<int32_t>(nearest(total * (0x1p32 / 6.283185307179586477)));
            }
    }
    VI operator()(VI code) const {
        VI total{};
        for (int k = 0; k < COUNT; k++) total += of_eight(sums[k], code >> BITS * k);
        return total;
    }
};

// Numbers of a group of seeds, side by side; what is beyond the seeds is computed and not used.
struct Group {
    alignas(64) double r[AT_ONCE], turns[AT_ONCE], amp[AT_ONCE], slope[AT_ONCE], d_angle[AT_ONCE];
};
struct Group128 {
    alignas(64) float radius[AT_ONCE], angle[AT_ONCE];
    alignas(64) int32_t low[AT_ONCE], high[AT_ONCE], turns[AT_ONCE];  // words of the code; the angle in 2^-32 turns
    // A record in two quarters.
    alignas(64) float u[AT_ONCE], v[AT_ONCE], amp[AT_ONCE], slope[AT_ONCE];
    alignas(64) float argument[AT_ONCE], shape[AT_ONCE], q[AT_ONCE], stage[AT_ONCE];
};

constexpr double PER_RADIAN = 0.15915494309189533577;

// Radius and angle (in turns) of packed64 seeds [first, first + n) in the order of storage.
inline void points64(const Packed& p, int64_t first, int n, Group& g) {
    const int64_t* word = p.seeds + first * p.words;
    if (p.radius) {
        for (int k = 0; k < n; k++) g.r[k] = p.radius[first + k], g.turns[k] = p.angle[first + k] * PER_RADIAN;
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

// Those of packed128 seeds, and their codes. An angle of 2^24 leaves no bit of a float for its place in the turn, so
// angles are reduced in double; from there on whole turns fall off the end of 32 bits.
inline void points128(const Packed& p, int64_t first, int n, Group128& g) {
    if (p.radius) {
        std::copy_n(p.radius + first, n, g.radius), std::copy_n(p.angle + first, n, g.angle);
        for (int k = 0; k < n; k++) {
            const int64_t code = p.seeds[first + k];
            g.low[k] = static_cast<int32_t>(code), g.high[k] = static_cast<int32_t>(code >> 32);
        }
    } else {
        const int64_t* word = p.seeds + first * p.words;
        for (int k = 0; k < n; k++) {
            float point[2];
            std::memcpy(point, word + 2 * k + 1, 8);  // little end first: the angle
            g.radius[k] = point[1], g.angle[k] = point[0];
            g.low[k] = static_cast<int32_t>(word[2 * k]), g.high[k] = static_cast<int32_t>(word[2 * k] >> 32);
        }
    }
    for (int k = 0; k < AT_ONCE; k++) {
        double turns = g.angle[k] * PER_RADIAN;
        turns = (turns - nearest(turns)) * 0x1p32 + MAGIC;
        int64_t bits;
        std::memcpy(&bits, &turns, 8);
        g.turns[k] = static_cast<int32_t>(bits);
    }
}

void records64(const Packed& p, int64_t at, int n, Record* out) {
    static thread_local Group g = {};
    points64(p, at, n, g);
    for (int k = 0; k < AT_ONCE; k++) {
        double s, c;
        wave_wide(g.turns[k], s, c);
        const double r = g.r[k], one = 1 / (1 + r * r), value = 2 * r * one;
        g.amp[k] = value * s, g.d_angle[k] = value * c;
        g.slope[k] = 2 * (1 - r) * (1 + r) * one * one * s;
    }
    for (int k = 0; k < n; k++)
        out[k * p.parts()] = {1, static_cast<float>(g.d_angle[k]), static_cast<float>(g.amp[k]),
                              static_cast<float>(g.slope[k]), 0, 0, 0,
                              static_cast<int32_t>(p.stages == 1 ? 0 : (at + k) % p.stages)};
}

// Cosine and minus sine of an angle in 2^-32 turns.
inline void wave_lanes(VI turns, VF& cosine, VF& minus_sine) {
    const VI quarter = (turns + (1 << 29)) >> 30, rest = turns - (quarter << 30);
    const VF t = __builtin_convertvector(rest, VF) * 1.46291807926715968e-9f, z = t * t;
    VF s = splat(1.0f / 362880), c = splat(1.0f / 40320);
    s = s * z - 1.0f / 5040, s = s * z + 1.0f / 120, s = s * z - 1.0f / 6, s = t + t * z * s;
    c = c * z - 1.0f / 720, c = c * z + 1.0f / 24, c = c * z - 0.5f, c = c * z + 1.0f;
    const VI odd = (quarter & 1) != 0;
    const VI a = odd ? reinterpret_cast<VI>(s) : reinterpret_cast<VI>(c);
    const VI b = odd ? reinterpret_cast<VI>(c) : reinterpret_cast<VI>(s);
    // The second bit is the sign.
    cosine = reinterpret_cast<VF>(a ^ ((quarter + 1) & 2) << 30);
    minus_sine = reinterpret_cast<VF>(b ^ ((quarter & 2) ^ 2) << 30);
}

// A vector of seeds: fields of their codes.
struct Fields {
    VI quadrant, frequency, amplitude, q;
    explicit Fields(VI high)
        : quadrant(high >> 30 & 3), frequency(high >> 18 & 4095), amplitude(high >> 6 & 4095), q(high & 63) {}
    // 2 a / 4095 - 1, without the difference of rounded numbers.
    VF A() const { return __builtin_convertvector(2 * amplitude - 4095, VF) * (1.0f / 4095); }
    VI bounded() const { return quadrant > 1; }
};

// 10 K / 4095 and 10 / 4095, in a part of twelve bits, whose products with a frequency are exact, and the rest.
constexpr float exact_part(double x) { return static_cast<float>(static_cast<int64_t>(x * 0x1p19)) * 0x1p-19f; }
constexpr double PER_FREQUENCY = 10.0 / 4095, GAIN_PER_FREQUENCY = PER_FREQUENCY * CORDIC_GAIN;

// Amplitude A / max f and argument at cell radius 1.
inline void radial(const Fields& of, VF r, VF& amp, VF& slope, VF& argument) {
    constexpr float HIGH = exact_part(GAIN_PER_FREQUENCY), LOW = static_cast<float>(GAIN_PER_FREQUENCY - HIGH);
    const VI floor = of.frequency > 0 ? of.frequency : VI{} + 1, bounded = of.bounded();
    const VF frequency = __builtin_convertvector(floor, VF), top = frequency * static_cast<float>(GAIN_PER_FREQUENCY);
    const VF times = bounded ? frequency + frequency : frequency;
    const VF e = expm1_parts(times * HIGH, times * LOW), more = e + 2.0f, both = e * more;
    const VF over = bounded ? more : (e + e) + 2.0f;
    VF under = bounded ? e : both;
    under = (of.quadrant == 1) ? under + 2.0f : under;
    amp = of.A() * ((of.quadrant == 3) ? splat(1.0f) : over / under);
    slope = amp * top, argument = top * r;
}

// Stretches of the steps up to each clamp, and the smallest radii in float that they bring to 1.
constexpr double STRETCH[5] = {1.6424840657522373, 1.646743506596901, 1.6467601926846949, 1.6467602578654548,
                               CORDIC_GAIN};
constexpr float brought_to_one(double stretch) {
    const float near = static_cast<float>(1 / stretch);
    return static_cast<double>(near) * stretch >= 1 ? near : near * (1 + 0x1p-23f);
}

// Amplitude A f(alpha R) and its slope in r.
inline void faithful(const Fields& of, VF r, VF& amp, VF& slope) {
    const VF alpha = __builtin_convertvector(of.frequency, VF) * static_cast<float>(PER_FREQUENCY);
    // The first clamp that sets in is the last: tanh(R) < 1 and the steps after it stretch by less than 1.003.
    VF before = splat(static_cast<float>(STRETCH[4])), after = splat(1.0f);
    for (int c = 3; c >= 0; c--) {
        const VI outside = r >= brought_to_one(STRETCH[c]);
        before = outside ? splat(static_cast<float>(STRETCH[c])) : before;
        after = outside ? splat(static_cast<float>(STRETCH[4] / STRETCH[c])) : after;
    }
    const VI clamped = r >= brought_to_one(STRETCH[4]);
    const VF twice = expm1_lanes(2.0f * (r * before)), w = 1.0f / (twice + 2.0f);
    const VF stretch = splat(static_cast<float>(STRETCH[4]));
    const VF R = clamped ? twice * w * after : r * stretch;
    const VF d_R = clamped ? 4.0f * ((twice + 1.0f) * w) * w * before * after : stretch;
    const VF x = alpha * R;
    const VI bounded = of.bounded(), second = (of.quadrant & 1) != 0;
    const VF e = expm1_lanes(bounded ? x + x : x), p = e + 1.0f, n = 1.0f / (bounded ? p + 1.0f : p);
    const VF a = bounded ? e * n : 0.5f * (e + e * n), b = bounded ? 4.0f * (p * n) * n : 0.5f * (p + n);
    const VF A = of.A();
    amp = A * (second ? b : a);
    slope = A * alpha * d_R * (second ? (bounded ? -2.0f * (a * b) : a) : b);
}

void records128(const Packed& p, int64_t at, int n, Record* out) {
    static const Turns steps;
    static thread_local Group128 g = {};
    points128(p, at, n, g);
    for (int k = 0; k < n; k += W) {
        const VI high = loadi(g.high + k);
        const Fields of(high);
        const VF r = load(g.radius + k);
        // A sine is a cosine a quarter of a turn later.
        const VI turns = of.q * (loadi(g.turns + k) + steps(loadi(g.low + k))) - ((high & 32) << 25);
        VF u, v, amp, slope, argument{};
        VI q = of.q;
        wave_lanes(turns, u, v);
        if (p.kind == RADIAL) {
            radial(of, r, amp, slope, argument);
        } else {
            faithful(of, r, amp, slope);
            // At the origin the angle of every cell is 0: the block is constant, and so is it in theta.
            const VI origin = r == 0.0f;
            u = origin ? ((of.q > 31) ? VF{} : splat(1.0f)) : u, v = origin ? VF{} : v, q = origin ? VI{} : q;
        }
        store(g.u + k, u), store(g.v + k, v), store(g.amp + k, amp), store(g.slope + k, slope);
        store(g.argument + k, argument), store(g.shape + k, reinterpret_cast<VF>(of.quadrant));
        store(g.q + k, reinterpret_cast<VF>(q));
    }
    if (p.stages > 1)
        for (int k = 0; k < n; k++) {
            const int32_t stage = static_cast<int32_t>((at + k) % p.stages);
            std::memcpy(g.stage + k, &stage, 4);
        }
    else std::fill_n(g.stage, n, 0.0f);
    for (int k = 0; k < n; k += 4) {
        Four first[4], second[4];
        turned(four(g.u + k), four(g.v + k), four(g.amp + k), four(g.slope + k), first);
        turned(four(g.argument + k), four(g.shape + k), four(g.q + k), four(g.stage + k), second);
        for (int m = 0; m < 4; m++) {
            Four* to = reinterpret_cast<Four*>(out + (k + m) * p.parts());
            to[0] = first[m], to[1] = second[m];
        }
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

// Writes up to AT_ONCE * p.parts() records beyond the last.
void records(const Packed& p, int64_t first, int64_t count, Record* out) {
    const int64_t end = (first + count) * p.stages;
    for (int64_t at = first * p.stages; at < end; at += AT_ONCE, out += AT_ONCE * p.parts()) {
        const int n = static_cast<int>(std::min<int64_t>(AT_ONCE, end - at));
        p.kind == PACKED64 ? records64(p, at, n, out) : records128(p, at, n, out);
        if (p.d_radius) along(p, at, n, out);
    }
}

// Asks for seeds that will be needed: a few columns of a block row are too short a piece for the processor to foresee.
inline void ahead(const Packed& p, int64_t first, int64_t count) {
    const int64_t begin = first * p.stages, end = begin + count * p.stages;
    const int64_t words = p.radius ? 1 : p.words;
    for (int64_t k = begin * words; k < end * words; k += 8) __builtin_prefetch(p.seeds + k);
    if (!p.radius) return;
    for (int64_t k = begin; k < end; k += 16) __builtin_prefetch(p.radius + k), __builtin_prefetch(p.angle + k);
}
