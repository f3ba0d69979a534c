// What does not depend on the instruction set: choosing the tier, threads, scales, edges.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string_view>
#include <vector>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "threads.h"
#include "trellis.h"

namespace rbe {

#ifdef _OPENMP
std::atomic<bool> in_child{false};
#endif

namespace {

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { in_child = true; });
#endif

constexpr int64_t PACKED = int64_t{4} << 20;  // bytes of packed activations that a call aims to stay under
constexpr int64_t ALONE = 1024;  // blocks (times rows of x, by fours) below which a second thread does not pay

const char* const ORDER[] = {"portable", "avx2", "avx512", "zen4", "amx"};

const Tier* find(std::string_view name) {
    if (name == "portable") return &portable_tier();
#if defined(RBE_X86_TIERS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    if (name == "avx2" && avx2) return &avx2_tier();
    if (name == "avx512" && avx512) return &avx512_tier();
    if (name == "zen4" && avx512 && __builtin_cpu_is("amd")) return &zen4_tier();
    if (name == "amx" && avx512 && amx_permitted()) return &amx_tier();
#endif
    return nullptr;
}

const Tier* best(std::string_view limit) {
    const Tier* found = &portable_tier();
    for (const char* name : ORDER) {
        if (const Tier* t = find(name)) found = t;
        if (limit == name) break;
    }
    return found;
}

std::atomic<const Tier*> current{nullptr};

thread_local Scratch scratch_rows, scratch_values, scratch_packed, scratch_sums;

// Integers X with x = X * unit, |X| < 2^30 (or |X| <= 127), for one row. Returns the unit; NaN where x is not finite.
double to_fixed(const Tier& t, const float* x, int64_t n, bool int8, int32_t* out) {
    const float top = t.largest(x, n);
    if (!std::isfinite(top) || top == 0) {
        std::fill_n(out, n, 0);
        return top == 0 ? 1.0 : std::numeric_limits<double>::quiet_NaN();
    }
    int exponent;
    if (int8) {
        // Bring the row near 1 first, so that 127 / top neither overflows nor loses bits on denormals.
        std::frexp(top, &exponent);
        const float near = std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
        const float factor = 127.0f / (top * near);
        t.fixed_point(x, n, near, factor, out);
        return 1.0 / (static_cast<double>(near) * static_cast<double>(factor));
    }
    std::frexp(top, &exponent);  // top < 2^exponent
    const int power = FIXED_BITS - exponent, half = power / 2;
    t.fixed_point(x, n, std::ldexp(1.0f, half), std::ldexp(1.0f, power - half), out);
    return std::ldexp(1.0, -power);
}

}  // namespace

bool tier_available(const char* name) { return find(name) != nullptr; }

bool set_tier(const char* name) {
    const char* limit = std::getenv("RBE_TIER");
    const Tier* t = *name ? find(name) : best(limit ? limit : "amx");
    if (t) current = t;
    return t != nullptr;
}

const Tier& tier() {
    if (!current.load()) set_tier("");
    return *current;
}

