// What does not depend on the instruction set: tables of block shapes, threads, scales, edges.
#include "packed.h"

#include <bit>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "threads.h"
#include "trellis.h"

namespace rbe {
namespace {

constexpr int64_t ALONE = 1 << 16;  // weights times rows of x below which a second thread does not pay
constexpr int64_t ROWS = 8;         // of a large block that a thread takes at once
constexpr double TURN = 6.283185307179586477;

thread_local Scratch scratch_records, scratch_profiles, scratch_slopes, scratch_tile;

const PackedTier& packed_tier() {
#if defined(RBE_X86_TIERS)
    const char first = tier().name[0], last = tier().name[3];
    if (first != 'p') return last == '2' ? packed_avx2() : packed_avx512();  // amx and zen4 have avx512
#endif
    return packed_portable();
}

uint32_t fmix32(uint32_t h) {
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return h ^ (h >> 16);
}

// Starts at a cache line, so that no vector straddles two.
template <class T>
struct Lines {
    using value_type = T;
    Lines() = default;
    template <class U>
    Lines(const Lines<U>&) {}
    T* allocate(size_t n) {
        void* memory = std::aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64);
        if (!memory) throw std::bad_alloc();
        return static_cast<T*>(memory);
    }
    void deallocate(T* memory, size_t) { std::free(memory); }
    bool operator==(const Lines&) const { return true; }
};
using Floats = std::vector<float, Lines<float>>;
using Integers = std::vector<int32_t, Lines<int32_t>>;

// The memory behind one `Tables`.
struct Shape : Tables {
    Floats wave_values, radius_values, phi_values, quarter_values, joined_values;
    Integers class_values, quarter_classes, joined_classes;

    Shape(int kind, int64_t h, int64_t w, int stages) {
        width = w, stride = (w + LANES - 1) / LANES * LANES, pairs = (h + 1) / 2;
        if (kind == PACKED64) modulation(h, stages);
        else disk(h);
    }

    void modulation(int64_t h, int stages) {
        phi_values.assign(static_cast<size_t>(stages * h * stride), 0.0f);
        for (int s = 0; s < stages; s++)
            for (int64_t i = 0; i < h; i++) {
                const uint32_t row = fmix32(static_cast<uint32_t>(i) ^ 0x9E3779B9u ^ fmix32(static_cast<uint32_t>(s)));
                for (int64_t j = 0; j < width; j++)
                    phi_values[static_cast<size_t>((s * h + i) * stride + j)] = static_cast<float>(
                        1 + 0.1 * std::sin(TURN * 0x1p-32 * static_cast<double>(fmix32(static_cast<uint32_t>(j) ^ row))));
            }
        phi = phi_values.data();
    }

    // The left upper quarters of the tables, in vectors.
    void quarter_up() {
        half = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>((width + 1) / 2)));
        quarter = (pairs * half + LANES - 1) / LANES;
        const size_t vectors = static_cast<size_t>(quarter * LANES);
        quarter_values.assign(FREQUENCIES * 2 * vectors, 0.0f);
        quarter_classes.assign(vectors, 0);
        for (int64_t i = 0; i < pairs; i++)
            for (int64_t j = 0; j < (width + 1) / 2; j++) {
                const size_t to = static_cast<size_t>(i * half + j), from = static_cast<size_t>(i * stride + j);
                quarter_classes[to] = class_values[from];
                for (size_t q = 0; q < FREQUENCIES; q++)
                    for (size_t part = 0; part < 2; part++)
                        quarter_values[(2 * q + part) * vectors + to] =
                            wave_values[((q * static_cast<size_t>(pairs) + static_cast<size_t>(i)) * 2 + part) *
                                            static_cast<size_t>(stride) + static_cast<size_t>(j)];
            }
        quarters = quarter_values.data(), quarter_class = quarter_classes.data();
        if (half == LANES / 2 && pairs == half) join();
    }

    void join() {
        const size_t side = LANES / 2, cells = side * side;
        for (size_t q = 0; q < FREQUENCIES; q++)
            for (size_t i = 0; i < side; i++)
                for (size_t part = 0; part < 2; part++)
                    for (size_t j = 0; j < side; j++)
                        joined_values.push_back(quarter_values[(2 * q + part) * cells + i * side + j]);
        for (size_t k = 0; k < 2 * cells; k++) joined_classes.push_back(quarter_classes[k / LANES * side + k % side]);
        joined = joined_values.data(), joined_class = joined_classes.data();
    }

    void disk(int64_t h) {
        const auto axis = [](int64_t k, int64_t n) {
            return n == 1 ? 0.0 : 2.0 * static_cast<double>(k) / static_cast<double>(n - 1) - 1.0;
        };
        const size_t cells = static_cast<size_t>(pairs * stride);
        std::vector<double> angle(cells), rho(cells), sorted;
        for (int64_t i = 0; i < pairs; i++)
            for (int64_t j = 0; j < width; j++) {
                const double y = axis(i, h), x = axis(j, width);
                const size_t at = static_cast<size_t>(i * stride + j);
                angle[at] = std::atan2(y, x), rho[at] = std::min(std::hypot(x, y), 0.99);
                sorted.push_back(rho[at]);
            }
        std::sort(sorted.begin(), sorted.end());
        for (const double r : sorted)
            if (radius_values.empty() || r > static_cast<double>(radius_values.back()) + 1e-6)
                radius_values.push_back(static_cast<float>(r));
        const Floats distinct = radius_values;
        classes = std::max(24, static_cast<int>(distinct.size() + 7) / 8 * 8);  // 22 radii in registers of eight
        radius_values.resize(static_cast<size_t>(classes + LANES), 0.0f);
        class_values.assign(cells, 0);
        wave_values.assign(FREQUENCIES * 2 * cells, 0.0f);
        for (int64_t i = 0; i < pairs; i++)
            for (int64_t j = 0; j < width; j++) {
                const size_t at = static_cast<size_t>(i * stride + j);
                const auto nearest = std::lower_bound(distinct.begin(), distinct.end(), static_cast<float>(rho[at]) - 5e-7f);
                class_values[at] = static_cast<int32_t>(nearest - distinct.begin());
                for (int q = 0; q < FREQUENCIES; q++) {
                    float* wave = &wave_values[static_cast<size_t>((q * pairs + i) * 2 * stride + j)];
                    wave[0] = static_cast<float>(std::cos(q * angle[at]));
                    wave[stride] = static_cast<float>(std::sin(q * angle[at]));
                }
            }
        quarter_up();
        waves = wave_values.data(), radius_class = class_values.data(), radii = radius_values.data();
    }
};

