// The Python face of the trellis kernels. Pointers arrive as integers; Python has checked what they point to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "trellis.h"

namespace nb = nanobind;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

struct TrellisMatrix : rbe::Matrix {
    TrellisMatrix(uintptr_t seeds_, int64_t rows_, int64_t cols_, int w_, int window_, uint32_t even_, uint32_t odd_,
                  uintptr_t scale_, uintptr_t row_scale_, uint32_t out_, uint32_t in_)
        : rbe::Matrix{at<const uint8_t>(seeds_), rows_, cols_, (rows_ + 15) / 16, (cols_ + 15) / 16, w_, window_, even_,
                      odd_, at<const float>(scale_), at<const uint16_t>(row_scale_), out_, in_} {}
};

}  // namespace

void bind_kernels(nb::module_& m) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<TrellisMatrix>(m, "TrellisMatrix", "A matrix of trellis seeds, borrowed from tensors that Python keeps.")
        .def(nb::init<uintptr_t, int64_t, int64_t, int, int, uint32_t, uint32_t, uintptr_t, uintptr_t, uint32_t,
                      uint32_t>())
        .def(
            "matmul",
            [](const TrellisMatrix& self, uintptr_t x, int64_t batch, uintptr_t y, int threads, bool int8) {
                rbe::matmul({&self, at<const float>(x), at<float>(y), batch, int8, threads});
            },
            release())
        .def(
            "decode", [](const TrellisMatrix& self, uintptr_t out, int threads) { rbe::decode(self, at<float>(out), threads); },
            release())
        .def(
            "decode_columns",
            [](const TrellisMatrix& self, int64_t begin, int64_t end, uintptr_t out, int threads) {
                rbe::decode_columns(self, begin, end, at<float>(out), threads);
            },
            release())
        .def(
            "rows",
            [](const TrellisMatrix& self, uintptr_t index, int64_t count, uintptr_t out, int threads) {
                rbe::rows(self, at<const int64_t>(index), count, at<float>(out), threads);
            },
            release());
    m.def(
        "rotate_rows",
        [](uintptr_t x, int64_t batch, int64_t n, uint32_t seed, bool back, int threads) {
            rbe::rotate_rows(at<float>(x), batch, n, seed, back, threads);
        },
        release());
    m.def("tier", [] { return std::string(rbe::tier().name); });
    m.def("set_tier", [](const std::string& name) { return rbe::set_tier(name.c_str()); });
    m.def("tier_available", [](const std::string& name) { return rbe::tier_available(name.c_str()); });
}
