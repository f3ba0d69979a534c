// Loops that every tier compiles for itself with its own instruction set: no intrinsics, so they vectorise anywhere.
// Included inside an anonymous namespace by each tier, after <cmath> and trellis.h.
#pragma once

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(64), aligned(4), may_alias));

inline uint32_t sign_bit(uint32_t k, uint32_t seed) {
    uint32_t h = k ^ seed;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    h ^= h >> 16;
    return h << 31;
}

// The signs that this thread used last, because the rows of a batch follow one another and hashing costs more than the
// transform's memory. Memory of its own: standard containers compiled for one tier could be linked into another.
struct Signs {
    uint32_t seed = 0, *bits = nullptr;
    int64_t n = 0;
    const uint32_t* get(int64_t count, uint32_t wanted) {
        if (wanted != seed || count > n) {
            std::free(bits);
            n = 0, bits = static_cast<uint32_t*>(std::malloc(static_cast<size_t>(count) * 4));
            if (!bits) return nullptr;
            for (int64_t k = 0; k < count; k++) bits[k] = sign_bit(static_cast<uint32_t>(k), wanted);
            seed = wanted, n = count;
        }
        return bits;
    }
    ~Signs() { std::free(bits); }
};

inline void flip_signs(float* x, int64_t n, uint32_t seed) {
    thread_local Signs signs;
    const uint32_t* flips = signs.get(n, seed);
    for (int64_t k = 0; k < n; k++) {
        uint32_t bits;
        std::memcpy(&bits, x + k, 4);
        bits ^= flips ? flips[k] : sign_bit(static_cast<uint32_t>(k), seed);
        std::memcpy(x + k, &bits, 4);
    }
}

// One butterfly inside a vector: lanes H apart give (a + b, a - b).
template <int H>
inline void butterfly(Lanes& v) {
    constexpr int S = INT32_MIN;
    constexpr IntLanes sign = {0,          H & 1 ? S : 0, H & 2 ? S : 0, H & 3 ? S : 0, H & 4 ? S : 0, H & 5 ? S : 0,
                               H & 6 ? S : 0, H & 7 ? S : 0, H & 8 ? S : 0, H & 9 ? S : 0, H & 10 ? S : 0, H & 11 ? S : 0,
                               H & 12 ? S : 0, H & 13 ? S : 0, H & 14 ? S : 0, H & 15 ? S : 0};
    const Lanes swapped = __builtin_shufflevector(v, v, H, 1 ^ H, 2 ^ H, 3 ^ H, 4 ^ H, 5 ^ H, 6 ^ H, 7 ^ H, 8 ^ H, 9 ^ H,
                                                  10 ^ H, 11 ^ H, 12 ^ H, 13 ^ H, 14 ^ H, 15 ^ H);
    v = swapped + reinterpret_cast<Lanes>(reinterpret_cast<IntLanes>(v) ^ sign);
}

