// Reads a cubin: its architecture, and of every kernel the name, parameters and limits. A cubin is
// an ELF file whose section .nv.info.<kernel> is a list of attributes: a format byte, the
// attribute's number, and two bytes that are the value or the number of bytes that follow.
#pragma once

#include <elf.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace standin {

struct Parameter {
    uint32_t offset;  // in the kernel's parameter buffer, bytes
    uint32_t size;    // bytes
};

struct Kernel {
    std::string name;
    std::vector<Parameter> parameters;  // by ordinal
    uint32_t required[3] = {0, 0, 0};   // the only block it may be launched with; 0: any
    uint32_t threads = 1024;            // of a block, at most
    uint32_t shared = 0;                // static, bytes, without what the driver keeps
    uint32_t registers = 0;
    uint32_t local = 0;      // bytes of a thread
    int64_t allowed = -1;    // dynamic shared memory set by cuFuncSetAttribute, bytes; -1: not set
    int32_t carveout = -1;   // percent set by cuFuncSetAttribute; -1: the driver's choice
    uint32_t arch = 0;       // 90 for sm_90
    uint32_t buffer() const {  // bytes of all parameters
        uint32_t end = 0;
        for (const Parameter& one : parameters) end = std::max(end, one.offset + one.size);
        return end;
    }
};

struct Cubin {
    uint32_t arch = 0;
    bool exact = false;  // an "a" architecture, which no later GPU runs
    std::vector<Kernel> kernels;
    // `device`: 90 for compute capability 9.0.
    bool runs_on(uint32_t device) const {
        if (exact) return arch == device;
        return arch / 10 == device / 10 && arch <= device;
    }
};

class CubinReader {
  public:
    // Throws std::string, a sentence, where `image` is no cubin that it can read. The image comes
    // without a size, so a truncated one is not noticed.
    static Cubin read(const void* image) {
        CubinReader reader(image);
        reader.find_kernels();
        return reader.cubin_;
    }
    // As `read`, without the kernels.
    static Cubin read_header(const void* image) { return CubinReader(image).cubin_; }
    // The image's bytes: up to the last that its headers name, as the driver is told no size.
    static std::string bytes(const void* image) {
        const CubinReader reader(image);
        const Elf64_Ehdr& header = reader.header_;
        uint64_t end = std::max(header.e_shoff + uint64_t{header.e_shnum} * header.e_shentsize,
                                header.e_phoff + uint64_t{header.e_phnum} * header.e_phentsize);
        for (const Elf64_Shdr& section : reader.sections_)
            if (section.sh_type != SHT_NOBITS)
                end = std::max(end, section.sh_offset + section.sh_size);
        return std::string(static_cast<const char*>(image), end);
    }

  private:
    static constexpr uint16_t kMachine = 190;  // EM_CUDA
    enum Attribute : uint8_t {
        kMaxThreads = 0x05,
        kRequiredBlock = 0x10,
        kFrameSize = 0x11,
        kParameterInfo = 0x17,
        kRegisterCount = 0x2f,
        kParameterInfo2 = 0x45,
    };
    static constexpr uint8_t kSized = 4;     // EIFMT_SVAL: bytes follow
    static constexpr uint32_t kKept = 1024;  // of shared memory, counted in the section from sm_90

    explicit CubinReader(const void* image) : bytes_(static_cast<const uint8_t*>(image)) {
        // A fat binary has another magic number, PTX is text: both are refused here.
        if (std::memcmp(bytes_, ELFMAG, SELFMAG) != 0)
            throw std::string("the image is no ELF file");
        std::memcpy(&header_, bytes_, sizeof header_);
        if (header_.e_ident[EI_CLASS] != ELFCLASS64 || header_.e_machine != kMachine)
            throw std::string("the image is an ELF file, but for no GPU");
        const bool later = header_.e_ident[EI_ABIVERSION] >= 8;  // CUDA 13
        cubin_.arch = later ? header_.e_flags >> 8 & 0xff : header_.e_flags & 0xff;
        cubin_.exact = (header_.e_flags & (later ? 0x8 : 0x800)) != 0;
        sections_.resize(header_.e_shnum);
        for (size_t i = 0; i < sections_.size(); ++i)
            std::memcpy(&sections_[i], bytes_ + header_.e_shoff + i * header_.e_shentsize,
                        sizeof sections_[i]);
        if (header_.e_shstrndx >= sections_.size())
            throw std::string("the cubin has no section names");
    }

