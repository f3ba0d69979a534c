// The format `stream`: levels to bytes and back. Must equal rbe/formats/stream.py, bit for bit.
#pragma once

#include <cstdint>
#include <vector>

namespace rbe {

// A matrix of levels and the tables of the definition.
struct StreamShape {
    int64_t rows, columns, cells;
    bool bias;
    const int64_t* logs;    // log2(1 + k/1024) in units of 2^-12
    const int64_t* powers;  // 2^(16 - k/1024)

    int64_t width() const { return columns + (bias ? 1 : 0); }
};

// levels (rows, width) to the shorter of both ways to write them.
std::vector<uint8_t> stream_pack(const StreamShape& shape, const int16_t* levels);

// Bytes to levels, which are all written; returns how many bytes were wanted, of the first `size` or of zeros after them.
int64_t stream_unpack(const StreamShape& shape, const uint8_t* data, int64_t size, int16_t* levels);

}  // namespace rbe
