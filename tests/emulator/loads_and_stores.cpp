// ld and st of every space (PTX ISA 9.7.9.8 to 9.7.9.12).
#include "block.hpp"
#include "opcodes.hpp"

namespace emulator {
namespace {

constexpr u32 kMostBytes = 32;  // of a lane

template <class Visit>
void lanes_in(const Warp& warp, Visit visit) {
    for (u32 lane = 0; lane < kLanes; ++lane)
        if (warp.mask >> lane & 1) visit(lane);
}

void put(Warp& warp, const Instruction& instruction, u32 lane, const u8* data) {
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    for (u32 i = 0; i < instruction.vector.count; ++i) {
        u64 value = 0;
        std::memcpy(&value, data + i * instruction.bytes, instruction.bytes);
        if (instruction.sign_extends) {
            const int shift = 64 - 8 * instruction.bytes;
            value = static_cast<u64>(static_cast<i64>(value << shift) >> shift);
        }
        if (instruction.wide)
            warp.doublewords(registers[i])[lane] = value;
        else
            warp.words(registers[i])[lane] = static_cast<u32>(value);
    }
}

void get(Warp& warp, const Instruction& instruction, u32 lane, u8* data) {
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    for (u32 i = 0; i < instruction.vector.count; ++i) {
        const u64 value = instruction.wide ? warp.doublewords(registers[i])[lane]
                                           : warp.words(registers[i])[lane];
        std::memcpy(data + i * instruction.bytes, &value, instruction.bytes);
    }
}

u32 total_bytes(const Instruction& instruction) {
    return instruction.bytes * instruction.vector.count;
}

u32 shared_address(const Warp& warp, const Instruction& instruction, u32 lane) {
    const u32 index = instruction.wide_addresses != 0 ? 2 * lane : lane;
    return warp.registers[instruction.operand[0] + index] + static_cast<u32>(instruction.immediate);
}

u64 wide_address(Warp& warp, const Instruction& instruction, u32 lane) {
    return warp.doublewords(instruction.operand[0])[lane] + static_cast<u64>(instruction.immediate);
}

void load_shared_lane(Warp& warp, const Instruction& instruction, u32 lane, u32& address) {
    const u32 bytes = total_bytes(instruction);
    Block& block = warp.block->owner(address);
    const u8* data = block.at(address, bytes, bytes);
    block.read_shared(warp, address, bytes);
    put(warp, instruction, lane, data);
}

void store_shared_lane(Warp& warp, const Instruction& instruction, u32 lane, u32& address) {
    const u32 bytes = total_bytes(instruction);
    Block& block = warp.block->owner(address);
    u8* const target = block.at(address, bytes, bytes);
    u8 data[kMostBytes];
    get(warp, instruction, lane, data);
    block.write_shared(warp, address, bytes, data);
    std::memcpy(target, data, bytes);
}

void check_alignment(u64 address, u32 bytes) {
    if (address % bytes != 0)
        throw Fault("global memory: misaligned address, wanted a multiple of " + text(bytes),
                    address);
}

// Accesses that are strong (volatile, relaxed, acquire, release) are ordered like atomics.
void order_strong(Warp& warp, const Instruction& instruction, u64 address, u32 bytes) {
    Block& block = *warp.block;
    Device& device = *block.launch->device;
    if (!device.options.races) return;
    Cluster& cluster = *block.cluster;
    if (instruction.options & 4) {
        device.released[address].insert(cluster.number);
        device.released[address].insert(cluster.ordered.begin(), cluster.ordered.end());
    }
    if (instruction.options & 2) {
        const std::set<u32>& released = device.released[address];
        cluster.ordered.insert(released.begin(), released.end());
    }
    device.races.atomic(block.accessor(warp), address, bytes);
}

void load_global_lane(Warp& warp, const Instruction& instruction, u32 lane, u64 address) {
    const u32 bytes = total_bytes(instruction);
    check_alignment(address, bytes);
    if (instruction.options & 1) {
        warp.block->launch->device->memory.check_read(address, bytes, "global memory");
        order_strong(warp, instruction, address, bytes);
    } else {
        warp.block->read_global(warp, address, bytes, "global memory");
    }
    put(warp, instruction, lane, reinterpret_cast<const u8*>(address));
}

void store_global_lane(Warp& warp, const Instruction& instruction, u32 lane, u64 address) {
    const u32 bytes = total_bytes(instruction);
    check_alignment(address, bytes);
    u8 data[kMostBytes];
    get(warp, instruction, lane, data);
    if (instruction.options & 1) {
        warp.block->launch->device->memory.check_write(address, bytes, "global memory");
        order_strong(warp, instruction, address, bytes);
        std::memcpy(reinterpret_cast<void*>(address), data, bytes);
    } else {
        warp.block->write_global(warp, address, data, bytes, "global memory");
    }
}

u8* local_lane(Warp& warp, u32 lane, u64 address, u32 bytes) {
    const u64 size = warp.kernel->local_bytes;
    if (address % bytes != 0) throw Fault("local memory: misaligned address " + text(address));
    if (address + bytes > size)
        throw Fault("local memory: out of bounds, " + text(bytes) + " bytes at " + text(address) +
                    ", a lane has " + text(size));
    return warp.local.data() + lane * size + address;
}

template <bool loads>
void access_shared(Warp& warp, const Instruction& instruction) {
    u32 addresses[kLanes] = {};
    lanes_in(warp, [&](u32 lane) {
        addresses[lane] = shared_address(warp, instruction, lane);
        if (loads)
            load_shared_lane(warp, instruction, lane, addresses[lane]);
        else
            store_shared_lane(warp, instruction, lane, addresses[lane]);
    });
    count_shared(warp, instruction, addresses, total_bytes(instruction));
}

template <bool loads>
void access_global(Warp& warp, const Instruction& instruction) {
    u64 addresses[kLanes] = {};
    lanes_in(warp, [&](u32 lane) {
        addresses[lane] = wide_address(warp, instruction, lane);
        if (loads)
            load_global_lane(warp, instruction, lane, addresses[lane]);
        else
            store_global_lane(warp, instruction, lane, addresses[lane]);
    });
    count_global(warp, instruction, addresses, total_bytes(instruction));
}

template <bool loads>
void access_local(Warp& warp, const Instruction& instruction) {
    const u32 bytes = total_bytes(instruction);
    lanes_in(warp, [&](u32 lane) {
        u8* const data = local_lane(warp, lane, wide_address(warp, instruction, lane), bytes);
        if (loads)
            put(warp, instruction, lane, data);
        else
            get(warp, instruction, lane, data);
    });
}

// The address' highest bits tell the space.
template <bool loads>
void access_generic(Warp& warp, const Instruction& instruction) {
    lanes_in(warp, [&](u32 lane) {
        const u64 address = wide_address(warp, instruction, lane);
        const u64 inner = address & ~kWindowMask, window = address & kWindowMask;
        u32 shared = static_cast<u32>(inner);
        if (window == kLocalWindow) {
            u8* const data = local_lane(warp, lane, inner, total_bytes(instruction));
            if (loads)
                put(warp, instruction, lane, data);
            else
                get(warp, instruction, lane, data);
        } else if (window == kSharedWindow) {
            if (loads)
                load_shared_lane(warp, instruction, lane, shared);
            else
                store_shared_lane(warp, instruction, lane, shared);
        } else {
            if (loads)
                load_global_lane(warp, instruction, lane, address);
            else
                store_global_lane(warp, instruction, lane, address);
        }
    });
}

void load_parameter(Warp& warp, const Instruction& instruction) {
    const u8* data = warp.block->launch->parameters + instruction.immediate;
    lanes_in(warp, [&](u32 lane) { put(warp, instruction, lane, data); });
}

}  // namespace

void add_loads_and_stores(OpcodeTable& table) {
    table.add("ld.param", load_parameter, "v=", kParameter);
    table.add("ld.shared", access_shared<true>, "v=m", kShared);
    table.add("st.shared", access_shared<false>, "=mv", kShared);
    table.add("ld.global", access_global<true>, "v=M", kGlobal);
    table.add("st.global", access_global<false>, "=Mv", kGlobal);
    table.add("ld.local", access_local<true>, "v=M", kLocal);
    table.add("st.local", access_local<false>, "=Mv", kLocal);
    table.add("ld.generic", access_generic<true>, "v=M", kGlobal);
    table.add("st.generic", access_generic<false>, "=Mv", kGlobal);
}

}  // namespace emulator
