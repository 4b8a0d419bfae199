// cp.async (PTX ISA 9.7.9.25.3): copied at its wait, as late as a GPU may.
#include <algorithm>

#include "block.hpp"
#include "opcodes.hpp"

namespace emulator {
namespace {

// [shared], [global], bytes, and those that are read; the rest is zeros.
template <bool has_size>
void copy(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    const u32* operand = instruction.operand;
    u64 sources[kLanes] = {};
    u32 reading = 0, bytes = 0;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        bytes = warp.words(operand[2])[lane];
        const u32 read = has_size ? warp.words(operand[3])[lane] : bytes;
        const u32 index = instruction.wide_addresses != 0 ? 2 * lane : lane;
        const u32 target =
            warp.registers[operand[0] + index] + static_cast<u32>(instruction.immediate);
        sources[lane] =
            warp.doublewords(operand[1])[lane] + static_cast<u64>(instruction.second_immediate);
        require(bytes == 4 || bytes == 8 || bytes == 16, "cp.async: wanted 4, 8 or 16 bytes");
        if (read > bytes)
            throw Fault("cp.async reads " + text(read) + " bytes and writes " + text(bytes));
        block.at(target, bytes, bytes);
        if (read != 0) {
            if (sources[lane] % bytes != 0)
                throw Fault("global memory: misaligned address of cp.async, wanted a multiple of " +
                                text(bytes),
                            sources[lane]);
            block.read_global(warp, sources[lane], read, "global memory");
            reading |= 1u << lane;
        }
        if (block.shadow.checks())
            block.shadow.write(warp, target, bytes,
                               {block.cluster->agents.copies(block.rank, warp.index),
                                warp.copies.commits + 1, false},
                               nullptr, nullptr);
        warp.copies.open.push_back(
            {sources[lane], target, static_cast<u8>(bytes), static_cast<u8>(read)});
    }
    const u32 mask = warp.mask;
    warp.mask = reading;
    if (reading != 0) count_global(warp, instruction, sources, bytes);
    warp.mask = mask;
}

void commit(Warp& warp, const Instruction&) { warp.copies.commit(); }
void wait(Warp& warp, const Instruction& instruction) {
    finish_copies(warp, static_cast<size_t>(instruction.immediate));
}
void wait_all(Warp& warp, const Instruction&) {
    warp.copies.commit();
    finish_copies(warp, 0);
}

}  // namespace

void finish_copies(Warp& warp, size_t keep) {
    Block& block = *warp.block;
    while (warp.copies.committed.size() > keep) {
        for (const CopiedLane& lane : warp.copies.committed.front()) {
            u8* const target = block.shared.data() + lane.target;
            std::memcpy(target, reinterpret_cast<const void*>(lane.source), lane.bytes_read);
            std::memset(target + lane.bytes_read, 0, lane.bytes - lane.bytes_read);
        }
        warp.copies.committed.pop_front();
    }
    if (!block.shadow.checks()) return;
    const u32 agent = block.cluster->agents.copies(block.rank, warp.index);
    warp.clocks.order[agent] = std::max(warp.clocks.order[agent], warp.copies.finished());
    warp.clocks.visible[agent] = warp.clocks.order[agent];
}

void add_async_copies(OpcodeTable& table) {
    for (const char* cache : {"ca", "cg"})
        for (const char* hint : {"", ".L2::64B", ".L2::128B", ".L2::256B"}) {
            const std::string name = std::string("cp.async.") + cache + ".shared.global" + hint;
            table.add(name, copy<false>, "=mNr", kAsyncCopy);
            table.add(name + "#4", copy<true>, "=mNrr", kAsyncCopy);
        }
    table.add("cp.async.commit_group", commit, "", kAsyncCopy);
    table.add("cp.async.wait_group", wait, "i", kAsyncCopy);
    table.add("cp.async.wait_all", wait_all, "", kAsyncCopy);
}

}  // namespace emulator