namespace {
// A few rows of x, as many as the scratch memory is meant for.
void multiply(const Tier& t, const Matrix& m, Activations a, const float* x, float* y, int threads) {
    const int64_t batch = a.batch;
    a.packed = scratch_packed.get(t.packed_bytes(m, a));
    std::vector<double> units(static_cast<size_t>(batch));
    parallel(batch, batch * a.cols < 32768 ? 1 : threads, [&](int64_t b) {
        float* row = static_cast<float*>(scratch_rows.get(static_cast<size_t>(m.cols) * 4));
        int32_t* values = static_cast<int32_t*>(scratch_values.get(static_cast<size_t>(a.cols + EDGE) * 4));
        std::copy_n(x + b * m.cols, m.cols, row);
        t.rotate(row, m.cols, m.rotation_in);
        std::fill(values + m.cols, values + a.cols + EDGE, 0);
        units[static_cast<size_t>(b)] = to_fixed(t, row, m.cols, a.int8, values) * *m.scale;
        t.pack(m, a, b, values);
    });
    // Bands of a few block rows: large enough to hide the hand-out, small enough to share two unequal cores evenly. An
    // even number of them, because the tiles take two at a time.
    const int64_t work = m.block_rows * m.block_cols * (batch + 3) / 4;
    threads = work < ALONE ? 1 : threads;
    const int64_t pairs = m.block_rows / ((batch > 8 ? 4 : 16) * threads), band = std::clamp<int64_t>(2 * pairs, 2, 8);
    const int64_t bands = (m.block_rows + band - 1) / band;
    std::atomic<int64_t> next{0};
    parallel(threads, threads, [&](int64_t) {
        int64_t* sums = static_cast<int64_t*>(scratch_sums.get(static_cast<size_t>(batch * band * EDGE) * 8));
        for (int64_t k; (k = next.fetch_add(1, std::memory_order_relaxed)) < bands;) {
            const int64_t begin = k * band, end = std::min(begin + band, m.block_rows), stride = band * EDGE;
            t.product(m, a, begin, end, sums, stride);
            const int64_t first = begin * EDGE, count = std::min(end * EDGE, m.rows) - first;
            for (int64_t b = 0; b < batch; b++) {
                float* to = y + b * m.rows + first;
                const int64_t* s = sums + b * stride;
                const double unit = units[static_cast<size_t>(b)];
                if (!m.row_scale) {
                    t.finish(s, count, unit, to);
                    continue;
                }
                for (int64_t r = 0; r < count; r++)
                    to[r] = static_cast<float>(static_cast<double>(s[r]) * unit * half_to_float(m.row_scale[first + r]));
            }
        }
        t.leave();
    });
    rotate_rows(y, batch, m.rows, m.rotation_out, true, threads);
    scratch_packed.trim();
}
}  // namespace

void matmul(const Call& call) {
    const Matrix& m = *call.matrix;
    const Tier& t = tier();
    Activations a{8, m.padded_cols(), call.int8, nullptr};
    const int64_t most = std::clamp<int64_t>(8 * PACKED / static_cast<int64_t>(t.packed_bytes(m, a)), 12, 256);
    for (int64_t b = 0; b < call.batch; b += most) {
        a.batch = std::min(most, call.batch - b);
        multiply(t, m, a, call.x + b * m.cols, call.y + b * m.rows, call.threads);
    }
}

void rotate_rows(float* x, int64_t batch, int64_t n, uint32_t seed, bool back, int threads) {
    if (seed == 0) return;
    const Tier& t = tier();
    parallel(batch, batch * n < 32768 ? 1 : threads,
             [&](int64_t b) { (back ? t.rotate_back : t.rotate)(x + b * n, n, seed); });
}

namespace {
// Calls use(block column, columns in it, codes) for every block of a block row.
template <class F>
void each_block(const Tier& t, const Matrix& m, int64_t block_row, const F& use) {
    constexpr int64_t AT_ONCE = 32;
    int16_t codes[AT_ONCE * EDGE * EDGE];
    for (int64_t j = 0; j < m.block_cols; j++) {
        if (j % AT_ONCE == 0) t.codes(m, block_row, j, std::min(AT_ONCE, m.block_cols - j), codes);
        use(j, std::min<int64_t>(EDGE, m.cols - j * EDGE), codes + j % AT_ONCE * EDGE * EDGE);
    }
}

// Scale and row scale of the rows of a block row.
struct Factors {
    float of[EDGE] = {};
    Factors(const Matrix& m, int64_t block_row) {
        for (int64_t r = 0; r < std::min<int64_t>(EDGE, m.rows - block_row * EDGE); r++)
            of[r] = *m.scale * (m.row_scale ? half_to_float(m.row_scale[block_row * EDGE + r]) : 1.0f);
    }
};
}  // namespace

