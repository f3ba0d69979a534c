// What does not depend on the instruction set: threads, runs of neighbours, and rows of the dense matrix.
#include "sparse.h"

#include <algorithm>
#include <vector>

#include "threads.h"
#include "trellis.h"

namespace rbe {
namespace {

constexpr int64_t ALONE = 1 << 16;  // additions below which a second thread does not pay
constexpr int64_t ROWS = 16;        // that a thread takes at a time
constexpr int64_t FEW = 6;          // rows of x that are multiplied one by one
constexpr int64_t WIDEST = 64;      // rows of x that become neighbours
constexpr int64_t CACHE = 1 << 19;  // bytes of them that stay in a core's cache

thread_local Scratch scratch_runs, scratch_rows;

float* floats(Scratch& from, int64_t n) { return static_cast<float*>(from.get(static_cast<size_t>(n) * 4)); }

int64_t padded(int64_t n) { return (n + RUN_OF - 1) / RUN_OF * RUN_OF; }

template <class Index>
const SparseTier<Index>& sparse_tier() {
#if defined(RBE_X86_TIERS)
    const char first = tier().name[0], last = tier().name[3];
    if (first != 'p') return last == '2' ? sparse_avx2<Index>() : sparse_avx512<Index>();  // amx and zen4 have avx512
#endif
    return sparse_portable<Index>();
}

template <class Index>
int64_t entries(const Sparse<Index>& p) {
    return p.starts[4 * p.rows];
}

// Columns [first, last) of `count` rows of x, turned: neighbours are `wide` rows, those that are not there 0.
void turn(const float* x, int64_t columns, int64_t count, int64_t first, int64_t last, int64_t wide, float* to) {
    // A line of memory at a time: rows that are a power of two apart push each other out of the cache.
    for (int64_t j = first; j < last; j += RUN_OF) {
        const int64_t end = std::min(j + RUN_OF, last);
        for (int64_t k = 0; k < count; k++)
            for (int64_t i = j; i < end; i++) to[i * wide + k] = x[k * columns + i];
        for (int64_t i = j; i < end; i++) std::fill(to + i * wide + count, to + (i + 1) * wide, 0.0f);
    }
}

// One channel of an image with its border, taken apart into those of every stride-th pixel.
void take_apart(const Window& w, const float* image, float* to) {
    const int64_t high = w.part(0), wide = w.part(1);
    for (int64_t down = 0; down < w.stride[0]; down++)
        for (int64_t right = 0; right < w.stride[1]; right++)
            for (int64_t i = 0; i < high; i++, to += wide) {
                std::fill_n(to, wide, 0.0f);
                const int64_t row = i * w.stride[0] + down - w.padding[0];
                if (row < 0 || row >= w.height) continue;
                const float* from = image + row * w.width;
                const int64_t start = right - w.padding[1], step = w.stride[1];
                int64_t j = start < 0 ? (-start + step - 1) / step : 0;
                for (int64_t at = start + j * step; j < wide && at < w.width; j++, at += step) to[j] = from[at];
            }
}

}  // namespace

template <class Index>
void sparse_matmul(const Sparse<Index>& p, int64_t columns, const float* x, int64_t n, float* y, int threads) {
    const SparseTier<Index>& t = sparse_tier<Index>();
    threads = entries(p) * n < ALONE ? 1 : threads;
    if (n <= FEW) {
        constexpr int64_t MANY = 8 * ROWS;
        const int64_t pieces = (p.rows + MANY - 1) / MANY;
        parallel(pieces * n, threads, [&](int64_t k) {
            const int64_t b = k / pieces, first = k % pieces * MANY;
            for (int64_t i = first; i < std::min(first + MANY, p.rows); i++)
                y[b * p.rows + i] = t.single(p, i, x + b * columns);
        });
        return;
    }
    const int64_t fit = CACHE / (4 * columns) / RUN_OF * RUN_OF;
    const int64_t wide = std::min({std::max(fit, 2 * RUN_OF), WIDEST, padded(n)}), blocks = (n + wide - 1) / wide;
    std::vector<int32_t> table(static_cast<size_t>(columns));
    for (int64_t j = 0; j < columns; j++) table[static_cast<size_t>(j)] = static_cast<int32_t>(j * wide);
    // One block after the other, so that no more than one of them is in memory.
    float* turned = floats(scratch_runs, columns * wide);
    constexpr int64_t TURN = 256;
    const int64_t pieces = (p.rows + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t count = std::min(wide, n - b * wide);
        parallel((columns + TURN - 1) / TURN, threads, [&](int64_t k) {
            turn(x + b * wide * columns, columns, count, k * TURN, std::min((k + 1) * TURN, columns), wide, turned);
        });
        parallel(pieces, threads, [&](int64_t k) {
            const int64_t first = k * ROWS, rows = std::min(ROWS, p.rows - first);
            alignas(64) float out[ROWS * WIDEST];
            for (int64_t i = 0; i < rows; i++) t.run(p, first + i, table.data(), turned, wide, out + i * wide);
            for (int64_t r = 0; r < count; r++)
                for (int64_t i = 0; i < rows; i++) y[(b * wide + r) * p.rows + first + i] = out[i * wide + r];
        });
    }
    scratch_runs.trim();
}

template <class Index>
void sparse_conv(const Sparse<Index>& p, const Window& w, const float* x, int64_t n, float* out, int threads) {
    const SparseTier<Index>& t = sparse_tier<Index>();
    const int64_t high = w.part(0), wide = w.part(1), strides = w.stride[0] * w.stride[1], size = w.parts() * high * wide;
    const int64_t height = w.out(0), width = w.out(1), length = padded(height * wide);
    // A run reads beyond the last part: up to a vector, and what is left of a row of pixels.
    const int64_t memory = size + RUN_OF + wide + w.kernel[1];
    threads = entries(p) * n * length < ALONE * RUN_OF ? 1 : threads;
    std::vector<int32_t> table;
    for (int64_t c = 0; c < w.channels; c++)
        for (int64_t i = 0; i < w.kernel[0]; i++)
            for (int64_t j = 0; j < w.kernel[1]; j++) {
                const int64_t part = i % w.stride[0] * w.stride[1] + j % w.stride[1];
                table.push_back(static_cast<int32_t>((c * strides + part) * high * wide + i / w.stride[0] * wide +
                                                     j / w.stride[1]));
            }
    const auto rows = [&](const float* parts, float* to, int64_t first, int64_t last) {
        float* sums = floats(scratch_rows, length);
        for (int64_t r = first; r < last; r++) {
            t.run(p, r, table.data(), parts, length, sums);
            for (int64_t i = 0; i < height; i++) std::copy_n(sums + i * wide, width, to + (r * height + i) * width);
        }
        scratch_rows.trim();
    };
    const auto channel = [&](const float* image, int64_t c, float* parts) {
        take_apart(w, image + c * w.height * w.width, parts + c * strides * high * wide);
    };
    const int64_t in_size = w.channels * w.height * w.width, out_size = p.rows * height * width;
    if (n >= threads) {
        parallel(n, threads, [&](int64_t b) {
            float* parts = floats(scratch_runs, memory);
            std::fill(parts + size, parts + memory, 0.0f);
            for (int64_t c = 0; c < w.channels; c++) channel(x + b * in_size, c, parts);
            rows(parts, out + b * out_size, 0, p.rows);
            scratch_runs.trim();
        });
        return;
    }
    float* parts = floats(scratch_runs, memory);
    std::fill(parts + size, parts + memory, 0.0f);
    const int64_t pieces = (p.rows + ROWS - 1) / ROWS;
    for (int64_t b = 0; b < n; b++) {
        parallel(w.channels, threads, [&](int64_t c) { channel(x + b * in_size, c, parts); });
        parallel(pieces, threads, [&](int64_t k) {
            rows(parts, out + b * out_size, k * ROWS, std::min((k + 1) * ROWS, p.rows));
        });
    }
    scratch_runs.trim();
}

template <class Index>
void sparse_rows(const Sparse<Index>& p, int64_t columns, const int64_t* index, int64_t count, float* out, int threads) {
    parallel(count, count * columns < 4 * ALONE ? 1 : threads, [&](int64_t k) {
        const int32_t* at = p.starts + 4 * index[k];
        float* to = out + k * columns;
        std::fill_n(to, columns, 0.0f);
        for (int32_t j = at[0]; j < at[1]; j++) to[p.columns[j]] = p.factor;
        for (int32_t j = at[1]; j < at[2]; j++) to[p.columns[j]] = -p.factor;
        const int16_t* levels = p.levels + at[3] - at[2];
        for (int32_t j = at[2]; j < at[4]; j++) to[p.columns[j]] = static_cast<float>(levels[j]) * p.factor;
    });
}

#define RBE_SPARSE(Index)                                                                                     \
    template void sparse_matmul(const Sparse<Index>&, int64_t, const float*, int64_t, float*, int);           \
    template void sparse_conv(const Sparse<Index>&, const Window&, const float*, int64_t, float*, int);       \
    template void sparse_rows(const Sparse<Index>&, int64_t, const int64_t*, int64_t, float*, int)
RBE_SPARSE(uint16_t);
RBE_SPARSE(int32_t);

}  // namespace rbe
