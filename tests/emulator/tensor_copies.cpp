// cp.async.bulk and cp.async.bulk.tensor (PTX ISA 9.7.9.25.4, 9.7.9.25.5): bytes, or boxes of a
// tensor, swizzled, zeros outside of it.
#include "opcodes.hpp"
#include "tensor_box.hpp"

namespace emulator {
namespace {

void read_coordinates(Warp& warp, const Instruction& instruction, u32 lane, i32* coordinates) {
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    require(instruction.vector.count <= 5, "a tensor of more than 5 dimensions");
    for (u32 i = 0; i < instruction.vector.count; ++i)
        coordinates[i] = static_cast<i32>(warp.words(registers[i])[lane]);
}

// The first, second or third address: 0, 1, 2.
u32 shared_operand(const Warp& warp, const Instruction& instruction, u32 operand, u32 lane,
                   u32 number = 0) {
    const bool wide = instruction.wide_addresses >> number & 1;
    const i64 displacement = number == 0   ? instruction.immediate
                             : number == 1 ? instruction.second_immediate
                                           : instruction.third_immediate;
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

// To the own block or another, or by a mask to several.
void address_blocks(Warp& warp, TensorLoad& item, const u32* mask) {
    Block& block = *warp.block;
    if (mask == nullptr) {
        const Block& target = block.owner(item.shared);
        item.ranks = 1u << target.rank;
        require(&block.owner(item.mbarrier) == &target,
                "cp.async.bulk: data and mbarrier of different blocks");
        return;
    }
    item.shared &= kOffsetMask;
    item.mbarrier &= kOffsetMask;
    item.ranks = *mask & 0xffff;
    if (item.ranks == 0 || item.ranks >> block.cluster->blocks.size() != 0)
        throw Fault(std::string(kBulkCopy) + ": the mask " + text(item.ranks) +
                    " names blocks that are not in the cluster");
}

// Bytes without a tensor map: multiples of 16, at multiples of 16.
void check_linear(u64 address, u32 bytes, u32 shared) {
    if (bytes == 0 || bytes % 16 != 0 || address % 16 != 0 || shared % 16 != 0)
        throw Fault("cp.async.bulk: " + text(bytes) + " bytes, global address " + text(address) +
                        ", shared " + std::to_string(i64{shared} - i64{kReservedShared}) +
                        ", wanted multiples of 16",
                    address);
}

// [shared], [map, {coordinates}], [mbarrier]; or [shared], [global], bytes, [mbarrier]. Then a mask
// of the cluster's blocks.
template <bool tensor, bool multicast>
void load(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    const u32* operand = instruction.operand;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        TensorLoad item{};
        if (tensor) {
            item.map = map_operand(warp, instruction, 1, lane);
            read_coordinates(warp, instruction, lane, item.coordinates);
        } else {
            item.address =
                warp.doublewords(operand[1])[lane] + static_cast<u64>(instruction.second_immediate);
            item.bytes = warp.words(operand[2])[lane];
        }
        const u32 number = tensor ? 1 : 2, last = tensor ? 3 : 4;
        item.shared = shared_operand(warp, instruction, 0, lane);
        item.mbarrier = shared_operand(warp, instruction, last - 1, lane, number);
        item.accessor = block.accessor(warp);
        item.instruction = &instruction;
        item.warp = &warp;
        const Box box = Box::of(item);
        address_blocks(warp, item, multicast ? warp.words(operand[last]) + lane : nullptr);
        if (tensor)
            box.check(instruction.vector.count, item.shared);
        else
            check_linear(item.address, item.bytes, item.shared);
        announce(warp, item, box.bytes());
        Counters& counters = block.launch->counters;
        ++counters.tensor_loads;
        counters.tensor_load_bytes += box.bytes();
        note_bytes(warp, instruction, box.bytes());
        block.cluster->loads.push_back(item);
    }
    warp.yields = true;
}

// [map, {coordinates}], [shared]; or [global], [shared], bytes.
template <bool tensor>
void store(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    const u32* operand = instruction.operand;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        TensorStore item{};
        item.shared = shared_operand(warp, instruction, 1, lane, tensor ? 0 : 1);
        item.instruction = &instruction;
        if (tensor) {
            item.map = map_operand(warp, instruction, 0, lane);
            read_coordinates(warp, instruction, lane, item.coordinates);
        } else {
            item.address =
                warp.doublewords(operand[0])[lane] + static_cast<u64>(instruction.immediate);
            item.bytes = warp.words(operand[2])[lane];
            check_linear(item.address, item.bytes, item.shared);
        }
        const Box box = Box::of(item);
        if (tensor) box.check(instruction.vector.count, item.shared);
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

// With and without a cache policy, which changes no result.
void add_with_hint(OpcodeTable& table, const std::string& name, Handler run,
                   const std::string& operands) {
    table.add(name, run, operands, kAsyncCopy);
    table.add(name + ".L2::cache_hint", run, operands + "R", kAsyncCopy);
}

}  // namespace

void add_tensor_copies(OpcodeTable& table) {
    const std::string completes = ".mbarrier::complete_tx::bytes", several = ".multicast::cluster";
    for (u32 rank = 1; rank <= 5; ++rank) {
        const std::string stem = std::string(kBulkCopy) + "." + text(rank) + "d";
        for (const std::string& tile : {std::string(), std::string(".tile")}) {
            for (const char* space : {".shared::cta", ".shared::cluster"})
                add_with_hint(table, stem + space + ".global" + tile + completes, load<true, false>,
                              "=mTn");
            add_with_hint(table, stem + ".shared::cluster.global" + tile + completes + several,
                          load<true, true>, "=mTnr");
            add_with_hint(table, stem + ".global.shared::cta" + tile + ".bulk_group", store<true>,
                          "=Tm");
        }
    }
    const std::string stem = "cp.async.bulk";
    for (const char* space : {".shared::cta", ".shared::cluster"})
        add_with_hint(table, stem + space + ".global" + completes, load<false, false>, "=mNro");
    add_with_hint(table, stem + ".shared::cluster.global" + completes + several, load<false, true>,
                  "=mNror");
    add_with_hint(table, stem + ".global.shared::cta.bulk_group", store<false>, "=Mnr");
}

}  // namespace emulator
