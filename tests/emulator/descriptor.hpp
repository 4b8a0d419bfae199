// wgmma's descriptors of matrices in shared memory (PTX ISA 9.7.15.5.1).
#pragma once

#include "fault.hpp"

namespace emulator {

// Modes are not a tensor map's: 1 swizzles 128 bytes, 2 swizzles 64, 3 swizzles 32, 0 none. The
// swizzle is of absolute addresses, so steps of k inside a pattern work.
struct Descriptor {
    u32 start, leading, stride, mode;

    explicit Descriptor(u64 bits)
        : start(static_cast<u32>(bits & 0x3fff) << 4),
          leading(static_cast<u32>(bits >> 16 & 0x3fff) << 4),
          stride(static_cast<u32>(bits >> 32 & 0x3fff) << 4),
          mode(static_cast<u32>(bits >> 62)) {
        require((bits >> 49 & 7) == 0, "wgmma: a base offset is not known to the emulator");
    }

    u32 span() const { return mode == 1 ? 128 : mode == 2 ? 64 : 32; }
    u32 swizzled(u32 address) const {
        const u32 bits = mode == 1 ? 7 : mode == 2 ? 3 : mode == 3 ? 1 : 0;
        return address ^ (address >> 7 & bits) << 4;
    }
    // K-major: the 16 bytes of a row (of A) or column (of B), the chunk-th along k.
    u32 k_major(u32 index, u32 chunk) const {
        const u32 group = start + (index >> 3) * stride;
        if (mode == 0) return group + (index & 7) * 16 + chunk * leading;
        return swizzled(group + (index & 7) * span() + chunk * 16);
    }
    // MN-major, of 16-bit elements: 8 rows or columns from 8 chunk on, at a single k.
    u32 mn_major(u32 chunk, u32 k) const {
        if (mode == 0) return start + chunk * stride + (k & 7) * 16 + (k >> 3) * leading;
        const u32 per_span = span() / 16;
        return swizzled(start + (chunk % per_span) * 16 + (chunk / per_span) * leading +
                        (k & 7) * span() + (k >> 3) * stride);
    }
};

}  // namespace emulator
