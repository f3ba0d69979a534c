// The Python face of sparse products. Pointers arrive as integers; Python has checked what they point to.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>

#include "sparse.h"

namespace nb = nanobind;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class Index>
rbe::Sparse<Index> with(const rbe::Sparse<Index>& matrix, float factor) {
    rbe::Sparse<Index> p = matrix;
    p.factor = factor;
    return p;
}

template <class Index>
void bind(nb::module_& m, const char* name) {
    using release = nb::call_guard<nb::gil_scoped_release>;
    using rbe::Sparse;
    nb::class_<Sparse<Index>>(m, name, "A sparse matrix of whole numbers, borrowed from tensors that Python keeps.")
        .def("__init__",
             [](Sparse<Index>* self, int64_t rows, uintptr_t starts, uintptr_t columns, uintptr_t levels,
                uintptr_t bias) {
                 new (self) Sparse<Index>{rows, at<const int32_t>(starts), at<const Index>(columns),
                                          at<const int16_t>(levels), at<const float>(bias), 1.0f};
             })
        .def(
            "matmul",
            [](const Sparse<Index>& self, float factor, int64_t columns, uintptr_t x, int64_t n, uintptr_t y, int threads) {
                rbe::sparse_matmul(with(self, factor), columns, at<const float>(x), n, at<float>(y), threads);
            },
            release())
        .def(
            "conv",
            [](const Sparse<Index>& self, float factor, std::array<int64_t, 3> image, std::array<int64_t, 6> window, uintptr_t x,
               int64_t n, uintptr_t out, int threads) {
                const auto [kernel0, kernel1, stride0, stride1, padding0, padding1] = window;
                const rbe::Window w{image[0], image[1], image[2], {kernel0, kernel1}, {stride0, stride1}, {padding0, padding1}};
                rbe::sparse_conv(with(self, factor), w, at<const float>(x), n, at<float>(out), threads);
            },
            release())
        .def(
            "rows",
            [](const Sparse<Index>& self, float factor, int64_t columns, uintptr_t index, int64_t count, uintptr_t out, int threads) {
                rbe::sparse_rows(with(self, factor), columns, at<const int64_t>(index), count, at<float>(out), threads);
            },
            release());
}

}  // namespace

void bind_sparse(nb::module_& m) {
    bind<uint16_t>(m, "SparseMatrix");
    bind<int32_t>(m, "WideSparseMatrix");
}
