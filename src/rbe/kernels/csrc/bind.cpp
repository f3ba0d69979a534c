// The Python face of the C++ kernels: raw pointers and integers only, so that it builds without torch.
// Python validates and owns every buffer; the functions below trust their arguments.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
    m.doc() = "C++ kernels of rbe.";
}
