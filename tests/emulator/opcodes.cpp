#include "opcodes.hpp"

#include "warp.hpp"

namespace emulator {

const char* class_name(u32 index) {
    static const char* const kNames[] = {
        "integer", "float",   "convert", "move",       "parameter",   "global",
        "shared",  "local",   "atomic",  "async copy", "matrix move", "mma",
        "wgmma",   "barrier", "branch",  "exchange",   "other"};
    static_assert(sizeof kNames / sizeof *kNames == kClasses);
    return kNames[index];
}

void OpcodeTable::add(const std::string& name, Handler run, const std::string& operands,
                      Class instruction_class) {
    entries_[name] = {run, operands, instruction_class};
}

const Opcode* OpcodeTable::find(const std::string& name) const {
    const auto entry = entries_.find(name);
    return entry == entries_.end() ? nullptr : &entry->second;
}

const OpcodeTable& opcode_table() {
    static const OpcodeTable table = [] {
        OpcodeTable result;
        for (auto add :
             {add_integers, add_bits, add_floats, add_halves, add_conversions, add_comparisons,
              add_moves, add_exchanges, add_branches, add_loads_and_stores, add_atomics,
              add_async_copies, add_matrix_moves, add_barriers, add_mbarriers, add_tensor_copies,
              add_bulk_groups, add_mma, add_wgmma})
            add(result);
        return result;
    }();
    return table;
}

void do_nothing(Warp&, const Instruction&) {}

void unknown_opcode(Warp& warp, const Instruction& instruction) {
    throw Fault(warp.kernel->opcodes[instruction.opcode] + " is not known to the emulator");
}

// ---- mutation

namespace {

std::string broken_name;
Handler broken_handler = nullptr;  // its replacement
Handler right_handler = nullptr;
char first_letter = ' ';

void skip(Warp&, const Instruction&) {}
void fail(Warp&, const Instruction&) { throw Fault("broken on purpose"); }

// The lowest bit of the first result.
void invert_result(Warp& warp, const Instruction& instruction) {
    const u32 mask = warp.mask;  // the handler may end lanes
    right_handler(warp, instruction);
    u32 first = instruction.operand[0];
    if (first_letter == 'p') {
        warp.predicates[first] ^= mask;
        return;
    }
    if (first_letter == 'v' || first_letter == 'V')
        first = warp.kernel->pool[instruction.vector.first];
    const bool wide = first_letter == 'R' || (first_letter == 'v' && instruction.wide);
    for (u32 lane = 0; lane < kLanes; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        if (wide)
            warp.doublewords(first)[lane] ^= 1;
        else
            warp.words(first)[lane] ^= 1;
    }
}

}  // namespace

bool break_opcode(const std::string& name, int mode) {
    broken_name.clear();
    if (mode == 0) return true;
    const Opcode* opcode = opcode_table().find(name);
    if (opcode == nullptr) return false;
    const bool has_result =
        opcode->operands.find('=') > 0 && opcode->operands.find('=') != std::string::npos;
    const bool is_product = opcode->operands[0] == 'V';
    if (mode == 2 && opcode->instruction_class == kWgmma) return false;
    if (mode == 2 && !has_result && !is_product) return false;
    broken_name = name;
    right_handler = opcode->run;
    first_letter = opcode->operands.empty() ? ' ' : opcode->operands[0];
    broken_handler = mode == 2 ? invert_result : opcode->run == do_nothing ? fail : skip;
    return true;
}

Handler handler_of(const std::string& name, const Opcode& opcode) {
    return name == broken_name ? broken_handler : opcode.run;
}

}  // namespace emulator
