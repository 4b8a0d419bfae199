// ld and st: their spaces, orders, vectors and types (PTX ISA 9.7.9.8 to 9.7.9.12).
#include <set>

#include "fault.hpp"
#include "parser.hpp"

namespace emulator {

namespace {

struct AccessForm {
    std::string space = "generic";
    std::string type;
    u32 vector = 1;
    u8 options = 0;  // 1: strong; 2: acquires; 4: releases
    bool known = true;
};

const std::set<std::string> kHints = {"weak",
                                      "nc",
                                      "ca",
                                      "cg",
                                      "cs",
                                      "lu",
                                      "cv",
                                      "wb",
                                      "wt",
                                      "cta",
                                      "cluster",
                                      "gpu",
                                      "sys",
                                      "L1::evict_normal",
                                      "L1::evict_unchanged",
                                      "L1::evict_first",
                                      "L1::evict_last",
                                      "L1::no_allocate",
                                      "L2::64B",
                                      "L2::128B",
                                      "L2::256B"};
const std::set<std::string> kTypes = {"b8",  "u8",  "s8",  "b16", "u16", "s16", "b32",
                                      "u32", "s32", "f32", "b64", "u64", "s64", "f64"};

AccessForm form_of(const std::string& opcode) {
    AccessForm form;
    for (size_t start = opcode.find('.') + 1; start <= opcode.size();) {
        const size_t dot = std::min(opcode.find('.', start), opcode.size());
        const std::string token = opcode.substr(start, dot - start);
        start = dot + 1;
        if (kTypes.count(token) != 0 && start > opcode.size())
            form.type = token;
        else if (token == "v2" || token == "v4" || token == "v8")
            form.vector = static_cast<u32>(token[1] - '0');
        else if (token == "global" || token == "const")
            form.space = "global";
        else if (token == "shared" || token == "shared::cta" || token == "shared::cluster")
            form.space = "shared";
        else if (token == "param" || token == "local")
            form.space = token;
        else if (token == "relaxed" || token == "volatile")
            form.options |= 1;
        else if (token == "acquire")
            form.options |= 1 | 2;
        else if (token == "release")
            form.options |= 1 | 4;
        else if (kHints.count(token) == 0)
            form.known = false;
    }
    form.known &= !form.type.empty();
    return form;
}

}  // namespace

void Parser::build_access(Instruction& instruction, const std::string& opcode,
                          std::vector<std::string>& parts) {
    const AccessForm form = form_of(opcode);
    const bool loads = opcode[0] == 'l';
    const std::string key = opcode.substr(0, 3) + form.space;
    const Opcode* entry = opcode_table().find(key);
    if (!form.known || entry == nullptr) return unknown(instruction);
    if (parts.size() != 2) fail(opcode + ": wanted 2 operands, got " + text(parts.size()));
    instruction.run = handler_of(key, *entry);
    instruction.instruction_class = entry->instruction_class;
    instruction.options = form.options;
    instruction.sign_extends = form.type[0] == 's';
    instruction.bytes = static_cast<u8>(std::stoi(form.type.substr(1)) / 8);

    const std::string& values = loads ? parts[0] : parts[1];
    std::string first = values;
    if (first[0] == '{') first = parts_of(first.substr(1, first.size() - 2)).at(0);
    const Register* reg = find_register(first);  // registers may be wider than the type
    instruction.wide = reg != nullptr ? reg->type == RegisterType::kBits64 : instruction.bytes == 8;
    instruction.vector = vector(values, instruction.wide ? 'R' : 'r');
    if (instruction.vector.count != form.vector)
        fail(opcode + ": " + text(instruction.vector.count) + " registers, wanted " +
             text(form.vector));
    if (loads) results_ = used_;

    const std::string& memory = loads ? parts[1] : parts[0];
    if (form.space != "param") {
        instruction.operand[0] =
            address(instruction, memory, form.space != "shared", instruction.immediate);
    } else {
        const std::string inner = memory.substr(1, memory.size() - 2);
        const size_t plus = inner.find('+');
        const std::string name = trimmed(inner.substr(0, plus));
        i64 offset = plus == std::string::npos ? 0 : number(trimmed(inner.substr(plus + 1)));
        const Parameter* parameter = nullptr;
        for (const Parameter& item : kernel_->parameters)
            if (item.name == name) parameter = &item;
        if (parameter == nullptr) fail("a parameter that is not known: '" + name + "'");
        if (offset < 0 || offset + instruction.bytes * form.vector > parameter->size)
            fail("a load past the end of parameter " + name);
        instruction.immediate = parameter->offset + offset;
    }
    append(instruction);
}

}  // namespace emulator
