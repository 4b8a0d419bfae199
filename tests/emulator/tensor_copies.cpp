// cp.async.bulk.tensor (PTX ISA 9.7.9.25.5): boxes of a tensor, swizzled, zeros outside of it.
#include <algorithm>

#include "../standin/tensor_map.hpp"
#include "block.hpp"
#include "opcodes.hpp"

namespace emulator {
namespace {

constexpr const char* kName = "cp.async.bulk.tensor";
constexpr u32 kChunk = 16;  // bytes that stay together under any swizzle

u32 swizzled(u32 address, u32 mode) {
    const u32 bits = mode == 1 ? 1 : mode == 2 ? 3 : mode == 3 ? 7 : 0;
    return address ^ (address >> 7 & bits) << 4;
}

// A box: rows of the innermost dimension.
struct Box {
    standin::TensorMap map;
    u32 element_bytes, row_bytes, rows = 1;

    explicit Box(const u8* bytes) {
        if (!standin::decode(bytes, map))
            throw Fault(std::string(kName) + ": the 128 bytes are no tensor map",
                        reinterpret_cast<u64>(bytes));
        element_bytes = standin::kElementBytes[map.type];
        row_bytes = map.box[0] * element_bytes;
        for (u32 i = 1; i < map.rank; ++i) rows *= map.box[i];
    }
    u32 bytes() const { return row_bytes * rows; }

    void check(u32 rank, u32 shared) const {
        static constexpr u32 kPattern[] = {128, 256, 512, 1024};
        if (map.rank != rank)
            throw Fault(std::string(kName) + ": " + text(rank) + " coordinates, the map has " +
                        text(map.rank) + " dimensions");
        if (map.swizzle > 3 || map.interleave != 0)
            throw Fault(std::string(kName) + ": swizzle " + text(map.swizzle) + ", interleave " +
                        text(map.interleave) + " are not known to the emulator");
        for (u32 i = 0; i < map.rank; ++i)
            if (map.steps[i] != 1)
                throw Fault(std::string(kName) + ": element strides are not known to the emulator");
        if (shared % kPattern[map.swizzle] != 0)
            throw Fault(std::string(kName) + ": misaligned address " +
                        std::to_string(i64{shared} - i64{kReservedShared}) +
                        " of shared memory, wanted a multiple of " + text(kPattern[map.swizzle]));
    }

