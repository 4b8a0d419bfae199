// Emulation for programs that tests start, which cannot call control.hpp's functions before the
// driver is in use: the environment says what they would.

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "control.hpp"

namespace {

std::string contents(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

long number(const char* variable) {
    const char* text = std::getenv(variable);
    return text == nullptr ? 0 : std::strtol(text, nullptr, 10);
}

[[noreturn]] void give_up() {
    std::fprintf(stderr, "STANDIN_EMULATION: %s\n", standin_complaint());
    std::abort();
}

// STANDIN_EMULATION: a folder with the emulator's library, emulator.so, and of each kernel the pair
// NAME.cubin, NAME.ptx. STANDIN_SEED and STANDIN_OVERLAP: standin_emulate's arguments.
// STANDIN_ARCH: 80 for compute capability 8.0; 9.0 if it is not set.
[[maybe_unused]] const bool emulated = [] {
    const char* folder = std::getenv("STANDIN_EMULATION");
    if (folder == nullptr) return false;
    const std::filesystem::path base(folder);
    if (const long arch = number("STANDIN_ARCH"); arch != 0)
        standin_device(static_cast<int>(arch / 10), static_cast<int>(arch % 10), 132);
    if (standin_emulator((base / "emulator.so").c_str()) != 0) give_up();
    for (const auto& entry : std::filesystem::directory_iterator(base)) {
        std::filesystem::path path = entry.path();
        if (path.extension() != ".cubin") continue;
        const std::string cubin = contents(path);
        const std::string ptx = contents(path.replace_extension(".ptx"));
        if (standin_ptx(cubin.data(), ptx.c_str()) != 0) give_up();
    }
    standin_emulate(static_cast<uint64_t>(number("STANDIN_SEED")),
                    static_cast<int>(number("STANDIN_OVERLAP")), 1);
    standin_track(1);
    return true;
}();

}  // namespace
