// fp32 and fp64 arithmetic (PTX ISA 9.7.3). Approximations are computed exactly.
#include "lanes.hpp"

namespace emulator {
namespace {

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        return a + b;
    }
};
struct Subtract {
    template <class T>
    T operator()(T a, T b) const {
        return a - b;
    }
};
struct Multiply {
    template <class T>
    T operator()(T a, T b) const {
        return a * b;
    }
};
struct Divide {
    template <class T>
    T operator()(T a, T b) const {
        return a / b;
    }
};
struct Fused {
    float operator()(float a, float b, float c) const { return fused(a, b, c); }
    double operator()(double a, double b, double c) const { return std::fma(a, b, c); }
};
struct Minimum {  // of a number and NaN: the number
    template <class T>
    T operator()(T a, T b) const {
        return a != a                               ? b
               : b != b                             ? a
               : std::signbit(a) != std::signbit(b) ? (std::signbit(a) ? a : b)
               : a < b                              ? a
                                                    : b;
    }
    float operator()(float a, float b, float c) const { return (*this)((*this)(a, b), c); }
};
struct Maximum {
    template <class T>
    T operator()(T a, T b) const {
        return a != a                               ? b
               : b != b                             ? a
               : std::signbit(a) != std::signbit(b) ? (std::signbit(a) ? b : a)
               : a > b                              ? a
                                                    : b;
    }
    float operator()(float a, float b, float c) const { return (*this)((*this)(a, b), c); }
};
constexpr u32 kNan = 0x7fffffff;
struct MinimumNan {
    float operator()(float a, float b) const {
        return a != a || b != b ? bits_as<float>(kNan) : Minimum()(a, b);
    }
    float operator()(float a, float b, float c) const { return (*this)((*this)(a, b), c); }
};
struct MaximumNan {
    float operator()(float a, float b) const {
        return a != a || b != b ? bits_as<float>(kNan) : Maximum()(a, b);
    }
    float operator()(float a, float b, float c) const { return (*this)((*this)(a, b), c); }
};
struct Absolute {
    float operator()(float a) const { return std::fabs(a); }
    double operator()(double a) const { return std::fabs(a); }
};
struct Negate {
    template <class T>
    T operator()(T a) const {
        return -a;
    }
};
struct Exp2 {
    float operator()(float a) const { return std::exp2(a); }
};
struct Log2 {
    float operator()(float a) const { return std::log2(a); }
};
struct Reciprocal {
    template <class T>
    T operator()(T a) const {
        return T(1) / a;
    }
};
struct ReciprocalRoot {
    float operator()(float a) const {
        return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a)));
    }
};
struct Root {
    template <class T>
    T operator()(T a) const {
        return std::sqrt(a);
    }
};
struct Tanh {
    float operator()(float a) const { return std::tanh(a); }
};
struct Sine {
    float operator()(float a) const { return std::sin(a); }
};
struct Cosine {
    float operator()(float a) const { return std::cos(a); }
};
struct CopySign {  // the sign of the first
    float operator()(float a, float b) const { return std::copysign(b, a); }
};

// Both halves of a register of 64 bits.
template <class Function>
struct Both {
    template <class... T>
    FloatPair operator()(T... pairs) const {
        return {Function()(pairs.low...), Function()(pairs.high...)};
    }
};

inline float flush(float a) { return std::fabs(a) < 1.17549435e-38f ? std::copysign(0.0f, a) : a; }
// .ftz: subnormal operands and results are zeros of their sign.
template <class Function>
struct Flushed {
    template <class... T>
    float operator()(T... a) const {
        return flush(Function()(flush(a)...));
    }
};
struct Same {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};
// .sat: to 0..1, NaN to 0.
template <class Function>
struct Saturated {
    template <class... T>
    float operator()(T... a) const {
        const float value = Function()(a...);
        return value > 1 ? 1.0f : value > 0 ? value : 0.0f;
    }
};

template <class Function, class... A>
void add_float(OpcodeTable& table, const std::string& name, const std::string& modifiers) {
    add_lanewise<float, Function, A...>(table, name + modifiers + ".f32", kFloat);
    add_lanewise<float, Flushed<Function>, A...>(table, name + ".ftz" + modifiers + ".f32", kFloat);
}

