// Finds the machine code that a GPU takes in a fatbin: an archive of cubins, each for one
// architecture, and of PTX. Compressed members are not read.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "abi.hpp"
#include "cubin.hpp"

namespace standin {

// Why an image does not load.
struct ImageError {
    int code;
    std::string sentence;
};

class FatbinReader {
  public:
    static bool is_fatbin(const void* image) {
        uint32_t magic;
        std::memcpy(&magic, image, sizeof magic);
        return magic == kMagic;
    }

    // The cubin of the latest architecture that runs on `device` (90 for compute capability 9.0).
    // Throws ImageError.
    static const void* cubin_for(const void* fatbin, uint32_t device) {
        const auto* bytes = static_cast<const uint8_t*>(fatbin);
        Archive archive;
        std::memcpy(&archive, bytes, sizeof archive);
        const uint8_t* at = bytes + archive.header;
        const uint8_t* end = at + archive.bytes;
        if (at == end) throw ImageError{kInvalidImage, "the fatbin is empty"};
        const uint8_t* best = nullptr;
        uint32_t best_arch = 0;
        while (at != end) {
            const Member member = read_member(at, end);
            const uint8_t* code = at + member.header;
            at = code + member.bytes;
            if (member.type != kMachineCode) continue;
            const uint32_t arch = runs_on(code, member.bytes, device);
            if (arch > best_arch) best_arch = arch, best = code;
        }
        if (best == nullptr)
            throw ImageError{kNoBinaryForGpu,
                             "the fatbin has no machine code for sm_" + std::to_string(device)};
        return best;
    }

  private:
    static constexpr uint32_t kMagic = 0xba55ed50;
    static constexpr uint16_t kPtx = 1, kMachineCode = 2;
    struct Archive {
        uint32_t magic;
        uint16_t version, header;
        uint64_t bytes;  // of the members, after the header
    };
    struct Member {
        uint16_t type, version;
        uint32_t header;
        uint64_t bytes;  // of its code, after the header
    };

    static Member read_member(const uint8_t* at, const uint8_t* end) {
        Member member{};
        const auto left = static_cast<uint64_t>(end - at);
        if (left >= sizeof member) std::memcpy(&member, at, sizeof member);
        const bool known = member.type == kPtx || member.type == kMachineCode;
        if (!known || member.header > left || member.bytes > left - member.header)
            throw ImageError{kInvalidImage, "the fatbin has a member that is not read here"};
        return member;
    }

    // The architecture; 0 if `device` does not run it.
    static uint32_t runs_on(const uint8_t* code, uint64_t bytes, uint32_t device) {
        if (bytes < sizeof(Elf64_Ehdr) || std::memcmp(code, ELFMAG, SELFMAG) != 0)
            throw ImageError{kInvalidImage, "the fatbin has a compressed member"};
        const Cubin cubin = CubinReader::read_header(code);
        return cubin.runs_on(device) ? cubin.arch : 0;
    }
};

// The cubin of `image`, which is one or a fatbin. Throws ImageError.
inline const void* cubin_of(const void* image, uint32_t device) {
    return FatbinReader::is_fatbin(image) ? FatbinReader::cubin_for(image, device) : image;
}

}  // namespace standin
