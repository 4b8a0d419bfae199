// PTX text to kernels. The grammar is that of Triton's LLVM and of nvcc: directives, scopes of
// inline assembly, labels, instructions with guards.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernel.hpp"
#include "opcodes.hpp"
#include "source_text.hpp"

namespace emulator {

enum class RegisterType : u8 { kPredicate, kBits16, kBits32, kBits64 };

struct Register {
    RegisterType type;
    u32 offset;  // or a predicate's number
};

// A variable of shared or local memory, or of .global and .const with its bytes.
struct Variable {
    std::string space;
    u32 bytes = 0, alignment = 1;
    bool dynamic = false;  // shared memory whose size the launch gives
    std::vector<u8> data;
    u32 address = 0;
};

class Parser {
  public:
    explicit Parser(const std::string& ptx) : source_(ptx) {}
    std::unique_ptr<Module> run();

  private:
    struct Scope {
        std::map<std::string, std::pair<RegisterType, bool>> declared;  // or prefixes: true
        std::map<std::string, Register> registers;
        std::map<std::string, u32> labels;
        int parent = -1;
    };
    struct Jump {
        u32 instruction;
        std::string label;
        int scope;
    };

    SourceText source_;
    u32 line_ = 0;
    std::map<std::string, Variable> module_variables_, variables_;
    std::unique_ptr<Kernel> kernel_;
    std::vector<Scope> scopes_;
    int scope_ = 0;
    std::vector<Jump> jumps_;
    std::map<std::string, u32> opcodes_;
    std::map<u64, u32> words_, doublewords_, predicates_, parameter_addresses_;
    std::map<std::string, u64> variable_addresses_;  // of .global and .const
    bool shared_laid_out_ = false;
    std::vector<u32> used_;  // registers of the statement at hand
    std::vector<u32> results_;
    RegisterUses uses_, writes_;  // by instruction

    [[noreturn]] void fail(const std::string& message) const;

    // parser.cpp: directives
    void module_level(size_t from, size_t to);
    size_t kernel(size_t entry);
    void read_parameters(const std::string& list);
    void read_requirements(const std::string& directives);
    void declare_registers(const std::string& statement);
    void declare_variable(const std::string& statement, bool in_kernel);
    void directive(const std::string& statement);
    void lay_out_shared();

    // operands.cpp
    u32 take(u32 words);
    Register* find_register(const std::string& name);
    Register* use_register(const std::string& name);
    u32 constant(u64 value, char letter);
    u32 special(const std::string& name);
    bool symbol(const std::string& name, bool wide, u32& offset);
    u32 operand(const std::string& text, char letter);
    u32 address(Instruction& instruction, const std::string& text, bool wide, i64& displacement);
    Registers vector(const std::string& text, char letter);
    i64 number(const std::string& text) const;

    // instructions.cpp
    void statement(const std::string& text);
    void build(Instruction& instruction, std::string opcode, std::vector<std::string>& parts);
    void take_operands(Instruction& instruction, const std::string& opcode, const Opcode& entry,
                       const std::vector<std::string>& parts);
    void take_operand(Instruction& instruction, char letter, const std::string& text, u32& count);
    void take_product(Instruction& instruction, const std::string& sizes,
                      const std::vector<std::string>& parts);
    void build_access(Instruction& instruction, const std::string& opcode,
                      std::vector<std::string>& parts);
    void build_pack(Instruction& instruction, const std::string& opcode,
                    std::vector<std::string>& parts);
    bool narrow_source(const Instruction& instruction, const std::string& opcode,
                       std::vector<std::string>& parts);
    void unknown(Instruction& instruction);
    void append(const Instruction& instruction);

    // flow.cpp
    void finish();
    void resolve_labels();
    void note_product_registers();
    void mark_copies(Kernel& kernel, std::vector<bool>& marks) const;
};

// Sets every branch's `meet`: its immediate post-dominator.
void set_meeting_points(Kernel& kernel);

}  // namespace emulator
