// The way of a backward pass through the seeds, whatever computes their derivatives. Included after packed_product.h.
#pragma once

// Calls run(k) for k = 0 ... COUNT - 1, each a constant: what a loop indexes stays in memory.
template <int COUNT, class F>
inline __attribute__((always_inline)) void unrolled(const F& run) {
    const auto each = [&]<int... K>(std::integer_sequence<int, K...>) __attribute__((always_inline)) {
        (run(std::integral_constant<int, K>()), ...);
    };
    each(std::make_integer_sequence<int, COUNT>());
}

// Records of one block row that follow each other, and some rows.
struct Step {
    const Record* r;
    const float *profile, *slopes;  // `classes` floats a record
    const float* y;                 // of this block row, row after row
    const float* x;                 // folded, block column by block column, row after row; null if seeds have no turn
    float* d;                       // derivatives by x in the same order, or null
    int64_t first, per_block, rows;  // the first record's number among those of these columns

    int64_t column(int64_t o) const { return (first + o) / per_block; }
};

// The derivatives of four records, side by side, from the sums over their blocks of G f cos, G f sin and, in radial
// mode, G rho f' cos and G rho f' sin: as `add_sums`, times the scale but for the value.
template <int KIND>
inline void conclude(const Record* r, const Four* total, float scale, Four* out) {
    Four field[4];
    turned(four(&r[0].u), four(&r[1].u), four(&r[2].u), four(&r[3].u), field);
    const Four q = {static_cast<float>(r[0].q), static_cast<float>(r[1].q), static_cast<float>(r[2].q),
                    static_cast<float>(r[3].q)};
    const Four u = field[0], v = field[1], amp = field[2], slope = field[3];
    const Four value = u * total[0] + v * total[1];
    out[0] = amp * value;
    out[1] = scale * slope * (KIND == RADIAL ? u * total[2] + v * total[3] : value);
    out[2] = scale * amp * q * (v * total[0] - u * total[1]);
}

