// A box of a tensor in global memory, and its place in shared memory (PTX ISA 5.5).
#pragma once

#include <algorithm>
#include <string>

#include "../standin/tensor_map.hpp"
#include "block.hpp"

namespace emulator {

constexpr const char* kBulkCopy = "cp.async.bulk.tensor";
constexpr u32 kChunk = 16;  // bytes that stay together under any swizzle

inline u32 swizzled(u32 address, u32 mode) {
    const u32 bits = mode == 1 ? 1 : mode == 2 ? 3 : mode == 3 ? 7 : 0;
    return address ^ (address >> 7 & bits) << 4;
}

// A box: rows of the innermost dimension.
struct Box {
    standin::TensorMap map;
    u32 element_bytes, row_bytes, rows = 1;
    const char* name = kBulkCopy;

    explicit Box(const u8* bytes) {
        if (!standin::decode(bytes, map))
            throw Fault(std::string(kBulkCopy) + ": the 128 bytes are no tensor map",
                        reinterpret_cast<u64>(bytes));
        element_bytes = standin::kElementBytes[map.type];
        row_bytes = map.box[0] * element_bytes;
        for (u32 i = 1; i < map.rank; ++i) rows *= map.box[i];
    }
    // Bytes in order, without a tensor map.
    Box(u64 address, u32 bytes) : element_bytes(1), row_bytes(bytes), name("cp.async.bulk") {
        map = {};
        map.rank = 1;
        map.base = address;
        map.dims[0] = bytes;
    }
    template <class Copy>
    static Box of(const Copy& copy) {
        return copy.map == nullptr ? Box(copy.address, copy.bytes) : Box(copy.map);
    }
    u32 bytes() const { return row_bytes * rows; }

    void check(u32 rank, u32 shared) const {
        static constexpr u32 kPattern[] = {128, 256, 512, 1024};
        if (map.rank != rank)
            throw Fault(std::string(kBulkCopy) + ": " + text(rank) + " coordinates, the map has " +
                        text(map.rank) + " dimensions");
        if (map.swizzle > 3 || map.interleave != 0)
            throw Fault(std::string(kBulkCopy) + ": swizzle " + text(map.swizzle) +
                        ", interleave " + text(map.interleave) + " are not known to the emulator");
        for (u32 i = 0; i < map.rank; ++i)
            if (map.steps[i] != 1)
                throw Fault(std::string(kBulkCopy) +
                            ": element strides are not known to the emulator");
        if (shared % kPattern[map.swizzle] != 0)
            throw Fault(std::string(kBulkCopy) + ": misaligned address " +
                        std::to_string(i64{shared} - i64{kReservedShared}) +
                        " of shared memory, wanted a multiple of " + text(kPattern[map.swizzle]));
    }

    // Visits 16 bytes at a time, with their addresses in shared and in global memory, and from
    // which to which byte they are inside the tensor.
    template <class Visit>
    void chunks(const i32* coordinates, u32 shared, Visit visit) const {
        for (u32 row = 0; row < rows; ++row) {
            u64 start = map.base;
            bool inside = true;
            u32 rest = row;
            for (u32 i = 1; i < map.rank; ++i) {
                const i64 at = i64{coordinates[i]} + rest % map.box[i];
                rest /= map.box[i];
                inside &= at >= 0 && static_cast<u64>(at) < map.dims[i];
                start += static_cast<u64>(at) * map.strides[i - 1];
            }
            const i64 end = static_cast<i64>(map.dims[0]) * element_bytes;
            for (u32 byte = 0; byte < row_bytes; byte += kChunk) {
                const i64 first = i64{coordinates[0]} * element_bytes + byte;
                i64 from = std::clamp<i64>(-first, 0, kChunk);
                i64 to = std::clamp<i64>(end - first, 0, kChunk);
                if (!inside || to < from) from = to = 0;
                visit(swizzled(shared + row * row_bytes + byte, map.swizzle),
                      start + static_cast<u64>(first), static_cast<u32>(from),
                      static_cast<u32>(to));
            }
        }
    }
};

}  // namespace emulator
