// bar and barrier.cluster, and fences between proxies (PTX ISA 9.7.13).
#include "block.hpp"
#include "opcodes.hpp"

namespace emulator {
namespace {

void arrive(Warp& warp, u32 number, u32 threads, bool waits) {
    Block& block = *warp.block;
    require(warp.mask == warp.alive, "a barrier is reached by a part of a warp: divergent barrier");
    if (number >= Block::kBarriers) throw Fault("barrier " + text(number) + ", wanted 0 to 15");
    Barrier& barrier = block.barriers[number];
    u32 expected = threads;
    if (expected == 0)
        for (const Warp& other : block.warps) expected += other.state != Warp::kDone ? kLanes : 0;
    if (expected % kLanes != 0)
        throw Fault("a barrier of " + text(expected) + " threads, wanted a multiple of 32");
    if (barrier.arrived == 0) {
        barrier.clocks.reset(warp.clocks.order.size());
        barrier.expected = expected;
    }
    if (barrier.expected != expected)
        throw Fault("warps meet at barrier " + text(number) +
                    " with different counts of threads, " + text(barrier.expected) + " and " +
                    text(expected));
    barrier.arrived += kLanes;
    if (barrier.arrived > expected)
        throw Fault("more threads arrive at barrier " + text(number) + " than its " +
                    text(expected));
    barrier.clocks.join(warp.clocks);
    if (block.shadow.checks()) ++warp.clocks.order[warp.agent];
    if (waits) {
        barrier.waiting.push_back(warp.index);
        warp.yields = true;
        ++block.launch->counters.barrier_waits;
    }
    if (barrier.arrived < expected) {
        if (!waits) return;
        warp.state = Warp::kAtBarrier;
        warp.waits_for = number;
        return;
    }
    for (u32 index : barrier.waiting) {
        Warp& other = block.warps[index];
        other.state = Warp::kReady;
        other.clocks.join(barrier.clocks);
    }
    barrier.waiting.clear();
    barrier.arrived = 0;
}

void count_wait(Warp& warp, const Instruction& instruction) {
    Launch& launch = *warp.block->launch;
    if (launch.device->options.counters) ++launch.site(instruction).waits;
}

// Barrier number, count of threads.
template <bool has_count, bool waits>
void bar(Warp& warp, const Instruction& instruction) {
    const u32 lane = warp.first_lane();
    const u32 number = warp.words(instruction.operand[0])[lane];
    const u32 threads = has_count ? warp.words(instruction.operand[1])[lane] : 0;
    require(!has_count || threads != 0, "a barrier of 0 threads");
    if (waits) count_wait(warp, instruction);
    arrive(warp, number, threads, waits);
}

void sync_warp(Warp& warp, const Instruction& instruction) {
    const u32 members = warp.words(instruction.operand[0])[warp.first_lane()];
    require((members & warp.alive & ~warp.mask) == 0,
            "bar.warp.sync names lanes that do not execute it: divergent barrier");
}

// Asynchronous copies and products now see every write that is ordered before.
void fence_async(Warp& warp, const Instruction&) {
    Clocks& clocks = warp.clocks;
    for (size_t i = 0; i < clocks.order.size(); ++i)
        clocks.visible[i] =
            clocks.visible[i] < clocks.order[i] ? clocks.order[i] : clocks.visible[i];
}

void arrive_cluster(Warp& warp, const Instruction&) {
    require(warp.mask == warp.alive,
            "barrier.cluster.arrive by a part of a warp: divergent barrier");
    require(warp.cluster_arrivals == warp.cluster_waits,
            "barrier.cluster.arrive twice without a wait");
    Cluster& cluster = *warp.block->cluster;
    ++warp.cluster_arrivals;
    if (warp.block->shadow.checks()) {
        if (cluster.arriving.order.empty()) cluster.arriving.reset(warp.clocks.order.size());
        cluster.arriving.join(warp.clocks);
        ++warp.clocks.order[warp.agent];
    }
    if (++cluster.arrived < cluster.agents.warps * cluster.blocks.size()) return;
    cluster.arrived = 0;
    ++cluster.phase;
    cluster.complete = cluster.arriving;
    cluster.arriving = Clocks();
    cluster.wake(Warp::kAtCluster);
}

void wait_cluster(Warp& warp, const Instruction& instruction) {
    Cluster& cluster = *warp.block->cluster;
    require(warp.cluster_waits < warp.cluster_arrivals, "barrier.cluster.wait without an arrive");
    if (cluster.phase < warp.cluster_arrivals) {
        count_wait(warp, instruction);
        warp.wait(Warp::kAtCluster);
        return;
    }
    ++warp.cluster_waits;
    warp.clocks.join(cluster.complete);
}

}  // namespace

void add_barriers(OpcodeTable& table) {
    for (const char* name : {"bar.sync", "barrier.sync", "barrier.sync.aligned", "barrier.cta.sync",
                             "barrier.cta.sync.aligned"}) {
        table.add(name, bar<false, true>, "r", kBarrier);
        table.add(name + std::string("#2"), bar<true, true>, "rr", kBarrier);
    }
    for (const char* name : {"bar.arrive", "barrier.arrive", "barrier.arrive.aligned",
                             "barrier.cta.arrive", "barrier.cta.arrive.aligned"})
        table.add(name, bar<true, false>, "rr", kBarrier);
    table.add("bar.warp.sync", sync_warp, "r", kBarrier);
    table.add("fence.proxy.async", fence_async, "", kBarrier);
    table.add("fence.proxy.async.shared::cta", fence_async, "", kBarrier);
    table.add("fence.mbarrier_init.release.cluster", do_nothing, "", kBarrier);
    for (const char* aligned : {"", ".aligned"}) {
        for (const char* order : {"", ".release", ".relaxed"})
            table.add(std::string("barrier.cluster.arrive") + order + aligned, arrive_cluster, "",
                      kBarrier);
        for (const char* order : {"", ".acquire"})
            table.add(std::string("barrier.cluster.wait") + order + aligned, wait_cluster, "",
                      kBarrier);
    }
}

}  // namespace emulator
