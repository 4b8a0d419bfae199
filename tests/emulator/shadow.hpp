// Races in shared memory: happens-before between warps, asynchronous copies and products.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "warp.hpp"

namespace emulator {

// Numbers the agents of a cluster: of each block its warps; cp.async of each warp, wgmma of each
// warpgroup, bulk stores of each warp; loads of each mbarrier. One more, at the end, is not of a
// block: its clock is 1 once the launches before are complete.
struct Agents {
    static constexpr u32 kMbarriers = 64;  // told apart; more share numbers

    u32 warps = 0, blocks = 0;

    u32 stride() const { return 4 * warps + kMbarriers; }
    u32 count() const { return stride() * blocks + 1; }
    u32 launches_before() const { return stride() * blocks; }
    u32 warp(u32 rank, u32 index) const { return rank * stride() + index; }
    u32 copies(u32 rank, u32 warp) const { return rank * stride() + warps + warp; }
    u32 products(u32 rank, u32 warp) const { return rank * stride() + 2 * warps + warp / 4; }
    u32 stores(u32 rank, u32 warp) const { return rank * stride() + 3 * warps + warp; }
    u32 loads(u32 rank, u32 mbarrier) const {
        return rank * stride() + 4 * warps + mbarrier % kMbarriers;
    }
    bool is_warp(u32 agent) const { return agent % stride() < warps; }
    bool is_generic(u32 agent) const { return agent % stride() < 2 * warps; }  // cp.async too
    std::string name(u32 agent, u32 own_rank) const;
};

// One access, of an agent at its clock.
struct Access {
    u32 agent;
    Clock clock;
    bool async;  // by the asynchronous proxy
};

class Shadow {
  public:
    // Forgets everything. No checks are made if `agents` is null.
    void begin(const Agents* agents, u32 rank, u32 bytes);
    bool checks() const { return agents_ != nullptr; }

    // `data`: the new bytes, if they are known. Warps that hold copies of a value may all store it
    // without an order.
    void write(const Warp& warp, u32 address, u32 bytes, Access access, const u8* memory,
               const u8* data);
    void read(const Warp& warp, u32 address, u32 bytes, Access access);
    // Clocks that a read requires: by agent the latest that wrote, and the latest to be visible.
    using Required = std::vector<std::array<u32, 3>>;  // agent, clock, clock that must be visible
    void record(Required* required) { required_ = required; }
    static bool meets(const Clocks& clocks, const Required& required);
    // A use of an mbarrier, whose initialization must come before.
    void use_mbarrier(const Warp& warp, u32 address);

    u64 same_writes = 0;

  private:
    static constexpr u16 kNone = 0xffff, kSeveral = 0xfffe;

    struct Word {  // 4 bytes: the last write, and the reads since; masks say of which bytes
        Clock write_clock = 0, read_clock = 0;
        u16 writer = kNone, reader = kNone;
        u32 several : 24, write_mask : 4, read_mask : 4;  // several: index of readers_

        Word() : several(0), write_mask(0), read_mask(0) {}
    };

    const Agents* agents_ = nullptr;
    u32 rank_ = 0;
    std::vector<Word> words_;
    std::vector<std::vector<std::pair<u32, Clock>>> readers_;  // agents, each with its latest clock
    Required* required_ = nullptr;

    [[noreturn]] void race(const char* message, u32 word, u32 agent, const Word& state) const;
    void check_readers(const Clocks& clocks, u32 word, u32 mask, Access access);
    void note_reader(const Clocks& clocks, Word& word, u32 mask, Access access);
    void require_clock(const Word& word, bool async);
};

}  // namespace emulator
