// Machine code in the context of a GPU: a module, the functions found in it, and their launch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "driver.hpp"

namespace vitrail {

constexpr int64_t kMostBlocks = int64_t{1} << 31;  // of a launch, and the most is one less

// A function that is loaded, and what it takes.
struct Entry {
    cu::Function function = nullptr;
    int threads = 0;                                // the most of a block
    // Bytes of each, which an old driver does not say. The driver copies a parameter to where the
    // function has it: sizes must agree, no more.
    std::optional<std::vector<size_t>> parameters;
};

class Module {
  public:
    // `code`: a cubin or a fatbin, whole, at an address as malloc gives it. Throws DriverError,
    // which says `where`.
    Module(const Gpu& gpu, const char* where, const void* code);
    ~Module();
    Module(const Module&) = delete;
    Module& operator=(const Module&) = delete;

    const Gpu& gpu() const { return gpu_; }
    // The context must be current. Throws DriverError, naming the function.
    Entry entry(const std::string& name) const;

  private:
    const Gpu& gpu_;
    cu::Module module_ = nullptr;
};

// A block, and how it is launched.
struct Block {
    unsigned x = 1, y = 1;
    unsigned shared = 0;   // bytes of dynamic shared memory
    bool overlap = false;  // may begin before the kernel before it has ended
};

// Puts `blocks` blocks on `stream`. The context must be current. Throws DriverError saying `where`.
inline void launch(const Driver& driver, const char* where, cu::Function function, unsigned blocks,
                   const Block& block, cu::Stream stream, void** parameters) {
    static constexpr cu::LaunchAttribute kMayOverlap{cu::kOverlap, 0, {1}};
    const cu::LaunchConfig config{{blocks, 1, 1}, {block.x, block.y, 1}, block.shared, stream,
                                  &kMayOverlap,   block.overlap ? 1u : 0u};
    driver(where, driver.launch, &config, function, parameters, static_cast<void**>(nullptr));
}

}  // namespace vitrail
