// The arithmetic code of `stream`. Names and order are those of rbe/formats/stream.py, which says what everything means.
#include "stream.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>

namespace rbe {
namespace {

constexpr int LARGEST = 255, PRIOR = 8, RATE = 11, FINE = 8, LEAST = 24, VIEWS = 5;
constexpr int64_t ONE = 1 << 16, HALF = ONE >> 1;
constexpr int SHIFT = 12 + RATE - FINE;
constexpr std::array<int64_t, VIEWS + 2> MIX = {4096, 2600, 2048, 1024, 1536, 1024, 1024};

int64_t clip(int64_t p) { return std::clamp<int64_t>(p, LEAST, ONE - LEAST); }

class Writer {
  public:
    static constexpr bool READS = false;
    std::vector<uint8_t> out;

    bool bit(int64_t p, bool bit) {
        uint32_t middle = low_ + uint32_t((uint64_t(high_ - low_) * uint64_t(p)) >> 16);
        if (bit)
            high_ = middle;
        else
            low_ = middle + 1;
        while (!((low_ ^ high_) >> 24)) {
            out.push_back(uint8_t(high_ >> 24));
            low_ <<= 8;
            high_ = high_ << 8 | 255;
        }
        return bit;
    }

    void finish() {
        for (int count = 0; count < 5; ++count) {
            int rest = 32 - 8 * count;
            uint64_t value = (uint64_t(low_) + ((uint64_t(1) << rest) - 1)) >> rest;
            if (value << rest <= high_) {
                for (int k = count - 1; k >= 0; --k) out.push_back(uint8_t(value >> 8 * k));
                break;
            }
        }
        while (!out.empty() && !out.back()) out.pop_back();
    }

  private:
    uint32_t low_ = 0, high_ = 0xFFFFFFFF;
};

class Reader {
  public:
    static constexpr bool READS = true;
    int64_t next = 4;

    Reader(const uint8_t* data, int64_t size) : data_(data), size_(size) {
        for (int64_t k = 0; k < 4; ++k) value_ = value_ << 8 | at(k);
    }

    bool bit(int64_t p, bool) {
        uint32_t middle = low_ + uint32_t((uint64_t(high_ - low_) * uint64_t(p)) >> 16);
        bool bit = value_ <= middle;
        if (bit)
            high_ = middle;
        else
            low_ = middle + 1;
        while (!((low_ ^ high_) >> 24)) {
            low_ <<= 8;
            high_ = high_ << 8 | 255;
            value_ = value_ << 8 | at(next++);
        }
        return bit;
    }

  private:
    const uint8_t* data_;
    int64_t size_;
    uint32_t low_ = 0, high_ = 0xFFFFFFFF, value_ = 0;

    uint8_t at(int64_t k) const { return k < size_ ? data_[k] : 0; }
};

struct Counted {
    int64_t yes = 1, no = 1;

    template <class Coder>
    bool code(Coder& coder, bool bit) {
        bit = coder.bit(clip(ONE * yes / (yes + no)), bit);
        (bit ? yes : no) += 2;
        return bit;
    }
};

using View = std::array<int64_t, 2>;

class Mixed {
  public:
    explicit Mixed(const StreamShape& shape)
        : shape_(shape), columns_(shape.columns), groups_((shape.columns + shape.cells - 1) / shape.cells),
          parts_(groups_.size()), places_(shape.cells) {
        for (int64_t& weight : mix_) weight <<= FINE;
    }

    void start() {
        row_ = {};
        std::fill(parts_.begin(), parts_.end(), View{});
        before_ = 0;
    }

    template <class Coder>
    bool code(Coder& coder, int64_t column, bool bit) {
        int64_t group = column / shape_.cells, place = column % shape_.cells;
        View* views[VIEWS] = {&row_, &columns_[column], &groups_[group], &parts_[group], &places_[place]};
        int64_t p = ONE * yes_ / (yes_ + no_);
        int64_t base = log2(p) - log2(ONE - p);
        int64_t yes = PRIOR * p, no = PRIOR * (ONE - p);
        std::array<int64_t, VIEWS + 2> inputs;
        inputs[0] = base;
        for (int k = 0; k < VIEWS; ++k)
            inputs[k + 1] = log2(((*views[k])[1] << 16) + yes) - log2(((*views[k])[0] << 16) + no) - base;
        inputs[VIEWS + 1] = int64_t(2 * (before_ & 1) + (before_ >> 1) - 1) * 2048;
        int64_t odds = 0;
        for (int k = 0; k < VIEWS + 2; ++k) odds += (mix_[k] >> FINE) * inputs[k];
        p = probability(odds >> 12);
        bit = coder.bit(p, bit);
        int64_t error = bit ? ONE - p : -p;
        for (int k = 0; k < VIEWS + 2; ++k) mix_[k] += (inputs[k] * error + (1 << (SHIFT - 1))) >> SHIFT;
        for (View* view : views) ++(*view)[bit];
        ++(bit ? yes_ : no_);
        before_ = (before_ << 1 | int(bit)) & 3;
        return bit;
    }

