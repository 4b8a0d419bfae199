// Instructions in which lanes see each other: shfl, vote, redux, elect, match (PTX
// ISA 9.7.9, 9.7.13).
#include <algorithm>

#include "lanes.hpp"

namespace emulator {
namespace {

u32 members_of(const Warp& warp, u32 offset) {
    const u32 members = warp.registers[offset + warp.first_lane()];
    require((members & ~warp.mask) == 0,
            "the member mask names lanes that do not execute the instruction");
    require((warp.mask & ~members) == 0,
            "a lane executes the instruction that the member mask does not name");
    return members;
}

enum Shuffle { kButterfly, kIndex, kUp, kDown };

// result|in range, value, b, c: segments and the clamp, members
template <Shuffle shuffle>
void shuffle_lanes(Warp& warp, const Instruction& instruction) {
    const u32* operand = instruction.operand;
    u32* result = warp.words(operand[0]);
    const u32 *b = warp.words(operand[3]), *c = warp.words(operand[4]);
    const u32 members = members_of(warp, operand[5]);
    u32 source[kLanes];
    std::memcpy(source, warp.words(operand[2]), sizeof source);
    u32 in_range = 0;
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((warp.mask >> lane & 1) == 0) continue;
        const u32 clamp = c[lane] & 31, segment = c[lane] >> 8 & 31, distance = b[lane] & 31;
        const i32 limit = static_cast<i32>((lane & segment) | (clamp & ~segment));
        i32 from = static_cast<i32>(lane);
        if (shuffle == kButterfly) from = static_cast<i32>(lane ^ distance);
        if (shuffle == kIndex) from = static_cast<i32>((lane & segment) | (distance & ~segment));
        if (shuffle == kUp) from -= static_cast<i32>(distance);
        if (shuffle == kDown) from += static_cast<i32>(distance);
        const bool valid = shuffle == kUp ? from >= limit : from <= limit;
        if (!valid) from = static_cast<i32>(lane);
        require(members >> from & 1, "shfl reads a lane that is not a member");
        result[lane] = source[from];
        in_range |= u32(valid) << lane;
    }
    warp.set_predicate(operand[1], in_range);
}

template <class T, class Function>
void reduce(Warp& warp, const Instruction& instruction) {
    const u32 members = members_of(warp, instruction.operand[2]);
    const u32* source = warp.words(instruction.operand[1]);
    u32* result = warp.words(instruction.operand[0]);
    T value = from_register<T>(source[lowest_bit(members)]);
    for (u32 lane = lowest_bit(members) + 1; lane < kLanes; ++lane)
        if (members >> lane & 1) value = Function()(value, from_register<T>(source[lane]));
    each_lane(warp, [=](u32 lane) { result[lane] = to_register(value); });
}
struct Sum {
    template <class T>
    T operator()(T a, T b) const {
        return a + b;
    }
};
struct Minimum {
    template <class T>
    T operator()(T a, T b) const {
        return std::min(a, b);
    }
};
struct Maximum {
    template <class T>
    T operator()(T a, T b) const {
        return std::max(a, b);
    }
};
struct And {
    u32 operator()(u32 a, u32 b) const { return a & b; }
};
struct Or {
    u32 operator()(u32 a, u32 b) const { return a | b; }
};
struct Xor {
    u32 operator()(u32 a, u32 b) const { return a ^ b; }
};

void elect(Warp& warp, const Instruction& instruction) {
    const u32 leader = lowest_bit(members_of(warp, instruction.operand[2]));
    u32* result = warp.words(instruction.operand[0]);
    each_lane(warp, [=](u32 lane) { result[lane] = leader; });
    warp.set_predicate(instruction.operand[1], 1u << leader);
}

enum Vote { kAll, kAny, kUniform };
template <Vote vote>
void vote_lanes(Warp& warp, const Instruction& instruction) {
    const u32 members = members_of(warp, instruction.operand[2]);
    const u32 lanes = warp.predicates[instruction.operand[1]] & members;
    const bool all = lanes == members, any = lanes != 0;
    const bool result = vote == kAll ? all : vote == kAny ? any : all || !any;
    warp.set_predicate(instruction.operand[0], result ? kAllLanes : 0);
}
void ballot(Warp& warp, const Instruction& instruction) {
    const u32 members = members_of(warp, instruction.operand[2]);
    const u32 lanes = warp.predicates[instruction.operand[1]] & members;
    u32* result = warp.words(instruction.operand[0]);
    each_lane(warp, [=](u32 lane) { result[lane] = lanes; });
}
void active_lanes(Warp& warp, const Instruction& instruction) {
    u32* result = warp.words(instruction.operand[0]);
    each_lane(warp, [=, mask = warp.mask](u32 lane) { result[lane] = mask; });
}
void match_any(Warp& warp, const Instruction& instruction) {
    const u32 members = members_of(warp, instruction.operand[2]);
    u32 source[kLanes];
    std::memcpy(source, warp.words(instruction.operand[1]), sizeof source);
    u32* result = warp.words(instruction.operand[0]);
    each_lane(warp, [&](u32 lane) {
        u32 equal = 0;
        for (u32 other = 0; other < kLanes; ++other)
            equal |= u32(source[other] == source[lane]) << other;
        result[lane] = equal & members;
    });
}

}  // namespace

void add_exchanges(OpcodeTable& table) {
    table.add("shfl.sync.bfly.b32", shuffle_lanes<kButterfly>, "rp=rrrr", kExchange);
    table.add("shfl.sync.idx.b32", shuffle_lanes<kIndex>, "rp=rrrr", kExchange);
    table.add("shfl.sync.up.b32", shuffle_lanes<kUp>, "rp=rrrr", kExchange);
    table.add("shfl.sync.down.b32", shuffle_lanes<kDown>, "rp=rrrr", kExchange);
    table.add("redux.sync.add.s32", reduce<i32, Sum>, "r=rr", kExchange);
    table.add("redux.sync.min.s32", reduce<i32, Minimum>, "r=rr", kExchange);
    table.add("redux.sync.max.s32", reduce<i32, Maximum>, "r=rr", kExchange);
    table.add("redux.sync.add.u32", reduce<u32, Sum>, "r=rr", kExchange);
    table.add("redux.sync.min.u32", reduce<u32, Minimum>, "r=rr", kExchange);
    table.add("redux.sync.max.u32", reduce<u32, Maximum>, "r=rr", kExchange);
    table.add("redux.sync.and.b32", reduce<u32, And>, "r=rr", kExchange);
    table.add("redux.sync.or.b32", reduce<u32, Or>, "r=rr", kExchange);
    table.add("redux.sync.xor.b32", reduce<u32, Xor>, "r=rr", kExchange);
    table.add("elect.sync", elect, "rp=r", kExchange);
    table.add("vote.sync.all.pred", vote_lanes<kAll>, "p=pr", kExchange);
    table.add("vote.sync.any.pred", vote_lanes<kAny>, "p=pr", kExchange);
    table.add("vote.sync.uni.pred", vote_lanes<kUniform>, "p=pr", kExchange);
    table.add("vote.sync.ballot.b32", ballot, "r=pr", kExchange);
    table.add("activemask.b32", active_lanes, "r=", kExchange);
    table.add("match.any.sync.b32", match_any, "r=rr", kExchange);
}

}  // namespace emulator
