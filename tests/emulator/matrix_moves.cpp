// ldmatrix and stmatrix (PTX ISA 9.7.14.5.15, 9.7.14.5.16): 8 x 8 matrices of 16 bits, a row of
// which an address names. Lane t holds row t / 4, columns 2 (t % 4) and the next.
#include "block.hpp"
#include "opcodes.hpp"

namespace emulator {
namespace {

template <u32 count>
struct Matrices {
    u32 addresses[kLanes] = {};
    u16 rows[count * 8][8];

    void locate(Warp& warp, const Instruction& instruction) {
        require(warp.mask == kAllLanes, "ldmatrix or stmatrix by a part of a warp");
        for (u32 i = 0; i < count * 8; ++i) {
            const u32 index = instruction.wide_addresses != 0 ? 2 * i : i;
            addresses[i] = warp.registers[instruction.operand[0] + index] +
                           static_cast<u32>(instruction.immediate);
        }
    }
    void count_rows(Warp& warp, const Instruction& instruction) const {
        warp.mask = count == 4 ? kAllLanes : (1u << count * 8) - 1;
        count_shared(warp, instruction, addresses, 16);
        warp.mask = kAllLanes;
    }
    // The element of a lane's register, the first or the second.
    template <bool transposed>
    u16& element(u32 matrix, u32 lane, u32 second) {
        const u32 row = lane / 4, column = 2 * (lane % 4) + second;
        return transposed ? rows[8 * matrix + column][row] : rows[8 * matrix + row][column];
    }
};

template <u32 count, bool transposed>
void load(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    Matrices<count> matrices;
    matrices.locate(warp, instruction);
    for (u32 i = 0; i < count * 8; ++i) {
        std::memcpy(matrices.rows[i], block.at(matrices.addresses[i], 16, 16), 16);
        block.read_shared(warp, matrices.addresses[i], 16);
    }
    matrices.count_rows(warp, instruction);
    for (u32 matrix = 0; matrix < count; ++matrix) {
        u32* result = warp.words(warp.kernel->pool[instruction.vector.first + matrix]);
        for (u32 lane = 0; lane < kLanes; ++lane)
            result[lane] = u32{matrices.template element<transposed>(matrix, lane, 0)} |
                           u32{matrices.template element<transposed>(matrix, lane, 1)} << 16;
    }
}

template <u32 count, bool transposed>
void store(Warp& warp, const Instruction& instruction) {
    Block& block = *warp.block;
    Matrices<count> matrices;
    matrices.locate(warp, instruction);
    for (u32 matrix = 0; matrix < count; ++matrix) {
        const u32* source = warp.words(warp.kernel->pool[instruction.vector.first + matrix]);
        for (u32 lane = 0; lane < kLanes; ++lane) {
            matrices.template element<transposed>(matrix, lane, 0) = static_cast<u16>(source[lane]);
            matrices.template element<transposed>(matrix, lane, 1) =
                static_cast<u16>(source[lane] >> 16);
        }
    }
    for (u32 i = 0; i < count * 8; ++i) {
        u8* const target = block.at(matrices.addresses[i], 16, 16);
        const u8* data = reinterpret_cast<const u8*>(matrices.rows[i]);
        block.write_shared(warp, matrices.addresses[i], 16, data);
        std::memcpy(target, data, 16);
    }
    matrices.count_rows(warp, instruction);
}

template <u32 count, bool transposed>
void check_count(Warp& warp, const Instruction& instruction, Handler run) {
    require(instruction.vector.count == count, "ldmatrix or stmatrix: another number of registers");
    run(warp, instruction);
}
template <u32 count, bool transposed>
void checked_load(Warp& warp, const Instruction& instruction) {
    check_count<count, transposed>(warp, instruction, load<count, transposed>);
}
template <u32 count, bool transposed>
void checked_store(Warp& warp, const Instruction& instruction) {
    check_count<count, transposed>(warp, instruction, store<count, transposed>);
}

template <u32 count>
void add_count(OpcodeTable& table) {
    const std::string stem = "matrix.sync.aligned.m8n8.x" + text(count);
    for (const char* space : {".shared.b16", ".shared::cta.b16"}) {
        table.add("ld" + stem + space, checked_load<count, false>, "v=m", kMatrixMove);
        table.add("ld" + stem + ".trans" + space, checked_load<count, true>, "v=m", kMatrixMove);
        table.add("st" + stem + space, checked_store<count, false>, "=mv", kMatrixMove);
        table.add("st" + stem + ".trans" + space, checked_store<count, true>, "=mv", kMatrixMove);
    }
}

}  // namespace

void add_matrix_moves(OpcodeTable& table) {
    add_count<1>(table);
    add_count<2>(table);
    add_count<4>(table);
}

}  // namespace emulator
