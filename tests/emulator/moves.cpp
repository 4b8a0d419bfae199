// mov, cvta, packing and unpacking of vectors (PTX ISA 9.7.9), registers of other kernels'
// launches.
#include "lanes.hpp"

namespace emulator {
namespace {

struct Same {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};
template <u64 window>
struct ToGeneric {
    u64 operator()(u64 address) const { return address | window; }
};
struct FromGeneric {
    u64 operator()(u64 address) const { return address & ~kWindowMask; }
};

template <class T>
constexpr T low_bits(u32 bits) {
    return bits >= sizeof(T) * 8 ? ~T(0) : static_cast<T>((T(1) << bits) - 1);
}

// operand 0 = {vector}, the first the lowest.
template <class T>
void pack(Warp& warp, const Instruction& instruction) {
    auto* result = lanes_of<T>(warp, instruction.operand[0]);
    const u32* parts = &warp.kernel->pool[instruction.vector.first];
    const u32 count = instruction.vector.count, bits = sizeof(T) * 8 / count;
    each_lane(warp, [=, &warp](u32 lane) {
        T value = 0;
        for (u32 i = 0; i < count; ++i)
            value |= (T(warp.words(parts[i])[lane]) & low_bits<T>(bits)) << bits * i;
        result[lane] = value;
    });
}

template <class T>
void unpack(Warp& warp, const Instruction& instruction) {
    T source[kLanes];  // a part may be the source's register
    std::memcpy(source, warp.registers + instruction.operand[0], sizeof source);
    const u32 count = instruction.vector.count, bits = sizeof(T) * 8 / count;
    for (u32 i = 0; i < count; ++i) {
        u32* part = warp.words(warp.kernel->pool[instruction.vector.first + i]);
        each_lane(warp, [&, part](u32 lane) {
            part[lane] = static_cast<u32>(source[lane] >> bits * i & low_bits<T>(bits));
        });
    }
}

}  // namespace

void add_moves(OpcodeTable& table) {
    for (const char* type : {"b16", "u16", "s16"})
        add_lanewise<u16, Same, u16>(table, std::string("mov.") + type, kMove);
    for (const char* type : {"b32", "u32", "s32", "f32"})
        add_lanewise<u32, Same, u32>(table, std::string("mov.") + type, kMove);
    for (const char* type : {"b64", "u64", "s64", "f64"})
        add_lanewise<u64, Same, u64>(table, std::string("mov.") + type, kMove);
    for (const char* space : {"param", "global", "const", "to.global", "to.const", "to.param"})
        add_lanewise<u64, Same, u64>(table, std::string("cvta.") + space + ".u64", kMove);
    add_lanewise<u64, ToGeneric<kSharedWindow>, u64>(table, "cvta.shared.u64", kMove);
    add_lanewise<u64, ToGeneric<kLocalWindow>, u64>(table, "cvta.local.u64", kMove);
    add_lanewise<u64, FromGeneric, u64>(table, "cvta.to.shared.u64", kMove);
    add_lanewise<u64, FromGeneric, u64>(table, "cvta.to.local.u64", kMove);
    // The parser turns mov.b32 with a vector into these.
    table.add("pack.b32", pack<u32>, "r=v", kMove);
    table.add("pack.b64", pack<u64>, "R=v", kMove);
    table.add("unpack.b32", unpack<u32>, "v=r", kMove);
    table.add("unpack.b64", unpack<u64>, "v=R", kMove);
}

}  // namespace emulator
