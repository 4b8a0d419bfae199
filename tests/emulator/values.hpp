// Registers' values: integers by width, and half precision without the processor's help.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

// Half precision is written so that compilers vectorize it: no branches, no tables.
inline float half_to_float(u16 half) {
    constexpr u32 kRebias = (127 - 15) << 23, kSubnormal = (127 - 14) << 23;
    const u32 sign = (half & 0x8000u) << 16;
    const u32 magnitude = (half & 0x7fffu) << 13;
    const u32 subnormal =
        bits_as<u32>(bits_as<float>(magnitude + kSubnormal) - bits_as<float>(kSubnormal));
    const u32 infinite = magnitude | 0x7f800000u;  // NaN too
    u32 bits = magnitude + kRebias;
    bits = magnitude < 0x00800000u ? subnormal : bits;
    bits = magnitude >= 0x0f800000u ? infinite : bits;
    return bits_as<float>(sign | bits);
}

// To the nearest, ties to even; NaN is 0x7fff, as PTX defines.
inline u16 float_to_half(float value) {
    constexpr u32 kHalf = 0x3f000000u;  // 0.5, whose last bit is a subnormal half's
    const u32 bits = bits_as<u32>(value);
    const u32 sign = bits >> 16 & 0x8000u;
    const u32 magnitude = bits & 0x7fffffffu;
    const u32 subnormal = bits_as<u32>(bits_as<float>(magnitude) + bits_as<float>(kHalf)) - kHalf;
    const u32 normal = (magnitude + 0xc8000fffu + (magnitude >> 13 & 1)) >> 13;
    u32 result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x47800000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7fffu : sign | result;
    return static_cast<u16>(result);
}

inline float bfloat_to_float(u16 bfloat) { return bits_as<float>(u32{bfloat} << 16); }

inline u16 float_to_bfloat(float value) {
    const u32 bits = bits_as<u32>(value);
    const u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return static_cast<u16>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff : rounded);
}

// One rounding; the C library's function if the compiler has no instruction.
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return std::fma(a, b, c);
#endif
}

inline u32 lowest_bit(u32 mask) { return static_cast<u32>(__builtin_ctz(mask)); }
inline u32 count_bits(u32 mask) { return static_cast<u32>(__builtin_popcount(mask)); }

}  // namespace emulator
