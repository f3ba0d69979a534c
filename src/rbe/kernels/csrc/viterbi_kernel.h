// The Viterbi pass, compiled once per tier: the including file defines RBE_VITERBI_TIER and the vector operations.
// No std:: here: an inline function compiled for AVX-512 must not be shared with the other tiers.
//
// A state is a window of L bits, newest highest. Weight t shifts b(t) new bits in, so states that differ only in their
// lowest b(t) bits (a group) have the same successors and only the cheapest of a group can go on:
//     cost_t[s]       = group_t[s mod 2^(L - b(t))] + (x_t - code(s))^2
//     group_{t+1}[g]  = min over j of cost_t[(g << b(t+1)) | j]
// cost_t never exists in memory. With in = b(t), out = b(t+1) and s = (g << out) | j, g = (top << (L - in - out)) | h,
// the pass walks h in vectors, then top, then j: the codes are stored in exactly that order and stream through once,
// group_t in the order h, j. The minimum over j is taken between vectors; only the store of the minima is a shuffle.
//
// Walking back asks which j won in one group a weight. Either a bit of every comparison is kept, or, where a tier finds
// those bits dear and memory still near (kMostKept), all group_t are, and what is asked is compared again.
#include "viterbi.h"

namespace rbe::viterbi {
namespace RBE_VITERBI_TIER {

constexpr float kNever = 1e30f;

// Position of state s = (top, h, j) among the codes of a parity, and of (h, j) among the costs of the groups.
inline size_t code_position(int window, int in, int out, uint32_t s) {
    const uint32_t j = s & ((1u << out) - 1), g = s >> out;
    const uint32_t h = g & ((1u << (window - in - out)) - 1), top = g >> (window - in - out);
    return (((size_t(h / kLanes) << in | top) << out | j) * kLanes) + h % kLanes;
}

inline size_t cost_position(int out, uint32_t index) {
    const uint32_t j = index & ((1u << out) - 1), h = index >> out;
    return (size_t(h / kLanes) << out | j) * kLanes + h % kLanes;
}

inline size_t order(const Trellis& trellis, int parity, uint32_t state) {
    return code_position(trellis.window, new_bits(trellis.w, parity), new_bits(trellis.w, parity + 1), state);
}

// The cheapest of the 2^kOut states [kFirst, kFirst + kCount) of kLanes groups; each comparison leaves one bit a lane.
template <int kOut, int kFirst, int kCount, bool kWeighted, bool kKeep>
inline Vector cheapest(const float* codes, const float* costs, Vector x, Vector weight, uint8_t* choices, size_t row) {
    if constexpr (kCount == 1) {
        const Vector d = sub(x, load(codes + kFirst * kLanes));
        Vector e = mul(d, d);
        if constexpr (kWeighted) e = mul(e, weight);
        return add(load(costs + kFirst * kLanes), e);
    } else {
        constexpr int kHalf = kCount / 2;
        const Vector a = cheapest<kOut, kFirst, kHalf, kWeighted, kKeep>(codes, costs, x, weight, choices, row);
        const Vector b = cheapest<kOut, kFirst + kHalf, kHalf, kWeighted, kKeep>(codes, costs, x, weight, choices, row);
        // Comparisons are numbered as a heap: the root is 1, the two halves of node n are 2 n and 2 n + 1.
        constexpr int kNode = (1 << kOut) / kCount + kFirst / kCount;
        if constexpr (!kKeep) store_less(choices + (kNode - 1) * row, b, a);
        return minimum(a, b);
    }
}

// One weight. `to` is written in the order of the next weight, whose groups again have 2^kIn states.
template <int kIn, int kOut, bool kWeighted, bool kKeep>
void step(int window, const float* codes, const float* from, float* to, uint8_t* choices, float x_value, float weight_value) {
    const size_t inner = size_t(1) << (window - kIn - kOut);
    const size_t row = (size_t(1) << (window - kOut)) / 8;
    const Vector x = broadcast(x_value), weight = broadcast(weight_value);
    if (inner >= kLanes << kIn) {  // then `top` is an offset in all that is written
        for (size_t h = 0; h < inner; h += kLanes) {
            float* split = to + ((h >> kIn) / kLanes << kIn) * kLanes + (h >> kIn) % kLanes;
            if constexpr ((1 << kIn) > kLanes) split += (h & ((1 << kIn) - 1)) * kLanes;
#pragma GCC unroll 16
            for (size_t top = 0; top < (size_t(1) << kIn); top++) {
                const Vector best =
                    cheapest<kOut, 0, 1 << kOut, kWeighted, kKeep>(codes, from, x, weight, choices + (top * inner + h) / 8, row);
                codes += kLanes << kOut;
                store_split<kIn>(split + top * inner, best);
            }
            from += kLanes << kOut;
        }
        return;
    }
    for (size_t h = 0; h < inner; h += kLanes) {
        for (size_t top = 0; top < (size_t(1) << kIn); top++) {
            const size_t g = top * inner + h;
            const Vector best = cheapest<kOut, 0, 1 << kOut, kWeighted, kKeep>(codes, from, x, weight, choices + g / 8, row);
            codes += kLanes << kOut;
            // Groups g ... g + kLanes - 1 are lanes of 2^kIn different vectors of the next weight.
            float* split = to + ((g >> kIn) / kLanes << kIn) * kLanes + (g >> kIn) % kLanes;
            if constexpr ((1 << kIn) > kLanes) split += (g & ((1 << kIn) - 1)) * kLanes;
            store_split<kIn>(split, best);
        }
        from += kLanes << kOut;
    }
}

using Step = void (*)(int, const float*, const float*, float*, uint8_t*, float, float);

template <bool kWeighted, bool kKeep>
Step choose(int in, int out) {
    switch (in * 8 + out) {
        case 0 * 8 + 1: return step<0, 1, kWeighted, kKeep>;
        case 1 * 8 + 0: return step<1, 0, kWeighted, kKeep>;
        case 1 * 8 + 1: return step<1, 1, kWeighted, kKeep>;
        case 1 * 8 + 2: return step<1, 2, kWeighted, kKeep>;
        case 2 * 8 + 1: return step<2, 1, kWeighted, kKeep>;
        case 2 * 8 + 2: return step<2, 2, kWeighted, kKeep>;
        case 2 * 8 + 3: return step<2, 3, kWeighted, kKeep>;
        case 3 * 8 + 2: return step<3, 2, kWeighted, kKeep>;
        case 3 * 8 + 3: return step<3, 3, kWeighted, kKeep>;
        case 3 * 8 + 4: return step<3, 4, kWeighted, kKeep>;
        case 4 * 8 + 3: return step<4, 3, kWeighted, kKeep>;
        default: return step<4, 4, kWeighted, kKeep>;
    }
}

inline size_t costs_bytes(const Trellis& trellis) {
    const int even = new_bits(trellis.w, 0), odd = new_bits(trellis.w, 1);
    return sizeof(float) << (trellis.window - (even < odd ? even : odd));
}

inline bool keeps_costs(const Trellis& trellis) { return costs_bytes(trellis) <= kMostKept; }

template <bool kWeighted>
Step choose(const Trellis& trellis, int parity) {
    const int in = new_bits(trellis.w, parity), out = new_bits(trellis.w, parity + 1);
    if constexpr (kMostKept > 0)
        if (keeps_costs(trellis)) return choose<kWeighted, true>(in, out);
    return choose<kWeighted, false>(in, out);
}

inline size_t kept_bytes(const Trellis& trellis) {
    if (keeps_costs(trellis)) return costs_bytes(trellis);
    size_t most = 0;
    for (int p = 0; p < 2; p++) {
        const int out = new_bits(trellis.w, p);
        const size_t bytes = (((size_t(1) << out) - 1) << (trellis.window - out)) / 8;
        most = bytes > most ? bytes : most;
    }
    return most;
}

struct Pass {
    const Trellis& trellis;
    const Scratch& scratch;
    const float* x;
    const float* weight;
    Step steps[2];
    bool keeps;

