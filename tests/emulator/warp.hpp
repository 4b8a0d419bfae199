// A warp: its registers, its lanes' positions, and the asynchronous work that it has begun.
#pragma once

#include <deque>
#include <vector>

#include "fault.hpp"
#include "kernel.hpp"

namespace emulator {

struct Block;
struct Warp;

using Clock = u32;

// Vector clocks, an entry an agent: `order` is happens-before, `visible` the part of it that
// fence.proxy.async has made visible to asynchronous copies and products. Both are empty if races
// are not checked.
struct Clocks {
    std::vector<Clock> order, visible;

    void reset(size_t agents);
    void join(const Clocks& other);
};

// Lanes that wait, and the instruction where they meet others again.
struct Split {
    u32 meet, at, lanes;
};

struct CopiedLane {  // of a cp.async
    u64 source;
    u32 target;
    u8 bytes, bytes_read;
};

struct Product {  // a wgmma that was issued: its operands, A's registers as they were
    void (*multiply)(Warp&, const Product&);
    const Instruction* instruction;
    u64 a, b;
    bool accumulates, done;
    std::vector<u32> copies;  // registers that its sums were copied to
    u32 fragment[4][kLanes];

    // May be called early: until the wait its registers are not to be used.
    void compute(Warp& warp) {
        if (!done) multiply(warp, *this);
        done = true;
    }
};

struct TensorStore {
    const u8* map;  // null: `bytes` to `address`
    i32 coordinates[5];
    u64 address;
    u32 bytes;
    u32 shared;
    const Instruction* instruction;
};

// Work in groups: some open, some committed, the oldest first.
template <class Item>
struct Groups {
    std::deque<std::vector<Item>> committed;
    std::vector<Item> open;
    Clock commits = 0;

    void clear() {
        committed.clear();
        open.clear();
        commits = 0;
    }
    void commit() {
        committed.push_back(std::move(open));
        open.clear();
        ++commits;
    }
    // Groups that were finished so far.
    Clock finished() const { return commits - static_cast<Clock>(committed.size()); }
};

struct Warp {
    enum State { kReady, kAtBarrier, kAtMbarrier, kAtCluster, kAtWarpgroup, kAtLaunches, kDone };

    u32* registers = nullptr;   // kLanes words a register of 32 bits
    u32* predicates = nullptr;  // a bit a lane
    Block* block = nullptr;
    const Kernel* kernel = nullptr;
    u32 index = 0;  // in its block
    u32 agent = 0;  // in the clocks of its cluster

    u32 next = 0;               // instruction
    u32 active = 0, alive = 0;  // lanes
    u32 mask = 0;               // lanes that execute the instruction at hand
    u32 meet = kNowhere;        // instruction at which the active lanes meet others
    std::vector<Split> splits;  // a stack

    State state = kReady;
    u32 waits_for = 0, wait_parity = 0;
    bool yields = false;  // ends its turn
    u64 executed = 0;

    Clocks clocks;
    Groups<CopiedLane> copies;
    Groups<Product> products;
    Groups<TensorStore> stores;
    u64 products_issued = 0;
    bool fenced = false;                // has executed a wgmma.fence
    std::vector<u8> written_since_fence;  // by register / kLanes
    u32 cluster_arrivals = 0, cluster_waits = 0;
    std::vector<u8> local;  // of its lanes, in order

    u32* words(u32 offset) { return registers + offset; }
    u64* doublewords(u32 offset) { return reinterpret_cast<u64*>(registers + offset); }
    u32 first_lane() const { return lowest_bit(mask); }
    void set_predicate(u32 predicate, u32 lanes) {
        predicates[predicate] = (predicates[predicate] & ~mask) | (lanes & mask);
    }

    void begin(u32 lanes, u32 agents, u32 first_agent);
    void branch(u32 target, u32 meeting);
    void resume_split();
    void leave();
    // The instruction is executed again when the warp is ready.
    void wait(State reason);
};

}  // namespace emulator