  private:
    const StreamShape& shape_;
    std::array<int64_t, VIEWS + 2> mix_ = MIX;
    int64_t yes_ = 1, no_ = 12;
    std::vector<View> columns_, groups_, parts_, places_;
    View row_{};
    int before_ = 0;

    int64_t log2(int64_t n) const {
        int length = int(std::bit_width(uint64_t(n)));
        return (int64_t(length - 1) << 12) + shape_.logs[(length > 11 ? n >> (length - 11) : n << (11 - length)) & 1023];
    }

    int64_t probability(int64_t odds) const {
        int64_t size = std::min<int64_t>(std::abs(odds), 63487);
        int64_t p = ONE * ONE / (ONE + (shape_.powers[size >> 2 & 1023] >> (size >> 12)));
        return clip(odds >= 0 ? p : ONE - p);
    }
};

struct Levels {
    Counted more[8];

    template <class Coder>
    int16_t code(Coder& coder, int level) {
        bool negative = coder.bit(HALF, level < 0);
        int size = 1;
        while (size < LARGEST && more[std::min(size, 8) - 1].code(coder, std::abs(level) > size)) ++size;
        return int16_t(negative ? -size : size);
    }
};

// All decisions in their order. A writer reads `levels`, a reader writes them; `marked` is the writer's choice.
template <class Coder, class Level>
void walk(Coder& coder, const StreamShape& s, Level* levels, bool marked) {
    constexpr bool READS = Coder::READS;
    const int64_t width = s.width();
    // A level that is known; a reader knows none.
    auto known = [&](int64_t i, int64_t j) -> int { return READS ? 0 : levels[i * width + j]; };
    auto put = [&](int64_t i, int64_t j, int16_t level) {
        if constexpr (READS) levels[i * width + j] = level;
    };
    marked = coder.bit(HALF, marked);
    Counted row, mark, of_bias;
    std::vector<uint8_t> used(s.rows);
    for (int64_t i = 0; i < s.rows; ++i) {
        bool any = false;
        if constexpr (!READS) any = std::any_of(levels + i * width, levels + (i + 1) * width, [](int x) { return x != 0; });
        used[i] = row.code(coder, any);
    }
    std::vector<int64_t> able;
    std::vector<uint8_t> there(marked && !READS ? s.columns : 0);
    if (!there.empty())
        for (int64_t i = 0; i < s.rows; ++i)
            for (int64_t j = 0; j < s.columns; ++j) there[j] |= known(i, j) != 0;
    for (int64_t j = 0; j < s.columns; ++j)
        if (!marked || mark.code(coder, !there.empty() && there[j])) able.push_back(j);
    Mixed present(s);
    Levels size;
    for (int64_t i = 0; i < s.rows; ++i) {
        if (!used[i]) continue;
        present.start();
        if (s.bias && of_bias.code(coder, known(i, s.columns) != 0))
            put(i, s.columns, size.code(coder, known(i, s.columns)));
        for (int64_t j : able)
            if (present.code(coder, j, known(i, j) != 0)) put(i, j, size.code(coder, known(i, j)));
    }
}

// Whether every column but the bias has a level: marks save nothing then.
bool full(const StreamShape& s, const int16_t* levels) {
    std::vector<uint8_t> there(s.columns);
    for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t j = 0; j < s.columns; ++j) there[j] |= levels[i * s.width() + j] != 0;
    return std::all_of(there.begin(), there.end(), [](uint8_t x) { return x != 0; });
}

}  // namespace

std::vector<uint8_t> stream_pack(const StreamShape& shape, const int16_t* levels) {
    Writer plain, marked;
    walk(plain, shape, levels, false);
    plain.finish();
    if (full(shape, levels)) return plain.out;
    walk(marked, shape, levels, true);
    marked.finish();
    return marked.out.size() < plain.out.size() ? marked.out : plain.out;
}

int64_t stream_unpack(const StreamShape& shape, const uint8_t* data, int64_t size, int16_t* levels) {
    std::fill_n(levels, shape.rows * shape.width(), int16_t(0));
    Reader reader(data, size);
    walk(reader, shape, levels, false);
    return reader.next;
}

}  // namespace rbe
