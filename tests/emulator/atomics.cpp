// atom and red (PTX ISA 9.7.13.1, 9.7.13.2), and fences of the GPU's scope. Lanes go in order.
#include <algorithm>

#include "block.hpp"
#include "lanes.hpp"

namespace emulator {
namespace {

struct Add {
    template <class T>
    T operator()(T old, T value, T) const {
        return static_cast<T>(old + value);
    }
};
template <class T>
struct AddHalves {  // each is rounded
    Pair<T> operator()(Pair<T> old, Pair<T> value, Pair<T>) const {
        return {narrow<T>(widen(old.low) + widen(value.low)),
                narrow<T>(widen(old.high) + widen(value.high))};
    }
};
struct Minimum {
    template <class T>
    T operator()(T old, T value, T) const {
        return std::min(old, value);
    }
};
struct Maximum {
    template <class T>
    T operator()(T old, T value, T) const {
        return std::max(old, value);
    }
};
struct And {
    template <class T>
    T operator()(T old, T value, T) const {
        return old & value;
    }
};
struct Or {
    template <class T>
    T operator()(T old, T value, T) const {
        return old | value;
    }
};
struct Xor {
    template <class T>
    T operator()(T old, T value, T) const {
        return old ^ value;
    }
};
struct Increment {
    u32 operator()(u32 old, u32 limit, u32) const { return old >= limit ? 0 : old + 1; }
};
struct Decrement {
    u32 operator()(u32 old, u32 limit, u32) const {
        return old == 0 || old > limit ? limit : old - 1;
    }
};
struct Exchange {
    template <class T>
    T operator()(T, T value, T) const {
        return value;
    }
};
struct CompareAndSwap {
    template <class T>
    T operator()(T old, T compared, T value) const {
        return old == compared ? value : old;
    }
};

// An atomic after a fence releases, an atomic before a fence acquires: both order two blocks.
void order_blocks(Warp& warp, const Instruction& instruction, u64 address, u32 bytes) {
    Block& block = *warp.block;
    Device& device = *block.launch->device;
    if (!device.options.races) return;
    device.races.atomic(block.accessor(warp), address, bytes);
    Cluster& cluster = *block.cluster;
    std::set<u32>& released = device.released[address];
    cluster.acquired.insert(released.begin(), released.end());
    if (instruction.options & 2) cluster.ordered.insert(released.begin(), released.end());
    if (block.fenced || instruction.options & 4) {
        released.insert(cluster.number);
        released.insert(cluster.ordered.begin(), cluster.ordered.end());
    }
}

// Atomics of shared memory order the warps that execute them: more than PTX does.
u8* shared_atomic(Warp& warp, u32 address, u32 bytes) {
    Block& block = warp.block->owner(address);
    u8* const data = block.at(address, bytes, bytes);
    if (block.shadow.checks()) {
        Clocks& clocks = block.atomics[address];
        if (clocks.order.empty()) clocks.reset(warp.clocks.order.size());
        warp.clocks.join(clocks);
        block.read_shared(warp, address, bytes);
        block.write_shared(warp, address, bytes);
        clocks.join(warp.clocks);
        ++warp.clocks.order[warp.agent];
    }
    return data;
}

u8* global_atomic(Warp& warp, const Instruction& instruction, u64 address, u32 bytes) {
    if (address % bytes != 0) throw Fault("global memory: misaligned atomic", address);
    GlobalMemory& memory = warp.block->launch->device->memory;
    memory.check_read(address, bytes, "global memory");
    order_blocks(warp, instruction, address, bytes);
    return reinterpret_cast<u8*>(address);
}

template <class T, class Function, bool in_shared, bool has_result>
void atomic(Warp& warp, const Instruction& instruction) {
    constexpr u32 kBytes = sizeof(T);
    const u32* operand = instruction.operand + (has_result ? 1 : 0);
    auto* result = lanes_of<T>(warp, instruction.operand[0]);
    const auto* value = lanes_of<T>(warp, operand[1]);
    const auto* second = lanes_of<T>(warp, operand[2]);
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        const bool narrow = in_shared && instruction.wide_addresses == 0;
        const u64 base = narrow ? warp.words(operand[0])[lane] : warp.doublewords(operand[0])[lane];
        const u64 address = base + static_cast<u64>(instruction.immediate);
        const bool shared = in_shared || (address & kWindowMask) == kSharedWindow;
        u8* const data = shared ? shared_atomic(warp, static_cast<u32>(address), kBytes)
                                : global_atomic(warp, instruction, address, kBytes);
        T old;
        std::memcpy(&old, data, kBytes);
        const T changed =
            Function()(old, from_register<T>(value[lane]), from_register<T>(second[lane]));
        std::memcpy(data, &changed, kBytes);
        if (has_result) result[lane] = to_register(old);
    }
}

template <class T, class Function, bool in_shared>
void add_space(OpcodeTable& table, const std::string& name, const char* space_name) {
    const std::string letter = sizeof(T) == 8 ? "R" : "r";
    std::string operands = (in_shared ? "m" : "M") + letter;
    if (std::is_same_v<Function, CompareAndSwap>) operands += letter;
    table.add("atom." + std::string(space_name) + name, atomic<T, Function, in_shared, true>,
              letter + "=" + operands, kAtomic);
    if (!std::is_same_v<Function, CompareAndSwap> && !std::is_same_v<Function, Exchange>)
        table.add("red." + std::string(space_name) + name, atomic<T, Function, in_shared, false>,
                  "=" + operands, kAtomic);
}
template <class T, class Function>
void add(OpcodeTable& table, const std::string& name) {
    add_space<T, Function, false>(table, name, "global");
    add_space<T, Function, true>(table, name, "shared");
    add_space<T, Function, false>(table, name, "generic");
}

void fence_gpu(Warp& warp, const Instruction&) {
    Block& block = *warp.block;
    block.fenced = true;
    Cluster& cluster = *block.cluster;
    cluster.ordered.insert(cluster.acquired.begin(), cluster.acquired.end());
}

}  // namespace