void decode_columns(const Matrix& m, int64_t begin, int64_t end, float* out, int threads) {
    const Tier& t = tier();
    const int64_t width = end - begin, bands = (width + EDGE - 1) / EDGE;
    // A few columns of blocks at a time, all block rows of them: what is being written stays in the second-level cache.
    constexpr int64_t AT_ONCE = 8;
    parallel((m.block_cols + AT_ONCE - 1) / AT_ONCE, threads, [&](int64_t k) {
        int16_t codes[AT_ONCE * EDGE * EDGE];
        const int64_t first = k * AT_ONCE, blocks = std::min(AT_ONCE, m.block_cols - first);
        const int64_t columns = std::min(blocks * EDGE, m.cols - first * EDGE);
        for (int64_t band = 0; band < bands; band++) {
            const int64_t i = begin / EDGE + band, count = std::min<int64_t>(EDGE, width - band * EDGE);
            const Factors factor(m, i);
            t.codes(m, i, first, blocks, codes);
            for (int64_t c = 0; c < columns; c++) {
                float* to = out + (first * EDGE + c) * width + band * EDGE;
                if (count == EDGE)
                    for (int r = 0; r < EDGE; r++) to[r] = static_cast<float>(codes[EDGE * c + r]) * factor.of[r];
                else
                    for (int64_t r = 0; r < count; r++) to[r] = static_cast<float>(codes[EDGE * c + r]) * factor.of[r];
            }
        }
    });
}

void rows(const Matrix& m, const int64_t* index, int64_t count, float* out, int threads) {
    const Tier& t = tier();
    parallel(count, count * m.block_cols < ALONE ? 1 : threads, [&](int64_t k) {
        const int64_t row = index[k];
        const float factor = Factors(m, row / EDGE).of[row % EDGE];
        float* to = out + k * m.cols;
        each_block(t, m, row / EDGE, [&](int64_t j, int64_t columns, const int16_t* codes) {
            for (int64_t c = 0; c < columns; c++)
                to[j * EDGE + c] = static_cast<float>(codes[EDGE * c + row % EDGE]) * factor;
        });
        t.rotate_back(to, m.cols, m.rotation_in);
    });
}

void decode(const Matrix& m, float* out, int threads) {
    const Tier& t = tier();
    parallel(m.block_rows, threads, [&](int64_t i) {
        const int64_t count = std::min<int64_t>(EDGE, m.rows - i * EDGE);
        const Factors factor(m, i);
        float* band = out + i * EDGE * m.cols;
        each_block(t, m, i, [&](int64_t j, int64_t columns, const int16_t* codes) {
            for (int64_t r = 0; r < count; r++)
                for (int64_t c = 0; c < columns; c++)
                    band[r * m.cols + j * EDGE + c] = static_cast<float>(codes[EDGE * c + r]) * factor.of[r];
        });
        for (int64_t r = 0; r < count; r++) t.rotate_back(band + r * m.cols, m.cols, m.rotation_in);
    });
    if (m.rotation_out == 0) return;
    // The output rotation runs down the columns: panels of columns are turned, rotated and turned back.
    constexpr int64_t PANEL = 16;
    parallel((m.cols + PANEL - 1) / PANEL, threads, [&](int64_t p) {
        const int64_t first = p * PANEL, width = std::min(PANEL, m.cols - first);
        float* turned = static_cast<float*>(scratch_rows.get(static_cast<size_t>(width * m.rows) * 4));
        for (int64_t r = 0; r < m.rows; r++)
            for (int64_t c = 0; c < width; c++) turned[c * m.rows + r] = out[r * m.cols + first + c];
        for (int64_t c = 0; c < width; c++) t.rotate_back(turned + c * m.rows, m.rows, m.rotation_out);
        for (int64_t r = 0; r < m.rows; r++)
            for (int64_t c = 0; c < width; c++) out[r * m.cols + first + c] = turned[c * m.rows + r];
    });
}

}  // namespace rbe
