// A launch of a chain: its arguments, its counters, and the progress of its blocks.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "memory.hpp"
#include "warp.hpp"

namespace emulator {

struct Options {
    u64 seed = 0;
    u64 limit = 0;
    bool races = true;
    bool counters = false;
    bool strict = false;
    u32 resident = 0;
    u32 multiprocessors = 132;
};

struct Site {  // of an instruction
    u64 runs = 0, ideal = 0, actual = 0, bytes = 0, waits = 0;
};

struct Counters {
    u64 by_class[kClasses] = {};
    u64 warp_instructions = 0, thread_instructions = 0, blocks = 0;
    u64 mma = 0, wgmma = 0, wgmma_macs = 0;
    u64 tensor_loads = 0, tensor_load_bytes = 0, tensor_stores = 0, tensor_store_bytes = 0;
    u64 barrier_waits = 0, mbarrier_waits = 0;
    u64 in_flight_moves = 0, same_writes = 0, injected_fences = 0, overlapped = 0;
    std::vector<Site> sites;
};

// What launches of a chain share.
struct Device {
    Options options;
    GlobalMemory memory;
    GlobalRaces races;
    std::vector<std::string> kernels;  // names by launch
    u32 complete = 0;                  // launches, all below it
    // By address: clusters whose atomic there, after a fence, released their writes.
    std::map<u64, std::set<u32>> released;
};

struct Launch {
    const Kernel* kernel = nullptr;
    Device* device = nullptr;
    u32 index = 0;
    u32 grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
    u32 shared_bytes = 0;
    bool overlaps = false;  // programmatic dependent launch
    const u8* parameters = nullptr;
    Counters counters;

    u32 first_cluster = 1;  // its number
    u32 settled = 0;        // launches below it are complete before this begins
    u32 started = 0, finished = 0, triggered = 0;  // clusters; blocks that let dependents start
    bool triggered_early = false;  // a block did so before it had waited
    double seconds = 0;

    u32 cluster_size() const { return kernel->cluster[0] == 0 ? 1 : kernel->cluster[0]; }
    u32 threads() const { return block[0] * block[1] * block[2]; }
    u32 warps() const { return (threads() + kLanes - 1) / kLanes; }
    u32 blocks() const { return grid[0] * grid[1] * grid[2]; }
    u32 clusters() const { return blocks() / cluster_size(); }
    bool complete() const { return finished == clusters(); }
    // Throws Fault if the kernel cannot be launched so.
    void check() const;
    Site& site(const Instruction& instruction) {
        return counters.sites[kernel->index_of(instruction)];
    }
};

// Runs the launches in order; throws Fault. `current`: the launch at hand when it throws.
void run_chain(std::vector<Launch>& launches, Device& device, u32& current);

}  // namespace emulator