    // Visits 16 bytes at a time, with their addresses in shared and in global memory, and from
    // which to which byte they are inside the tensor.
    template <class Visit>
    void chunks(const i32* coordinates, u32 shared, Visit visit) const {
        for (u32 row = 0; row < rows; ++row) {
            u64 start = map.base;
            bool inside = true;
            u32 rest = row;
            for (u32 i = 1; i < map.rank; ++i) {
                const i64 at = i64{coordinates[i]} + rest % map.box[i];
                rest /= map.box[i];
                inside &= at >= 0 && static_cast<u64>(at) < map.dims[i];
                start += static_cast<u64>(at) * map.strides[i - 1];
            }
            const i64 end = static_cast<i64>(map.dims[0]) * element_bytes;
            for (u32 byte = 0; byte < row_bytes; byte += kChunk) {
                const i64 first = i64{coordinates[0]} * element_bytes + byte;
                i64 from = std::clamp<i64>(-first, 0, kChunk);
                i64 to = std::clamp<i64>(end - first, 0, kChunk);
                if (!inside || to < from) from = to = 0;
                visit(swizzled(shared + row * row_bytes + byte, map.swizzle),
                      start + static_cast<u64>(first), static_cast<u32>(from),
                      static_cast<u32>(to));
            }
        }
    }
};

void read_coordinates(Warp& warp, const Instruction& instruction, u32 lane, i32* coordinates) {
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    require(instruction.vector.count <= 5, "a tensor of more than 5 dimensions");
    for (u32 i = 0; i < instruction.vector.count; ++i)
        coordinates[i] = static_cast<i32>(warp.words(registers[i])[lane]);
}

// The first or the second address of shared memory.
u32 shared_operand(const Warp& warp, const Instruction& instruction, u32 operand, u32 lane,
                   bool second = false) {
    const bool wide = instruction.wide_addresses >> u32{second} & 1;
    const i64 displacement = second ? instruction.second_immediate : instruction.immediate;
    return warp.registers[instruction.operand[operand] + (wide ? 2 * lane : lane)] +
           static_cast<u32>(displacement);
}

const u8* map_operand(Warp& warp, const Instruction& instruction, u32 operand, u32 lane) {
    const u64 address = warp.doublewords(instruction.operand[operand])[lane];
    const Launch& launch = *warp.block->launch;
    const u64 parameters = reinterpret_cast<u64>(launch.parameters);
    if (address < parameters || address + 128 > parameters + launch.kernel->parameter_bytes)
        launch.device->memory.check_read(address, 128, "a tensor map");
    return reinterpret_cast<const u8*>(address);
}

void note_bytes(Warp& warp, const Instruction& instruction, u32 bytes) {
    Launch& launch = *warp.block->launch;
    if (launch.device->options.counters) launch.site(instruction).bytes += bytes;
}

// The box will be written by the mbarriers' loads.
void announce(Warp& warp, TensorLoad& load, u32 bytes) {
    Cluster& cluster = *warp.block->cluster;
    for (Block& target : cluster.blocks) {
        if ((load.ranks >> target.rank & 1) == 0) continue;
        const u32 far = load.mbarrier | (target.rank + 1) << kRankShift;
        const Mbarrier& mbarrier = warp.block->mbarrier(warp, far);
        target.at(load.shared, bytes);
        if (!target.shadow.checks()) continue;
        const Clock clock = mbarrier.first_clock + mbarrier.phase + 1;
        target.shadow.write(warp, load.shared, bytes, {mbarrier.agent, clock, true}, nullptr,
                            nullptr);
    }
}

// [shared], [map, {coordinates}], [mbarrier], and a mask of the cluster's blocks.
template <bool multicast>
void load(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    Cluster& cluster = *block.cluster;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        TensorLoad item{};
        item.map = map_operand(warp, instruction, 1, lane);
        read_coordinates(warp, instruction, lane, item.coordinates);
        item.shared = shared_operand(warp, instruction, 0, lane);
        item.mbarrier = shared_operand(warp, instruction, 2, lane, true);
        item.accessor = block.accessor(warp);
        item.instruction = &instruction;
        item.warp = &warp;
        const Box box(item.map);
        if (multicast) {
            item.shared &= kOffsetMask;
            item.mbarrier &= kOffsetMask;
            item.ranks = warp.words(instruction.operand[3])[lane] & 0xffff;
            if (item.ranks == 0 || item.ranks >> cluster.blocks.size() != 0)
                throw Fault(std::string(kName) + ": the mask " + text(item.ranks) +
                            " names blocks that are not in the cluster");
        } else {
            const Block& target = block.owner(item.shared);
            item.ranks = 1u << target.rank;
            require(&block.owner(item.mbarrier) == &target,
                    "cp.async.bulk.tensor: data and mbarrier of different blocks");
        }
        box.check(instruction.vector.count, item.shared);
        announce(warp, item, box.bytes());
        Counters& counters = block.launch->counters;
        ++counters.tensor_loads;
        counters.tensor_load_bytes += box.bytes();
        note_bytes(warp, instruction, box.bytes());
        cluster.loads.push_back(item);
    }
    warp.yields = true;
}

// [map, {coordinates}], [shared]
void store(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        TensorStore item{};
        item.map = map_operand(warp, instruction, 0, lane);
        read_coordinates(warp, instruction, lane, item.coordinates);
        item.shared = shared_operand(warp, instruction, 1, lane);
        item.instruction = &instruction;
        const Box box(item.map);
        box.check(instruction.vector.count, item.shared);
        block.at(item.shared, box.bytes());
        if (block.shadow.checks())
            block.shadow.read(warp, item.shared, box.bytes(),
                              {block.cluster->agents.stores(block.rank, warp.index),
                               warp.stores.commits + 1, true});
        Counters& counters = block.launch->counters;
        ++counters.tensor_stores;
        counters.tensor_store_bytes += box.bytes();
        note_bytes(warp, instruction, box.bytes());
        warp.stores.open.push_back(item);
    }
}

void run_store(Warp& warp, const TensorStore& item) {
    Block& block = *warp.block;
    const Box box(item.map);
    try {
        box.chunks(item.coordinates, item.shared, [&](u32 shared, u64 global, u32 from, u32 to) {
            if (from == to) return;
            block.write_global(warp, global + from, block.shared.data() + shared + from, to - from,
                               kName);
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
        device.memory.check_read(global + from, to - from, kName);
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
        const Box box(item.map);
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

void add_tensor_copies(OpcodeTable& table) {
    for (u32 rank = 1; rank <= 5; ++rank) {
        const std::string stem = std::string(kName) + "." + text(rank) + "d";
        const std::string completes = ".mbarrier::complete_tx::bytes";
        for (const char* tile : {"", ".tile"}) {
            for (const char* space : {".shared::cta", ".shared::cluster"})
                table.add(stem + space + ".global" + tile + completes, load<false>, "=mTn",
                          kAsyncCopy);
            table.add(stem + ".shared::cluster.global" + tile + completes + ".multicast::cluster",
                      load<true>, "=mTnr", kAsyncCopy);
            table.add(stem + ".global.shared::cta" + tile + ".bulk_group", store, "=Tm",
                      kAsyncCopy);
        }
    }
    table.add("cp.async.bulk.commit_group", commit, "", kAsyncCopy);
    table.add("cp.async.bulk.wait_group", wait, "i", kAsyncCopy);
    table.add("cp.async.bulk.wait_group.read", wait, "i", kAsyncCopy);
}

}  // namespace emulator
