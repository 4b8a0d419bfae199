// Pillow's resampling of uint8 images, in the integers that a device works in. The same functions
// run in the kernels of resize.cu and, compiled by a host compiler, in the tests against Pillow.
// Formula, tables and their layout: kernels/vitrail_kernels/ops/resize.py, whose resize_tables makes
// the tables. First across, into `middle`, then down.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VITRAIL_DEVICE __host__ __device__ __forceinline__
#else
#define VITRAIL_DEVICE inline
#endif

namespace vitrail::resize {

constexpr int kLines = 16;        // lines of `middle` in a group, all of one image
constexpr int kTogether = 4;      // lines that share a weight in registers; divides kLines
constexpr int kNumbers = 16;      // numbers of a line that are loaded together, going down
constexpr int32_t kPrecision = 22;

// A row of the table of images.
struct Image {
    int64_t pixels;       // where the first byte that is needed stands in the packed pixels
    int64_t line;         // bytes from one line of pixels to the next
    int64_t lines;        // lines that are needed
    int64_t group;        // first group in `middle`
    int64_t columns;      // where the table of the output's columns begins in `taps`
    int64_t column_taps;  // most weights of a column
    int64_t rows;         // and of its rows
    int64_t row_taps;
};
static_assert(sizeof(Image) == 64, "Image: wanted eight numbers without padding");

// Which sources each of n outputs has, and with which weights.
struct Axis {
    const int32_t* table;  // (n,) first source, (n,) how many, (taps, n) weights
    int32_t n;

    VITRAIL_DEVICE int32_t first(int32_t at) const { return table[at]; }
    VITRAIL_DEVICE int32_t count(int32_t at) const { return table[n + at]; }
    VITRAIL_DEVICE int32_t weight(int32_t tap, int32_t at) const {
        return table[int64_t{2 + tap} * n + at];
    }
};

// Sums of a byte times a weight in 22 binary places, rounded and clipped. resize_tables makes no
// weights whose sum of positive ones could leave 31 bits.
VITRAIL_DEVICE constexpr int32_t zero() { return 1 << (kPrecision - 1); }

VITRAIL_DEVICE constexpr int32_t add(int32_t sum, uint8_t value, int32_t weight) {
    return sum + value * weight;
}

VITRAIL_DEVICE constexpr uint8_t byte_of(int32_t sum) {
    const int32_t value = sum >> kPrecision;  // towards minus infinity, as Pillow does
    return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Number `at` = column * channels + channel of kTogether lines of `middle`, from line `line` of
// `group` on. Lines that the group has and the image has not become its last line again: nothing
// reads them, and `middle` has room for whole groups.
VITRAIL_DEVICE void across(uint8_t* middle, const uint8_t* pixels, const Image& image,
                           const int32_t* taps, int32_t group, int32_t line, int32_t at,
                           int32_t width, int32_t stride, int32_t channels) {
    const Axis axis{taps + image.columns, width};
    const int32_t column = at / channels;
    const int32_t count = axis.count(column);
    const int64_t begun = (group - image.group) * kLines + line;
    const int64_t exists = begun < image.lines ? begun : image.lines - 1;
    const uint8_t* source = pixels + (image.pixels + exists * image.line) +
                            (int64_t{axis.first(column)} * channels + at % channels);
    uint32_t below[kTogether];  // where the other lines are: lines are less than 2^27 bytes apart
    int32_t sums[kTogether];
    for (int i = 0; i < kTogether; ++i) {
        const int64_t last = image.lines - 1 - exists;
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

// Numbers `at` to at + 15 of line `row` of an image's output, of which those below `numbers` exist.
// `at`, `stride` and the address of `middle` are multiples of 16; `out` may begin anywhere.
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
