// mbarrier (PTX ISA 9.7.13.15), and addresses of other blocks of a cluster.
#include "block.hpp"
#include "opcodes.hpp"

namespace emulator {

Mbarrier& Block::mbarrier(const Warp& warp, u32 address) {
    Block& block = owner(address);
    const auto entry = block.mbarriers.find(address);
    if (entry == block.mbarriers.end())
        throw Fault("no mbarrier is initialized at byte " +
                    std::to_string(i64{address} - i64{kReservedShared}) + " of shared memory");
    block.shadow.use_mbarrier(warp, address);
    return entry->second;
}

namespace {

u32 address_of(const Warp& warp, const Instruction& instruction, u32 operand, u32 lane) {
    const u32 index = instruction.wide_addresses != 0 ? 2 * lane : lane;
    return warp.registers[instruction.operand[operand] + index] +
           static_cast<u32>(instruction.immediate);
}

template <class Visit>
void lanes_in(const Warp& warp, Visit visit) {
    for (u32 lane = 0; lane < kLanes; ++lane)
        if (warp.mask >> lane & 1) visit(lane);
}

// One that no mbarrier has, if possible none had: a load of an mbarrier that is gone would count as
// waited for after a phase of another one with its number.
u32 new_number(Block& block) {
    require(block.mbarriers.size() < Agents::kMbarriers,
            "more than 64 mbarriers of a block at a time");
    for (bool taken = true; taken;) {
        block.next_number = (block.next_number + 1) % Agents::kMbarriers;
        taken = false;
        for (const auto& [address, mbarrier] : block.mbarriers)
            taken |= mbarrier.number == block.next_number;
    }
    return block.next_number;
}

void initialize(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    lanes_in(warp, [&](u32 lane) {
        const u32 address = address_of(warp, instruction, 0, lane);
        block.at(address, 8, 8);
        require(block.mbarriers.count(address) == 0, "mbarrier.init of an mbarrier that is in use");
        block.write_shared(warp, address, 8);
        const u32 number = new_number(block);
        Mbarrier& mbarrier = block.mbarriers[address];
        mbarrier.number = number;
        mbarrier.agent = block.cluster->agents.loads(block.rank, number);
        mbarrier.first_clock = block.load_clocks[number];
        mbarrier.expected = mbarrier.pending = warp.words(instruction.operand[1])[lane];
        require(mbarrier.expected != 0, "an mbarrier that expects no arrivals");
        if (!block.shadow.checks()) return;
        mbarrier.arriving.reset(warp.clocks.order.size());
        mbarrier.complete.reset(warp.clocks.order.size());
    });
}

void invalidate(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    lanes_in(warp, [&](u32 lane) {
        const u32 address = address_of(warp, instruction, 0, lane);
        block.mbarrier(warp, address);
        block.cluster->require_no_load(block, address, "mbarrier.inval while a bulk load");
        block.write_shared(warp, address, 8);
        block.mbarriers.erase(address);
    });
}

void arrive_at(Warp& warp, u32 address, u32 count, u32 bytes) {
    Block& block = warp.block->owner(address);
    Mbarrier& mbarrier = block.mbarrier(warp, address);
    mbarrier.bytes += bytes;
    if (mbarrier.pending < count)
        throw Fault("more arrivals at an mbarrier than the " + text(mbarrier.expected) +
                    " that it expects");
    mbarrier.pending -= count;
    if (block.shadow.checks()) {
        mbarrier.arriving.join(warp.clocks);
        ++warp.clocks.order[warp.agent];
    }
    block.advance(mbarrier, address);
}

// _, [address], bytes
void arrive_expecting(Warp& warp, const Instruction& instruction) {
    lanes_in(warp, [&](u32 lane) {
        arrive_at(warp, address_of(warp, instruction, 0, lane), 1,
                  warp.words(instruction.operand[1])[lane]);
    });
}
void expect(Warp& warp, const Instruction& instruction) {
    lanes_in(warp, [&](u32 lane) {
        u32 address = address_of(warp, instruction, 0, lane);
        Mbarrier& mbarrier = warp.block->owner(address).mbarrier(warp, address);
        mbarrier.bytes += warp.words(instruction.operand[1])[lane];
    });
}
void arrive_once(Warp& warp, const Instruction& instruction) {
    lanes_in(warp,
             [&](u32 lane) { arrive_at(warp, address_of(warp, instruction, 0, lane), 1, 0); });
}
// _, [address], count
void arrive_counted(Warp& warp, const Instruction& instruction) {
    lanes_in(warp, [&](u32 lane) {
        arrive_at(warp, address_of(warp, instruction, 0, lane),
                  warp.words(instruction.operand[1])[lane], 0);
    });
}

// p, [address], parity. A test that fails gives false, try_wait waits until the phase ends.
template <bool waits>
void test_parity(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    const u32 lane = warp.first_lane();
    const u32 address = address_of(warp, instruction, 1, lane);
    const u32 parity = warp.words(instruction.operand[2])[lane] & 1;
    Mbarrier& mbarrier = block.mbarrier(warp, address);
    const bool over = (mbarrier.phase & 1) != parity;
    if (over) warp.clocks.join(mbarrier.complete);
    if (over || !waits) {
        warp.set_predicate(instruction.operand[0], over ? kAllLanes : 0);
        if (!over) warp.yields = true;
        return;
    }
    warp.waits_for = address;
    warp.wait_parity = parity;
    ++block.launch->counters.mbarrier_waits;
    if (block.launch->device->options.counters) ++block.launch->site(instruction).waits;
    warp.wait(Warp::kAtMbarrier);
}

// The address of the same byte in a block of the cluster.
void map_address(Warp& warp, const Instruction& instruction) {
    u32* result = warp.words(instruction.operand[0]);
    const u32* address = warp.words(instruction.operand[1]);
    const u32* rank = warp.words(instruction.operand[2]);
    const size_t blocks = warp.block->cluster->blocks.size();
    lanes_in(warp, [&](u32 lane) {
        if (rank[lane] >= blocks)
            throw Fault("mapa: block " + text(rank[lane]) + ", the cluster has " + text(blocks));
        result[lane] = (address[lane] & kOffsetMask) | (rank[lane] + 1) << kRankShift;
    });
}

}  // namespace

void add_mbarriers(OpcodeTable& table) {
    for (const char* space : {".shared.b64", ".shared::cta.b64"}) {
        const auto add = [&](const std::string& name, Handler run, const char* operands) {
            table.add("mbarrier." + name + space, run, operands, kBarrier);
        };
        add("init", initialize, "mr");
        add("inval", invalidate, "m");
        add("arrive", arrive_once, "_m");
        add("arrive.release.cta", arrive_once, "_m");
        add("arrive.expect_tx", arrive_expecting, "_mr");
        add("arrive.expect_tx.release.cta", arrive_expecting, "_mr");
        add("expect_tx.relaxed.cta", expect, "mr");
        for (const char* order : {"", ".acquire.cta", ".acquire.cluster"}) {
            add(std::string("try_wait.parity") + order, test_parity<true>, "p=mr");
            add(std::string("test_wait.parity") + order, test_parity<false>, "p=mr");
        }
        table.add(std::string("mbarrier.arrive") + space + "#3", arrive_counted, "_mr", kBarrier);
    }
    for (const char* order : {"", ".release.cluster"}) {
        const std::string stem = std::string("mbarrier.arrive") + order + ".shared::cluster.b64";
        table.add(stem, arrive_once, "_m", kBarrier);
        table.add(stem + "#3", arrive_counted, "_mr", kBarrier);
    }
    for (const char* stem : {"mbarrier.arrive.expect_tx.shared::cluster.b64",
                             "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64"})
        table.add(stem, arrive_expecting, "_mr", kBarrier);
    table.add("mapa.shared::cluster.u32", map_address, "r=rr", kInteger);
}

}  // namespace emulator
