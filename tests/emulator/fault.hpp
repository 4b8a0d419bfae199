// An error of the kernel, or a feature that the emulator does not model. Thrown; the C interface
// turns it into an error code and a sentence.
#pragma once

#include <string>
#include <utility>

#include "values.hpp"

namespace emulator {

struct Fault {
    std::string message;
    u64 address = 0;  // of global memory; 0 if the fault is not about one

    Fault(std::string text, u64 at = 0) : message(std::move(text)), address(at) {}
};

inline void require(bool condition, const char* message) {
    if (!condition) throw Fault(message);
}

inline std::string text(u64 value) { return std::to_string(value); }

}  // namespace emulator
