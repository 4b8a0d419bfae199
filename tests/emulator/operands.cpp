// Operands: registers, numbers, symbols, addresses, vectors.
#include <algorithm>
#include <cctype>

#include "parser.hpp"

namespace emulator {

u32 Parser::take(u32 words) {
    const u32 offset = kernel_->register_words;
    kernel_->register_words += words;
    return offset;
}

Register* Parser::find_register(const std::string& name) {
    for (int index = scope_; index >= 0; index = scopes_[static_cast<size_t>(index)].parent) {
        Scope& scope = scopes_[static_cast<size_t>(index)];
        const auto known = scope.registers.find(name);
        if (known != scope.registers.end()) return &known->second;
        auto declared = scope.declared.find(name);
        if (declared == scope.declared.end()) {  // %r12 of %r<20>
            size_t digits = name.size();
            while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1])))
                --digits;
            if (digits == name.size()) continue;
            declared = scope.declared.find(name.substr(0, digits));
            if (declared == scope.declared.end() || !declared->second.second) continue;
        }
        const RegisterType type = declared->second.first;
        const u32 offset = type == RegisterType::kPredicate ? kernel_->predicates++
                           : type == RegisterType::kBits64  ? take(2 * kLanes)
                                                            : take(kLanes);
        return &(scope.registers[name] = {type, offset});
    }
    return nullptr;
}

Register* Parser::use_register(const std::string& name) {
    Register* const result = find_register(name);
    if (result != nullptr && result->type != RegisterType::kPredicate)
        used_.push_back(result->offset);
    return result;
}

u32 Parser::constant(u64 value, char letter) {
    Constants& constants = kernel_->constants;
    if (letter == 'p') {
        const auto [slot, is_new] = predicates_.try_emplace(value != 0, 0);
        if (is_new) {
            slot->second = kernel_->predicates++;
            constants.predicates.push_back({slot->second, value != 0 ? kAllLanes : 0});
        }
        return slot->second;
    }
    if (letter == 'R') {
        const auto [slot, is_new] = doublewords_.try_emplace(value, 0);
        if (is_new) {
            slot->second = take(2 * kLanes);
            constants.doublewords.push_back({slot->second, value});
        }
        return slot->second;
    }
    const auto [slot, is_new] = words_.try_emplace(static_cast<u32>(value), 0);
    if (is_new) {
        slot->second = take(kLanes);
        constants.words.push_back({slot->second, static_cast<u32>(value)});
    }
    return slot->second;
}

u32 Parser::special(const std::string& name) {
    static const char* const kAxes[] = {"%tid",       "%ntid",          "%ctaid",
                                        "%nctaid",    "%cluster_ctaid", "%cluster_nctaid",
                                        "%clusterid", "%nclusterid"};
    static const char* const kScalars[] = {"%laneid",      "%warpid",          "%smid",
                                           "%nsmid",       "%cluster_ctarank", "%cluster_nctarank",
                                           "%lanemask_eq", "%lanemask_lt",     "%lanemask_le",
                                           "%lanemask_gt", "%lanemask_ge",     "%clock"};
    const size_t dot = name.find('.');
    const std::string base = name.substr(0, dot), axis = name.substr(std::min(dot, name.size()));
    const bool has_axis = axis == ".x" || axis == ".y" || axis == ".z";
    const auto is = [](const std::string& text) {
        return [&text](const char* other) { return text == other; };
    };
    const bool known = (has_axis && std::any_of(std::begin(kAxes), std::end(kAxes), is(base))) ||
                       std::any_of(std::begin(kScalars), std::end(kScalars), is(name));
    if (!known) fail("a register that is not known: " + name);
    const auto [slot, is_new] = kernel_->constants.special.try_emplace(name, 0);
    if (is_new) slot->second = take(kLanes);
    return slot->second;
}

