// Matrices of whole numbers, most of them 0, as streams decode to: products that touch only what is there.
//
// The entries of a row stand in three groups, those of +1, those of -1 and all others; only the others have a level
// beside their column. A row of the matrix meets runs of neighbouring numbers: rows of x, turned so that they are
// neighbours, for a linear layer, and the pixels of an image for a convolution. Where the run of a column begins is in a
// table.
#pragma once
#include <cstdint>

namespace rbe {

constexpr int64_t RUN_OF = 16;  // lengths of runs are multiples: floats of the widest vector

template <class Index>
struct Sparse {
    int64_t rows;
    const int32_t* starts;  // (rows + 1, 4): of +1, of -1, of the others, and of their levels
    const Index* columns;
    const int16_t* levels;
    const float* bias;  // (rows,), as levels are, or null
    float factor;       // of all sums, set for each call
};

template <class Index>
struct SparseTier {
    // One row times x.
    float (*single)(const Sparse<Index>& p, int64_t row, const float* x);
    // One row times runs: out[k] = factor * (sum of level * in[table[column] + k] + bias), k < length.
    void (*run)(const Sparse<Index>& p, int64_t row, const int32_t* table, const float* in, int64_t length, float* out);
};

template <class Index>
const SparseTier<Index>& sparse_portable();
#if defined(RBE_X86_TIERS)
template <class Index>
const SparseTier<Index>& sparse_avx2();
template <class Index>
const SparseTier<Index>& sparse_avx512();
#endif

// A convolution: sides, strides and padding of height and width.
struct Window {
    int64_t channels, height, width;  // of the image
    int64_t kernel[2], stride[2], padding[2];

    int64_t side(int k) const { return (k ? width : height) + 2 * padding[k]; }
    int64_t out(int k) const { return (side(k) - kernel[k]) / stride[k] + 1; }
    // Of every stride-th pixel, rounded up; what the last cell of the kernel reaches is within.
    int64_t part(int k) const { return (side(k) + stride[k] - 1) / stride[k]; }
    int64_t parts() const { return channels * stride[0] * stride[1]; }
};

// y (n, rows) of x (n, columns).
template <class Index>
void sparse_matmul(const Sparse<Index>& p, int64_t columns, const float* x, int64_t n, float* y, int threads);

// out (n, rows, out height, out width) of x (n, channels, height, width).
template <class Index>
void sparse_conv(const Sparse<Index>& p, const Window& w, const float* x, int64_t n, float* out, int threads);

// Rows of the dense matrix (count, columns), times the factor, without the bias.
template <class Index>
void sparse_rows(const Sparse<Index>& p, int64_t columns, const int64_t* index, int64_t count, float* out, int threads);

}  // namespace rbe
