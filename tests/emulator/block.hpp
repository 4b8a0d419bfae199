// Blocks and clusters: warps that run together, their shared memory, and their barriers.
#pragma once

#include <unordered_map>
#include <vector>

#include "launch.hpp"
#include "shadow.hpp"
#include "warp.hpp"

namespace emulator {

struct Cluster;

// Addresses of shared::cluster: the block's rank + 1 above the offset; 0 is the own block.
constexpr u32 kRankShift = 24, kOffsetMask = (1u << kRankShift) - 1;

struct Mbarrier {
    u32 expected = 0, pending = 0, phase = 0;
    i64 bytes = 0;  // that are still to come
    u32 number = 0;         // in its block, which tells the agents of loads apart
    u32 agent = 0;          // of its loads
    Clock first_clock = 0;  // of that agent: mbarriers of the same number have used up those below
    Clocks arriving, complete;
};

// The clocks that a product's read of B requires, noted by the first warp of its warpgroup.
struct OperandCheck {
    u64 b = 0;  // descriptor
    u32 warps = 0;
    Shadow::Required required;
};

struct Barrier {
    u32 arrived = 0, expected = 0;  // threads
    std::vector<u32> waiting;  // warps
    Clocks clocks;
};

struct Block {
    static constexpr u32 kBarriers = 16;

    Cluster* cluster = nullptr;
    Launch* launch = nullptr;
    u32 index[3] = {};
    u32 rank = 0;
    u32 shared_bytes = 0;  // reserved ones too
    std::vector<u8> shared;
    std::vector<Warp> warps;
    std::unordered_map<u32, Mbarrier> mbarriers;
    Barrier barriers[kBarriers];
    Clock load_clocks[Agents::kMbarriers] = {};  // used up, by an mbarrier's number
    u32 next_number = 0;  // of the next mbarrier
    Shadow shadow;
    std::unordered_map<u32, Clocks> atomics;  // by address: of the warps that executed them
    std::map<std::pair<u32, u64>, OperandCheck> operand_checks;  // by warpgroup and product
    bool triggered = false, waited = false;  // griddepcontrol
    bool fenced = false;  // has executed a fence of the GPU's scope

    void begin(u32 linear_index);
    void leave();  // a warp has ended
    bool ended() const;

    // Host memory of `bytes` at an address of shared memory, aligned to `alignment`.
    u8* at(u32 address, u32 bytes, u32 alignment = 1);
    // The block that an address of shared::cluster is of; the address becomes a local one.
    Block& owner(u32& address);
    void write_shared(const Warp& warp, u32 address, u32 bytes, const u8* data = nullptr);
    void read_shared(const Warp& warp, u32 address, u32 bytes);
    // The mbarrier at an address, whose initialization must be ordered before.
    Mbarrier& mbarrier(const Warp& warp, u32 address);
    // Ends the mbarrier's phase if nothing is missing.
    void advance(Mbarrier& mbarrier, u32 address);

    // Global memory: checks bounds, written bytes, and order.
    void read_global(const Warp& warp, u64 address, u32 bytes, const char* operation);
    void write_global(const Warp& warp, u64 address, const u8* data, u32 bytes,
                      const char* operation);
    Accessor accessor(const Warp& warp) const;
};

// splitmix64
struct Random {
    u64 state;

    u64 next() {
        u64 z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    u32 below(u32 limit) { return static_cast<u32>((next() >> 32) * limit >> 32); }
};

// A bulk load under way.
struct TensorLoad {
    const u8* map;  // null: `bytes` from `address`
    i32 coordinates[5];
    u64 address;
    u32 bytes;
    u32 shared, mbarrier;
    u32 ranks;  // a mask: blocks that get it, all at the same addresses
    Accessor accessor;
    const Instruction* instruction;
    const Warp* warp;

    // Whether it writes to that block, and completes at that mbarrier of it.
    bool completes_at(const Block& block, u32 address) const {
        return mbarrier == address && (ranks >> block.rank & 1) != 0;
    }
};

// Blocks that run together; a single block for kernels without clusters.
struct Cluster {
    enum Progress { kRunning, kWaitsForLaunches, kFinished };

    Launch* launch = nullptr;
    u32 number = 0;  // over all launches, from 1
    Agents agents;
    std::vector<Block> blocks;
    std::vector<TensorLoad> loads;  // under way
    std::set<u32> ordered, acquired;  // clusters synchronized with; those a fence will order
    Random random{0};
    u32 arrived = 0, phase = 0;  // barrier.cluster, in warps
    Clocks arriving, complete;

    explicit Cluster(Launch& owner);
    Cluster(const Cluster&) = delete;
    void begin(u32 cluster_index);
    // Executes warps for some turns, or until none can run.
    Progress advance(u32 turns);
    void wake(Warp::State state);  // every warp that waits so
    // "[opcode, PTX line, source, block, warp]"
    std::string location(const Warp& warp, u32 instruction) const;
    // Throws Fault if a bulk load is under way for an mbarrier of the block.
    void require_no_load(const Block& block, u32 mbarrier, const char* message) const;
    bool pauses = false;  // gives others a turn, as at launch_dependents

  private:
    std::vector<u32> registers_, predicates_;
    std::vector<Warp*> ready_;
    std::vector<u64> priorities_;
    u32 turn_ = 0;

    void set_special_registers(Block& block, Warp& warp);
    Warp& choose();
    void run_turn(Warp& warp);
    void finish_some_work(Warp& warp, bool force);
    void end_warp(Warp& warp);
    void end() const;
    [[noreturn]] void deadlock() const;
};

// Asynchronous work, done at once. Of groups all but the latest `keep`.
void finish_copies(Warp& warp, size_t keep);
void finish_stores(Warp& warp, size_t keep);
void finish_products(Warp& warp, size_t keep);
void load_tensor(Cluster& cluster, u32 index);  // by its index in `loads`
// An instruction that uses accumulators while products may be in flight.
void use_accumulators(Warp& warp, const Instruction& instruction);

// Counts an access of the warp's lanes, by their addresses.
void count_shared(Warp& warp, const Instruction& instruction, const u32* addresses, u32 bytes);
void count_global(Warp& warp, const Instruction& instruction, const u64* addresses, u32 bytes);

}  // namespace emulator
