// The Python face of the coder of `stream`. Pointers arrive as integers; Python has checked what they point to.
#include <nanobind/nanobind.h>

#include "stream.h"

namespace nb = nanobind;

namespace {

rbe::StreamShape shape(int64_t rows, int64_t columns, int64_t cells, bool bias, uintptr_t logs, uintptr_t powers) {
    return {rows, columns, cells, bias, reinterpret_cast<const int64_t*>(logs),
            reinterpret_cast<const int64_t*>(powers)};
}

}  // namespace

void bind_stream(nb::module_& m) {
    m.def("stream_pack", [](int64_t rows, int64_t columns, int64_t cells, bool bias, uintptr_t logs, uintptr_t powers,
                            uintptr_t levels) {
        std::vector<uint8_t> out;
        {
            nb::gil_scoped_release release;
            out = rbe::stream_pack(shape(rows, columns, cells, bias, logs, powers),
                                   reinterpret_cast<const int16_t*>(levels));
        }
        return nb::bytes(out.data(), out.size());
    });
    m.def(
        "stream_unpack",
        [](int64_t rows, int64_t columns, int64_t cells, bool bias, uintptr_t logs, uintptr_t powers, uintptr_t data,
           int64_t size, uintptr_t levels) {
            return rbe::stream_unpack(shape(rows, columns, cells, bias, logs, powers),
                                      reinterpret_cast<const uint8_t*>(data), size, reinterpret_cast<int16_t*>(levels));
        },
        nb::call_guard<nb::gil_scoped_release>());
}
