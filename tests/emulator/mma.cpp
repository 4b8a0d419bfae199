// mma.sync (PTX ISA 9.7.14.5): 16 rows, 8 columns. Sums of floats go in the order of k, in fp32;
// products of two halves are exact there.
#include <algorithm>
#include <limits>

#include "block.hpp"
#include "lanes.hpp"

namespace emulator {
namespace {

constexpr u32 kRows = 16, kColumns = 8;

inline float value_of(Half element) { return widen(element); }
inline float value_of(Bfloat element) { return widen(element); }
inline i32 value_of(i8 element) { return element; }
inline i32 value_of(u8 element) { return element; }

// Lane t holds rows t / 4 and 8 more of A and C, column t / 4 of B.
template <class A, class B, u32 depth>
struct Fragments {
    using Sum = decltype(value_of(A()));
    static constexpr u32 kEach = 4 / sizeof(A);                // elements of a register
    static constexpr u32 kOfA = kRows * depth / kEach / kLanes;  // registers
    static constexpr u32 kOfB = kColumns * depth / kEach / kLanes;

    alignas(32) Sum a[kRows][depth];
    alignas(32) Sum b[depth][kColumns];

    // A register of all lanes holds 8 rows of `kWidth` elements, in order.
    static constexpr u32 kWidth = 4 * kEach;

    template <class T>
    static void read_rows(const u32* words, Sum (&rows)[8][kWidth]) {
        T elements[8 * kWidth];
        std::memcpy(elements, words, sizeof elements);
        Sum* values = rows[0];
        for (u32 i = 0; i < 8 * kWidth; ++i) values[i] = value_of(elements[i]);
    }
    void gather(Warp& warp, const u32* registers) {
        Sum rows[8][kWidth];
        for (u32 i = 0; i < kOfA; ++i) {
            read_rows<A>(warp.words(registers[i]), rows);
            for (u32 row = 0; row < 8; ++row)
                std::memcpy(&a[row + 8 * (i & 1)][kWidth * (i >> 1)], rows[row], sizeof rows[row]);
        }
        for (u32 i = 0; i < kOfB; ++i) {
            read_rows<B>(warp.words(registers[kOfA + i]), rows);
            for (u32 k = 0; k < kWidth; ++k)
                for (u32 column = 0; column < kColumns; ++column)
                    b[kWidth * i + k][column] = rows[column][k];
        }
    }
    template <class Total>
    void accumulate(Total (&sums)[kRows][kColumns]) const {
        for (u32 row = 0; row < kRows; ++row)
            for (u32 k = 0; k < depth; ++k)
                for (u32 column = 0; column < kColumns; ++column)
                    sums[row][column] += static_cast<Total>(a[row][k] * b[k][column]);
    }
};

// The element of C and D that a lane's i-th value is.
template <class T>
inline T& of_lane(T (&sums)[kRows][kColumns], u32 lane, u32 i) {
    return sums[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
}

template <class T, u32 depth, class Result>
void multiply_floats(Warp& warp, const Instruction& instruction) {
    require(warp.mask == kAllLanes, "mma by a part of a warp");
    constexpr bool halves = std::is_same_v<Result, Half>;
    using Operands = Fragments<T, T, depth>;
    constexpr u32 kOfC = halves ? 2 : 4;
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    const u32* c = registers + kOfC + Operands::kOfA + Operands::kOfB;
    Operands operands;
    operands.gather(warp, registers + kOfC);
    alignas(32) float sums[kRows][kColumns];
    for (u32 i = 0; i < 4; ++i) {
        const u32* words = warp.words(c[halves ? i / 2 : i]);
        for (u32 lane = 0; lane < kLanes; ++lane)
            of_lane(sums, lane, i) =
                halves ? half_to_float(static_cast<u16>(words[lane] >> 16 * (i & 1)))
                       : bits_as<float>(words[lane]);
    }
    operands.accumulate(sums);
    for (u32 i = 0; i < kOfC; ++i) {
        u32* words = warp.words(registers[i]);
        for (u32 lane = 0; lane < kLanes; ++lane)
            words[lane] = halves ? u32{float_to_half(of_lane(sums, lane, 2 * i))} |
                                       u32{float_to_half(of_lane(sums, lane, 2 * i + 1))} << 16
                                 : bits_as<u32>(of_lane(sums, lane, i));
    }
    ++warp.block->launch->counters.mma;
}

template <class A, class B, u32 depth, bool saturates>
void multiply_integers(Warp& warp, const Instruction& instruction) {
    require(warp.mask == kAllLanes, "mma by a part of a warp");
    using Operands = Fragments<A, B, depth>;
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    const u32* c = registers + 4 + Operands::kOfA + Operands::kOfB;
    Operands operands;
    operands.gather(warp, registers + 4);
    i64 sums[kRows][kColumns];
    for (u32 i = 0; i < 4; ++i)
        for (u32 lane = 0; lane < kLanes; ++lane)
            of_lane(sums, lane, i) = static_cast<i32>(warp.words(c[i])[lane]);
    operands.accumulate(sums);
    for (u32 i = 0; i < 4; ++i)
        for (u32 lane = 0; lane < kLanes; ++lane) {
            i64 value = of_lane(sums, lane, i);
            if (saturates)
                value = std::clamp<i64>(value, std::numeric_limits<i32>::min(),
                                        std::numeric_limits<i32>::max());
            warp.words(registers[i])[lane] = static_cast<u32>(value);
        }
    ++warp.block->launch->counters.mma;
}

template <class A, class B>
void add_bytes(OpcodeTable& table, const std::string& types) {
    const std::string stem = "mma.sync.aligned.m16n8k";
    const std::string end = ".s32." + types + ".s32";
    table.add(stem + "32.row.col" + end, multiply_integers<A, B, 32, false>, "V4424", kMma);
    table.add(stem + "16.row.col" + end, multiply_integers<A, B, 16, false>, "V4214", kMma);
    table.add(stem + "32.row.col.satfinite" + end, multiply_integers<A, B, 32, true>, "V4424",
              kMma);
    table.add(stem + "16.row.col.satfinite" + end, multiply_integers<A, B, 16, true>, "V4214",
              kMma);
}

}  // namespace

void add_mma(OpcodeTable& table) {
    const std::string stem = "mma.sync.aligned.m16n8k";
    table.add(stem + "16.row.col.f32.f16.f16.f32", multiply_floats<Half, 16, float>, "V4424", kMma);
    table.add(stem + "8.row.col.f32.f16.f16.f32", multiply_floats<Half, 8, float>, "V4214", kMma);
    table.add(stem + "16.row.col.f16.f16.f16.f16", multiply_floats<Half, 16, Half>, "V2422", kMma);
    table.add(stem + "8.row.col.f16.f16.f16.f16", multiply_floats<Half, 8, Half>, "V2212", kMma);
    table.add(stem + "16.row.col.f32.bf16.bf16.f32", multiply_floats<Bfloat, 16, float>, "V4424",
              kMma);
    table.add(stem + "8.row.col.f32.bf16.bf16.f32", multiply_floats<Bfloat, 8, float>, "V4214",
              kMma);
    add_bytes<i8, i8>(table, "s8.s8");
    add_bytes<u8, u8>(table, "u8.u8");
    add_bytes<u8, i8>(table, "u8.s8");
    add_bytes<i8, u8>(table, "s8.u8");
}

}  // namespace emulator