    // Walk `count` weights from `first` on and leave their states in scratch.path. `seam` >= 0 is the state before the
    // first and of the last weight; -1 leaves both ends open, and then the first half of the states is not wanted: it
    // leads to the others. Returns the cost.
    float walk(int first, int count, int seam) const {
        const int window = trellis.window, w = trellis.w;
        const uint32_t states = 1u << window;
        const int wanted = seam < 0 ? count / 2 - 1 : 0;
        const auto costs = [&](int i) {
            return keeps && i >= wanted ? reinterpret_cast<float*>(scratch.kept + i * scratch.kept_bytes) : scratch.costs[i & 1];
        };
        float* from = costs(0);
        const int enter = new_bits(w, first);
        const size_t groups = states >> enter;
        for (size_t i = 0; i < groups; i++) from[i] = seam < 0 ? 0.0f : kNever;
        if (seam >= 0) from[cost_position(new_bits(w, first + 1), uint32_t(seam) >> enter)] = 0.0f;

        const int open = seam < 0 ? count : count - 1;  // a forced last state needs no comparison
        for (int i = 0; i < open; i++) {
            const int t = (first + i) % kWeights;
            float* to = costs(i + 1);
            steps[t & 1](window, trellis.codes[t & 1], from, to, scratch.kept + i * scratch.kept_bytes, x[t],
                         weight ? weight[t] : 1.0f);
            from = to;
        }

        float cost;
        int32_t state;
        if (seam >= 0) {
            const int t = (first + count - 1) % kWeights;
            const int in = new_bits(w, t), out = new_bits(w, t + 1);
            const float d = x[t] - trellis.codes[t & 1][order(trellis, t & 1, uint32_t(seam))];
            cost = from[cost_position(out, uint32_t(seam) & ((states >> in) - 1))] + (weight ? weight[t] : 1.0f) * (d * d);
            state = seam;
        } else {
            // `from` holds the groups that would enter the next weight.
            const int t = first + count - 1;
            const int out = new_bits(w, t + 1), next = new_bits(w, t);
            uint32_t best = 0;
            cost = kNever;
            for (uint32_t g = 0; g < states >> out; g++) {
                const float c = from[cost_position(next, g)];
                if (c < cost) {
                    cost = c;
                    best = g;
                }
            }
            state = winner(first, count - 1, out, best);
        }
        for (int i = count - 1;; i--) {
            scratch.path[(first + i) % kWeights] = state;
            if (i == wanted) break;
            const int in = new_bits(w, first + i);
            state = winner(first, i - 1, in, uint32_t(state) & ((states >> in) - 1));
        }
        return cost;
    }

