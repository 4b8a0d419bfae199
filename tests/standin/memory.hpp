// Device memory that is host memory: live ranges, ranges a test registered, and those freed.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace standin {

constexpr int kMostDevices = 8;
constexpr int kAnyDevice = -1;

// Memory of a device, in bytes.
struct DeviceMemory {
    uint64_t limit = uint64_t{80} << 30;
    uint64_t live = 0;    // allocations
    uint64_t bytes = 0;   // in them, and in those freed on a stream that was not waited for yet
    uint64_t pooled = 0;  // of them, freed on streams since the last wait
    uint64_t peak = 0;    // the most `bytes` since a test asked
};

struct Range {
    uint64_t start = 0;
    uint64_t bytes = 0;
    bool registered = false;
    bool pooled = false;  // allocated on a stream
    int device = kAnyDevice;  // that it is memory of
    std::string name{};   // for faults of kernels
    // A byte for each byte, 1 if something wrote it; empty if that is not tracked.
    std::shared_ptr<std::vector<uint8_t>> written{};
    bool is_on(int on) const { return device == on || device == kAnyDevice; }
    bool holds(uint64_t address, uint64_t size) const {
        return address >= start && address - start <= bytes && size <= bytes - (address - start);
    }
    uint8_t* map() const { return written ? written->data() : nullptr; }
    void track() { written = std::make_shared<std::vector<uint8_t>>(bytes); }
};

class Memory {
  public:
    static constexpr uint64_t kAlignment = 256;  // of what the driver gives
    static constexpr uint8_t kFresh = 0xa5;      // new memory is not zero

    bool undo = false;     // see standin_undo
    bool tracked = false;  // see standin_track
    DeviceMemory of[kMostDevices];

    // 0 where it does not fit.
    uint64_t allocate(int device, uint64_t size, bool pooled = false) {
        DeviceMemory& memory = of[device];
        if (size > memory.limit || memory.bytes > memory.limit - size) return 0;
        const uint64_t whole = (size + kAlignment - 1) / kAlignment * kAlignment;
        void* block = std::aligned_alloc(kAlignment, whole);
        if (block == nullptr) return 0;
        // Only the first page, so that an arena of gigabytes costs none.
        std::memset(block, kFresh, size < 4096 || undo ? size : 4096);
        const auto start = reinterpret_cast<uint64_t>(block);
        Range range{start, size, false, pooled, device};
        range.name =
            "allocation " + std::to_string(++allocated_) + " of " + std::to_string(size) + " bytes";
        if (tracked) range.track();
        ranges_[start] = std::move(range);
        ++memory.live;
        memory.bytes += size;
        memory.peak = std::max(memory.peak, memory.bytes);
        return start;
    }

    // Before a launch on `stream` writes `size` bytes, at most 8.
    void note(int device, void* stream, uint64_t address, size_t size) {
        if (!undo) return;
        std::vector<Written>& log = written_[{device, stream}];
        Written& one = log.emplace_back(Written{address, size, {}});
        std::memcpy(one.before, reinterpret_cast<const void*>(address), size);
    }
    void take_back(int device, void* stream) {
        std::vector<Written>& log = written_[{device, stream}];
        for (; !log.empty(); log.pop_back()) {
            const Written& one = log.back();
            if (find(one.address, one.size) == nullptr) continue;
            std::memcpy(reinterpret_cast<void*>(one.address), one.before, one.size);
        }
    }

    // False where `start` begins no live allocation, or none of a stream where it is freed on one.
    // Such memory is nobody's from then on, but the device has it back only when a stream is waited
    // for, as from a pool that keeps nothing.
    bool release(uint64_t start, bool on_stream = false) {
        const auto found = ranges_.find(start);
        if (found == ranges_.end() || found->second.registered) return false;
        if (on_stream && !found->second.pooled) return false;
        DeviceMemory& memory = of[found->second.device];
        --memory.live;
        if (on_stream) {
            memory.pooled += found->second.bytes;
        } else {
            memory.bytes -= found->second.bytes;
        }
        freed_.push_back(found->second);
        held_ += found->second.bytes;
        ranges_.erase(found);
        // Blocks wait, so that an address is not at once another allocation's.
        while (held_ > kHeld || freed_.size() > kHeldBlocks) {
            held_ -= freed_.front().bytes;
            std::free(reinterpret_cast<void*>(freed_.front().start));
            freed_.pop_front();
        }
        return true;
    }

    void wait(int device) { of[device].bytes -= std::exchange(of[device].pooled, 0); }

