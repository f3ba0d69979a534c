// Matrices of packed64 and packed128 seeds: what the tiers and their driver share.
//
// Every format is a sum of *records*. A record is one seed of one block (or a part of its derivative), and a block is
//   packed64            amp * phi[i][j]
//   packed128 faithful  amp * (u cos(q a_ij) + v sin(q a_ij))
//   packed128 radial    amp * f(argument * rho_ij) * (u cos(q a_ij) + v sin(q a_ij))
// with a_ij and rho_ij angle and radius of a cell: the 20 CORDIC steps of packed128 turn all cells alike, and in faithful
// mode they leave all cells at one radius. Cells (i, j) and (h-1-i, j) have the same cosine and radius and the opposite
// sine, so tables hold half the rows, and rows are generated in such pairs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rbe {

enum Kind : int { PACKED64 = 0, FAITHFUL = 1, RADIAL = 2 };

constexpr double CORDIC_GAIN = 1.646760258120067;
constexpr int FREQUENCIES = 64;
constexpr int LANES = 16;  // rows of tables are padded to this many cells, whatever the tier

// What the cells of a small block have in common with those of every other block of its shape.
//
// Products use more symmetry: columns j and w-1-j of packed128 differ, in cosine and sine, by signs that depend on
// whether q is even. With sums and differences of mirrored inputs a block is two quarters, an even and an odd part.
// The cells of a quarter stand in vectors of LANES; `half` columns (a power of two) of `pairs` rows, zeros at the end.
struct Tables {
    int64_t pairs = 0, width = 0, stride = 0;  // pairs of rows; columns, padded columns
    int classes = 0;                           // padded count of distinct cell radii
    const float* waves = nullptr;              // (64, pairs, 2, stride): cos, sin of q a
    const int32_t* radius_class = nullptr;     // (pairs, stride)
    const float* radii = nullptr;              // (classes,)
    const float* phi = nullptr;                // (stages, height, stride)
    int64_t half = 0, quarter = 0;             // columns, vectors of a quarter
    const float* quarters = nullptr;           // (64, 2, quarter, LANES): cos, sin of q a
    const int32_t* quarter_class = nullptr;    // (quarter, LANES)
    // Blocks of LANES rows and as many columns: both quarters side by side, and their classes; else null.
    const float* joined = nullptr;          // (64, LANES / 2, LANES): rows of cos, then sin, of q a
    const int32_t* joined_class = nullptr;  // (LANES / 2, LANES)
};

struct Packed {
    int kind;
    int64_t rows, cols, height, width, block_rows, block_cols;  // height and width of a block
    int stages, words;                                          // seeds a block, words a seed
    const int64_t* seeds;         // (blocks, stages * words); the code words (blocks, stages) where `radius` is given
    const float *radius, *angle;  // (blocks, stages), or null: read them from the seeds
    const float *d_radius, *d_angle;  // null, or a direction (blocks, stages): the matrix is the derivative along it
    const float* scale;
    const uint16_t* row_scale;  // float16, or null
    const Tables* tables;       // null for large blocks

    // A direction in radial mode moves the profile and the wave: two records a seed.
    int parts() const { return d_radius && kind == RADIAL ? 2 : 1; }
    int records() const { return stages * parts(); }
};

struct Record {
    float u, v, amp, slope;   // slope: d amp / dr (the factor of f' rho in radial mode); packed64: v is d amp / dtheta
    float argument;           // of the profile at cell radius 1
    int32_t shape;            // 0 sinh, 1 cosh, 2 tanh, 3 sech^2; + 4: rho times the derivative
    int32_t q, stage;
};

// Sums over one seed's block of an upstream gradient G: of G W, G dW/dr, G dW/dtheta.
struct Sums {
    double value, radius, angle;
};


// Folded rows of x: [b][J][0 or 1][half], sums and differences of columns j and w-1-j of block column J. Rows are a
// cache line longer than that, or those of a wide matrix would all meet in one set of the cache.
inline int64_t folded_stride(const Packed& p) {
    return (p.block_cols * 2 * p.tables->half + LANES - 1) / LANES * LANES + LANES;
}

struct PackedTier {
    // The records of blocks [first, first + count), p.records() each.
    void (*records)(const Packed& p, int64_t first, int64_t count, Record* out);
    // f of every record at every radius class, `tables->classes` floats each.
    void (*profiles)(const Tables& t, const Record* records, int64_t count, float* out, float* slopes);
    // Rows [i0, i1) of block row I, all columns, times the factors of the rows: out[(i - i0) * cols + j].
    void (*expand)(const Packed& p, int64_t I, int64_t i0, int64_t i1, const Record* r, const float* profile,
                   const float* factors, float* out);
    // Block row I times `batch` rows of folded x (below): parts[b][0 or 1][pair], the even and odd parts of y, unscaled.
    void (*product)(const Packed& p, const Record* r, const float* profile, const float* x, int64_t batch,
                    float* parts);
    // For block columns [J0, J1): adds the derivatives by folded x to d_x, laid out as x is, where d_x is given, and
    // those by the seeds to three planes (blocks, stages), where out is given: `Sums`, the last two times the scale. y is
    // folded: [I][b][0 or 1][pair].
    void (*backward)(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
                     float* const* out);
    // Adds the sums of block columns [J0, J1) of rows [i0, i1) of block row I to out[J * stages + s]; G as `expand`.
    void (*contract)(const Packed& p, int64_t I, int64_t i0, int64_t i1, int64_t J0, int64_t J1, const Record* r,
                     const float* profile, const float* slopes, const float* gradient, Sums* out);
    float (*dot)(const float* a, const float* b, int64_t n);
};

// Tables of a shape of blocks, made on first use and kept.
const Tables* packed_tables(int kind, int64_t height, int64_t width, int stages);

const PackedTier& packed_portable();
#if defined(RBE_X86_TIERS)
const PackedTier& packed_avx2();
const PackedTier& packed_avx512();
#endif

// Threads give the same result whatever their number. `begin` and `end` are rows of the matrix before its rotations.
void packed_decode(const Packed& p, int64_t begin, int64_t end, float* out, int threads);
void packed_rows(const Packed& p, const int64_t* index, int64_t count, float* out, int threads);
void packed_matmul(const Packed& p, const float* x, int64_t batch, float* y, int threads);
// Derivatives of <y, W x>: by x where d_x is given, and by the seeds, in three planes (blocks, stages), where out is
// given: the sums of G W, and derivatives by radius and angle. x may be null without out.
void packed_backward(const Packed& p, const float* x, const float* y, int64_t batch, float* d_x, float* const* out,
                     int threads);
// packed64: amplitudes (blocks, stages), where wanted, and, where weights are given, which are sums over G phi, the
// derivatives of their products with the amplitudes by radius and angle, times the scale. Returns the sum of the products.
double packed_amplitudes(const Packed& p, float* amp, const float* weights, float* const* out, int threads);
void packed_contract(const Packed& p, int64_t begin, int64_t end, const float* gradient, Sums* out, int threads);

}  // namespace rbe
