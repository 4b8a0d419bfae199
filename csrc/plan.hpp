// A plan: launches over named buffers. Sizes are affine in the number of sequences, the number of
// tokens and the longest sequence of a call. A plan is read and checked once, then never changed.
// engine/vitrail/plan/lowering.py writes plans; docs/runtime.md explains the fields.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "reader.hpp"

namespace vitrail {

constexpr uint64_t kAlignment = 256;  // bytes; of every buffer in the memory of a call

template <typename Number>
constexpr Number round_up(Number count, Number step) {
    return (count + step - 1) / step * step;
}

// The sizes of one call.
struct Sizes {
    int64_t sequences = 0;
    int64_t tokens = 0;   // of all sequences together
    int64_t longest = 0;  // tokens of the longest sequence

    bool operator==(const Sizes& other) const {
        return sequences == other.sequences && tokens == other.tokens && longest == other.longest;
    }
    bool covers(const Sizes& other) const {
        return sequences >= other.sequences && tokens >= other.tokens && longest >= other.longest;
    }
};

// A number that is affine in the sizes of a call.
struct Affine {
    int32_t sequences = 0;
    int32_t tokens = 0;
    int32_t longest = 0;
    int64_t constant = 0;

    int64_t at(const Sizes& sizes) const {
        return sequences * sizes.sequences + tokens * sizes.tokens + longest * sizes.longest +
               constant;
    }
    bool grows() const { return sequences >= 0 && tokens >= 0 && longest >= 0 && constant >= 0; }
};

// `slot`: the buffer's slot in the arena. If negative, the caller brings the buffer: -1 is the
// caller's first buffer, -2 the second.
struct Buffer {
    std::string name;
    Affine rows;
    int64_t row_bytes = 0;
    int32_t slot = 0;

    bool external() const { return slot < 0; }
};

constexpr int32_t kWeights = -1;

// An address: `offset` bytes into the weights, or the start of a buffer.
struct Address {
    int32_t buffer = kWeights;
    int64_t offset = 0;
};

enum class ArgumentType : uint8_t { kInt32, kInt64, kFloat, kPointer, kMap, kNull, kCount };

// One parameter of a kernel. A map is a tensor map over `rows` rows of `columns` numbers, `stride`
// bytes apart. The box shape is part of the kernel binary (`Box`).
struct Argument {
    ArgumentType type = ArgumentType::kNull;
    Affine integer;  // kInt32, kInt64
    float number = 0;
    Address address;  // kPointer, kMap
    Affine rows;      // kMap, like the two below
    int64_t columns = 0;
    int64_t stride = 0;

    uint32_t size() const {
        switch (type) {
            case ArgumentType::kInt32:
            case ArgumentType::kFloat:
                return 4;
            case ArgumentType::kMap:
                return 128;
            default:
                return 8;
        }
    }
    uint32_t alignment() const { return type == ArgumentType::kMap ? 64 : size(); }
};

// A launch has times * ceil(rows / block) blocks, and at most `per_multiprocessor` blocks (0: no
// limit) for each multiprocessor of the device.
struct Grid {
    Affine times;
    Affine rows;
    uint32_t block = 1;
    uint32_t per_multiprocessor = 0;

    int64_t blocks(const Sizes& sizes, int multiprocessors) const {
        const int64_t blocks = times.at(sizes) * ((rows.at(sizes) + block - 1) / block);
        const int64_t limit = int64_t{per_multiprocessor} * multiprocessors;
        return per_multiprocessor != 0 && blocks > limit ? limit : blocks;
    }
};

// How a launch runs with at most `max_rows` rows. `kernel` is an index into Plan::kernel_keys.
struct Variant {
    int64_t max_rows = 0;
    uint32_t kernel = 0;
    Grid grid;
    std::vector<Argument> arguments;
};

struct Launch {
    std::string label;
    Affine rows;
    std::vector<Variant> variants;  // in order of `max_rows`; the last also runs larger calls
};

struct Plan {
    std::string name;
    uint64_t weight_bytes = 0;
    std::vector<Buffer> buffers;
    std::vector<std::string> kernel_keys;
    std::vector<Launch> launches;
    uint32_t slots = 0;
    std::vector<uint32_t> externals;  // indices of the caller's buffers, in the caller's order

    // Throws FormatError for bytes that are no plan, and for a plan with an index out of range.
    static Plan parse(std::string_view bytes);
};

// The box of a tensor map; numbers of cuTensorMapEncodeTiled.
struct Box {
    uint32_t type = 0;
    uint32_t swizzle = 0;
    uint32_t bytes = 0;  // of one number
    uint32_t rows = 0;
    uint32_t columns = 0;
};

// A compiled kernel and its launch parameters.
struct KernelBinary {
    std::string key;
    std::string function;
    uint32_t arch = 0;
    uint32_t threads = 0;   // of a block
    uint32_t shared = 0;    // bytes of dynamic shared memory
    bool overlaps = false;  // waits for the previous kernel, so it may be launched before that ends
    std::vector<Box> boxes;  // of the kernel's tensor maps, in order
    std::string_view cubin;  // a view of the bytes that were parsed

    static KernelBinary parse(std::string_view bytes);
};

}  // namespace vitrail
