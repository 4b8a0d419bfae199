// Logic, shifts and bit fields (PTX ISA 9.7.1, 9.7.8).
#include "lanes.hpp"

namespace emulator {
namespace {

struct And {
    template <class T>
    T operator()(T a, T b) const {
        return a & b;
    }
};
struct Or {
    template <class T>
    T operator()(T a, T b) const {
        return a | b;
    }
};
struct Xor {
    template <class T>
    T operator()(T a, T b) const {
        return a ^ b;
    }
};
struct Not {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(~a);
    }
};
struct ShiftLeft {  // by the width or more: 0
    template <class T>
    T operator()(T a, u32 b) const {
        return b >= sizeof(T) * 8 ? T(0) : static_cast<T>(a << b);
    }
};
struct ShiftRight {  // by the width or more: 0, or the sign
    template <class T>
    T operator()(T a, u32 b) const {
        if (b >= sizeof(T) * 8) return a < 0 ? static_cast<T>(-1) : T(0);
        return static_cast<T>(a >> b);
    }
};
struct FunnelLeft {
    u32 operator()(u32 a, u32 b, u32 c) const {
        return static_cast<u32>((u64{b} << 32 | a) << (c & 31) >> 32);
    }
};
struct FunnelRight {
    u32 operator()(u32 a, u32 b, u32 c) const {
        return static_cast<u32>((u64{b} << 32 | a) >> (c & 31));
    }
};
struct FunnelLeftClamped {
    u32 operator()(u32 a, u32 b, u32 c) const { return c >= 32 ? a : FunnelLeft()(a, b, c); }
};
struct FunnelRightClamped {
    u32 operator()(u32 a, u32 b, u32 c) const { return c >= 32 ? b : FunnelRight()(a, b, c); }
};

template <class T>
struct Extract {  // bits from b on, c of them; the sign of the last fills the rest
    T operator()(T a, u32 b, u32 c) const {
        constexpr u32 kBits = sizeof(T) * 8;
        const u32 start = b & 255, length = c & 255;
        if (length == 0) return 0;
        if (start >= kBits) return a < 0 ? static_cast<T>(-1) : T(0);
        if (start + length >= kBits) return static_cast<T>(a >> start);
        using Unsigned = std::make_unsigned_t<T>;
        const Unsigned top = static_cast<Unsigned>(Unsigned(a) << (kBits - start - length));
        return static_cast<T>(static_cast<T>(top) >> (kBits - length));
    }
};
template <class T>
struct Insert {  // a's lowest bits into b, from bit c on, d of them
    T operator()(T a, T b, u32 c, u32 d) const {
        constexpr u32 kBits = sizeof(T) * 8;
        const u32 start = c & 255, length = d & 255;
        if (start >= kBits || length == 0) return b;
        const T mask = static_cast<T>((length >= kBits ? ~T(0) : (T(1) << length) - 1) << start);
        return (b & ~mask) | (static_cast<T>(a << start) & mask);
    }
};
struct Permute {  // a nibble of c picks a byte; its highest bit the byte's sign
    u32 operator()(u32 a, u32 b, u32 c) const {
        const u64 both = u64{b} << 32 | a;
        u32 result = 0;
        for (u32 i = 0; i < 4; ++i) {
            const u32 nibble = c >> 4 * i & 15;
            u32 byte = static_cast<u32>(both >> 8 * (nibble & 7)) & 255;
            if (nibble & 8) byte = byte & 128 ? 255 : 0;
            result |= byte << 8 * i;
        }
        return result;
    }
};
struct CountOnes {
    u32 operator()(u32 a) const { return count_bits(a); }
};
struct LeadingZeros {
    u32 operator()(u32 a) const { return a == 0 ? 32 : static_cast<u32>(__builtin_clz(a)); }
};
struct Reverse {
    u32 operator()(u32 a) const {
        u32 result = 0;
        for (u32 i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
        return result;
    }
};

void look_up_bits(Warp& warp, const Instruction& instruction) {
    u32* result = warp.words(instruction.operand[0]);
    const u32* a = warp.words(instruction.operand[1]);
    const u32* b = warp.words(instruction.operand[2]);
    const u32* c = warp.words(instruction.operand[3]);
    const u32 table = static_cast<u32>(instruction.immediate);
    each_lane(warp, [=](u32 lane) {
        u32 bits = 0;
        for (u32 i = 0; i < 8; ++i)
            if (table >> i & 1)
                bits |= (i & 4 ? a[lane] : ~a[lane]) & (i & 2 ? b[lane] : ~b[lane]) &
                        (i & 1 ? c[lane] : ~c[lane]);
        result[lane] = bits;
    });
}

template <class T, class Signed>
void add_width(OpcodeTable& table, const std::string& bits) {
    add_lanewise<T, And, T, T>(table, "and.b" + bits, kInteger);
    add_lanewise<T, Or, T, T>(table, "or.b" + bits, kInteger);
    add_lanewise<T, Xor, T, T>(table, "xor.b" + bits, kInteger);
    add_lanewise<T, Not, T>(table, "not.b" + bits, kInteger);
    add_lanewise<T, ShiftLeft, T, u32>(table, "shl.b" + bits, kInteger);
    add_lanewise<T, ShiftRight, T, u32>(table, "shr.b" + bits, kInteger);
    add_lanewise<T, ShiftRight, T, u32>(table, "shr.u" + bits, kInteger);
    add_lanewise<Signed, ShiftRight, Signed, u32>(table, "shr.s" + bits, kInteger);
}

}  // namespace

void add_bits(OpcodeTable& table) {
    add_width<u16, i16>(table, "16");
    add_width<u32, i32>(table, "32");
    add_width<u64, i64>(table, "64");
    add_lanewise<u32, Extract<u32>, u32, u32, u32>(table, "bfe.u32", kInteger);
    add_lanewise<i32, Extract<i32>, i32, u32, u32>(table, "bfe.s32", kInteger);
    add_lanewise<u64, Extract<u64>, u64, u32, u32>(table, "bfe.u64", kInteger);
    add_lanewise<i64, Extract<i64>, i64, u32, u32>(table, "bfe.s64", kInteger);
    add_lanewise<u32, Insert<u32>, u32, u32, u32, u32>(table, "bfi.b32", kInteger);
    add_lanewise<u64, Insert<u64>, u64, u64, u32, u32>(table, "bfi.b64", kInteger);
    add_lanewise<u32, Permute, u32, u32, u32>(table, "prmt.b32", kInteger);
    add_lanewise<u32, CountOnes, u32>(table, "popc.b32", kInteger);
    add_lanewise<u32, LeadingZeros, u32>(table, "clz.b32", kInteger);
    add_lanewise<u32, Reverse, u32>(table, "brev.b32", kInteger);
    add_lanewise<u32, FunnelLeft, u32, u32, u32>(table, "shf.l.wrap.b32", kInteger);
    add_lanewise<u32, FunnelRight, u32, u32, u32>(table, "shf.r.wrap.b32", kInteger);
    add_lanewise<u32, FunnelLeftClamped, u32, u32, u32>(table, "shf.l.clamp.b32", kInteger);
    add_lanewise<u32, FunnelRightClamped, u32, u32, u32>(table, "shf.r.clamp.b32", kInteger);
    table.add("lop3.b32", look_up_bits, "r=rrri", kInteger);
}

}  // namespace emulator
