// Matrices of outer128 seeds: what the tiers and their driver share.
//
// A *record* is one seed of one block: a sum of outer products a u v^T, two in blocks of 8 and 16, one in larger ones.
// A block multiplies without its weights: v . x is a sum of x with signs, and a (v . x) goes into y with the signs of u.
// Signs of eight neighbours are one byte of the seed, and one vector of a table of 256.
//
// A block of 64 has the signs of one of 32: index i has sign i mod 32, times a fixed sign of its own. So x is folded to
// half of its columns before a product and y is unfolded after it, and the kernels know sides of 8, 16 and 32 alone.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rbe {

constexpr int BYTE = 8;        // signs of a byte, and floats of a vector, on every tier
constexpr int RUN = 32;        // records that are handled together
constexpr int WIDEST = 32;     // signs of a side
constexpr int64_t PANEL = 16;  // block columns that a transposed product handles at once

struct Outer {
    int64_t rows, cols;
    int edge;                      // of a block: 8, 16, 32 or 64
    int64_t block_rows, block_cols;
    int stages;                    // seeds a block
    const int64_t* seeds;          // (blocks, 2 stages); the code words (blocks, stages) where `radius` is given
    const float *radius, *angle;   // (blocks, stages), or null: read them from the seeds
    const float* scale;
    const uint16_t* row_scale;  // float16, or null

    int side() const { return std::min(edge, WIDEST); }
    int terms() const { return edge <= 16 ? 2 : 1; }
    uint64_t code(int64_t record) const { return static_cast<uint64_t>(radius ? seeds[record] : seeds[2 * record]); }
};

// Entry k of byte b: +1 where bit k is set, else -1.
struct SignTable {
    alignas(64) float at[256][BYTE];
    constexpr SignTable() : at() {
        for (int b = 0; b < 256; b++)
            for (int k = 0; k < BYTE; k++) at[b][k] = b >> k & 1 ? 1.0f : -1.0f;
    }
};
inline constexpr SignTable SIGNS;

// The fixed signs of blocks of 64.
struct FixedSigns {
    float at[2 * WIDEST];
    constexpr FixedSigns() : at() {
        for (uint32_t k = 0; k < 2 * WIDEST; k++) {
            uint32_t h = (k ^ (k >> 16)) * 0x85EBCA6Bu;
            h = (h ^ (h >> 13)) * 0xC2B2AE35u;
            at[k] = (h ^ (h >> 16)) & 1 ? -1.0f : 1.0f;
        }
    }
};
inline constexpr FixedSigns FIXED;

// Of the records of a run, side by side: (a, b) = length (cosine, sine), and d length / dr.
struct Points {
    alignas(64) float length[RUN], cosine[RUN], sine[RUN], slope[RUN];
};

// Upstream gradients of the records: of G W, G dW/dr, G dW/dtheta, and of the signs, in the order of `sign_bits`.
struct OuterSums {
    double* value;                // (block rows,), added up in order
    float *radius, *angle;        // (blocks, stages), or null
    float* signs;                 // (blocks, stages, 64), or null
    float factor;                 // of all but the value
};

struct OuterTier {
    void (*points)(const Outer& p, int64_t first, int count, Points& out);
    // Block row I times `batch` rows of folded x, (batch, x_stride): y (batch, side), not scaled.
    void (*product)(const Outer& p, int64_t I, const float* x, int64_t x_stride, int64_t batch, float* y);
    // Block columns [J0, J1) of the transposed product: adds to x (batch, x_stride), folded, from folded y.
    void (*transposed)(const Outer& p, int64_t J0, int64_t J1, const float* y, int64_t y_stride, int64_t batch, float* x,
                       int64_t x_stride);
    // Rows [i0, i1) of block row I, all columns, times the factors of the rows.
    void (*expand)(const Outer& p, int64_t I, int64_t i0, int64_t i1, const float* factors, float* out);
    // Block row I; the gradient of its rows (count, cols) is times the factors of the rows but the scale.
    void (*contract)(const Outer& p, int64_t I, int64_t count, const float* gradient, const OuterSums& out);
    // Code words of latent numbers (count, 64): the bit of a number that is 0 or more is set.
    void (*pack)(const float* latent, int64_t count, bool wide, int64_t* code);
};

const OuterTier& outer_portable();
#if defined(RBE_X86_TIERS)
const OuterTier& outer_avx2();
const OuterTier& outer_avx512();
#endif

// Threads give the same result whatever their number. `begin` and `end` are whole block rows of the matrix before its
// rotations; the other sizes are those of the matrix.
void outer_decode(const Outer& p, int64_t begin, int64_t end, float* out, int threads);
void outer_rows(const Outer& p, const int64_t* index, int64_t count, float* out, int threads);
void outer_matmul(const Outer& p, const float* x, int64_t batch, float* y, int threads);
void outer_transposed(const Outer& p, const float* y, int64_t batch, float* x, int threads);
// The gradient (end - begin, cols) is already times the row factors. Returns the sum of G W, unscaled; the derivatives
// are times `factor`.
double outer_contract(const Outer& p, int64_t begin, int64_t end, const float* gradient, float* by_radius,
                      float* by_angle, float* by_signs, float factor, int threads);
void outer_pack(const float* latent, int64_t count, bool wide, int64_t* code, int threads);

}  // namespace rbe