void add_arithmetic(OpcodeTable& table) {
    using F = float;
    for (const std::string& rounding : {std::string(), std::string(".rn")}) {
        const auto add = [&](const char* name, auto function) {
            using Function = decltype(function);
            const std::string stem = name + rounding;
            add_lanewise<F, Function, F, F>(table, stem + ".f32", kFloat);
            add_lanewise<F, Flushed<Function>, F, F>(table, stem + ".ftz.f32", kFloat);
            add_lanewise<F, Saturated<Function>, F, F>(table, stem + ".sat.f32", kFloat);
            add_lanewise<double, Function, double, double>(table, stem + ".f64", kFloat);
            using P = FloatPair;
            add_lanewise<P, Both<Function>, P, P>(table, stem + ".f32x2", kFloat);
            add_lanewise<P, Both<Flushed<Function>>, P, P>(table, stem + ".ftz.f32x2", kFloat);
        };
        add("add", Add());
        add("sub", Subtract());
        add("mul", Multiply());
    }
    using P = FloatPair;
    add_float<Fused, F, F, F>(table, "fma.rn", "");
    add_lanewise<F, Saturated<Fused>, F, F, F>(table, "fma.rn.sat.f32", kFloat);
    add_lanewise<double, Fused, double, double, double>(table, "fma.rn.f64", kFloat);
    add_lanewise<P, Both<Fused>, P, P, P>(table, "fma.rn.f32x2", kFloat);
    add_lanewise<P, Both<Flushed<Fused>>, P, P, P>(table, "fma.rn.ftz.f32x2", kFloat);
    for (const char* name : {"div.rn", "div.full", "div.approx"})
        add_float<Divide, F, F>(table, name, "");
    add_lanewise<double, Divide, double, double>(table, "div.rn.f64", kFloat);
}

}  // namespace

void add_floats(OpcodeTable& table) {
    using F = float;
    add_arithmetic(table);
    add_float<Minimum, F, F>(table, "min", "");
    add_float<Maximum, F, F>(table, "max", "");
    add_float<MinimumNan, F, F>(table, "min", ".NaN");
    add_float<MaximumNan, F, F>(table, "max", ".NaN");
    for (const char* name : {"min.f32#4", "min.ftz.f32#4"})
        add_lanewise<F, Minimum, F, F, F>(table, name, kFloat);
    for (const char* name : {"max.f32#4", "max.ftz.f32#4"})
        add_lanewise<F, Maximum, F, F, F>(table, name, kFloat);
    add_lanewise<F, MinimumNan, F, F, F>(table, "min.NaN.f32#4", kFloat);
    add_lanewise<F, MaximumNan, F, F, F>(table, "max.NaN.f32#4", kFloat);
    add_lanewise<double, Minimum, double, double>(table, "min.f64", kFloat);
    add_lanewise<double, Maximum, double, double>(table, "max.f64", kFloat);
    add_float<Absolute, F>(table, "abs", "");
    add_float<Negate, F>(table, "neg", "");
    add_lanewise<double, Absolute, double>(table, "abs.f64", kFloat);
    add_lanewise<double, Negate, double>(table, "neg.f64", kFloat);
    add_float<Exp2, F>(table, "ex2.approx", "");
    add_float<Log2, F>(table, "lg2.approx", "");
    add_float<Sine, F>(table, "sin.approx", "");
    add_float<Cosine, F>(table, "cos.approx", "");
    add_float<ReciprocalRoot, F>(table, "rsqrt.approx", "");
    for (const char* name : {"rcp.approx", "rcp.rn"}) add_float<Reciprocal, F>(table, name, "");
    for (const char* name : {"sqrt.approx", "sqrt.rn"}) add_float<Root, F>(table, name, "");
    add_lanewise<double, Reciprocal, double>(table, "rcp.rn.f64", kFloat);
    add_lanewise<double, Root, double>(table, "sqrt.rn.f64", kFloat);
    add_lanewise<F, Tanh, F>(table, "tanh.approx.f32", kFloat);
    add_lanewise<F, CopySign, F, F>(table, "copysign.f32", kFloat);
    add_lanewise<F, Saturated<Same>, F>(table, "cvt.sat.f32.f32", kConvert);
    add_lanewise<F, Flushed<Same>, F>(table, "cvt.ftz.f32.f32", kConvert);
}

}  // namespace emulator
