// Bulk copies take place: loads at any time until their mbarrier's phase ends, stores until their
// group is waited for (PTX ISA 9.7.9.25).
#include "opcodes.hpp"
#include "tensor_box.hpp"

namespace emulator {
namespace {

void run_store(Warp& warp, const TensorStore& item) {
    Block& block = *warp.block;
    const Box box = Box::of(item);
    try {
        box.chunks(item.coordinates, item.shared, [&](u32 shared, u64 global, u32 from, u32 to) {
            if (from == to) return;
            block.write_global(warp, global + from, block.shared.data() + shared + from, to - from,
                               box.name);
        });
    } catch (Fault& fault) {
        const u32 index = warp.kernel->index_of(*item.instruction);
        fault.message += ", by the store" + block.cluster->location(warp, index) + ", done at";
        throw;
    }
}

void copy_box(const Box& box, const TensorLoad& item, Block& block) {
    Device& device = *block.launch->device;
    box.chunks(item.coordinates, item.shared, [&](u32 shared, u64 global, u32 from, u32 to) {
        u8* const target = block.shared.data() + shared;
        if (from != 0 || to != kChunk) std::memset(target, 0, kChunk);
        if (from == to) return;
        device.memory.check_read(global + from, to - from, box.name);
        if (device.options.races) device.races.read(item.accessor, global + from, to - from);
        std::memcpy(target + from, reinterpret_cast<const void*>(global + from), to - from);
    });
}

void commit(Warp& warp, const Instruction&) { warp.stores.commit(); }
void wait(Warp& warp, const Instruction& instruction) {
    finish_stores(warp, static_cast<size_t>(instruction.immediate));
}

}  // namespace

void load_tensor(Cluster& cluster, u32 index) {
    const TensorLoad item = cluster.loads[index];
    cluster.loads.erase(cluster.loads.begin() + index);
    try {
        const Box box = Box::of(item);
        for (Block& block : cluster.blocks) {
            if ((item.ranks >> block.rank & 1) == 0) continue;
            copy_box(box, item, block);
            Mbarrier& mbarrier = block.mbarriers.at(item.mbarrier);
            mbarrier.bytes -= box.bytes();
            block.advance(mbarrier, item.mbarrier);
        }
    } catch (Fault& fault) {
        fault.message +=
            cluster.location(*item.warp, cluster.launch->kernel->index_of(*item.instruction));
        throw;
    }
}

void finish_stores(Warp& warp, size_t keep) {
    while (warp.stores.committed.size() > keep) {
        for (const TensorStore& item : warp.stores.committed.front()) run_store(warp, item);
        warp.stores.committed.pop_front();
    }
    const Block& block = *warp.block;
    if (!block.shadow.checks()) return;
    Clock& clock = warp.clocks.order[block.cluster->agents.stores(block.rank, warp.index)];
    clock = std::max(clock, warp.stores.finished());
}

void add_bulk_groups(OpcodeTable& table) {
    table.add("cp.async.bulk.commit_group", commit, "", kAsyncCopy);
    table.add("cp.async.bulk.wait_group", wait, "i", kAsyncCopy);
    table.add("cp.async.bulk.wait_group.read", wait, "i", kAsyncCopy);
}

}  // namespace emulator
