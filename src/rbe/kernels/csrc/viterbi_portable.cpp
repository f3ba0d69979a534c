// Vector operations in plain C++: the compiler maps them to what the machine has (SSE2, NEON).
#include "viterbi.h"

#define RBE_VITERBI_TIER portable

namespace rbe::viterbi::portable {

constexpr int kLanes = 8;
constexpr size_t kMostKept = 0;
struct Vector {
    float lane[kLanes];
};

inline Vector load(const float* p) {
    Vector v;
    for (int i = 0; i < kLanes; i++) v.lane[i] = p[i];
    return v;
}
inline Vector broadcast(float x) {
    Vector v;
    for (int i = 0; i < kLanes; i++) v.lane[i] = x;
    return v;
}
inline Vector add(Vector a, Vector b) {
    for (int i = 0; i < kLanes; i++) a.lane[i] += b.lane[i];
    return a;
}
inline Vector sub(Vector a, Vector b) {
    for (int i = 0; i < kLanes; i++) a.lane[i] -= b.lane[i];
    return a;
}
inline Vector mul(Vector a, Vector b) {
    for (int i = 0; i < kLanes; i++) a.lane[i] *= b.lane[i];
    return a;
}
inline Vector minimum(Vector a, Vector b) {
    for (int i = 0; i < kLanes; i++) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
}
inline void store_less(uint8_t* to, Vector a, Vector b) {
    unsigned bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= unsigned(a.lane[i] < b.lane[i]) << i;
    *to = uint8_t(bits);
}
// Lane i goes to vector i mod 2^kIn of `to`, at lane i / 2^kIn.
template <int kIn>
inline void store_split(float* to, Vector v) {
    for (int i = 0; i < kLanes; i++) to[(i & ((1 << kIn) - 1)) * kLanes + (i >> kIn)] = v.lane[i];
}
}  // namespace rbe::viterbi::portable

#include "viterbi_kernel.h"

const rbe::viterbi::Tier rbe::viterbi::portable_tier = {"portable", rbe::viterbi::portable::order,
    rbe::viterbi::portable::kept_bytes, rbe::viterbi::portable::encode};