    // The state that won group g after the i-th weight walked from `first` on; groups have 2^out states.
    int32_t winner(int first, int i, int out, uint32_t g) const {
        const uint8_t* row = scratch.kept + i * scratch.kept_bytes;
        if (keeps) {
            const float* from = reinterpret_cast<const float*>(row);
            const int t = (first + i) % kWeights;
            const uint32_t groups = 1u << (trellis.window - new_bits(trellis.w, t));
            uint32_t best = 0;
            float least = 4 * kNever;
            for (uint32_t s = g << out; s < (g + 1) << out; s++) {  // the same roundings as in `cheapest`
                const float d = x[t] - trellis.codes[t & 1][order(trellis, t & 1, s)];
                float e = d * d;
                if (weight) e *= weight[t];
                const float cost = from[cost_position(out, s & (groups - 1))] + e;
                if (cost < least) least = cost, best = s;
            }
            return int32_t(best);
        }
        const size_t bytes = (size_t(1) << (trellis.window - out)) / 8;
        uint32_t node = 1;
        for (int level = 0; level < out; level++) node = 2 * node + ((row[(node - 1) * bytes + g / 8] >> (g % 8)) & 1);
        return int32_t(g << out | (node - (1u << out)));
    }
};

inline float encode(const Trellis& trellis, const Scratch& scratch, const float* x, const float* weight) {
    const Pass pass{trellis, scratch, x, weight,
                    {weight ? choose<true>(trellis, 0) : choose<false>(trellis, 0),
                     weight ? choose<true>(trellis, 1) : choose<false>(trellis, 1)},
                    keeps_costs(trellis)};
    float best = 4 * kNever;
    for (int r = 0; r < trellis.starts; r++) {
        const int seam = r * kWeights / trellis.starts;
        pass.walk(seam - trellis.reach + kWeights, 2 * trellis.reach, -1);
        const float cost = pass.walk(seam, kWeights, scratch.path[(seam + kWeights - 1) % kWeights]);
        if (cost < best) {
            best = cost;
            for (int t = 0; t < kWeights; t++) scratch.best[t] = scratch.path[t];
        }
    }
    return best;
}

}  // namespace RBE_VITERBI_TIER
}  // namespace rbe::viterbi
