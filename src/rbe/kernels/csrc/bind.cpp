// The Python face of the C++ kernels: raw pointers and integers only, so that it builds without torch.
// Python validates and owns every buffer; the functions below trust their arguments.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_encoder(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_outer(nb::module_& m);
void bind_packed(nb::module_& m);
void bind_sparse(nb::module_& m);
void bind_stream(nb::module_& m);

NB_MODULE(_cpu, m) {
    m.doc() = "C++ kernels of rbe.";
    bind_encoder(m);
    bind_kernels(m);
    bind_outer(m);
    bind_packed(m);
    bind_sparse(m);
    bind_stream(m);
}