// The register that holds a symbol's address. False if there is no such symbol.
bool Parser::symbol(const std::string& name, bool wide, u32& offset) {
    for (const Parameter& parameter : kernel_->parameters) {
        if (parameter.name != name) continue;
        if (!wide) fail("an address of 32 bits of parameter " + name);
        const auto [slot, is_new] = parameter_addresses_.try_emplace(parameter.offset, 0);
        if (is_new) {
            slot->second = take(2 * kLanes);
            kernel_->constants.parameters.push_back({slot->second, parameter.offset});
        }
        offset = slot->second;
        return true;
    }
    const auto variable = variables_.find(name);
    if (variable == variables_.end()) return false;
    Variable& item = variable->second;
    if (item.space == ".shared") lay_out_shared();
    if (item.space == ".shared" || item.space == ".local") {
        offset = constant(item.address, wide ? 'R' : 'r');
        return true;
    }
    if (!wide) fail("an address of 32 bits of " + name);
    const auto [slot, is_new] = variable_addresses_.try_emplace(name, 0);
    if (is_new) {
        auto memory = std::make_unique<u8[]>(item.bytes + 64);
        u8* const start = memory.get() + (64 - reinterpret_cast<u64>(memory.get()) % 64) % 64;
        std::copy(item.data.begin(), item.data.end(), start);
        slot->second = reinterpret_cast<u64>(start);
        kernel_->variable_ranges.push_back({slot->second, item.bytes});
        kernel_->variables.push_back(std::move(memory));
    }
    offset = constant(slot->second, 'R');
    return true;
}

// letter: p, r or R. `_` is a register that nobody reads.
u32 Parser::operand(const std::string& text, char letter) {
    if (text == "_")
        return letter == 'p' ? kernel_->predicates++ : take(letter == 'R' ? 2 * kLanes : kLanes);
    u64 value;
    if (read_number(text, value)) return constant(value, letter);
    if (text == "WARP_SZ") return constant(kLanes, letter);
    if (text == "true" || text == "false") return constant(text == "true", 'p');
    if (const Register* reg = use_register(text)) {
        const bool fits = letter == 'p'   ? reg->type == RegisterType::kPredicate
                          : letter == 'R' ? reg->type == RegisterType::kBits64
                                          : reg->type == RegisterType::kBits32 ||
                                                reg->type == RegisterType::kBits16;
        if (!fits) fail("operand " + text + " is of another size than the opcode's");
        return reg->offset;
    }
    if (!text.empty() && text[0] == '%') return special(text);
    u32 offset;
    if (symbol(text, letter == 'R', offset)) return offset;
    fail("an operand that is not known: '" + text + "'");
}

i64 Parser::number(const std::string& text) const {
    u64 value;
    if (!read_number(text, value)) fail("wanted a number, got '" + text + "'");
    return static_cast<i64>(value);
}

// "[base+displacement]"; wide: of 64 bits. Addresses of shared memory may be in wide registers.
u32 Parser::address(Instruction& instruction, const std::string& text, bool wide,
                    i64& displacement) {
    if (text.size() < 3 || text.front() != '[' || text.back() != ']')
        fail("wanted an address in brackets, got '" + text + "'");
    const std::string inner = text.substr(1, text.size() - 2);
    const size_t sign = inner.find_first_of("+", 1);
    const std::string base = trimmed(inner.substr(0, sign));
    displacement = sign == std::string::npos ? 0 : number(trimmed(inner.substr(sign + 1)));
    u64 value;
    if (read_number(base, value)) return constant(value, wide ? 'R' : 'r');
    if (const Register* reg = use_register(base)) {
        const bool is_wide = reg->type == RegisterType::kBits64;
        if (wide && !is_wide) fail("an address of 32 bits, wanted 64: " + base);
        const u8 bit = &displacement == &instruction.immediate          ? 1
                       : &displacement == &instruction.second_immediate ? 2
                                                                        : 4;
        if (!wide && is_wide) instruction.wide_addresses |= bit;
        return reg->offset;
    }
    u32 offset;
    if (!symbol(base, wide, offset)) fail("a symbol that is not known: '" + base + "'");
    return offset;
}

Registers Parser::vector(const std::string& text, char letter) {
    const bool braces = !text.empty() && text.front() == '{';
    const std::vector<std::string> names =
        braces ? parts_of(text.substr(1, text.size() - 2)) : std::vector<std::string>{text};
    std::vector<u32> offsets;  // first: constants may grow the pool's neighbors
    for (const std::string& name : names) offsets.push_back(operand(name, letter));
    const Registers result{static_cast<u32>(kernel_->pool.size()),
                           static_cast<u32>(offsets.size())};
    kernel_->pool.insert(kernel_->pool.end(), offsets.begin(), offsets.end());
    return result;
}

}  // namespace emulator
