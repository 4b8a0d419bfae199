// Statements to instructions: the opcode's entry in the table, and every operand that it takes.
#include <algorithm>
#include <cctype>
#include <set>

#include "fault.hpp"
#include "parser.hpp"

namespace emulator {

static bool starts(const std::string& text, const char* prefix) {
    return text.rfind(prefix, 0) == 0;
}

void Parser::statement(const std::string& text) {
    if (text.empty()) return;
    if (text[0] == '.') return directive(text);
    Instruction instruction;
    instruction.line = line_;
    instruction.source = source_.source_of(line_);
    used_.clear();
    results_.clear();
    std::string rest = text;
    if (rest[0] == '@') {
        instruction.negated = rest.size() > 1 && rest[1] == '!';
        const size_t first = instruction.negated ? 2 : 1, end = rest.find_first_of(" \t\r\n");
        if (end == std::string::npos) fail("a guard without an instruction");
        instruction.guard = static_cast<i32>(operand(rest.substr(first, end - first), 'p'));
        rest = trimmed(rest.substr(end));
    }
    const size_t end = std::min(rest.find_first_of(" \t\r\n"), rest.size());
    const std::string opcode = rest.substr(0, end);
    std::vector<std::string> parts = parts_of(rest.substr(end));
    const auto [slot, is_new] =
        opcodes_.try_emplace(opcode, static_cast<u32>(kernel_->opcodes.size()));
    if (is_new) kernel_->opcodes.push_back(opcode);
    instruction.opcode = slot->second;
    build(instruction, opcode, parts);
}

void Parser::append(const Instruction& instruction) {
    const u32 index = static_cast<u32>(kernel_->code.size());
    kernel_->code.push_back(instruction);
    if (!used_.empty()) uses_[index] = used_;
    if (!results_.empty()) writes_[index] = results_;
}

void Parser::unknown(Instruction& instruction) {
    instruction.run = unknown_opcode;
    instruction.instruction_class = kOther;
    append(instruction);
}

// An atomic's opcode without its order and scope, which become options: 2 acquires, 4 releases.
static std::string without_order(const std::string& opcode, u8& options) {
    std::string result, space = ".generic";
    size_t start = 0;
    std::string tail;
    while (start <= opcode.size()) {
        const size_t dot = std::min(opcode.find('.', start), opcode.size());
        const std::string token = opcode.substr(start, dot - start);
        static const std::set<std::string> kDropped = {"relaxed", "cta", "cluster", "gpu", "sys"};
        if (token == "acquire" || token == "acq_rel") options |= 2;
        if (token == "release" || token == "acq_rel") options |= 4;
        if (start == 0)
            result = token;
        else if (token == "global")
            space = ".global";
        else if (token == "shared" || token == "shared::cta" || token == "shared::cluster")
            space = ".shared";
        else if (kDropped.count(token) == 0 && token != "acquire" && token != "release" &&
                 token != "acq_rel")
            tail += "." + token;
        start = dot + 1;
    }
    return result + space + tail;
}

void Parser::build(Instruction& instruction, std::string opcode, std::vector<std::string>& parts) {
    if (starts(opcode, "ld.") || starts(opcode, "st."))
        return build_access(instruction, opcode, parts);
    const bool moves = opcode == "mov.b32" || opcode == "mov.b64";
    if (moves && parts.size() == 2 && (starts(parts[0], "{") || starts(parts[1], "{")))
        return build_pack(instruction, opcode, parts);
    if (starts(opcode, "atom.") || starts(opcode, "red."))
        opcode = without_order(opcode, instruction.options);
    // d|p: both results; without '|' nobody reads the second.
    if (!parts.empty() &&
        (starts(opcode, "shfl.") || starts(opcode, "setp.") || opcode == "elect.sync")) {
        const size_t bar = parts[0].find('|');
        std::string second = "_";
        if (bar != std::string::npos) {
            second = trimmed(parts[0].substr(bar + 1));
            parts[0] = trimmed(parts[0].substr(0, bar));
        }
        parts.insert(parts.begin() + 1, second);
    }
    const OpcodeTable& table = opcode_table();
    const Opcode* entry = table.find(opcode + "#" + std::to_string(parts.size()));
    if (entry != nullptr)
        opcode += "#" + std::to_string(parts.size());
    else
        entry = table.find(opcode);
    if (entry == nullptr) return unknown(instruction);
    if (starts(opcode, "cvt.")) narrow_source(instruction, opcode, parts);
    instruction.run = handler_of(opcode, *entry);
    instruction.instruction_class = entry->instruction_class;
    take_operands(instruction, opcode, *entry, parts);
    const size_t columns =
        starts(opcode, "wgmma.mma_async") ? opcode.find("m64n") : std::string::npos;
    if (columns != std::string::npos) {
        const u32 wanted = static_cast<u32>(std::stoi(opcode.substr(columns + 4))) /
                           (opcode.find(".f16.f16.f16") != std::string::npos ? 4 : 2);
        if (instruction.vector.count != wanted)
            fail(opcode + ": D of " + text(instruction.vector.count) + " registers, wanted " +
                 text(wanted));
    }
    append(instruction);
}

void Parser::take_operands(Instruction& instruction, const std::string& opcode, const Opcode& entry,
                           const std::vector<std::string>& parts) {
    const std::string& letters = entry.operands;
    if (letters[0] == 'V') {
        if (parts.size() != 4) fail(opcode + ": wanted 4 operands, got " + text(parts.size()));
        return take_product(instruction, letters.substr(1), parts);
    }
    size_t index = 0;
    u32 count = 0;
    for (char letter : letters) {
        if (letter == '=') {
            results_ = used_;
            continue;
        }
        if (letter == 'J') {
            for (; index < parts.size(); ++index, ++instruction.options)
                instruction.second_immediate =
                    instruction.second_immediate << 8 | (number(parts[index]) & 255);
            break;
        }
        if (index == parts.size()) fail(opcode + ": too few operands, got " + text(parts.size()));
        take_operand(instruction, letter, parts[index++], count);
    }
    if (index != parts.size())
        fail(opcode + ": an operand that is not known to the emulator: " + parts[index]);
}

void Parser::take_operand(Instruction& instruction, char letter, const std::string& text,
                          u32& count) {
    switch (letter) {
        case 'p':
        case 'r':
        case 'R':
            instruction.operand[count++] = operand(text, letter);
            return;
        case 'v':
            instruction.vector = vector(text, 'r');
            return;
        case 'w':
            instruction.second_vector = vector(text, 'r');
            return;
        case 'm':
        case 'M':
            instruction.operand[count++] =
                address(instruction, text, letter == 'M', instruction.immediate);
            return;
        case 'n':
        case 'N':
            instruction.operand[count++] =
                address(instruction, text, letter == 'N', instruction.second_immediate);
            return;
        case 'o':
            instruction.operand[count++] =
                address(instruction, text, false, instruction.third_immediate);
            return;
        case 'i':
            instruction.immediate = number(text);
            return;
        case 'j':
            instruction.second_immediate = number(text);
            return;
        case 'L':
            jumps_.push_back({static_cast<u32>(kernel_->code.size()), text, scope_});
            return;
        case '_':
            if (text != "_") fail("a result that is not known to the emulator, wanted _: " + text);
            return;
        case 'A':
            if (starts(text, "{"))
                instruction.second_vector = vector(text, 'r');
            else
                instruction.operand[count] = operand(text, 'R');
            ++count;
            return;
        case 'T': {
            if (text.size() < 2) fail("wanted [map, {coordinates}]");
            const auto parts = parts_of(text.substr(1, text.size() - 2));
            if (parts.size() != 2) fail("wanted [map, {coordinates}], got " + text);
            instruction.operand[count++] = operand(parts[0], 'R');
            instruction.vector = vector(parts[1], 'r');
            return;
        }
        default:
            fail(std::string("the opcode table has a letter that is not known: ") + letter);
    }
}

// D, A, B, C as a single list.
void Parser::take_product(Instruction& instruction, const std::string& sizes,
                          const std::vector<std::string>& parts) {
    std::vector<u32> all;
    for (size_t i = 0; i < 4; ++i) {
        const Registers registers = vector(parts[i], 'r');
        if (registers.count != static_cast<u32>(sizes[i] - '0'))
            fail("a product's operand of " + text(registers.count) + " registers, wanted " +
                 sizes[i]);
        const auto first = kernel_->pool.begin() + registers.first;
        all.insert(all.end(), first, first + registers.count);
        if (i == 0) results_ = used_;
    }
    instruction.vector = {static_cast<u32>(kernel_->pool.size()), static_cast<u32>(all.size())};
    kernel_->pool.insert(kernel_->pool.end(), all.begin(), all.end());
}

// A source in a register of 64 bits, of a type of fewer: its low bits count.
bool Parser::narrow_source(const Instruction& instruction, const std::string& opcode,
                           std::vector<std::string>& parts) {
    if (parts.size() != 2 || opcode.substr(opcode.rfind('.')).find("64") != std::string::npos)
        return false;
    const Register* source = use_register(parts[1]);
    if (source == nullptr || source->type != RegisterType::kBits64) {
        used_.clear();
        return false;
    }
    Instruction cut = instruction;
    cut.run = opcode_table().find("cvt.u32.u64")->run;
    cut.instruction_class = kConvert;
    cut.operand[0] = take(kLanes);
    cut.operand[1] = source->offset;
    append(cut);
    used_.clear();
    parts[1] = "%cut" + std::to_string(cut.operand[0]);
    scopes_[static_cast<size_t>(scope_)].registers[parts[1]] = {RegisterType::kBits32,
                                                                cut.operand[0]};
    return true;
}

void Parser::build_pack(Instruction& instruction, const std::string& opcode,
                        std::vector<std::string>& parts) {
    const bool unpacks = starts(parts[0], "{");
    const std::string key = (unpacks ? "unpack." : "pack.") + opcode.substr(4);
    const Opcode* entry = opcode_table().find(key);
    const char letter = opcode == "mov.b64" ? 'R' : 'r';
    if (unpacks) {
        instruction.vector = vector(parts[0], 'r');
        results_ = used_;
        instruction.operand[0] = operand(parts[1], letter);
    } else {
        instruction.operand[0] = operand(parts[0], letter);
        results_ = used_;
        instruction.vector = vector(parts[1], 'r');
    }
    if (instruction.vector.count != 2 && instruction.vector.count != 4)
        fail(opcode + ": wanted 2 or 4 parts, got " + text(instruction.vector.count));
    instruction.run = handler_of(key, *entry);
    instruction.instruction_class = entry->instruction_class;
    append(instruction);
}

}  // namespace emulator
