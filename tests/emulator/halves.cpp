// fp16 and bf16 arithmetic, alone and in pairs, and sums of mixed precision (PTX ISA 9.7.4, 9.7.5).
#include "lanes.hpp"

namespace emulator {
namespace {

struct Add {
    double operator()(double a, double b) const { return a + b; }
};
struct Subtract {
    double operator()(double a, double b) const { return a - b; }
};
struct Multiply {
    double operator()(double a, double b) const { return a * b; }
};
// A product of two halves is exact in fp32; in fp64 their sum with a third is exact too, so that
// the result is rounded once.
struct Fused {
    double operator()(double a, double b, double c) const { return std::fma(a, b, c); }
};
struct Relu {
    double operator()(double a, double b, double c) const {
        const double value = std::fma(a, b, c);
        return value > 0 ? value : value != value ? value : 0;
    }
};
template <bool nan>
struct Minimum {
    float operator()(float a, float b) const {
        if (a != a || b != b) return nan || (a != a && b != b) ? NAN : a != a ? b : a;
        return a < b || (a == b && std::signbit(a)) ? a : b;
    }
};
template <bool nan>
struct Maximum {
    float operator()(float a, float b) const {
        if (a != a || b != b) return nan || (a != a && b != b) ? NAN : a != a ? b : a;
        return a > b || (a == b && std::signbit(b)) ? a : b;
    }
};
struct Exp2 {
    float operator()(float a) const { return std::exp2(a); }
};
struct Tanh {
    float operator()(float a) const { return std::tanh(a); }
};

// Rounds through fp32 to odd, so that the second rounding is of the exact value.
template <class T>
T narrow_once(double value) {
    float single = static_cast<float>(value);
    if (static_cast<double>(single) != value && std::isfinite(single)) {
        u32 bits = bits_as<u32>(single);
        if ((bits & 1) == 0) {
            const bool above = std::fabs(static_cast<double>(single)) > std::fabs(value);
            bits = above ? bits - 1 : bits + 1;
        }
        single = bits_as<float>(bits);
    }
    return narrow<T>(single);
}

template <class T, class Function>
struct Rounded {
    template <class... A>
    T operator()(A... a) const {
        return narrow_once<T>(static_cast<double>(Function()(widen(a)...)));
    }
    template <class... A>
    Pair<T> operator()(Pair<A>... a) const {
        return {(*this)(a.low...), (*this)(a.high...)};
    }
};

template <class T, u16 clear, u16 flip>
struct Sign {
    T operator()(T a) const { return {static_cast<u16>((a.bits & ~clear) ^ flip)}; }
    Pair<T> operator()(Pair<T> a) const { return {(*this)(a.low), (*this)(a.high)}; }
};

template <class T, class Function>
void add_binary(OpcodeTable& table, const std::string& name, const std::string& type) {
    using P = Pair<T>;
    add_lanewise<T, Rounded<T, Function>, T, T>(table, name + "." + type, kFloat);
    add_lanewise<P, Rounded<T, Function>, P, P>(table, name + "." + type + "x2", kFloat);
}

template <class T>
struct MixedAdd {
    float operator()(T a, float b) const { return widen(a) + b; }
};
template <class T>
struct MixedSubtract {
    float operator()(T a, float b) const { return widen(a) - b; }
};
template <class T>
struct MixedFused {
    float operator()(T a, T b, float c) const { return fused(widen(a), widen(b), c); }
};

template <class T>
void add_type(OpcodeTable& table, const std::string& type) {
    using P = Pair<T>;
    for (const char* rounding : {"", ".rn"}) {
        add_binary<T, Add>(table, std::string("add") + rounding, type);
        add_binary<T, Subtract>(table, std::string("sub") + rounding, type);
        add_binary<T, Multiply>(table, std::string("mul") + rounding, type);
        const std::string mixed = rounding + std::string(".f32.") + type;
        add_lanewise<float, MixedAdd<T>, T, float>(table, "add" + mixed, kFloat);
        add_lanewise<float, MixedSubtract<T>, T, float>(table, "sub" + mixed, kFloat);
    }
    add_lanewise<float, MixedFused<T>, T, T, float>(table, "fma.rn.f32." + type, kFloat);
    add_binary<T, Minimum<false>>(table, "min", type);
    add_binary<T, Maximum<false>>(table, "max", type);
    add_binary<T, Minimum<true>>(table, "min.NaN", type);
    add_binary<T, Maximum<true>>(table, "max.NaN", type);
    add_lanewise<T, Rounded<T, Fused>, T, T, T>(table, "fma.rn." + type, kFloat);
    add_lanewise<P, Rounded<T, Fused>, P, P, P>(table, "fma.rn." + type + "x2", kFloat);
    add_lanewise<T, Rounded<T, Relu>, T, T, T>(table, "fma.rn.relu." + type, kFloat);
    add_lanewise<P, Rounded<T, Relu>, P, P, P>(table, "fma.rn.relu." + type + "x2", kFloat);
    add_lanewise<T, Sign<T, 0, 0x8000>, T>(table, "neg." + type, kFloat);
    add_lanewise<P, Sign<T, 0, 0x8000>, P>(table, "neg." + type + "x2", kFloat);
    add_lanewise<T, Sign<T, 0x8000, 0>, T>(table, "abs." + type, kFloat);
    add_lanewise<P, Sign<T, 0x8000, 0>, P>(table, "abs." + type + "x2", kFloat);
    const std::string exp2 = type == "bf16" ? "ex2.approx.ftz." : "ex2.approx.";
    add_lanewise<T, Rounded<T, Exp2>, T>(table, exp2 + type, kFloat);
    add_lanewise<P, Rounded<T, Exp2>, P>(table, exp2 + type + "x2", kFloat);
    add_lanewise<T, Rounded<T, Tanh>, T>(table, "tanh.approx." + type, kFloat);
    add_lanewise<P, Rounded<T, Tanh>, P>(table, "tanh.approx." + type + "x2", kFloat);
}

}  // namespace

void add_halves(OpcodeTable& table) {
    add_type<Half>(table, "f16");
    add_type<Bfloat>(table, "bf16");
}

}  // namespace emulator
