// Directives: kernels, their parameters and requirements, registers and variables.
#include "parser.hpp"

#include <cctype>
#include <cstdio>
#include <cstdlib>

namespace emulator {

std::unique_ptr<Module> parse(const std::string& text) { return Parser(text).run(); }

void Parser::fail(const std::string& message) const {
    const std::vector<std::string> sources = source_.sources();
    const std::string& source = sources[source_.source_of(line_)];
    throw(kernel_ == nullptr ? "" : kernel_->name + ": ") + message + " [PTX line " +
        std::to_string(line_) + (source.empty() ? "" : ", " + source) + "]";
}

std::unique_ptr<Module> Parser::run() {
    auto module = std::make_unique<Module>();
    const std::string& text = source_.text();
    size_t at = 0;
    for (size_t entry; (entry = text.find(".entry", at)) != std::string::npos;) {
        module_level(at, entry);
        at = kernel(entry);
        module->kernels.push_back(std::move(kernel_));
    }
    if (module->kernels.empty()) throw std::string("PTX without a .entry");
    return module;
}

void Parser::module_level(size_t from, size_t to) {
    const std::string& text = source_.text();
    for (size_t end; (end = text.find(';', from)) < to; from = end + 1) {
        const std::string statement = trimmed(text.substr(from, end - from));
        line_ = source_.line_at(from);
        for (const char* space : {".shared", ".global", ".const"}) {
            const size_t start = statement.find(std::string(space) + " ");
            if (start == std::string::npos) continue;
            declare_variable(statement.substr(start), false);
            break;
        }
    }
}

static bool is_word(char c) {
    return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%';
}

size_t Parser::kernel(size_t entry) {
    const std::string& text = source_.text();
    line_ = source_.line_at(entry);
    kernel_ = std::make_unique<Kernel>();
    scopes_.assign(1, Scope());
    scope_ = 0;
    jumps_.clear();
    opcodes_.clear();
    for (auto* constants : {&words_, &doublewords_, &predicates_, &parameter_addresses_})
        constants->clear();
    variable_addresses_.clear();
    uses_.clear();
    writes_.clear();
    variables_ = module_variables_;
    shared_laid_out_ = false;

    const size_t open = text.find('(', entry), body = text.find('{', entry);
    if (body == std::string::npos) fail("a kernel without a body");
    kernel_->name = trimmed(text.substr(entry + 6, std::min(open, body) - entry - 6));
    size_t close = entry + 6;
    if (open < body) {
        close = text.find(')', open);
        read_parameters(text.substr(open + 1, close - open - 1));
    }
    read_requirements(text.substr(close, body - close));
    size_t at = body + 1;
    for (int depth = 1; depth > 0;) {
        while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
        if (at >= text.size()) fail("the body does not end");
        line_ = source_.line_at(at);
        if (text[at] == '{') {
            scopes_.emplace_back();
            scopes_.back().parent = scope_;
            scope_ = static_cast<int>(scopes_.size()) - 1;
            ++depth;
            ++at;
        } else if (text[at] == '}') {
            if (--depth > 0) scope_ = scopes_[static_cast<size_t>(scope_)].parent;
            ++at;
        } else if (text[at] == ';') {
            ++at;
        } else {
            size_t end = at;
            while (is_word(text[end])) ++end;
            size_t colon = end;
            while (text[colon] == ' ' || text[colon] == '\t') ++colon;
            if (end > at && text[colon] == ':' && text[colon + 1] != ':') {
                scopes_[static_cast<size_t>(scope_)].labels[text.substr(at, end - at)] =
                    static_cast<u32>(kernel_->code.size());
                at = colon + 1;
                continue;
            }
            end = text.find(';', at);
            if (end == std::string::npos) fail("a statement without an end");
            statement(trimmed(text.substr(at, end - at)));
            at = end + 1;
        }
    }
    finish();
    return at;
}

static u32 bytes_of_type(const std::string& type) {
    for (u32 bits : {128u, 64u, 32u, 16u})
        if (type.find(std::to_string(bits)) != std::string::npos) return bits / 8;
    return 1;
}

// name[count] -> count, and the name without it; 1 if there is none, 0 for name[].
static u32 take_count(std::string& name) {
    const size_t bracket = name.find('[');
    if (bracket == std::string::npos) return 1;
    const u32 count = static_cast<u32>(std::strtoul(name.c_str() + bracket + 1, nullptr, 0));
    name.resize(bracket);
    return count;
}

void Parser::read_parameters(const std::string& list) {
    for (const std::string& part : parts_of(list)) {
        const std::vector<std::string> words = words_of(part);
        u32 unit = 0, alignment = 0;
        bool pointer = false;  // after .ptr the alignment is the memory's
        for (size_t i = 0; i + 1 < words.size(); ++i) {
            if (words[i] == ".ptr")
                pointer = true;
            else if (words[i] == ".align") {
                const u32 value = static_cast<u32>(std::atoi(words[++i].c_str()));
                if (!pointer) alignment = value;
            } else if (words[i] != ".param" && words[i][0] == '.' && unit == 0) {
                unit = bytes_of_type(words[i]);
            }
        }
        if (unit == 0) fail("a parameter without a type: " + part);
        std::string name = words.back();
        const u32 size = unit * take_count(name);
        if (alignment == 0) alignment = unit;
        const u32 offset = (kernel_->parameter_bytes + alignment - 1) / alignment * alignment;
        kernel_->parameters.push_back({name, offset, size});
        kernel_->parameter_bytes = offset + size;
    }
}

void Parser::read_requirements(const std::string& directives) {
    const auto read = [&](const char* name, u32* numbers) {
        const size_t at = directives.find(name);
        if (at == std::string::npos) return;
        u32 x = 1, y = 1, z = 1;
        const char* start = directives.c_str() + at + std::char_traits<char>::length(name);
        if (std::sscanf(start, " %u , %u , %u", &x, &y, &z) < 1) return;
        numbers[0] = x;
        numbers[1] = y;
        numbers[2] = z;
    };
    read(".reqntid", kernel_->required_block);
    read(".reqnctapercluster", kernel_->cluster);
}

void Parser::directive(const std::string& statement) {
    if (statement.rfind(".reg", 0) == 0)
        declare_registers(statement);
    else if (statement.rfind(".shared", 0) == 0 || statement.rfind(".local", 0) == 0)
        declare_variable(statement, true);
    else if (statement.rfind(".pragma", 0) != 0)
        fail("a directive that is not known to the emulator: " + words_of(statement)[0]);
}

void Parser::declare_registers(const std::string& statement) {
    const std::string rest = trimmed(statement.substr(4));
    const size_t blank = rest.find_first_of(" \t");
    const std::string type = rest.substr(0, blank);
    RegisterType bits = RegisterType::kBits32;
    if (type == ".pred")
        bits = RegisterType::kPredicate;
    else if (type.find("128") != std::string::npos)
        fail("registers of 128 bits are not known");
    else if (bytes_of_type(type) == 8)
        bits = RegisterType::kBits64;
    else if (bytes_of_type(type) < 4 && type.find("x2") == std::string::npos)
        bits = RegisterType::kBits16;
    for (const std::string& name : parts_of(rest.substr(blank))) {
        const size_t bracket = name.find('<');
        scopes_[static_cast<size_t>(scope_)].declared[trimmed(name.substr(0, bracket))] = {
            bits, bracket != std::string::npos};
    }
}

// ".shared .align 16 .b8 name[64]", or with values in braces.
void Parser::declare_variable(const std::string& statement, bool in_kernel) {
    Variable variable;
    std::string name;
    u32 unit = 1;
    const std::vector<std::string> words = words_of(statement.substr(0, statement.find('=')));
    for (size_t i = 0; i < words.size(); ++i) {
        if (words[i] == ".align")
            variable.alignment = static_cast<u32>(std::stoi(words[++i]));
        else if (i == 0)
            variable.space = words[0];
        else if (words[i][0] != '.')
            name = words[i];
        else if (words[i] != ".visible" && words[i] != ".extern")
            unit = bytes_of_type(words[i]);
    }
    variable.dynamic = name.find("[]") != std::string::npos;
    const u32 count = take_count(name);
    variable.bytes = unit * count;
    if (variable.space == ".global" || variable.space == ".const") {
        variable.data.resize(variable.bytes);
        const size_t open = statement.find('{'), close = statement.find('}');
        if (open != std::string::npos) {
            const auto values = parts_of(statement.substr(open + 1, close - open - 1));
            for (size_t i = 0; i < values.size() && i < count; ++i) {
                const u64 value = static_cast<u64>(number(values[i]));
                std::memcpy(&variable.data[i * unit], &value, std::min(unit, 8u));
            }
        }
    } else if (variable.space == ".local") {
        const u32 alignment = variable.alignment;
        variable.address = (kernel_->local_bytes + alignment - 1) / alignment * alignment;
        kernel_->local_bytes = variable.address + variable.bytes;
    }
    (in_kernel ? variables_ : module_variables_)[name] = variable;
}

// Static variables first, then dynamic ones, which share an address.
void Parser::lay_out_shared() {
    if (shared_laid_out_) return;
    shared_laid_out_ = true;
    u32 end = kReservedShared;
    for (auto& [name, variable] : variables_) {
        if (variable.space != ".shared" || variable.dynamic) continue;
        end = (end + variable.alignment - 1) / variable.alignment * variable.alignment;
        variable.address = end;
        end += variable.bytes;
    }
    kernel_->static_shared_end = end;
    end = (end + 15) / 16 * 16;
    for (auto& [name, variable] : variables_)
        if (variable.space == ".shared" && variable.dynamic) {
            end = (end + variable.alignment - 1) / variable.alignment * variable.alignment;
            variable.address = end;
        }
    kernel_->dynamic_shared = end;
}

}  // namespace emulator
