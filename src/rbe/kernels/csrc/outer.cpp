// What does not depend on the instruction set: threads, scales, edges, the folds of blocks of 64.
#include "outer.h"

#include <vector>

#include "threads.h"
#include "trellis.h"

namespace rbe {
namespace {

constexpr int64_t ALONE = 1 << 18;  // weights times rows of x below which a second thread does not pay

thread_local Scratch scratch_rows;

const OuterTier& outer_tier() {
#if defined(RBE_X86_TIERS)
    const char first = tier().name[0], last = tier().name[3];
    if (first != 'p') return last == '2' ? outer_avx2() : outer_avx512();  // amx and zen4 have avx512
#endif
    return outer_portable();
}

float row_factor(const Outer& p, int64_t row) { return p.row_scale ? half_to_float(p.row_scale[row]) : 1.0f; }

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;

Floats floats(int64_t n) {
    auto* memory = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(n * 4 + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    return Floats(memory);
}

// One row of `given` numbers in blocks, as the kernels read it: padded with zeros, and folded.
void fold(const Outer& p, const float* from, int64_t given, int64_t blocks, float* to) {
    if (p.edge <= WIDEST) {
        std::copy_n(from, given, to);
        std::fill(to + given, to + blocks * p.edge, 0.0f);
        return;
    }
    std::fill(to, to + blocks * WIDEST, 0.0f);
    for (int64_t k = 0; k < given; k++) to[k / p.edge * WIDEST + k % WIDEST] += FIXED.at[k % p.edge] * from[k];
}

// The transposed of `fold`.
void unfold(const Outer& p, const float* from, int64_t wanted, float* to) {
    if (p.edge <= WIDEST) {
        std::copy_n(from, wanted, to);
        return;
    }
    for (int64_t k = 0; k < wanted; k++) to[k] = FIXED.at[k % p.edge] * from[k / p.edge * WIDEST + k % WIDEST];
}

}  // namespace

void outer_decode(const Outer& p, int64_t begin, int64_t end, float* out, int threads) {
    const OuterTier& t = outer_tier();
    const int64_t first = begin / p.edge, last = (end + p.edge - 1) / p.edge;
    parallel(last - first, (end - begin) * p.cols < ALONE ? 1 : threads, [&](int64_t k) {
        const int64_t row = (first + k) * p.edge, count = std::min<int64_t>(p.edge, end - row);
        float factors[2 * WIDEST];
        for (int64_t i = 0; i < count; i++) factors[i] = *p.scale * row_factor(p, row + i);
        t.expand(p, first + k, 0, count, factors, out + (row - begin) * p.cols);
    });
}

void outer_rows(const Outer& p, const int64_t* index, int64_t count, float* out, int threads) {
    const OuterTier& t = outer_tier();
    parallel(count, count * p.cols < ALONE ? 1 : threads, [&](int64_t k) {
        const int64_t row = index[k], i = row % p.edge;
        const float factor = *p.scale * row_factor(p, row);
        t.expand(p, row / p.edge, i, i + 1, &factor, out + k * p.cols);
    });
}

void outer_matmul(const Outer& p, const float* x, int64_t batch, float* y, int threads) {
    const OuterTier& t = outer_tier();
    const int64_t wide = p.block_cols * p.side();
    threads = p.rows * p.cols * batch < ALONE ? 1 : threads;
    const bool ready = p.edge <= WIDEST && wide == p.cols;
    const Floats folded = ready ? Floats() : floats(batch * wide);
    if (!ready)
        parallel(batch, threads, [&](int64_t b) { fold(p, x + b * p.cols, p.cols, p.block_cols, folded.get() + b * wide); });
    parallel(p.block_rows, threads, [&](int64_t I) {
        float* sums = static_cast<float*>(scratch_rows.get(static_cast<size_t>(batch * p.side()) * 4));
        t.product(p, I, ready ? x : folded.get(), wide, batch, sums);
        const int64_t first = I * p.edge, count = std::min<int64_t>(p.edge, p.rows - first);
        float factors[2 * WIDEST];
        for (int64_t i = 0; i < count; i++)
            factors[i] = *p.scale * row_factor(p, first + i) * (p.edge > WIDEST ? FIXED.at[i] : 1.0f);
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < count; i++) y[b * p.rows + first + i] = factors[i] * sums[b * p.side() + i % p.side()];
        scratch_rows.trim();
    });
}

void outer_transposed(const Outer& p, const float* y, int64_t batch, float* x, int threads) {
    const OuterTier& t = outer_tier();
    const int64_t tall = p.block_rows * p.side(), wide = p.block_cols * p.side();
    threads = p.rows * p.cols * batch < ALONE ? 1 : threads;
    const Floats folded = floats(batch * tall), sums = floats(batch * wide);
    parallel(batch, threads, [&](int64_t b) {
        std::vector<float> scaled(static_cast<size_t>(p.rows));
        for (int64_t i = 0; i < p.rows; i++) scaled[static_cast<size_t>(i)] = *p.scale * row_factor(p, i) * y[b * p.rows + i];
        fold(p, scaled.data(), p.rows, p.block_rows, folded.get() + b * tall);
        std::fill_n(sums.get() + b * wide, wide, 0.0f);
    });
    parallel((p.block_cols + PANEL - 1) / PANEL, threads, [&](int64_t k) {
        t.transposed(p, k * PANEL, std::min((k + 1) * PANEL, p.block_cols), folded.get(), tall, batch, sums.get(), wide);
    });
    parallel(batch, threads, [&](int64_t b) { unfold(p, sums.get() + b * wide, p.cols, x + b * p.cols); });
}

double outer_contract(const Outer& p, int64_t begin, int64_t end, const float* gradient, float* by_radius,
                      float* by_angle, float* by_signs, float factor, int threads) {
    const OuterTier& t = outer_tier();
    const int64_t first = begin / p.edge, last = (end + p.edge - 1) / p.edge;
    std::vector<double> values(static_cast<size_t>(p.block_rows));
    const OuterSums out{values.data(), by_radius, by_angle, by_signs, factor};
    parallel(last - first, (end - begin) * p.cols < ALONE ? 1 : threads, [&](int64_t k) {
        const int64_t row = (first + k) * p.edge;
        t.contract(p, first + k, std::min<int64_t>(p.edge, end - row), gradient + (row - begin) * p.cols, out);
    });
    double total = 0;
    for (int64_t I = first; I < last; I++) total += values[static_cast<size_t>(I)];
    return total;
}

void outer_pack(const float* latent, int64_t count, bool wide, int64_t* code, int threads) {
    const OuterTier& t = outer_tier();
    constexpr int64_t PIECE = 1024;
    parallel((count + PIECE - 1) / PIECE, threads, [&](int64_t k) {
        t.pack(latent + k * PIECE * 64, std::min(PIECE, count - k * PIECE), wide, code + k * PIECE);
    });
}

}  // namespace rbe
