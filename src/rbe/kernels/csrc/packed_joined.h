// Derivatives of products with packed128 blocks of W x W, their quarters side by side: a vector is a row of both (see
// `Tables`), so that one sum over rows gives [P Q] of packed_backward.h, one load or store serves both parts of a row
// of x, and nothing is added up across lanes but the sums over a block. Included after packed_walk.h.
#pragma once

constexpr int HALF = W / 2;

// Where q is odd, the sines belong to the even columns of x, and halves change places: `side` changes them, and `row`
// takes the entries of a row of y, [even odd], for row i of the quarters.
struct Picks {
    VI row[2][HALF], side[2];
    Picks() {
        for (int odd = 0; odd < 2; odd++)
            for (int k = 0; k < W; k++) {
                const int part = k / HALF ^ odd;
                side[odd][k] = part * HALF + k % HALF;
                for (int i = 0; i < HALF; i++) row[odd][i][k] = part * HALF + i;
            }
    }
};

// What is constant for a record while rows pass by. `amp` is in the order of x and d, as q demands.
struct Joined {
    const float *wave, *profile, *slopes, *x;
    float* d;
    VF amp;
    int odd;
};

// The sums over a block: of G f [cos sin], and of G rho f' [cos sin].
struct Found {
    VF value{}, slope{};
};

// One row, for which the matrices of a radial record are not worth being formed.
template <int KIND, bool BY_X, bool BY_SEEDS, int COUNT>
inline __attribute__((always_inline)) void one_row(const Tables& t, const Picks& picks, const Joined* of,
                                                   const float* y, Found* found) {
    VF some[HALF];
#pragma GCC unroll 8
    for (int i = 0; i < HALF; i++) {
        VF v = pick(load(y), picks.row[0][i]);
        hold(v);
        some[i] = v;
    }
    unrolled<COUNT>([&](auto o) __attribute__((always_inline)) {
        VF value{}, slope{};
#pragma GCC unroll 8
        for (int i = 0; i < HALF; i++) {
            const VF both = load(of[o].wave + i * W) * some[i];
            if (KIND == RADIAL) {
                const VI cell = loadi(t.joined_class + i * W);
                value += lookup(of[o].profile, t.classes, cell) * both;
                if (BY_SEEDS) slope += lookup(of[o].slopes, t.classes, cell) * both;
            } else {
                value += both;
            }
        }
        const VI side = picks.side[of[o].odd];
        if (BY_X) store(of[o].d, load(of[o].d) + pick(value, side) * of[o].amp);
        if (!BY_SEEDS) return;
        const VF x = pick(load(of[o].x), side);
        found[o].value = value * x, found[o].slope = slope * x;
    });
}

// Several rows of a radial record: its matrix of f and G stay in registers, and every row is read once.
template <bool BY_X, bool BY_SEEDS>
inline void rows_of(const Tables& t, const Picks& picks, const Joined& of, const float* y, int64_t rows, Found& found) {
    const VI side = picks.side[of.odd];
    VF matrix[HALF], g[HALF] = {}, value{};
    VI at[HALF];
#pragma GCC unroll 8
    for (int i = 0; i < HALF; i++) {
        at[i] = picks.row[of.odd][i];
        matrix[i] = pick(load(of.wave + i * W) * lookup(of.profile, t.classes, loadi(t.joined_class + i * W)), side);
    }
    for (int64_t b = 0; b < rows; b++) {
        const VF row = load(y + b * W), x = BY_SEEDS ? load(of.x + b * W) : VF{};
        VF sum{};
#pragma GCC unroll 8
        for (int i = 0; i < HALF; i++) {
            const VF some = pick(row, at[i]);
            sum += matrix[i] * some;
            if (BY_SEEDS) g[i] += some * x;
        }
        if (BY_X) store(of.d + b * W, load(of.d + b * W) + sum * of.amp);
        if (BY_SEEDS) value += sum * x;
    }
    if (!BY_SEEDS) return;
    found.value = pick(value, side);
#pragma GCC unroll 8
    for (int i = 0; i < HALF; i++) {
        const VF slope = load(of.wave + i * W) * lookup(of.slopes, t.classes, loadi(t.joined_class + i * W));
        found.slope += slope * pick(g[i], side);
    }
}

template <int KIND, bool BY_X, bool BY_SEEDS>
void joined_of(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
               float* const* out) {
    static const Picks picks;
    const Tables& t = *p.tables;
    const int64_t classes = KIND == RADIAL ? t.classes : 0;
    const auto serve = [&](auto count, auto few, const Step& step, Four* total) __attribute__((always_inline)) {
        constexpr int COUNT = count();
        Joined of[COUNT];
        Found found[4];
        unrolled<COUNT>([&](auto o) __attribute__((always_inline)) {
            const Record& r = step.r[o];
            const int64_t column = step.column(o) * (few() ? 1 : step.rows) * W;
            const int odd = r.q & 1;  // known to nobody beforehand: a branch would be guessed wrongly every other time
            of[o] = {t.joined + r.q * HALF * W, step.profile + o * classes, step.slopes + o * classes,
                     BY_SEEDS ? step.x + column : nullptr, BY_X ? step.d + column : nullptr,
                     pick(halves(r.amp * r.u, r.amp * r.v), picks.side[odd]), odd};
        });
        if constexpr (few()) {
            one_row<KIND, BY_X, BY_SEEDS, COUNT>(t, picks, of, step.y, found);
        } else if constexpr (KIND == RADIAL) {
            unrolled<COUNT>([&](auto o) __attribute__((always_inline)) {
                rows_of<BY_X, BY_SEEDS>(t, picks, of[o], step.y, step.rows, found[o]);
            });
        }
        if (!BY_SEEDS) return;
        sum_halves(found[0].value, found[1].value, found[2].value, found[3].value, total);
        if (KIND == RADIAL) sum_halves(found[0].slope, found[1].slope, found[2].slope, found[3].slope, total + 2);
    };
    walk<KIND, BY_X, BY_SEEDS>(p, J0, J1, x, y, batch, d_x, out, HALF, W, HALF, serve);
}

void backward_joined(const Packed& p, int64_t J0, int64_t J1, const float* x, const float* y, int64_t batch, float* d_x,
                     float* const* out) {
    const auto run = [&](auto kind) {
        constexpr int KIND = kind();
        if (d_x && out) joined_of<KIND, true, true>(p, J0, J1, x, y, batch, d_x, out);
        else if (d_x) joined_of<KIND, true, false>(p, J0, J1, x, y, batch, d_x, out);
        else joined_of<KIND, false, true>(p, J0, J1, x, y, batch, d_x, out);
    };
    if (p.kind == FAITHFUL) run(std::integral_constant<int, FAITHFUL>());
    else run(std::integral_constant<int, RADIAL>());
}
