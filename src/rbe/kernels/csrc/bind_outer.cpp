// The Python face of the outer128 kernels. Pointers arrive as integers; Python has checked what they point to.
#include <nanobind/nanobind.h>

#include "outer.h"

namespace nb = nanobind;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct OuterMatrix : rbe::Outer {
    OuterMatrix(int64_t rows_, int64_t cols_, int edge_, int stages_, uintptr_t seeds_, uintptr_t radius_,
                uintptr_t angle_, uintptr_t scale_, uintptr_t row_scale_)
        : rbe::Outer{rows_, cols_, edge_, (rows_ + edge_ - 1) / edge_, (cols_ + edge_ - 1) / edge_, stages_,
                     at<const int64_t>(seeds_), at<const float>(radius_), at<const float>(angle_),
                     at<const float>(scale_), at<const uint16_t>(row_scale_)} {}
};

}  // namespace

void bind_outer(nb::module_& m) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<OuterMatrix>(m, "OuterMatrix", "A matrix of outer128 seeds, borrowed from tensors that Python keeps.")
        .def(nb::init<int64_t, int64_t, int, int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>())
        .def(
            "matmul",
            [](const OuterMatrix& self, uintptr_t x, int64_t batch, uintptr_t y, int threads) {
                rbe::outer_matmul(self, at<const float>(x), batch, at<float>(y), threads);
            },
            release())
        .def(
            "transposed",
            [](const OuterMatrix& self, uintptr_t y, int64_t batch, uintptr_t x, int threads) {
                rbe::outer_transposed(self, at<const float>(y), batch, at<float>(x), threads);
            },
            release())
        .def(
            "decode",
            [](const OuterMatrix& self, int64_t begin, int64_t end, uintptr_t out, int threads) {
                rbe::outer_decode(self, begin, end, at<float>(out), threads);
            },
            release())
        .def(
            "rows",
            [](const OuterMatrix& self, uintptr_t index, int64_t count, uintptr_t out, int threads) {
                rbe::outer_rows(self, at<const int64_t>(index), count, at<float>(out), threads);
            },
            release())
        .def(
            "contract",
            [](const OuterMatrix& self, int64_t begin, int64_t end, uintptr_t gradient, uintptr_t radius,
               uintptr_t angle, uintptr_t signs, float factor, int threads) {
                return rbe::outer_contract(self, begin, end, at<const float>(gradient), at<float>(radius),
                                           at<float>(angle), at<float>(signs), factor, threads);
            },
            release());
    m.def(
        "outer_pack",
        [](uintptr_t latent, int64_t count, bool wide, uintptr_t code, int threads) {
            rbe::outer_pack(at<const float>(latent), count, wide, at<int64_t>(code), threads);
        },
        release());
}
