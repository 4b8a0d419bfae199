#include "memory.hpp"

#include <algorithm>
#include <cstdio>

namespace emulator {

void GlobalMemory::prepare() {
    std::sort(ranges.begin(), ranges.end(),
              [](const Range& a, const Range& b) { return a.start < b.start; });
}

static bool holds(const Range& range, u64 address, u64 bytes) {
    return address >= range.start && bytes <= range.bytes &&
           address - range.start <= range.bytes - bytes;
}

const Range* GlobalMemory::range_of(u64 address, u64 bytes) {
    if (last_ < ranges.size() && holds(ranges[last_], address, bytes)) return &ranges[last_];
    const auto after =
        std::upper_bound(ranges.begin(), ranges.end(), address,
                         [](u64 value, const Range& range) { return value < range.start; });
    if (after == ranges.begin() || !holds(*(after - 1), address, bytes)) return nullptr;
    last_ = static_cast<size_t>(after - 1 - ranges.begin());
    return &ranges[last_];
}

void GlobalMemory::out_of_bounds(u64 address, u32 bytes, const char* operation,
                                 const char* verb) const {
    char hex[32];
    std::snprintf(hex, sizeof hex, "0x%llx", static_cast<unsigned long long>(address));
    std::string sentence = std::string(operation) + ": " + verb + " out of bounds, " + text(bytes) +
                           " bytes at " + hex;
    const Range* nearest = nullptr;
    u64 distance = 1 << 16;
    for (const Range& range : ranges) {
        const u64 end = range.start + range.bytes;
        const u64 away = address < range.start ? range.start - address
                         : address >= end      ? address - end
                                               : 0;
        if (away >= distance) continue;
        distance = away;
        nearest = &range;
    }
    if (nearest != nullptr)
        sentence += ", byte " + std::to_string(static_cast<i64>(address - nearest->start)) +
                    " of " + nearest->name + ", which has " + text(nearest->bytes);
    throw Fault(sentence, address);
}

void GlobalMemory::check_read(u64 address, u32 bytes, const char* operation) {
    const Range* range = range_of(address, bytes);
    if (range == nullptr) out_of_bounds(address, bytes, operation, "read");
    if (range->written == nullptr) return;
    const u8* written = range->written + (address - range->start);
    const u8* hole = std::find(written, written + bytes, 0);
    if (hole != written + bytes)
        throw Fault(std::string(operation) + ": read of what nobody wrote, byte " +
                        text(address - range->start + static_cast<u64>(hole - written)) + " of " +
                        range->name,
                    address);
}

void GlobalMemory::check_write(u64 address, u32 bytes, const char* operation) {
    const Range* range = range_of(address, bytes);
    if (range == nullptr) out_of_bounds(address, bytes, operation, "write");
    if (range->written != nullptr) std::memset(range->written + (address - range->start), 1, bytes);
}

}  // namespace emulator
