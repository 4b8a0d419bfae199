// Which warp runs next, for how long, and when asynchronous work is done.
#include <algorithm>

#include "block.hpp"

namespace emulator {

// Seed 0: each warp in turn until it waits, asynchronous work as late as allowed. Even seeds: any
// warp for some instructions. Odd ones: the ready warp of the highest priority, and priorities that
// change now and then, so that some warps run far ahead of others.
Warp& Cluster::choose() {
    const u64 seed = launch->device->options.seed;
    if (seed == 0) return *ready_[turn_++ % ready_.size()];
    if (seed % 2 == 0) return *ready_[random.below(static_cast<u32>(ready_.size()))];
    if (priorities_.empty() || random.below(64) == 0) {
        priorities_.resize(blocks.size() * agents.warps);
        // A block's own part lets whole blocks run ahead.
        for (size_t rank = 0; rank < blocks.size(); ++rank) {
            const u64 own = random.next() >> 2;
            for (u32 i = 0; i < agents.warps; ++i)
                priorities_[rank * agents.warps + i] = own + (random.next() >> 2);
        }
    }
    const auto priority = [this](const Warp* warp) {
        return priorities_[warp->block->rank * agents.warps + warp->index];
    };
    return **std::max_element(ready_.begin(), ready_.end(), [&](const Warp* a, const Warp* b) {
        return priority(a) < priority(b);
    });
}

Cluster::Progress Cluster::advance(u32 turns) {
    Counters& counters = launch->counters;
    const u64 limit = launch->device->options.limit;
    for (pauses = false; turns > 0 && !pauses; --turns) {
        ready_.clear();
        bool over = true, waits_for_launches = false;
        for (Block& block : blocks)
            for (Warp& warp : block.warps) {
                if (warp.state == Warp::kReady) ready_.push_back(&warp);
                over &= warp.state == Warp::kDone;
                waits_for_launches |= warp.state == Warp::kAtLaunches;
            }
        if (over) {
            end();
            return kFinished;
        }
        if (ready_.empty()) {
            if (loads.empty() && waits_for_launches) return kWaitsForLaunches;
            if (loads.empty()) deadlock();
            const u32 last = static_cast<u32>(loads.size());
            load_tensor(*this, launch->device->options.seed == 0 ? 0 : random.below(last));
            continue;
        }
        Warp& warp = choose();
        const u64 before = warp.executed;
        run_turn(warp);
        counters.warp_instructions += warp.executed - before;
        if (limit != 0 && counters.warp_instructions > limit)
            throw Fault("the limit of " + text(limit) + " warp instructions is reached" +
                        location(warp, warp.next));
        finish_some_work(warp, false);
        if (warp.state == Warp::kDone) end_warp(warp);
    }
    return kRunning;
}

void Cluster::run_turn(Warp& warp) {
    const Options& options = launch->device->options;
    const Kernel& kernel = *launch->kernel;
    const Instruction* code = kernel.code.data();
    Counters& counters = launch->counters;
    u32 turn = options.seed == 0 ? 1u << 20 : 1 + random.below(400);
    warp.yields = false;
    try {
        while (turn-- > 0 && !warp.yields) {
            while (warp.next == warp.meet) warp.resume_split();
            const Instruction& instruction = code[warp.next];
            u32 mask = warp.active;
            if (instruction.guard >= 0) {
                const u32 guard = warp.predicates[instruction.guard];
                mask &= instruction.negated ? ~guard : guard;
            }
            ++warp.next;
            ++warp.executed;
            if (mask == 0) continue;
            warp.mask = mask;
            if (options.counters) {
                ++counters.by_class[instruction.instruction_class];
                counters.thread_instructions += count_bits(mask);
                ++counters.sites[static_cast<size_t>(&instruction - code)].runs;
            }
            if (instruction.uses_accumulator &&
                !(warp.products.committed.empty() && warp.products.open.empty()))
                use_accumulators(warp, instruction);
            instruction.run(warp, instruction);
            if (instruction.writes_fragment)
                for (u32 offset : kernel.fragments.at(kernel.index_of(instruction)))
                    warp.written_since_fence[offset / kLanes] = 1;
        }
    } catch (Fault& fault) {
        fault.message += location(warp, warp.next == 0 ? 0 : warp.next - 1);
        throw;
    }
}

std::string Cluster::location(const Warp& warp, u32 instruction) const {
    const u32* const index = warp.block->index;
    std::string at = text(index[0]);
    if (launch->grid[1] > 1 || launch->grid[2] > 1)
        at = "(" + at + ", " + text(index[1]) + ", " + text(index[2]) + ")";
    return " [" + launch->kernel->location(instruction) + ", block " + at + ", warp " +
           text(warp.index) + "]";
}

void Cluster::require_no_load(const Block& block, u32 mbarrier, const char* message) const {
    for (const TensorLoad& load : loads)
        if (load.completes_at(block, mbarrier))
            throw Fault(std::string(message) + " for the mbarrier at byte " +
                        std::to_string(i64{mbarrier} - i64{kReservedShared}) +
                        " of shared memory is under way, which" +
                        location(*load.warp, launch->kernel->index_of(*load.instruction)) +
                        " began");
}

// Products and loads may be done early, and with seeds other than 0 sometimes are.
void Cluster::finish_some_work(Warp& warp, bool force) {
    if (launch->device->options.seed == 0) return;
    if (!warp.products.committed.empty() && (force || random.below(4) == 0)) {
        for (Product& product : warp.products.committed.front()) product.compute(warp);
    }
    if (loads.empty() || random.below(2) != 0) return;
    load_tensor(*this, random.below(static_cast<u32>(loads.size())));
}

void Cluster::end_warp(Warp& warp) {
    const auto require_committed = [&](const auto& open, const char* name) {
        if (open.empty()) return;
        throw Fault("a warp ends with a " + std::string(name) + " that was not committed" +
                    location(warp, launch->kernel->index_of(*open.front().instruction)));
    };
    require_committed(warp.products.open, "wgmma");
    require_committed(warp.stores.open, "bulk store");
    for (const auto& group : warp.stores.committed)
        if (!group.empty())
            throw Fault("a warp ends while a bulk store reads shared memory" +
                        location(warp, launch->kernel->index_of(*group.front().instruction)));
    finish_copies(warp, 0);
    finish_products(warp, 0);
    finish_stores(warp, 0);
}

void Cluster::end() const {
    for (const Block& block : blocks)
        for (const auto& [address, mbarrier] : block.mbarriers)
            require_no_load(block, address, "the block ends while a bulk load");
    Counters& counters = launch->counters;
    for (const Block& block : blocks) {
        ++counters.blocks;
        counters.same_writes += block.shadow.same_writes;
        for (size_t i = 0; i + 3 < block.warps.size(); ++i)
            if (block.warps[i].products_issued != block.warps[i / 4 * 4].products_issued)
                throw Fault("the warps of a warpgroup executed different numbers of wgmma");
    }
}

static std::string reason(const Warp& warp) {
    switch (warp.state) {
        case Warp::kAtBarrier:
            return "at barrier " + text(warp.waits_for);
        case Warp::kAtWarpgroup:
            return "at wgmma.wait_group, for the other warps of its warpgroup";
        case Warp::kAtCluster:
            return "at the cluster's barrier";
        case Warp::kAtLaunches:
            return "at griddepcontrol.wait";
        default:
            return "at mbarrier " + text(warp.waits_for - kReservedShared) + " parity " +
                   text(warp.wait_parity);
    }
}

void Cluster::deadlock() const {
    std::string sentence = "deadlock in block " + text(blocks[0].index[0]) + ":";
    for (const Block& block : blocks)
        for (const Warp& warp : block.warps) {
            if (warp.state == Warp::kDone) continue;
            const bool repeats = warp.state != Warp::kAtBarrier;
            sentence += " ";
            if (blocks.size() > 1) sentence += "block " + text(block.rank) + " of the cluster, ";
            sentence += "warp " + text(warp.index) + " " + reason(warp) + " in " +
                        launch->kernel->location(repeats ? warp.next : warp.next - 1) + ";";
        }
    throw Fault(sentence);
}

}  // namespace emulator
