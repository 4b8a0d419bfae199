#include "block.hpp"

#include <algorithm>

namespace emulator {

void Block::begin(u32 linear_index) {
    index[0] = linear_index % launch->grid[0];
    index[1] = linear_index / launch->grid[0] % launch->grid[1];
    index[2] = linear_index / launch->grid[0] / launch->grid[1];
    std::fill(shared.begin(), shared.end(), 0xcd);
    mbarriers.clear();
    next_number = 0;
    atomics.clear();
    operand_checks.clear();
    for (Barrier& barrier : barriers) {
        barrier.arrived = 0;
        barrier.waiting.clear();
    }
    triggered = waited = fenced = false;
    std::fill(load_clocks, load_clocks + Agents::kMbarriers, 0);
    const bool races = launch->device->options.races;
    shadow.begin(races ? &cluster->agents : nullptr, rank, shared_bytes);
    for (Warp& warp : warps) {
        warp.block = this;
        const u32 left = launch->threads() - warp.index * kLanes;
        warp.begin(left >= kLanes ? kAllLanes : (1u << left) - 1,
                   races ? cluster->agents.count() : 0, cluster->agents.warp(rank, 0));
    }
}

bool Block::ended() const {
    return std::all_of(warps.begin(), warps.end(),
                       [](const Warp& warp) { return warp.state == Warp::kDone; });
}

void Block::leave() {
    if (triggered || !ended()) return;
    triggered = true;
    ++launch->triggered;
    launch->triggered_early |= !waited;
}

u8* Block::at(u32 address, u32 bytes, u32 alignment) {
    if (address % alignment != 0)
        throw Fault("shared memory: misaligned address " +
                    std::to_string(i64{address} - i64{kReservedShared}) +
                    ", wanted a multiple of " + text(alignment));
    if (address < kReservedShared || u64{address} + bytes > shared_bytes)
        throw Fault("shared memory: out of bounds, " + text(bytes) + " bytes at " +
                    std::to_string(i64{address} - i64{kReservedShared}) + ", the block has " +
                    text(shared_bytes - kReservedShared));
    return shared.data() + address;
}

Block& Block::owner(u32& address) {
    const u32 above = address >> kRankShift;
    if (above == 0) return *this;
    address &= kOffsetMask;
    if (above > cluster->blocks.size())
        throw Fault("shared::cluster: address of block " + text(above - 1) + ", the cluster has " +
                    text(cluster->blocks.size()));
    Block& block = cluster->blocks[above - 1];
    if (block.ended()) throw Fault("shared::cluster: block " + text(above - 1) + " has ended");
    return block;
}

void Block::write_shared(const Warp& warp, u32 address, u32 bytes, const u8* data) {
    if (!shadow.checks()) return;
    const Access access{warp.agent, warp.clocks.order[warp.agent], false};
    shadow.write(warp, address, bytes, access, shared.data(), data);
}

void Block::read_shared(const Warp& warp, u32 address, u32 bytes) {
    if (!shadow.checks()) return;
    shadow.read(warp, address, bytes, {warp.agent, warp.clocks.order[warp.agent], false});
}

Accessor Block::accessor(const Warp& warp) const {
    const std::vector<Clock>& order = warp.clocks.order;  // empty if races are not checked
    const bool waited =
        !launch->overlaps || order.empty() || order[cluster->agents.launches_before()] != 0;
    return {cluster->number, launch->index,     launch->settled,
            waited,          &cluster->ordered, launch->device->kernels.data()};
}

void Block::read_global(const Warp& warp, u64 address, u32 bytes, const char* operation) {
    Device& device = *launch->device;
    device.memory.check_read(address, bytes, operation);
    if (device.options.races) device.races.read(accessor(warp), address, bytes);
}

void Block::write_global(const Warp& warp, u64 address, const u8* data, u32 bytes,
                         const char* operation) {
    Device& device = *launch->device;
    device.memory.check_write(address, bytes, operation);
    if (device.options.races) device.races.write(accessor(warp), address, bytes, data);
    std::memcpy(reinterpret_cast<void*>(address), data, bytes);
}

void Block::advance(Mbarrier& mbarrier, u32 address) {
    if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
    cluster->require_no_load(*this, address,
                             "a phase ends, too few bytes are expected, while a bulk load");
    ++mbarrier.phase;
    mbarrier.pending = mbarrier.expected;
    if (shadow.checks()) {
        Clock& loads = mbarrier.arriving.order[mbarrier.agent];
        loads = std::max(loads, mbarrier.first_clock + mbarrier.phase);
        load_clocks[mbarrier.number] = loads;
        mbarrier.complete = mbarrier.arriving;
        mbarrier.arriving.reset(mbarrier.complete.order.size());
    }
    for (Warp& warp : warps)
        if (warp.state == Warp::kAtMbarrier && warp.waits_for == address) warp.state = Warp::kReady;
}

}  // namespace emulator
