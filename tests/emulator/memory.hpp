// Global memory: ranges with names, written bytes, and order between blocks and launches.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "fault.hpp"

namespace emulator {

struct Range {
    u64 start, bytes;
    u8* written;  // a byte for each byte; null: all count as written
    std::string name;
};

// The origin of an access to global memory: a cluster of some launch. Clusters of one launch are
// not ordered; those of earlier launches come before once `waited`, as griddepcontrol.wait grants
// it.
struct Accessor {
    u32 cluster;  // a number from 1, counted over all launches of the chain
    u32 launch;
    u32 settled;  // launches below it were complete before this launch began
    bool waited;
    const std::set<u32>* ordered;  // clusters that it has synchronized with, by atomics and fences
    const std::string* kernels;  // names by launch
};

class GlobalRaces {
  public:
    void read(const Accessor& accessor, u64 address, u32 bytes);
    // `data`: the new bytes; several clusters may store equal values.
    void write(const Accessor& accessor, u64 address, u32 bytes, const u8* data);
    void atomic(const Accessor& accessor, u64 address, u32 bytes);
    void add_launch(u32 clusters);

  private:
    static constexpr u32 kPageBytes = 4096;
    static constexpr u32 kSpecial = 0x80000000u;  // not a cluster's number: of launch number ...
    static constexpr u32 kAtomic = 0x40000000u;  // ... by atomics; else by several clusters

    struct Owner {
        u32 writer = 0, reader = 0;  // 0: none
    };
    struct Page {  // an owner a word, or a byte once part of a word was accessed
        bool by_byte = false;
        std::vector<Owner> owners{kPageBytes / 4};
    };

    std::unordered_map<u64, std::unique_ptr<Page>> pages_;
    u64 last_number_ = 0;
    Page* last_page_ = nullptr;
    std::vector<u32> first_clusters_{1};  // by launch

    Page& page(u64 number);
    template <class Visit>
    void each_owner(u64 address, u32 bytes, Visit visit);
    u32 launch_of(u32 owner) const;
    bool ordered(const Accessor& accessor, u32 owner) const;
    [[noreturn]] void race(const Accessor& accessor, const char* verb, u32 owner,
                           const char* owner_verb, u64 address) const;
};

class GlobalMemory {
  public:
    std::vector<Range> ranges;  // sorted once `prepare` has run

    void prepare();
    // The range that holds all of these bytes, or null.
    const Range* range_of(u64 address, u64 bytes);
    // Throw Fault if the bytes are not all in a range, or hold nothing. `check` is the operation's
    // name for the message.
    void check_read(u64 address, u32 bytes, const char* operation);
    void check_write(u64 address, u32 bytes, const char* operation);

  private:
    size_t last_ = 0;

    [[noreturn]] void out_of_bounds(u64 address, u32 bytes, const char* operation,
                                    const char* verb) const;
};

}  // namespace emulator
