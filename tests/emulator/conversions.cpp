// cvt (PTX ISA 9.7.9.21): between integers, from and to floats. Sources may be in wider registers.
#include <limits>

#include "lanes.hpp"

namespace emulator {
namespace {

struct Convert {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};
// Out of line: few kernels saturate, and so many loops would take long to compile.
template <class Result>
__attribute__((noinline)) Result clamp_signed(i64 value) {
    using Limits = std::numeric_limits<Result>;
    if (value < 0 && std::is_unsigned_v<Result>) return 0;
    if (value < 0) return value < static_cast<i64>(Limits::min()) ? Limits::min() : Result(value);
    return u64(value) > u64(Limits::max()) ? Limits::max() : static_cast<Result>(value);
}
template <class Result>
__attribute__((noinline)) Result clamp_unsigned(u64 value) {
    using Limits = std::numeric_limits<Result>;
    return value > u64(Limits::max()) ? Limits::max() : static_cast<Result>(value);
}
template <class Result>
struct Saturate {  // of integers
    template <class T>
    Result operator()(T a) const {
        if constexpr (std::is_signed_v<T>)
            return clamp_signed<Result>(a);
        else
            return clamp_unsigned<Result>(a);
    }
};

enum Rounding { kNearest, kZero, kDown, kUp };

__attribute__((noinline)) double round_to_integer(double value, Rounding rounding) {
    switch (rounding) {
        case kNearest:
            return std::nearbyint(value);
        case kZero:
            return std::trunc(value);
        case kDown:
            return std::floor(value);
        default:
            return std::ceil(value);
    }
}
template <class Result>
__attribute__((noinline)) Result to_integer(double value, Rounding rounding) {
    using Limits = std::numeric_limits<Result>;
    value = round_to_integer(value, rounding);
    if (value != value) return 0;
    if (value <= static_cast<double>(Limits::min())) return Limits::min();
    if (value >= static_cast<double>(Limits::max())) return Limits::max();
    return static_cast<Result>(value);
}
template <Rounding rounding>
struct RoundFloat {
    float operator()(float a) const {
        return static_cast<float>(round_to_integer(static_cast<double>(a), rounding));
    }
};
template <class Result, Rounding rounding>
struct FloatToInteger {  // out of range: the nearest; NaN: 0
    template <class T>
    Result operator()(T a) const {
        return to_integer<Result>(widen_double(a), rounding);
    }
    static double widen_double(double a) { return a; }
    static double widen_double(float a) { return static_cast<double>(a); }
    static double widen_double(Half a) { return static_cast<double>(widen(a)); }
};
template <class T>
struct Widen {
    float operator()(T a) const { return widen(a); }
};
template <class T, bool relu>
struct Narrow {
    T operator()(float a) const { return narrow<T>(relu && a < 0 ? 0.0f : a); }
};
template <class T>
struct NarrowToZero {
    T operator()(float a) const {
        T result = narrow<T>(a);
        if (std::fabs(widen(result)) > std::fabs(a) && (result.bits & 0x7fff) != 0) --result.bits;
        return result;
    }
};
template <class T, bool relu>
struct NarrowPair {
    Pair<T> operator()(float high, float low) const {
        return {Narrow<T, relu>()(low), Narrow<T, relu>()(high)};
    }
};
template <class T>
struct IntegerToHalf {
    template <class Source>
    T operator()(Source a) const {
        return narrow<T>(static_cast<float>(a));
    }
};

template <class Result, class Source>
void add_integer(OpcodeTable& table, const std::string& result, const std::string& source) {
    const std::string types = result + "." + source;
    add_lanewise<Result, Convert, Source>(table, "cvt." + types, kConvert);
    add_lanewise<Result, Saturate<Result>, Source>(table, "cvt.sat." + types, kConvert);
}
template <class Result>
void add_integers_to(OpcodeTable& table, const std::string& result) {
    add_integer<Result, u8>(table, result, "u8");
    add_integer<Result, i8>(table, result, "s8");
    add_integer<Result, u16>(table, result, "u16");
    add_integer<Result, i16>(table, result, "s16");
    add_integer<Result, u32>(table, result, "u32");
    add_integer<Result, i32>(table, result, "s32");
    add_integer<Result, u64>(table, result, "u64");
    add_integer<Result, i64>(table, result, "s64");
}

template <class T>
void add_with_floats(OpcodeTable& table, const std::string& type) {
    for (const char* name : {"cvt.rn.f32.", "cvt.rz.f32."})
        if (name[5] == 'n' || sizeof(T) < 4)  // exact if it is narrow
            add_lanewise<float, Convert, T>(table, name + type, kConvert);
    add_lanewise<Half, IntegerToHalf<Half>, T>(table, "cvt.rn.f16." + type, kConvert);
    add_lanewise<double, Convert, T>(table, "cvt.rn.f64." + type, kConvert);
    const auto add = [&](const std::string& rounding, auto function) {
        using F = decltype(function);
        const std::string stem = "cvt." + rounding;
        add_lanewise<T, F, float>(table, stem + "." + type + ".f32", kConvert);
        add_lanewise<T, F, float>(table, stem + ".ftz." + type + ".f32", kConvert);
        add_lanewise<T, F, float>(table, stem + ".sat." + type + ".f32", kConvert);
        add_lanewise<T, F, double>(table, stem + "." + type + ".f64", kConvert);
        add_lanewise<T, F, Half>(table, stem + "." + type + ".f16", kConvert);
    };
    add("rni", FloatToInteger<T, kNearest>());
    add("rzi", FloatToInteger<T, kZero>());
    add("rmi", FloatToInteger<T, kDown>());
    add("rpi", FloatToInteger<T, kUp>());
}

template <class T>
void add_halves(OpcodeTable& table, const std::string& type) {
    using P = Pair<T>;
    add_lanewise<float, Widen<T>, T>(table, "cvt.f32." + type, kConvert);
    add_lanewise<T, Narrow<T, false>, float>(table, "cvt.rn." + type + ".f32", kConvert);
    add_lanewise<T, NarrowToZero<T>, float>(table, "cvt.rz." + type + ".f32", kConvert);
    add_lanewise<T, Narrow<T, true>, float>(table, "cvt.rn.relu." + type + ".f32", kConvert);
    add_lanewise<P, NarrowPair<T, false>, float, float>(table, "cvt.rn." + type + "x2.f32",
                                                        kConvert);
    add_lanewise<P, NarrowPair<T, true>, float, float>(table, "cvt.rn.relu." + type + "x2.f32",
                                                       kConvert);
}

}  // namespace

void add_conversions(OpcodeTable& table) {
    add_integers_to<u8>(table, "u8");
    add_integers_to<i8>(table, "s8");
    add_integers_to<u16>(table, "u16");
    add_integers_to<i16>(table, "s16");
    add_integers_to<u32>(table, "u32");
    add_integers_to<i32>(table, "s32");
    add_integers_to<u64>(table, "u64");
    add_integers_to<i64>(table, "s64");
    add_with_floats<u8>(table, "u8");
    add_with_floats<i8>(table, "s8");
    add_with_floats<u16>(table, "u16");
    add_with_floats<i16>(table, "s16");
    add_with_floats<u32>(table, "u32");
    add_with_floats<i32>(table, "s32");
    add_with_floats<u64>(table, "u64");
    add_with_floats<i64>(table, "s64");
    add_halves<Half>(table, "f16");
    add_halves<Bfloat>(table, "bf16");
    add_lanewise<float, RoundFloat<kNearest>, float>(table, "cvt.rni.f32.f32", kConvert);
    add_lanewise<float, RoundFloat<kZero>, float>(table, "cvt.rzi.f32.f32", kConvert);
    add_lanewise<float, RoundFloat<kDown>, float>(table, "cvt.rmi.f32.f32", kConvert);
    add_lanewise<float, RoundFloat<kUp>, float>(table, "cvt.rpi.f32.f32", kConvert);
    add_lanewise<double, Convert, float>(table, "cvt.f64.f32", kConvert);
    add_lanewise<float, Convert, double>(table, "cvt.rn.f32.f64", kConvert);
}

}  // namespace emulator