// Records and profiles of `count` blocks from `first` on, in this thread's scratch memory.
struct Prepared {
    Record* records;
    float *profile = nullptr, *slopes = nullptr;

    Prepared(const PackedTier& t, const Packed& p, int64_t first, int64_t count, bool differentiate = false) {
        const int64_t n = count * p.records();
        records = static_cast<Record*>(scratch_records.get(static_cast<size_t>(n + 32 * p.parts()) * sizeof(Record)));
        t.records(p, first, count, records);
        if (p.kind != RADIAL || !p.tables) return;
        const size_t bytes = static_cast<size_t>(n * p.tables->classes + LANES) * sizeof(float);  // vectors may overhang
        profile = static_cast<float*>(scratch_profiles.get(bytes));
        if (differentiate) slopes = static_cast<float*>(scratch_slopes.get(bytes));
        t.profiles(*p.tables, records, n, profile, slopes);
    }
};

float factor(const Packed& p, int64_t row) { return *p.scale * (p.row_scale ? half_to_float(p.row_scale[row]) : 1.0f); }

// Pieces of rows [begin, end), each within one block row: whole ones of small blocks, a few rows of large ones.
struct Piece {
    int64_t I, i0, i1, row;
};
std::vector<Piece> pieces(const Packed& p, int64_t begin, int64_t end) {
    std::vector<Piece> out;
    for (int64_t row = begin; row < end;) {
        const int64_t I = row / p.height, i0 = row % p.height, left = std::min(p.height - i0, end - row);
        const int64_t n = p.tables ? left : std::min(left, ROWS);
        out.push_back({I, i0, i0 + n, row});
        row += n;
    }
    return out;
}

void expand_piece(const PackedTier& t, const Packed& p, const Piece& at, float* out) {
    const Prepared ready(t, p, at.I * p.block_cols, p.block_cols);
    std::vector<float> factors(static_cast<size_t>(at.i1 - at.i0));
    for (int64_t k = 0; k < at.i1 - at.i0; k++) factors[static_cast<size_t>(k)] = factor(p, at.row + k);
    t.expand(p, at.I, at.i0, at.i1, ready.records, ready.profile, factors.data(), out);
}

// Sums and differences of the two ends of a side; the middle of an odd side is both. Only the first
// `given` values are there; the others are zero.
void fold(const float* from, int64_t given, int64_t side, float* sums, float* differences) {
    float padded[64];
    if (given < side) {
        std::copy_n(from, given, padded);
        std::fill(padded + given, padded + side, 0.0f);
        from = padded;
    }
    const int64_t half = side / 2;
    for (int64_t j = 0; j < half; j++) {
        const float left = from[j], right = from[side - 1 - j];
        sums[j] = left + right, differences[j] = left - right;
    }
    if (side % 2) sums[half] = differences[half] = from[half];
}

