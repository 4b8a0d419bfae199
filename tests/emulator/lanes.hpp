// Instructions that compute a lane's result from the same lane's operands.
#pragma once

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "opcodes.hpp"
#include "warp.hpp"

// The compiler may vectorize the loop: an instruction's lanes do not depend on each other.
#if defined(__clang__)
#define EMULATOR_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMULATOR_INDEPENDENT _Pragma("GCC ivdep")
#else
#define EMULATOR_INDEPENDENT
#endif

namespace emulator {

template <class Body>
inline void each_lane(const Warp& warp, Body body) {
    if (warp.mask == kAllLanes) {
        EMULATOR_INDEPENDENT
        for (u32 lane = 0; lane < kLanes; ++lane) body(lane);
    } else {
        const u32 mask = warp.mask;
        for (u32 lane = 0; lane < kLanes; ++lane)
            if (mask >> lane & 1) body(lane);
    }
}

// Values of half precision, as registers hold them.
struct Half {
    u16 bits;
};
struct Bfloat {
    u16 bits;
};
template <class T>
struct Pair {  // two in a register of 32 bits
    T low, high;
};
struct FloatPair {  // two in a register of 64 bits
    float low, high;
};

inline float widen(float value) { return value; }
inline float widen(Half value) { return half_to_float(value.bits); }
inline float widen(Bfloat value) { return bfloat_to_float(value.bits); }
template <class T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
    return value;
}
template <>
inline Half narrow<Half>(float value) {
    return {float_to_half(value)};
}
template <>
inline Bfloat narrow<Bfloat>(float value) {
    return {float_to_bfloat(value)};
}

// A register's word or doubleword, and the value that it holds.
template <class T>
using Stored = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T>
inline T from_register(Stored<T> stored) {
    if constexpr (std::is_integral_v<T>)
        return static_cast<T>(stored);
    else if constexpr (sizeof(T) == 2)
        return {static_cast<u16>(stored)};
    else
        return bits_as<T>(stored);
}

template <class T>
inline Stored<T> to_register(T value) {
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T> && sizeof(T) < 4)
        return static_cast<u32>(i32{value});
    else if constexpr (std::is_integral_v<T>)
        return static_cast<Stored<T>>(value);
    else if constexpr (sizeof(T) == 2)
        return value.bits;
    else
        return bits_as<Stored<T>>(value);
}

template <class T>
inline Stored<T>* lanes_of(Warp& warp, u32 offset) {
    return reinterpret_cast<Stored<T>*>(warp.registers + offset);
}

// Result = Function()(A...).
template <class Result, class Function, class... A>
struct Lanewise {
    static void run(Warp& warp, const Instruction& instruction) {
        run(warp, instruction, std::index_sequence_for<A...>());
    }

    template <size_t... I>
    static void run(Warp& warp, const Instruction& instruction, std::index_sequence<I...>) {
        auto* result = lanes_of<Result>(warp, instruction.operand[0]);
        const std::tuple<const Stored<A>*...> sources{
            lanes_of<A>(warp, instruction.operand[I + 1])...};
        each_lane(warp, [=](u32 lane) {
            result[lane] = to_register<Result>(
                static_cast<Result>(Function()(from_register<A>(std::get<I>(sources)[lane])...)));
        });
    }

    static std::string operands() {
        const auto letter = [](size_t bytes) { return bytes == 8 ? 'R' : 'r'; };
        return std::string{letter(sizeof(Result)), '=', letter(sizeof(A))...};
    }
};

template <class Result, class Function, class... A>
void add_lanewise(OpcodeTable& table, const std::string& name, Class instruction_class) {
    using Operation = Lanewise<Result, Function, A...>;
    table.add(name, Operation::run, Operation::operands(), instruction_class);
}

}  // namespace emulator