// Goes through the seeds of block columns [J0, J1) and calls run(count, few, step, total) for `count` records, a
// constant, at a time: it adds derivatives by folded x to step.d, two times `d_part` floats a row, which are added up
// in steps of `half`, and finds the sums that `conclude` wants. A row of y is `y_row` floats. Inlined, as all of these
// are constants for the common blocks.
template <int KIND, bool BY_X, bool BY_SEEDS, class F>
inline __attribute__((always_inline)) void walk(const Packed& p, int64_t J0, int64_t J1, const float* x,
                                                const float* y, int64_t batch, float* d_x, float* const* out,
                                                int64_t half, int64_t y_row, int64_t d_part, const F& run) {
    thread_local Memory records_memory, profile_memory, slopes_memory, x_memory, d_memory;
    // Rows whose derivatives are added up before the seeds are read again. What a few columns of blocks need of them stays
    // near while block rows pass by.
    constexpr int64_t ROWS = 128, COLUMNS = 4;
    // Records and their profiles that are computed before they are used: in the second level.
    constexpr int64_t READY = 512;
    const Tables& t = *p.tables;
    const int64_t per_block = p.records(), blocks = J1 - J0, wide = blocks * per_block;
    const int64_t tall = std::clamp<int64_t>(READY / wide, 1, p.block_rows), count = tall * wide;
    const int64_t classes = KIND == RADIAL ? t.classes : 0;
    const int64_t x_row = 2 * half, d_row = 2 * d_part, x_stride = folded_stride(p), most = std::min(ROWS, batch);
    Record* ready = reinterpret_cast<Record*>(
        records_memory.get((count + AT_ONCE * p.parts()) * static_cast<int64_t>(sizeof(Record) / 4)));
    float* profile = profile_memory.get(count * classes + LANES);
    float* slopes = BY_SEEDS ? slopes_memory.get(count * classes + LANES) : nullptr;
    float* own_x = BY_SEEDS ? x_memory.get(blocks * most * x_row) : nullptr;
    float* d = BY_X ? d_memory.get(blocks * most * d_row) : nullptr;

    // Records from k on of block columns J ... in block row I0 + i; rows [first, first + rows).
    const auto of_records = [&](auto count, auto few, int64_t I0, int64_t i, int64_t J, int64_t k, int64_t first,
                                int64_t rows) __attribute__((always_inline)) {
        const int64_t at = i * wide + J * per_block + k;
        const float* f_of = profile + at * classes;
        const Step step{ready + at, f_of, BY_SEEDS ? slopes + at * classes : f_of,
                        y + ((I0 + i) * batch + first) * y_row, BY_SEEDS ? own_x : nullptr, BY_X ? d : nullptr,
                        J * per_block + k, per_block, rows};
        Four total[4];
        run(count, few, step, total);
        if (!BY_SEEDS) return;
        Four found[3];
        conclude<KIND>(step.r, total, *p.scale, found);
        const int64_t before = ((I0 + i) * p.block_cols + J0 + J) * p.stages + k;
        for (int m = 0; m < 3; m++) {
            float* to = out[m] + before;
            if (count() == 4) {
                const Four all = first ? found[m] + four(to) : found[m];
                std::memcpy(to, &all, sizeof all);
            } else {
                *to = first ? found[m][0] + *to : found[m][0];
            }
        }
    };
    const auto of_rows = [&](auto few, int64_t I0, int64_t here, int64_t first, int64_t rows) {
        for (int64_t J = 0; J < blocks; J += COLUMNS) {
            const int64_t served = std::min(COLUMNS, blocks - J) * per_block;
            for (int64_t i = 0; i < here; i++) {
                int64_t k = 0;
                for (; k + 4 <= served; k += 4)
                    of_records(std::integral_constant<int, 4>(), few, I0, i, J, k, first, rows);
                for (; k < served; k++)
                    of_records(std::integral_constant<int, 1>(), few, I0, i, J, k, first, rows);
            }
        }
    };

    for (int64_t first = 0; first < batch; first += ROWS) {
        const int64_t stored = std::min(ROWS, batch - first);
        if (BY_X) std::fill_n(d, blocks * stored * d_row, 0.0f);
        if (BY_SEEDS)
            for (int64_t J = 0; J < blocks; J++)
                for (int64_t b = 0; b < stored; b++)
                    std::copy_n(x + (first + b) * x_stride + (J0 + J) * x_row, x_row, own_x + (J * stored + b) * x_row);
        for (int64_t I0 = 0; I0 < p.block_rows; I0 += tall) {
            const int64_t here = std::min(tall, p.block_rows - I0);
            for (int64_t i = 0; i < here; i++) {
                if (I0 + tall + i < p.block_rows) {
                    const int64_t next = (I0 + tall + i) * p.block_cols + J0;
                    ahead(p, next, blocks);
                    for (int64_t k = 0; BY_SEEDS && k < wide; k += 16)
                        for (int m = 0; m < 3; m++) __builtin_prefetch(out[m] + next * p.stages + k, 1);
                }
                records(p, (I0 + i) * p.block_cols + J0, blocks, ready + i * wide);
            }
            if (KIND == RADIAL) profiles(t, ready, here * wide, profile, slopes);
            if (batch <= FEW) of_rows(std::true_type(), I0, here, first, stored);
            else of_rows(std::false_type(), I0, here, first, stored);
        }
        if (!BY_X) continue;
        for (int64_t J = 0; J < blocks; J++)
            for (int64_t b = 0; b < stored; b++)
                for (int m = 0; m < 2; m++) {
                    const float* from = d + (J * stored + b) * d_row + m * d_part;
                    float* to = d_x + (first + b) * x_stride + (J0 + J) * x_row + m * half;
                    for (int64_t j = 0; j < half; j++) {
                        float total = 0;
                        for (int64_t k = j; k < d_part; k += half) total += from[k];
                        to[j] = total;
                    }
                }
    }
}

