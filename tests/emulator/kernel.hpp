// A kernel as it is executed: instructions with resolved registers, parsed from its PTX.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "values.hpp"

namespace emulator {

constexpr u32 kLanes = 32;
constexpr u32 kAllLanes = 0xffffffffu;
constexpr u32 kNowhere = 0xffffffffu;  // no instruction
constexpr u32 kReservedShared = 1024;  // shared memory that CUDA keeps, before the kernel's own

// Generic addresses of shared and local memory; no address of the host is like them.
constexpr u64 kSharedWindow = 0xe000000000000000, kLocalWindow = 0xd000000000000000;
constexpr u64 kWindowMask = 0xf000000000000000;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

enum Class : u8 {
    kInteger,
    kFloat,
    kConvert,
    kMove,
    kParameter,
    kGlobal,
    kShared,
    kLocal,
    kAtomic,
    kAsyncCopy,
    kMatrixMove,
    kMma,
    kWgmma,
    kBarrier,
    kBranch,
    kExchange,
    kOther,
    kClasses
};
const char* class_name(u32 index);

// Registers of a vector operand: a part of Kernel::pool.
struct Registers {
    u32 first = 0, count = 0;
};

struct Instruction {
    Handler run = nullptr;
    i32 guard = -1;  // a predicate, -1 if there is none
    bool negated = false;
    bool sign_extends = false;         // a load
    bool wide = false;                 // the vector's registers have 64 bits
    u8 wide_addresses = 0;  // bits: the first to third of shared memory is in 64-bit registers
    bool writes_fragment = false;  // writes registers that some wgmma takes
    bool uses_accumulator = false;  // uses registers that some wgmma accumulates in
    Class instruction_class = kOther;
    u8 bytes = 0;  // of an element
    u8 options = 0;  // bits that the handler defines
    u32 operand[6] = {};  // offsets in the warp's registers, or numbers of predicates
    Registers vector, second_vector;
    i64 immediate = 0, second_immediate = 0,
        third_immediate = 0;  // an address' offset, or a number
    u32 target = 0;  // of a branch
    u32 meet = kNowhere;  // at which the branch's lanes meet again
    u32 opcode = 0;  // in Kernel::opcodes
    u32 line = 0;  // of the PTX
    u32 source = 0;  // in Kernel::sources
};

struct Parameter {
    std::string name;
    u32 offset, size;
};

// Values that registers hold from the start of a block.
struct Constants {
    std::vector<std::pair<u32, u32>> words;  // register, value
    std::vector<std::pair<u32, u64>> doublewords;  // register, value
    std::vector<std::pair<u32, u32>> predicates;  // predicate, value
    std::vector<std::pair<u32, u32>> parameters;  // register, offset in the parameters
    std::map<std::string, u32> special;  // %tid.x -> register
};

// By instruction: registers of wgmma, as offsets.
using RegisterUses = std::unordered_map<u32, std::vector<u32>>;

struct Kernel {
    std::string name;
    std::vector<Instruction> code;
    std::vector<u32> pool;
    std::vector<std::string> opcodes, sources;
    std::vector<Parameter> parameters;
    u32 parameter_bytes = 0;
    u32 required_block[3] = {}, cluster[3] = {};  // 0: not required
    u32 register_words = 0;  // of a warp
    u32 predicates = 0;
    u32 static_shared_end = kReservedShared, dynamic_shared = kReservedShared;  // addresses
    u32 local_bytes = 0;  // of a lane
    Constants constants;
    RegisterUses accumulators, fragments;  // used; written
    RegisterUses copies;  // of accumulators: written
    std::vector<std::unique_ptr<u8[]>> variables;  // of .global and .const
    std::vector<std::pair<u64, u64>> variable_ranges;  // their addresses and sizes

    u32 index_of(const Instruction& instruction) const {
        return static_cast<u32>(&instruction - code.data());
    }
    // "opcode, PTX line 12, file.py:34:5".
    std::string location(u32 index) const;
};

struct Module {
    std::vector<std::unique_ptr<Kernel>> kernels;
};

// Throws std::string, a sentence, if the text is no PTX that the emulator reads.
std::unique_ptr<Module> parse(const std::string& text);

}  // namespace emulator