    void find_kernels() {
        std::map<std::string, const Elf64_Shdr*> named;
        for (const Elf64_Shdr& section : sections_) named[name_of(section)] = &section;
        for (const auto& [name, section] : named) {
            if (name.rfind(".nv.info.", 0) != 0) continue;
            Kernel kernel;
            kernel.name = name.substr(std::strlen(".nv.info."));
            if (named.count(".text." + kernel.name) == 0) continue;
            kernel.arch = cubin_.arch;
            read_info(*section, kernel);
            const auto shared = named.find(".nv.shared." + kernel.name);
            if (shared != named.end())
                kernel.shared = static_cast<uint32_t>(shared->second->sh_size);
            if (cubin_.arch >= 90) kernel.shared -= std::min(kernel.shared, kKept);
            cubin_.kernels.push_back(kernel);
        }
        if (cubin_.kernels.empty()) throw std::string("the cubin has no kernel");
        const auto common = named.find(".nv.info");
        const auto symbols = named.find(".symtab");
        if (common != named.end() && symbols != named.end())
            read_common(*common->second, *symbols->second);
    }

    void read_info(const Elf64_Shdr& section, Kernel& kernel) const {
        std::map<uint16_t, Parameter> found;
        each(section, [&](uint8_t attribute, const uint8_t* value, uint16_t size) {
            if (attribute == kParameterInfo2)
                throw kernel.name + " has parameters in a form that is not read here";
            if (attribute == kParameterInfo && size >= 12)
                found[number<uint16_t>(value + 4)] = {number<uint16_t>(value + 6),
                                                      number<uint32_t>(value + 8) >> 18};
            if (attribute == kRequiredBlock && size >= 12)
                std::memcpy(kernel.required, value, 12);
            if (attribute == kMaxThreads && size >= 12)
                kernel.threads = number<uint32_t>(value) * number<uint32_t>(value + 4) *
                                 number<uint32_t>(value + 8);
        });
        for (const auto& [ordinal, parameter] : found) {
            if (ordinal != kernel.parameters.size())
                throw kernel.name + " has a gap among its parameters";
            kernel.parameters.push_back(parameter);
        }
        if (kernel.required[0] != 0)
            kernel.threads = kernel.required[0] * kernel.required[1] * kernel.required[2];
    }

    // What stands outside the kernels' own sections: pairs of a symbol and a number.
    void read_common(const Elf64_Shdr& section, const Elf64_Shdr& symbols) {
        each(section, [&](uint8_t attribute, const uint8_t* value, uint16_t size) {
            if (size < 8 || (attribute != kRegisterCount && attribute != kFrameSize)) return;
            const uint64_t place = number<uint32_t>(value) * sizeof(Elf64_Sym);
            if (place >= symbols.sh_size || symbols.sh_link >= sections_.size()) return;
            Elf64_Sym symbol;
            std::memcpy(&symbol, bytes_ + symbols.sh_offset + place, sizeof symbol);
            const std::string name = text(sections_[symbols.sh_link], symbol.st_name);
            for (Kernel& kernel : cubin_.kernels)
                if (kernel.name == name)
                    (attribute == kRegisterCount ? kernel.registers : kernel.local) =
                        number<uint32_t>(value + 4);
        });
    }

    template <typename Visit>
    void each(const Elf64_Shdr& section, Visit visit) const {
        const uint8_t* at = bytes_ + section.sh_offset;
        const uint8_t* end = at + section.sh_size;
        while (end - at >= 4) {
            const uint16_t size = at[0] == kSized ? number<uint16_t>(at + 2) : 0;
            if (end - at < 4 + size) throw std::string("an attribute runs past its section");
            visit(at[1], at + 4, size);
            at += 4 + size;
        }
    }

    std::string name_of(const Elf64_Shdr& section) const {
        return text(sections_[header_.e_shstrndx], section.sh_name);
    }

    std::string text(const Elf64_Shdr& table, uint32_t place) const {
        if (place >= table.sh_size) throw std::string("a name lies outside its table");
        const char* start = reinterpret_cast<const char*>(bytes_ + table.sh_offset + place);
        return std::string(start, strnlen(start, table.sh_size - place));
    }

    template <typename Number>
    static Number number(const uint8_t* at) {
        Number value;
        std::memcpy(&value, at, sizeof value);
        return value;
    }

    const uint8_t* bytes_;
    Elf64_Ehdr header_;
    std::vector<Elf64_Shdr> sections_;
    Cubin cubin_;
};

}  // namespace standin