    // False where it overlaps another range; the same start again replaces it.
    bool enlist(uint64_t start, uint64_t size, int device) {
        const auto same = ranges_.find(start);
        if (same != ranges_.end() && same->second.registered) ranges_.erase(same);
        const auto next = ranges_.lower_bound(start);
        if (next != ranges_.end() && next->first - start < size) return false;
        if (next != ranges_.begin() && std::prev(next)->second.holds(start, 1)) return false;
        ranges_[start] = {start, size, true, false, device};
        ranges_[start].name = "registered memory of " + std::to_string(size) + " bytes";
        return true;
    }

    bool delist(uint64_t start) {
        const auto found = ranges_.find(start);
        if (found == ranges_.end() || !found->second.registered) return false;
        ranges_.erase(found);
        return true;
    }

    // The range that holds all of it, or null.
    const Range* find(uint64_t address, uint64_t size = 1) const {
        auto next = ranges_.upper_bound(address);
        if (next == ranges_.begin()) return nullptr;
        const Range& range = std::prev(next)->second;
        return range.holds(address, size) ? &range : nullptr;
    }

    // The live range that begins at `start`, or null.
    Range* begins(uint64_t start) {
        const auto found = ranges_.find(start);
        return found == ranges_.end() ? nullptr : &found->second;
    }

    template <typename Visit>
    void each(Visit visit) const {
        for (const auto& [start, range] : ranges_) visit(range);
    }

    // The host wrote these bytes.
    void mark(uint64_t address, uint64_t size) {
        const Range* range = find(address, size);
        if (range == nullptr || !range->written) return;
        std::fill_n(range->map() + (address - range->start), size, uint8_t{1});
    }
    // A sentence if nobody wrote some of these bytes.
    std::string unwritten(uint64_t address, uint64_t size) const {
        const Range* range = find(address, size);
        if (range == nullptr || !range->written) return "";
        const uint8_t* first = range->map() + (address - range->start);
        const auto missing = std::count(first, first + size, uint8_t{0});
        if (missing == 0) return "";
        const auto at = std::find(first, first + size, uint8_t{0}) - first;
        return std::to_string(missing) + " of " + std::to_string(size) + " bytes of " +
               range->name + " were never written, the first at " + std::to_string(at);
    }

    // What is known of an address that a kernel used: nothing, or that it was freed.
    std::string freed(uint64_t address) const {
        for (const Range& range : freed_)
            if (range.holds(address, 1)) return " (in memory that was freed: " + range.name + ")";
        return "";
    }

    // Why nothing live holds it.
    std::string why(uint64_t address, uint64_t size = 1) const {
        const std::string name = name_of(address, size);
        for (const Range& range : freed_)
            if (range.holds(address, 1)) return name + " lies in memory that was freed";
        if (const Range* range = find(address))
            return name + " runs past the end of its range, " +
                   std::to_string(range->start + range->bytes - address) + " bytes further";
        return name + " lies in no live allocation and no registered range";
    }

  private:
    static constexpr uint64_t kHeld = uint64_t{64} << 20;
    static constexpr size_t kHeldBlocks = 4096;

    static std::string name_of(uint64_t address, uint64_t size) {
        char text[64];
        std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
        return std::string(text) + (size == 1 ? "" : " of " + std::to_string(size) + " bytes");
    }

    struct Written {
        uint64_t address;
        size_t size;
        uint8_t before[8];
    };

    // by device and stream, the latest last
    std::map<std::pair<int, void*>, std::vector<Written>> written_;
    std::map<uint64_t, Range> ranges_;
    std::deque<Range> freed_;
    uint64_t allocated_ = 0;  // so far
    uint64_t held_ = 0;
};

// Addresses for the driver that does nothing: nobody reads or writes there, so they come round
// again. Reserved once, never mapped.
class Pretended {
  public:
    void reserve() {
        if (base_.load() != 0) return;
        void* space = mmap(nullptr, kSpace, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                           -1, 0);
        if (space != MAP_FAILED) base_.store(reinterpret_cast<uint64_t>(space));
    }
    uint64_t allocate(uint64_t size) {
        if (size == 0 || size > kSpace / 2 || base_.load() == 0) return 0;
        const uint64_t whole = (size + Memory::kAlignment - 1) / Memory::kAlignment;
        uint64_t place;
        do {
            place = next_.fetch_add(whole) * Memory::kAlignment % kSpace;
        } while (place > kSpace - size);
        return base_.load() + place;
    }
    bool holds(uint64_t address) const {
        const uint64_t base = base_.load();
        return base != 0 && address >= base && address - base < kSpace;
    }

  private:
    static constexpr uint64_t kSpace = uint64_t{1} << 36;
    std::atomic<uint64_t> base_{0}, next_{0};
};

inline Pretended pretended;

}  // namespace standin