void add_atomics(OpcodeTable& table) {
    add<u32, Add>(table, ".add.u32");
    add<i32, Add>(table, ".add.s32");
    add<u64, Add>(table, ".add.u64");
    add<float, Add>(table, ".add.f32");
    add<double, Add>(table, ".add.f64");
    add<Pair<Half>, AddHalves<Half>>(table, ".add.noftz.f16x2");
    add<Pair<Bfloat>, AddHalves<Bfloat>>(table, ".add.noftz.bf16x2");
    add<u32, Minimum>(table, ".min.u32");
    add<i32, Minimum>(table, ".min.s32");
    add<u64, Minimum>(table, ".min.u64");
    add<i64, Minimum>(table, ".min.s64");
    add<u32, Maximum>(table, ".max.u32");
    add<i32, Maximum>(table, ".max.s32");
    add<u64, Maximum>(table, ".max.u64");
    add<i64, Maximum>(table, ".max.s64");
    add<u32, And>(table, ".and.b32");
    add<u32, Or>(table, ".or.b32");
    add<u32, Xor>(table, ".xor.b32");
    add<u32, Increment>(table, ".inc.u32");
    add<u32, Decrement>(table, ".dec.u32");
    add<u32, Exchange>(table, ".exch.b32");
    add<u64, Exchange>(table, ".exch.b64");
    add<u32, CompareAndSwap>(table, ".cas.b32");
    add<u64, CompareAndSwap>(table, ".cas.b64");
    for (const char* name : {"membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys",
                             "fence.sc.gpu", "fence.sc.sys"})
        table.add(name, fence_gpu, "", kAtomic);
    for (const char* name : {"membar.cta", "fence.acq_rel.cta", "fence.sc.cta",
                             "fence.acq_rel.cluster", "fence.sc.cluster"})
        table.add(name, do_nothing, "", kAtomic);  // barriers order warps here, fences do not
}

}  // namespace emulator
