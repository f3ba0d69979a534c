// The Python face of the packed kernels. Pointers arrive as integers; Python has checked what they point to.
#include <nanobind/nanobind.h>

#include "packed.h"

namespace nb = nanobind;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct PackedMatrix : rbe::Packed {
    PackedMatrix(int kind_, int64_t rows_, int64_t cols_, int64_t height_, int64_t width_, int stages_, int words_,
                 bool tabled, uintptr_t seeds_, uintptr_t radius_, uintptr_t angle_, uintptr_t d_radius_,
                 uintptr_t d_angle_, uintptr_t scale_, uintptr_t row_scale_)
        : rbe::Packed{kind_, rows_, cols_, height_, width_, (rows_ + height_ - 1) / height_,
                      (cols_ + width_ - 1) / width_, stages_, words_, at<const int64_t>(seeds_),
                      at<const float>(radius_), at<const float>(angle_), at<const float>(d_radius_),
                      at<const float>(d_angle_), at<const float>(scale_), at<const uint16_t>(row_scale_),
                      tabled ? rbe::packed_tables(kind_, height_, width_, stages_) : nullptr} {}
};

}  // namespace

void bind_packed(nb::module_& m) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<PackedMatrix>(m, "PackedMatrix", "A matrix of packed seeds, borrowed from tensors that Python keeps.")
        .def(nb::init<int, int64_t, int64_t, int64_t, int64_t, int, int, bool, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t, uintptr_t, uintptr_t, uintptr_t>())
        .def(
            "matmul",
            [](const PackedMatrix& self, uintptr_t x, int64_t batch, uintptr_t y, int threads) {
                rbe::packed_matmul(self, at<const float>(x), batch, at<float>(y), threads);
            },
            release())
        .def(
            "decode",
            [](const PackedMatrix& self, int64_t begin, int64_t end, uintptr_t out, int threads) {
                rbe::packed_decode(self, begin, end, at<float>(out), threads);
            },
            release())
        .def(
            "rows",
            [](const PackedMatrix& self, uintptr_t index, int64_t count, uintptr_t out, int threads) {
                rbe::packed_rows(self, at<const int64_t>(index), count, at<float>(out), threads);
            },
            release())
        .def(
            "backward",
            [](const PackedMatrix& self, uintptr_t x, uintptr_t y, int64_t batch, uintptr_t d_x, uintptr_t value,
               uintptr_t by_radius, uintptr_t by_angle, int threads) {
                float* const out[3] = {at<float>(value), at<float>(by_radius), at<float>(by_angle)};
                rbe::packed_backward(self, at<const float>(x), at<const float>(y), batch, at<float>(d_x),
                                     value ? out : nullptr, threads);
            },
            release())
        .def(
            "amplitudes",
            [](const PackedMatrix& self, uintptr_t amp, uintptr_t weights, uintptr_t by_radius, uintptr_t by_angle,
               int threads) {
                float* const out[2] = {at<float>(by_radius), at<float>(by_angle)};
                return rbe::packed_amplitudes(self, at<float>(amp), at<const float>(weights), out, threads);
            },
            release())
        .def(
            "contract",
            [](const PackedMatrix& self, int64_t begin, int64_t end, uintptr_t gradient, uintptr_t out, int threads) {
                rbe::packed_contract(self, begin, end, at<const float>(gradient), at<rbe::Sums>(out), threads);
            },
            release());
}
