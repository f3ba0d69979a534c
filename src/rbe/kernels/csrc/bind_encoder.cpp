#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <cstdlib>

#include "viterbi_driver.h"

namespace nb = nanobind;

namespace {

constexpr auto kReport = std::chrono::milliseconds(200);

// Addresses are of contiguous arrays that the caller keeps alive; 0 is none.
void encode_trellis(uintptr_t matrix, uintptr_t importance, uintptr_t row_energy, int64_t rows, int64_t columns, float unit,
                    int window, int w, int starts, int reach, uint32_t even, uint32_t odd, int threads, uintptr_t seeds,
                    uintptr_t sums, nb::object progress) {
    rbe::viterbi::Encoding work{};
    work.matrix = reinterpret_cast<const float*>(matrix);
    work.importance = reinterpret_cast<const float*>(importance);
    work.row_energy = reinterpret_cast<const float*>(row_energy);
    work.rows = rows;
    work.columns = columns;
    work.unit = unit;
    work.window = window;
    work.w = w;
    work.starts = starts;
    work.reach = reach;
    work.multipliers[0] = even;
    work.multipliers[1] = odd;
    work.threads = threads;
    work.seeds = reinterpret_cast<uint64_t*>(seeds);
    work.sums = reinterpret_cast<double*>(sums);
    const std::string tier = rbe::viterbi::encoder_tier(std::getenv("RBE_TIER"));
    auto last = std::chrono::steady_clock::now();
    auto tick = [&](int64_t blocks) {
        nb::gil_scoped_acquire hold;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        const auto now = std::chrono::steady_clock::now();
        if (!progress.is_none() && now - last >= kReport) {
            last = now;
            progress(blocks);
        }
        return true;
    };
    nb::gil_scoped_release release;
    rbe::viterbi::encode_matrix(work, tier, tick);
}

}  // namespace

void bind_encoder(nb::module_& m) {
    m.def("encode_trellis", &encode_trellis, nb::arg("matrix"), nb::arg("importance"), nb::arg("row_energy"),
          nb::arg("rows"), nb::arg("columns"), nb::arg("unit"), nb::arg("window"), nb::arg("w"), nb::arg("starts"),
          nb::arg("reach"), nb::arg("even"), nb::arg("odd"), nb::arg("threads"), nb::arg("seeds"), nb::arg("sums"),
          nb::arg("progress").none());
    m.def("encoder_tier", [] { return rbe::viterbi::encoder_tier(std::getenv("RBE_TIER")); });
}
