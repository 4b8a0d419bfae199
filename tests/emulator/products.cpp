// What a wgmma computes, for the 16 rows of a warp: sums in the order of k. Floats are summed in
// fp32, in which products of two halves are exact.
#include "products.hpp"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "block.hpp"
#include "descriptor.hpp"
#include "lanes.hpp"

#if defined(__GNUC__) && !defined(__clang__)
#define EMULATOR_MAY_FUSE __attribute__((optimize("fp-contract=fast")))
#else
#define EMULATOR_MAY_FUSE
#endif

namespace emulator {
namespace {

constexpr u32 kRows = 16, kMostColumns = 256;
constexpr u32 kWide = 8;
typedef float Floats __attribute__((vector_size(4 * kWide)));

template <class T>
inline void widen_chunk(const u8* data, float* result) {
    u16 halves[8];
    std::memcpy(halves, data, sizeof halves);
    for (u32 i = 0; i < 8; ++i) result[i] = widen(T{halves[i]});
}

// Row and column of a lane's i-th accumulator.
inline u32 row_of(u32 lane, u32 i) { return lane / 4 + 8 * (i >> 1 & 1); }
inline u32 column_of(u32 lane, u32 i) { return 8 * (i >> 2) + 2 * (lane % 4) + (i & 1); }

struct FloatProduct {
    static constexpr u32 kDepth = 16;

    alignas(64) float a[kRows][kDepth], b[kDepth][kMostColumns], sums[kRows][kMostColumns];

    template <class T>
    void load_a(Warp& warp, const Product& product, const ProductForm& form) {
        if (form.a_in_registers) {
            for (u32 i = 0; i < 4; ++i)
                for (u32 lane = 0; lane < kLanes; ++lane)
                    for (u32 j = 0; j < 2; ++j)
                        a[lane / 4 + 8 * (i & 1)][2 * (lane % 4) + 8 * (i >> 1) + j] =
                            widen(T{static_cast<u16>(product.fragment[i][lane] >> 16 * j)});
        } else {
            Block& block = *warp.block;
            const Descriptor descriptor(product.a);
            const u32 first = warp.index % 4 * kRows;
            float chunk[8];
            for (u32 row = 0; row < kRows && !form.transposes_a; ++row)
                for (u32 half = 0; half < 2; ++half)
                    widen_chunk<T>(block.at(descriptor.k_major(first + row, half), 16),
                                   &a[row][8 * half]);
            for (u32 k = 0; k < kDepth && form.transposes_a; ++k)
                for (u32 half = 0; half < 2; ++half) {
                    widen_chunk<T>(block.at(descriptor.mn_major(first / 8 + half, k), 16), chunk);
                    for (u32 i = 0; i < 8; ++i) a[8 * half + i][k] = chunk[i];
                }
        }
        if (form.negates)
            for (auto& row : a)
                for (float& value : row) value = -value;
    }

    template <class T>
    void load_b(Warp& warp, const Product& product, const ProductForm& form) {
        Block& block = *warp.block;
        const Descriptor descriptor(product.b);
        if (form.transposes_b) {
            for (u32 k = 0; k < kDepth; ++k)
                for (u32 chunk = 0; chunk < form.columns / 8; ++chunk)
                    widen_chunk<T>(block.at(descriptor.mn_major(chunk, k), 16), &b[k][8 * chunk]);
            return;
        }
        for (u32 column = 0; column < form.columns; column += 8) {  // 8 columns at a time
            float transposed[8][kDepth];
            for (u32 i = 0; i < 8; ++i)
                for (u32 half = 0; half < 2; ++half)
                    widen_chunk<T>(block.at(descriptor.k_major(column + i, half), 16),
                                   &transposed[i][8 * half]);
            for (u32 k = 0; k < kDepth; ++k)
                for (u32 i = 0; i < 8; ++i) b[k][column + i] = transposed[i][k];
        }
    }