// Orthonormal fast Walsh-Hadamard transform of n = 2^k floats.
inline void hadamard(float* x, int64_t n) {
    const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
    if (n < 16) {
        for (int64_t h = 1; h < n; h *= 2)
            for (int64_t i = 0; i < n; i += 2 * h)
                for (int64_t k = i; k < i + h; k++) {
                    const float a = x[k], b = x[k + h];
                    x[k] = a + b, x[k + h] = a - b;
                }
        for (int64_t k = 0; k < n; k++) x[k] *= norm;
        return;
    }
    Lanes* v = reinterpret_cast<Lanes*>(x);
    const int64_t m = n / 16;
    // First as many stages as the registers hold, in one pass over memory; the last pass also scales.
#if defined(__AVX512F__)
    constexpr int HELD = 16;
#else
    constexpr int HELD = 4;
#endif
    int64_t h = 1;
    if (m < HELD) {
        for (int64_t i = 0; i < m; i++) {
            Lanes u = v[i];
            butterfly<1>(u), butterfly<2>(u), butterfly<4>(u), butterfly<8>(u);
            v[i] = m > 1 ? u : u * norm;
        }
    } else {
        h = HELD;
        const float scale = m > h ? 1.0f : norm;
        for (int64_t i = 0; i < m; i += HELD) {
            Lanes u[HELD];
#pragma GCC unroll 16
            for (int k = 0; k < HELD; k++) {
                u[k] = v[i + k];
                butterfly<1>(u[k]), butterfly<2>(u[k]), butterfly<4>(u[k]), butterfly<8>(u[k]);
            }
#pragma GCC unroll 4
            for (int s = 1; s < HELD; s *= 2)
#pragma GCC unroll 16
                for (int k = 0; k < HELD; k++)
                    if (!(k & s)) {
                        const Lanes a = u[k], b = u[k + s];
                        u[k] = a + b, u[k + s] = a - b;
                    }
#pragma GCC unroll 16
            for (int k = 0; k < HELD; k++) v[i + k] = u[k] * scale;
        }
    }
    for (; 4 * h <= m; h *= 4) {
        const float scale = 4 * h < m ? 1.0f : norm;
        for (int64_t i = 0; i < m; i += 4 * h)
            for (int64_t k = i; k < i + h; k++) {
                const Lanes a = v[k], b = v[k + h], c = v[k + 2 * h], d = v[k + 3 * h];
                const Lanes ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
                v[k] = (ab + cd) * scale, v[k + h] = (a_b + c_d) * scale;
                v[k + 2 * h] = (ab - cd) * scale, v[k + 3 * h] = (a_b - c_d) * scale;
            }
    }
    for (; 2 * h <= m; h *= 2) {
        const float scale = 2 * h < m ? 1.0f : norm;
        for (int64_t i = 0; i < m; i += 2 * h)
            for (int64_t k = i; k < i + h; k++) {
                const Lanes a = v[k], b = v[k + h];
                v[k] = (a + b) * scale, v[k + h] = (a - b) * scale;
            }
    }
}

inline int64_t span(int64_t n) { return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n))); }

void rotate(float* x, int64_t n, uint32_t seed) {
    if (seed == 0) return;
    const int64_t p = span(n);
    flip_signs(x, n, seed);
    hadamard(x, p);
    if (p < n) hadamard(x + n - p, p);
}

void rotate_back(float* x, int64_t n, uint32_t seed) {
    if (seed == 0) return;
    const int64_t p = span(n);
    if (p < n) hadamard(x + n - p, p);
    hadamard(x, p);
    flip_signs(x, n, seed);
}

// Two factors, because one power of two does not reach from denormals to 2^30. Halves round away from zero.
void fixed_point(const float* x, int64_t n, float factor, float factor2, int32_t* out) {
    for (int64_t k = 0; k < n; k++) {
        const float v = x[k] * factor * factor2;
        out[k] = static_cast<int32_t>(v + std::copysign(0.49999997f, v));
    }
}

float largest(const float* x, int64_t n) {
    // As integers, magnitudes of floats sort like the floats, and NaN sorts above infinity: no branch, no lost NaN.
    int32_t top = 0;
    for (int64_t k = 0; k < n; k++) {
        int32_t bits;
        std::memcpy(&bits, x + k, 4);
        bits &= 0x7FFFFFFF;
        top = bits > top ? bits : top;
    }
    top = top > 0x7F800000 ? 0x7F800000 : top;
    float out;
    std::memcpy(&out, &top, 4);
    return out;
}

// The final formula, the same everywhere.
void finish(const int64_t* sums, int64_t n, double unit, float* out) {
    for (int64_t k = 0; k < n; k++) out[k] = static_cast<float>(static_cast<double>(sums[k]) * unit);
}

// 16-bit digits (batch, digits, cols): X = d1 2^16 + d0, or one digit for int8.
inline size_t digits_bytes(const Matrix&, const Activations& a) {
    return static_cast<size_t>(a.batch * a.cols * (a.int8 ? 1 : 2) * 2);
}

inline void pack_digits(const Matrix&, const Activations& a, int64_t b, const int32_t* x) {
    int16_t* out = static_cast<int16_t*>(a.packed) + b * a.cols * (a.int8 ? 1 : 2);
    if (!a.int8) {
        for (int64_t j = 0; j < a.cols; j++) out[j] = static_cast<int16_t>((x[j] + 0x8000) >> 16);
        out += a.cols;
    }
    for (int64_t j = 0; j < a.cols; j++) out[j] = static_cast<int16_t>(x[j]);
}

inline void nothing() {}
