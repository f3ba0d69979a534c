// What the CPU tiers share: the matrix as the kernels see it, and the table of functions that one tier fills in.
//
// Every tier computes the same integers. Activations are fixed-point integers X (below), so a product is
// S = sum_j code_ij * X_j, exact in 64 bits, and one final formula turns S into a float: all tiers agree bit for bit.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

namespace rbe {

static_assert(std::endian::native == std::endian::little, "seeds are read as bytes, first ring bit first");

constexpr int EDGE = 16;         // rows and columns of a block
constexpr int OFFSET = 510;      // mean of the sum of four bytes
constexpr int CHUNK = 128;       // columns whose products with 16-bit digits fit 32 bits: 510 * 2^15 * 128 < 2^31
constexpr int FIXED_BITS = 30;   // float activations: |X| < 2^30, so that X = d1 2^16 + d0 with 16-bit signed digits

struct Matrix {
    const uint8_t* seeds;  // blocks in row-major order of the block grid, 16 w bytes each
    int64_t rows, cols, block_rows, block_cols;
    int w, window;
    uint32_t even, odd;  // multipliers for even and odd rows
    const float* scale;
    const uint16_t* row_scale;  // float16, or null
    uint32_t rotation_out, rotation_in;

    int block_bytes() const { return 16 * w; }
    int64_t padded_cols() const { return block_cols * EDGE; }
    // A multiplier with equal halves: the upper half of the product is the lower half plus a 16-bit high product.
    bool paired() const { return (even >> 16) == (even & 0xFFFF) && (odd >> 16) == (odd & 0xFFFF) && window == 16; }
    const uint8_t* block(int64_t i, int64_t j) const { return seeds + (i * block_cols + j) * block_bytes(); }
    // First ring bit of the window of row i in column 0; column j adds 8 w j. It can be negative: the ring closes.
    int start(int i) const { return (w * (i + 1) + 1) / 2 - window; }
};

// Activations of a call: `batch` rows of integers, in the tier's own layout.
struct Activations {
    int64_t batch, cols;  // cols padded to whole blocks
    bool int8;            // |X| <= 127, else |X| < 2^30
    void* packed;         // `packed_bytes` long, 64-byte aligned
};

// A block with what its windows may touch around it: two ring bytes before, zeros after. For the ends of the buffer.
struct Padded {
    alignas(64) uint8_t bytes[64 + 128 + 128];
    [[gnu::noinline]] const uint8_t* fill(const uint8_t* block, int n) {
        std::memcpy(bytes + 62, block + n - 2, 2);
        std::memcpy(bytes + 64, block, static_cast<size_t>(n));
        return bytes + 64;
    }
};

struct Tier {
    const char* name;
    // In place on one row of n floats: R x, its transpose, and integers nearest to x * factor.
    void (*rotate)(float* x, int64_t n, uint32_t seed);
    void (*rotate_back)(float* x, int64_t n, uint32_t seed);
    void (*fixed_point)(const float* x, int64_t n, float factor, float factor2, int32_t* out);
    float (*largest)(const float* x, int64_t n);  // max |x|, infinite where an entry is not finite
    void (*finish)(const int64_t* sums, int64_t n, double unit, float* out);  // out = S * unit
    // Codes of `count` neighbouring blocks of a block row, each in stream order, column by column: out[16 j + i].
    void (*codes)(const Matrix&, int64_t block_row, int64_t first, int64_t count, int16_t* out);
    size_t (*packed_bytes)(const Matrix&, const Activations&);
    // Lay out batch row b, whose values are padded with zeros to a multiple of 32.
    void (*pack)(const Matrix&, const Activations&, int64_t b, const int32_t* values);
    // S for block rows [begin, end): sums[(i - begin) * 16 + r] of batch row b stands at b * stride.
    void (*product)(const Matrix&, const Activations&, int64_t begin, int64_t end, int64_t* sums, int64_t stride);
    // Called by each thread after its share of the products.
    void (*leave)();
};

const Tier& portable_tier();
#if defined(RBE_X86_TIERS)  // set by the build where it compiles them
const Tier& avx2_tier();
const Tier& avx512_tier();
const Tier& zen4_tier();
const Tier& amx_tier();
bool amx_permitted();  // asks the kernel once
#endif

// Chooses by cpuid, no higher than RBE_TIER; `name` forces one (empty: default). Returns false if it is not available.
bool set_tier(const char* name);
const Tier& tier();
bool tier_available(const char* name);

struct Call {
    const Matrix* matrix;
    const float* x;  // (batch, cols)
    float* y;        // (batch, rows)
    int64_t batch;
    bool int8;
    int threads;
};
void matmul(const Call&);
// Undo or apply a rotation on every row of (batch, n), in place.
void rotate_rows(float* x, int64_t batch, int64_t n, uint32_t seed, bool back, int threads);
// W~ of rows [begin, end), scaled: out (cols, end - begin), rows of the matrix contiguous. begin is a multiple of 16.
void decode_columns(const Matrix&, int64_t begin, int64_t end, float* out, int threads);
// The whole matrix, rotations undone: out (rows, cols).
void decode(const Matrix&, float* out, int threads);
// Chosen rows, input rotation undone: out (count, cols). Indices are already checked.
void rows(const Matrix&, const int64_t* index, int64_t count, float* out, int threads);

}  // namespace rbe
