// Pillow's resampling of uint8 images in integer arithmetic. `across` resizes the columns into
// `middle`, then `down` resizes the rows. The kernels of resize.cu call these functions; tests
// compile them for the host and compare them with Pillow. kernels/vitrail_kernels/ops/resize.py has
// the formula, and its resize_tables makes the tables.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VITRAIL_DEVICE __host__ __device__ __forceinline__
#else
#define VITRAIL_DEVICE inline
#endif

namespace vitrail::resize {

constexpr int kLines = 16;    // lines of `middle` in a group, all of one image
constexpr int kTogether = 4;  // lines that share a weight in registers; divides kLines
constexpr int kNumbers = 16;  // values of a line that `down` loads together
constexpr int32_t kPrecision = 22;

// One image: a row of the table of images.
struct Image {
    int64_t pixels;       // offset of the first needed byte in the packed pixels
    int64_t line;         // bytes from one line of pixels to the next
    int64_t lines;        // number of needed lines
    int64_t group;        // first group in `middle`
    int64_t columns;      // offset of the table of output columns in `taps`
    int64_t column_taps;  // weights of a column at most
    int64_t rows;         // offset of the table of output rows in `taps`
    int64_t row_taps;     // weights of a row at most
};
static_assert(sizeof(Image) == 64, "Image: wanted eight numbers without padding");

// The sources of each of n outputs, and their weights.
struct Axis {
    const int32_t* table;  // (n,) first source, (n,) number of sources, (taps, n) weights
    int32_t n;

    VITRAIL_DEVICE int32_t first(int32_t at) const { return table[at]; }
    VITRAIL_DEVICE int32_t count(int32_t at) const { return table[n + at]; }
    VITRAIL_DEVICE int32_t weight(int32_t tap, int32_t at) const {
        return table[int64_t{2 + tap} * n + at];
    }
};

// Sums of bytes times weights in fixed point with kPrecision fractional bits, rounded and clipped.
// The sum fits 31 bits: resize_tables makes no weights whose positive part could exceed that.
VITRAIL_DEVICE constexpr int32_t zero() { return 1 << (kPrecision - 1); }

VITRAIL_DEVICE constexpr int32_t add(int32_t sum, uint8_t value, int32_t weight) {
    return sum + value * weight;
}

VITRAIL_DEVICE constexpr uint8_t byte_of(int32_t sum) {
    const int32_t value = sum >> kPrecision;  // rounds down, like Pillow
    return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Computes value `at` (column * channels + channel) of kTogether lines of `middle`, starting at
// line `line` of `group`. `middle` holds whole groups; lines past the image repeat its last line,
// and nothing reads them.
VITRAIL_DEVICE void across(uint8_t* middle, const uint8_t* pixels, const Image& image,
                           const int32_t* taps, int32_t group, int32_t line, int32_t at,
                           int32_t width, int32_t stride, int32_t channels) {
    const Axis axis{taps + image.columns, width};
    const int32_t column = at / channels;
    const int32_t count = axis.count(column);
    const int64_t image_line = (group - image.group) * kLines + line;
    const int64_t start = image_line < image.lines ? image_line : image.lines - 1;
    const uint8_t* source = pixels + (image.pixels + start * image.line) +
                            (int64_t{axis.first(column)} * channels + at % channels);
    uint32_t below[kTogether];  // offset of each line; a line has fewer than 2^27 bytes
    int32_t sums[kTogether];
    for (int i = 0; i < kTogether; ++i) {
        const int64_t last = image.lines - 1 - start;
        below[i] = static_cast<uint32_t>((i < last ? i : last) * image.line);
        sums[i] = zero();
    }
    for (int32_t tap = 0; tap < count; ++tap) {
        const int32_t weight = axis.weight(tap, column);
        const uint8_t* value = source + tap * channels;
        for (int i = 0; i < kTogether; ++i) sums[i] = add(sums[i], value[below[i]], weight);
    }
    uint8_t* to = middle + (int64_t{group} * kLines + line) * stride + at;
    for (int i = 0; i < kTogether; ++i) to[int64_t{i} * stride] = byte_of(sums[i]);
}

// Computes values `at` to at + 15 of an output line, except those past its `numbers` values. `at`,
// `stride` and the address of `middle` are multiples of 16; `out` may have any alignment.
VITRAIL_DEVICE void down(uint8_t* out, const uint8_t* middle, const Image& image,
                         const int32_t* taps, int32_t row, int32_t at, int32_t height,
                         int32_t numbers, int32_t stride) {
    const Axis axis{taps + image.rows, height};
    const int32_t count = axis.count(row);
    const uint8_t* line = middle + (image.group * kLines + axis.first(row)) * stride + at;
    int32_t sums[kNumbers];
    for (int i = 0; i < kNumbers; ++i) sums[i] = zero();
    for (int32_t tap = 0; tap < count; ++tap) {
        const int32_t weight = axis.weight(tap, row);
        const uint8_t* source = line + int64_t{tap} * stride;
        uint8_t values[kNumbers];
        std::memcpy(values, __builtin_assume_aligned(source, kNumbers), kNumbers);
        for (int i = 0; i < kNumbers; ++i) sums[i] = add(sums[i], values[i], weight);
    }
    uint8_t values[kNumbers];
    for (int i = 0; i < kNumbers; ++i) values[i] = byte_of(sums[i]);
    uint8_t* to = out + (int64_t{row} * numbers + at);
    if (numbers - at >= kNumbers && reinterpret_cast<uintptr_t>(to) % kNumbers == 0) {
        std::memcpy(__builtin_assume_aligned(to, kNumbers), values, kNumbers);
    } else {
        for (int i = 0; i < kNumbers; ++i) {
            if (at + i < numbers) to[i] = values[i];
        }
    }
}

}  // namespace vitrail::resize
