// The table of opcodes: for each, with all its modifiers, a handler and the operands it takes.
#pragma once

#include <map>
#include <string>

#include "kernel.hpp"

namespace emulator {

// `operands` has a letter for each, results before '=':
//   p predicate; r register of 32 bits or fewer, R of 64; v vector, w a second vector; _ a sink;
//   m address of shared memory, n a second address; o a third; M, N addresses of global memory;
//   i number, j a second number; J all numbers that are left, a byte each, their count in
//   `options`; L label; T [tensor map, {coordinates}]; A wgmma's A, registers or a descriptor; V
//   four vectors of a product, whose sizes follow as digits.
// Opcodes that take several numbers of operands have an entry "opcode#n" for the longer forms.
struct Opcode {
    Handler run;
    std::string operands;
    Class instruction_class;
};

class OpcodeTable {
  public:
    void add(const std::string& name, Handler run, const std::string& operands,
             Class instruction_class);
    // Null if it is not known. A longer form has its number of operands in the name.
    const Opcode* find(const std::string& name) const;
    const std::map<std::string, Opcode>& entries() const { return entries_; }

  private:
    std::map<std::string, Opcode> entries_;
};

const OpcodeTable& opcode_table();

void do_nothing(Warp&, const Instruction&);
void unknown_opcode(Warp&, const Instruction&);

// For tests of the tests: see emulator_break. False if the opcode has no such mutation.
bool break_opcode(const std::string& name, int mode);
// The handler that the opcode has now.
Handler handler_of(const std::string& name, const Opcode& opcode);

// Each adds a family.
void add_integers(OpcodeTable&);
void add_bits(OpcodeTable&);
void add_floats(OpcodeTable&);
void add_halves(OpcodeTable&);
void add_conversions(OpcodeTable&);
void add_comparisons(OpcodeTable&);
void add_moves(OpcodeTable&);
void add_exchanges(OpcodeTable&);
void add_branches(OpcodeTable&);
void add_loads_and_stores(OpcodeTable&);
void add_atomics(OpcodeTable&);
void add_async_copies(OpcodeTable&);
void add_matrix_moves(OpcodeTable&);
void add_barriers(OpcodeTable&);
void add_mbarriers(OpcodeTable&);
void add_tensor_copies(OpcodeTable&);
void add_bulk_groups(OpcodeTable&);
void add_mma(OpcodeTable&);
void add_wgmma(OpcodeTable&);

}  // namespace emulator