// The inverse for results: the first half of a side is the sum of an even and an odd part, the other their difference.
void unfold(const float* even, const float* odd, int64_t wanted, int64_t side, float* to) {
    const int64_t half = (side + 1) / 2;
    for (int64_t j = 0; j < std::min(half, wanted); j++) to[j] = even[j] + odd[j];
    for (int64_t j = half; j < wanted; j++) to[j] = even[side - 1 - j] - odd[side - 1 - j];
}

Floats fold_columns(const Packed& p, const float* x, int64_t batch, int threads) {
    const int64_t half = p.tables->half, wide = folded_stride(p);
    Floats out(static_cast<size_t>(batch * wide));
    parallel(batch, threads, [&](int64_t b) {
        for (int64_t J = 0; J < p.block_cols; J++) {
            float* to = out.data() + b * wide + J * 2 * half;
            fold(x + b * p.cols + J * p.width, std::min(p.width, p.cols - J * p.width), p.width, to, to + half);
        }
    });
    return out;
}

}  // namespace

const Tables* packed_tables(int kind, int64_t height, int64_t width, int stages) {
    static std::mutex lock;
    static std::map<std::tuple<bool, int64_t, int64_t, int>, std::unique_ptr<Shape>> shapes;
    const bool fixed = kind == PACKED64;
    const std::lock_guard<std::mutex> held(lock);
    std::unique_ptr<Shape>& shape = shapes[{fixed, height, width, fixed ? stages : 0}];
    if (!shape) shape = std::make_unique<Shape>(kind, height, width, stages);
    return shape.get();
}

void packed_decode(const Packed& p, int64_t begin, int64_t end, float* out, int threads) {
    const PackedTier& t = packed_tier();
    const std::vector<Piece> all = pieces(p, begin, end);
    parallel(static_cast<int64_t>(all.size()), (end - begin) * p.cols < ALONE ? 1 : threads, [&](int64_t k) {
        const Piece& at = all[static_cast<size_t>(k)];
        expand_piece(t, p, at, out + (at.row - begin) * p.cols);
    });
}

void packed_rows(const Packed& p, const int64_t* index, int64_t count, float* out, int threads) {
    const PackedTier& t = packed_tier();
    parallel(count, count * p.cols < ALONE ? 1 : threads, [&](int64_t k) {
        const int64_t row = index[k], i = row % p.height;
        expand_piece(t, p, {row / p.height, i, i + 1, row}, out + k * p.cols);
    });
}

void packed_matmul(const Packed& p, const float* x, int64_t batch, float* y, int threads) {
    const PackedTier& t = packed_tier();
    const std::vector<Piece> all = pieces(p, 0, p.rows);
    threads = p.rows * p.cols * batch < ALONE ? 1 : threads;
    if (!p.tables) {
        parallel(static_cast<int64_t>(all.size()), threads, [&](int64_t k) {
            const Piece& at = all[static_cast<size_t>(k)];
            float* tile = static_cast<float*>(scratch_tile.get(static_cast<size_t>(ROWS * p.cols) * 4));
            expand_piece(t, p, at, tile);
            for (int64_t b = 0; b < batch; b++)
                for (int64_t i = 0; i < at.i1 - at.i0; i++)
                    y[b * p.rows + at.row + i] = t.dot(tile + i * p.cols, x + b * p.cols, p.cols);
        });
        return;
    }
    const int64_t pairs = p.tables->pairs;
    const Floats folded = fold_columns(p, x, batch, threads);
    parallel(p.block_rows, threads, [&](int64_t I) {
        const Prepared ready(t, p, I * p.block_cols, p.block_cols);
        float* parts = static_cast<float*>(scratch_tile.get(static_cast<size_t>(batch * 2 * pairs) * 4));
        t.product(p, ready.records, ready.profile, folded.data(), batch, parts);
        const int64_t first = I * p.height, count = std::min(p.height, p.rows - first);
        float factors[64];
        for (int64_t i = 0; i < count; i++) factors[i] = factor(p, first + i);
        for (int64_t b = 0; b < batch; b++) {
            const float *even = parts + b * 2 * pairs, *odd = even + pairs;
            float* to = y + b * p.rows + first;
            unfold(even, odd, count, p.height, to);
            for (int64_t i = 0; i < count; i++) to[i] *= factors[i];
        }
    });
}

