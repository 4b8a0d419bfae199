// Integer arithmetic (PTX ISA 9.7.1). Overflow wraps: the build says -fwrapv.
#include <algorithm>

#include "lanes.hpp"

namespace emulator {
namespace {

template <class T>
constexpr T kMinusOne = static_cast<T>(-1);

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a + b);
    }
};
struct Subtract {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a - b);
    }
};
struct MultiplyLow {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(u64(a) * u64(b));
    }
};
struct MultiplyAddLow {
    template <class T>
    T operator()(T a, T b, T c) const {
        return static_cast<T>(u64(a) * u64(b) + u64(c));
    }
};
struct Divide {  // by zero: PTX does not define it; all bits are 1
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return kMinusOne<T>;
        if (std::is_signed_v<T> && b == kMinusOne<T>) return static_cast<T>(0 - a);
        return static_cast<T>(a / b);
    }
};
struct Remainder {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return a;
        return std::is_signed_v<T> && b == kMinusOne<T> ? T(0) : static_cast<T>(a % b);
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
struct MinimumRelu {
    i32 operator()(i32 a, i32 b) const { return std::max(std::min(a, b), 0); }
};
struct MaximumRelu {
    i32 operator()(i32 a, i32 b) const { return std::max(std::max(a, b), 0); }
};
struct Negate {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(0 - a);
    }
};
struct Absolute {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(a < 0 ? 0 - a : a);
    }
};
template <class Wide>
struct MultiplyHigh {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (sizeof(T) * 8));
    }
};
struct MultiplyHigh64 {
    u64 operator()(u64 a, u64 b) const {
        const u64 low = (a & kAllLanes) * (b & kAllLanes);
        const u64 first = (a >> 32) * (b & kAllLanes) + (low >> 32);
        const u64 second = (a & kAllLanes) * (b >> 32) + (first & kAllLanes);
        return (a >> 32) * (b >> 32) + (first >> 32) + (second >> 32);
    }
    i64 operator()(i64 a, i64 b) const {
        const u64 high = (*this)(static_cast<u64>(a), static_cast<u64>(b));
        return static_cast<i64>(high - (a < 0 ? u64(b) : 0) - (b < 0 ? u64(a) : 0));
    }
};
template <class Wide>
struct MultiplyWide {
    template <class T>
    Wide operator()(T a, T b) const {
        return static_cast<Wide>(Wide(a) * Wide(b));
    }
};
template <class Wide>
struct MultiplyAddWide {
    template <class T>
    Wide operator()(T a, T b, Wide c) const {
        return static_cast<Wide>(Wide(a) * Wide(b) + c);
    }
};
template <class A, class B>
struct DotOfBytes {
    i32 operator()(u32 a, u32 b, i32 sum) const {
        for (u32 shift = 0; shift < 32; shift += 8)
            sum += i32(static_cast<A>(a >> shift)) * i32(static_cast<B>(b >> shift));
        return sum;
    }
};

template <class T>
void add_type(OpcodeTable& table, const std::string& type) {
    add_lanewise<T, Add, T, T>(table, "add." + type, kInteger);
    add_lanewise<T, Subtract, T, T>(table, "sub." + type, kInteger);
    add_lanewise<T, MultiplyLow, T, T>(table, "mul.lo." + type, kInteger);
    add_lanewise<T, MultiplyAddLow, T, T, T>(table, "mad.lo." + type, kInteger);
    add_lanewise<T, Divide, T, T>(table, "div." + type, kInteger);
    add_lanewise<T, Remainder, T, T>(table, "rem." + type, kInteger);
    add_lanewise<T, Minimum, T, T>(table, "min." + type, kInteger);
    add_lanewise<T, Maximum, T, T>(table, "max." + type, kInteger);
    if constexpr (std::is_signed_v<T>) {
        add_lanewise<T, Negate, T>(table, "neg." + type, kInteger);
        add_lanewise<T, Absolute, T>(table, "abs." + type, kInteger);
    }
}

template <class T, class Wide>
void add_wide(OpcodeTable& table, const std::string& type) {
    add_lanewise<Wide, MultiplyWide<Wide>, T, T>(table, "mul.wide." + type, kInteger);
    add_lanewise<Wide, MultiplyAddWide<Wide>, T, T, Wide>(table, "mad.wide." + type, kInteger);
    add_lanewise<T, MultiplyHigh<Wide>, T, T>(table, "mul.hi." + type, kInteger);
}

}  // namespace

void add_integers(OpcodeTable& table) {
    add_type<i16>(table, "s16");
    add_type<u16>(table, "u16");
    add_type<i32>(table, "s32");
    add_type<u32>(table, "u32");
    add_type<i64>(table, "s64");
    add_type<u64>(table, "u64");
    add_wide<i16, i32>(table, "s16");
    add_wide<u16, u32>(table, "u16");
    add_wide<i32, i64>(table, "s32");
    add_wide<u32, u64>(table, "u32");
    add_lanewise<i64, MultiplyHigh64, i64, i64>(table, "mul.hi.s64", kInteger);
    add_lanewise<u64, MultiplyHigh64, u64, u64>(table, "mul.hi.u64", kInteger);
    add_lanewise<i32, MinimumRelu, i32, i32>(table, "min.relu.s32", kInteger);
    add_lanewise<i32, MaximumRelu, i32, i32>(table, "max.relu.s32", kInteger);
    add_lanewise<i32, DotOfBytes<i8, i8>, u32, u32, i32>(table, "dp4a.s32.s32", kInteger);
    add_lanewise<i32, DotOfBytes<u8, i8>, u32, u32, i32>(table, "dp4a.u32.s32", kInteger);
    add_lanewise<i32, DotOfBytes<i8, u8>, u32, u32, i32>(table, "dp4a.s32.u32", kInteger);
    add_lanewise<i32, DotOfBytes<u8, u8>, u32, u32, i32>(table, "dp4a.u32.u32", kInteger);
}

}  // namespace emulator
