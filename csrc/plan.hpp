// A plan as plain records: launches over named buffers, whose sizes are affine in the sequences,
// tokens and longest sequence of a call. Read and checked once, never changed. What the records
// mean is said in docs/runtime.md; engine/vitrail/plan/lowering.py writes them.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "reader.hpp"

namespace vitrail {

constexpr std::string_view kPlanMagic = "vitrail plan 1\n";
constexpr std::string_view kImageMagic = "vitrail image 1\n";

constexpr uint64_t kAlignment = 256;  // of what memory of a call is cut into

template <typename Number>
constexpr Number round_up(Number count, Number step) {
    return (count + step - 1) / step * step;
}

// What one call is about.
struct Sizes {
    int64_t sequences = 0;
    int64_t tokens = 0;   // of all sequences
    int64_t longest = 0;  // tokens of the longest

    bool operator==(const Sizes& other) const {
        return sequences == other.sequences && tokens == other.tokens && longest == other.longest;
    }
    bool covers(const Sizes& other) const {
        return sequences >= other.sequences && tokens >= other.tokens && longest >= other.longest;
    }
};

// A number that follows from the sizes of the call.
struct Affine {
    int32_t sequences = 0;
    int32_t tokens = 0;
    int32_t longest = 0;
    int64_t constant = 0;

    int64_t at(const Sizes& sizes) const {
        return sequences * sizes.sequences + tokens * sizes.tokens + longest * sizes.longest +
               constant;
    }
    bool grows() const {
        return sequences >= 0 && tokens >= 0 && longest >= 0 && constant >= 0;
    }
};

// `slot`: where in the arena it lives; below 0 what the caller brings: -1 the first, -2 the next.
struct Buffer {
    std::string name;
    Affine rows;
    int64_t row_bytes = 0;
    int32_t slot = 0;

    bool external() const { return slot < 0; }
};

constexpr int32_t kWeights = -1;

// An address: `offset` bytes into a buffer, or into the weights.
struct Place {
    int32_t buffer = kWeights;
    int64_t offset = 0;
};

enum class Kind : uint8_t { kInt32, kInt64, kFloat, kPointer, kMap, kNull, kCount };

// One parameter of a kernel. A map is a tensor map over `rows` rows of `columns` numbers, `stride`
// bytes apart; how it is cut into boxes is said by the kernel's image.
struct Argument {
    Kind kind = Kind::kNull;
    Affine integer;  // kInt32, kInt64
    float number = 0;
    Place place;  // kPointer, kMap
    Affine rows;  // kMap, as the two below
    int64_t columns = 0;
    int64_t stride = 0;

    uint32_t size() const {
        switch (kind) {
            case Kind::kInt32:
            case Kind::kFloat:
                return 4;
            case Kind::kMap:
                return 128;
            default:
                return 8;
        }
    }
    uint32_t alignment() const { return kind == Kind::kMap ? 64 : size(); }
};

// Blocks of a launch: times * ceil(rows / block), at most `per_multiprocessor` (0: no limit) on
// each multiprocessor of the device.
struct Grid {
    Affine times;
    Affine rows;
    uint32_t block = 1;
    uint32_t per_multiprocessor = 0;

    int64_t blocks(const Sizes& sizes, int multiprocessors) const {
        const int64_t all = times.at(sizes) * ((rows.at(sizes) + block - 1) / block);
        const int64_t most = int64_t{per_multiprocessor} * multiprocessors;
        return per_multiprocessor != 0 && all > most ? most : all;
    }
};

// A launch for calls of up to `until` rows, by one of the plan's images.
struct Variant {
    int64_t until = 0;
    uint32_t image = 0;
    Grid grid;
    std::vector<Argument> arguments;
};

struct Launch {
    std::string label;
    Affine rows;
    std::vector<Variant> variants;  // by `until`; the last serves all that is larger
};

struct Plan {
    std::string name;
    uint64_t weight_bytes = 0;
    std::vector<Buffer> buffers;
    std::vector<std::string> images;  // their keys
    std::vector<Launch> launches;
    uint32_t slots = 0;
    std::vector<uint32_t> externals;  // buffers, in the order in which the caller brings them

    // Throws FormatError for bytes that are not a plan, or one that points outside itself.
    static Plan parse(std::string_view bytes);
};

// How a tensor map is cut into boxes; numbers of cuTensorMapEncodeTiled.
struct Box {
    uint32_t type = 0;
    uint32_t swizzle = 0;
    uint32_t bytes = 0;  // of one number
    uint32_t rows = 0;
    uint32_t columns = 0;
};

// A kernel's machine code and what launching it takes.
struct Image {
    std::string key;
    std::string function;
    uint32_t arch = 0;
    uint32_t threads = 0;
    uint32_t shared = 0;       // bytes of dynamic shared memory
    bool overlaps = false;     // waits for the kernel before it: may be launched before that ends
    std::vector<Box> boxes;    // of its tensor maps in order
    std::string_view machine;  // in the bytes that were parsed

    static Image parse(std::string_view bytes);
};

}  // namespace vitrail