    // 8 rows of 8 columns stay in registers over k. Products are exact (unless bf16's
    // underflow), so a fused multiply-add gives the same sums.
    EMULATOR_MAY_FUSE void multiply(u32 columns) {
        for (u32 column = 0; column < columns; column += kWide)
            for (u32 row = 0; row < kRows; row += 8) {
                Floats totals[8];
                for (u32 i = 0; i < 8; ++i)
                    std::memcpy(&totals[i], &sums[row + i][column], sizeof totals[i]);
                for (u32 k = 0; k < kDepth; ++k) {
                    Floats factors;
                    std::memcpy(&factors, &b[k][column], sizeof factors);
                    for (u32 i = 0; i < 8; ++i) totals[i] += a[row + i][k] * factors;
                }
                for (u32 i = 0; i < 8; ++i)
                    std::memcpy(&sums[row + i][column], &totals[i], sizeof totals[i]);
            }
    }
};

// halves: the accumulators are fp16, two in a register.
template <class T, bool halves>
void multiply_floats(Warp& warp, const Product& product) {
    const Instruction& instruction = *product.instruction;
    const ProductForm form(instruction, halves);
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    FloatProduct work;
    work.load_a<T>(warp, product, form);
    work.load_b<T>(warp, product, form);
    const u32 pairs = form.columns / 4;  // of a lane: neighbors in a row
    for (u32 pair = 0; pair < pairs; ++pair) {
        const u32* first = warp.words(registers[halves ? pair : 2 * pair]);
        const u32* second = warp.words(registers[halves ? pair : 2 * pair + 1]);
        for (u32 lane = 0; lane < kLanes; ++lane) {
            float* const sums = &work.sums[row_of(lane, 2 * pair)][column_of(lane, 2 * pair)];
            if (!product.accumulates) {
                sums[0] = sums[1] = 0;
            } else if (halves) {
                sums[0] = half_to_float(static_cast<u16>(first[lane]));
                sums[1] = half_to_float(static_cast<u16>(first[lane] >> 16));
            } else {
                sums[0] = bits_as<float>(first[lane]);
                sums[1] = bits_as<float>(second[lane]);
            }
        }
    }
    work.multiply(form.columns);
    for (u32 pair = 0; pair < pairs; ++pair) {
        u32* first = warp.words(registers[halves ? pair : 2 * pair]);
        u32* second = warp.words(registers[halves ? pair : 2 * pair + 1]);
        for (u32 lane = 0; lane < kLanes; ++lane) {
            const float* sums = &work.sums[row_of(lane, 2 * pair)][column_of(lane, 2 * pair)];
            if (halves) {
                first[lane] = u32{float_to_half(sums[0])} | u32{float_to_half(sums[1])} << 16;
            } else {
                first[lane] = bits_as<u32>(sums[0]);
                second[lane] = bits_as<u32>(sums[1]);
            }
        }
    }
}

template <class A, class B, bool saturates>
void multiply_integers(Warp& warp, const Product& product) {
    constexpr u32 kDepth = 32;
    const Instruction& instruction = *product.instruction;
    const ProductForm form(instruction, false);
    Block& block = *warp.block;
    const u32* registers = &warp.kernel->pool[instruction.vector.first];
    A a[kRows][kDepth];
    B b[kMostColumns][kDepth];
    if (form.a_in_registers) {
        for (u32 i = 0; i < 4; ++i)
            for (u32 lane = 0; lane < kLanes; ++lane)
                std::memcpy(&a[lane / 4 + 8 * (i & 1)][4 * (lane % 4) + 16 * (i >> 1)],
                            &product.fragment[i][lane], 4);
    } else {
        const Descriptor descriptor(product.a);
        for (u32 row = 0; row < kRows; ++row)
            for (u32 half = 0; half < 2; ++half)
                std::memcpy(&a[row][16 * half],
                            block.at(descriptor.k_major(warp.index % 4 * kRows + row, half), 16),
                            16);
    }
    const Descriptor descriptor(product.b);
    for (u32 column = 0; column < form.columns; ++column)
        for (u32 half = 0; half < 2; ++half)
            std::memcpy(&b[column][16 * half], block.at(descriptor.k_major(column, half), 16), 16);
    for (u32 i = 0; i < instruction.vector.count; ++i) {
        u32* words = warp.words(registers[i]);
        for (u32 lane = 0; lane < kLanes; ++lane) {
            i32 total = 0;
            for (u32 k = 0; k < kDepth; ++k)
                total += i32{a[row_of(lane, i)][k]} * i32{b[column_of(lane, i)][k]};
            i64 sum = product.accumulates ? i64{static_cast<i32>(words[lane])} + total : total;
            if (saturates)
                sum = std::clamp<i64>(sum, std::numeric_limits<i32>::min(),
                                      std::numeric_limits<i32>::max());
            words[lane] = static_cast<u32>(sum);
        }
    }
}

}  // namespace

ProductForm::ProductForm(const Instruction& instruction, bool halves) {
    const i64 flags = instruction.second_immediate;  // scales of A and B, transpositions
    const u32 count = instruction.options;
    a_in_registers = instruction.second_vector.count != 0;
    columns = instruction.vector.count * (halves ? 4 : 2);
    if (count == 0) return;  // of integers
    const u32 transpositions = a_in_registers ? 1 : 2;
    require(count == 2 + transpositions, "wgmma: the numbers after scale-d");
    require((flags & 0xfe) == 0 && (transpositions == 1 || (flags >> 8 & 0xfe) == 0),
            "wgmma: a transposition is neither 0 nor 1");
    transposes_b = flags & 1;
    transposes_a = transpositions == 2 && (flags >> 8 & 1);
    for (u32 shift : {8 * transpositions, 8 * transpositions + 8}) {
        const i8 scale = static_cast<i8>(flags >> shift);
        require(scale == 1 || scale == -1, "wgmma: a scale is neither 1 nor -1");
        negates ^= scale == -1;
    }
}

void (*product_function(ProductType type))(Warp&, const Product&) {
    switch (type) {
        case ProductType::kHalf:
            return multiply_floats<Half, false>;
        case ProductType::kBfloat:
            return multiply_floats<Bfloat, false>;
        case ProductType::kHalfSums:
            return multiply_floats<Half, true>;
        case ProductType::kS8S8:
            return multiply_integers<i8, i8, false>;
        case ProductType::kU8U8:
            return multiply_integers<u8, u8, false>;
        case ProductType::kU8S8:
            return multiply_integers<u8, i8, false>;
        case ProductType::kS8U8:
            return multiply_integers<i8, u8, false>;
        case ProductType::kS8S8Saturated:
            return multiply_integers<i8, i8, true>;
        case ProductType::kU8U8Saturated:
            return multiply_integers<u8, u8, true>;
        case ProductType::kU8S8Saturated:
            return multiply_integers<u8, i8, true>;
        default:
            return multiply_integers<i8, u8, true>;
    }
}

}  // namespace emulator