void packed_backward(const Packed& p, const float* x, const float* y, int64_t batch, float* d_x, float* const* out,
                     int threads) {
    const PackedTier& t = packed_tier();
    const Tables& tables = *p.tables;
    const int64_t pairs = tables.quarter * LANES / tables.half, stride = folded_stride(p);
    threads = p.rows * p.cols * batch < ALONE ? 1 : threads;
    // y times the factors of the rows, as sums and differences of mirrored rows; the middle row of an odd count is both.
    // Rows of a block row are neighbours: from row to row of a wide matrix, all would meet in a few sets of the cache.
    // Pairs are as many as the cells of a quarter, which fill its vectors; vectors may overhang.
    Floats folded_y(static_cast<size_t>(batch * p.block_rows * 2 * pairs + LANES));
    std::vector<float> factors(static_cast<size_t>(p.rows));
    for (int64_t i = 0; i < p.rows; i++)
        factors[static_cast<size_t>(i)] = p.row_scale ? half_to_float(p.row_scale[i]) : 1.0f;
    parallel(batch, threads, [&](int64_t b) {
        for (int64_t I = 0; I < p.block_rows; I++) {
            float *to = folded_y.data() + (I * batch + b) * 2 * pairs, scaled[64];
            const int64_t first = I * p.height, count = std::min(p.height, p.rows - first);
            for (int64_t i = 0; i < count; i++)
                scaled[i] = y[b * p.rows + first + i] * factors[static_cast<size_t>(first + i)];
            fold(scaled, count, p.height, to, to + pairs);
        }
    });
    const Floats folded_x = out ? fold_columns(p, x, batch, threads) : Floats();
    Floats folded_d(d_x ? static_cast<size_t>(batch * stride) : 0);
    // Columns of blocks that a thread takes at once: their sums stay in its first-level cache.
    constexpr int64_t most = 32;
    const int64_t pieces = (p.block_cols + most - 1) / most, columns = (p.block_cols + pieces - 1) / pieces;
    parallel(pieces, threads, [&](int64_t k) {
        t.backward(p, k * columns, std::min((k + 1) * columns, p.block_cols), out ? folded_x.data() : nullptr,
                   folded_y.data(), batch, d_x ? folded_d.data() : nullptr, out);
    });
    if (!d_x) return;
    const float scale = *p.scale;
    parallel(batch, threads, [&](int64_t b) {
        for (int64_t J = 0; J < p.block_cols; J++) {
            const float *even = folded_d.data() + b * stride + J * 2 * tables.half, *odd = even + tables.half;
            const int64_t columns = std::min(p.width, p.cols - J * p.width);
            float* to = d_x + b * p.cols + J * p.width;
            unfold(even, odd, columns, p.width, to);
            for (int64_t j = 0; j < columns; j++) to[j] *= scale;
        }
    });
}

double packed_amplitudes(const Packed& p, float* amp, const float* weights, float* const* out, int threads) {
    // Of every block row, added up in order: no dependence on the number of threads.
    std::vector<double> values(static_cast<size_t>(p.block_rows));
    const PackedTier& t = packed_tier();
    const int64_t wide = p.block_cols * p.records();
    const float scale = *p.scale;
    parallel(p.block_rows, p.block_rows * wide < ALONE / 64 ? 1 : threads, [&](int64_t I) {
        const Prepared ready(t, p, I * p.block_cols, p.block_cols);
        const Record* r = ready.records;
        const int64_t first = I * wide;
        if (amp)
            for (int64_t k = 0; k < wide; k++) amp[first + k] = r[k].amp;
        if (!weights) return;
        double value[4] = {};
        for (int64_t k = 0; k < wide; k++) {
            const float weight = weights[first + k];
            value[k % 4] += static_cast<double>(weight * r[k].amp);
            out[0][first + k] = weight * r[k].slope * scale, out[1][first + k] = weight * r[k].v * scale;
        }
        values[static_cast<size_t>(I)] = (value[0] + value[1]) + (value[2] + value[3]);
    });
    double total = 0;
    for (const double value : values) total += value;
    return total;
}

void packed_contract(const Packed& p, int64_t begin, int64_t end, const float* gradient, Sums* out, int threads) {
    const PackedTier& t = packed_tier();
    const std::vector<Piece> rows = pieces(p, begin, end);
    const int64_t wide = p.block_cols * p.stages;
    threads = (end - begin) * p.cols < ALONE ? 1 : threads;
    // Rows of large blocks meet in the same sums: every piece has its own, added up in order.
    std::vector<Sums> partial(p.tables ? 0 : rows.size() * static_cast<size_t>(wide));
    parallel(static_cast<int64_t>(rows.size()), threads, [&](int64_t k) {
        const Piece& at = rows[static_cast<size_t>(k)];
        const Prepared ready(t, p, at.I * p.block_cols, p.block_cols, true);
        Sums* to = p.tables ? out + at.I * wide : partial.data() + k * wide;
        t.contract(p, at.I, at.i0, at.i1, 0, p.block_cols, ready.records, ready.profile, ready.slopes,
                   gradient + (at.row - begin) * p.cols, to);
    });
    for (size_t k = 0; k < partial.size(); k++) {
        Sums& to = out[rows[k / static_cast<size_t>(wide)].I * wide + static_cast<int64_t>(k) % wide];
        to.value += partial[k].value, to.radius += partial[k].radius, to.angle += partial[k].angle;
    }
}

}  // namespace rbe
