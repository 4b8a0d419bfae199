// Loads machine code into a GPU's context, looks up its kernels and launches them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "driver.hpp"

namespace vitrail {

constexpr int64_t kMaxBlocks = int64_t{1} << 31;  // a launch must have fewer blocks

// A kernel of a loaded module.
struct Entry {
    cu::Function function = nullptr;
    int threads = 0;  // per block, at most
    // Size of each parameter in bytes; absent if the driver is too old to tell. Sizes alone must
    // agree: the driver copies each parameter to the offset that the kernel expects.
    std::optional<std::vector<size_t>> parameters;
};

class Module : NonCopyable {
  public:
    // `code`: a whole cubin or fatbin, aligned as by malloc. Throws DriverError naming `purpose`.
    Module(const Gpu& gpu, const char* purpose, const void* code);
    ~Module();

    const Gpu& gpu() const { return gpu_; }
    // The context must be current. Throws DriverError naming the kernel.
    Entry entry(const std::string& name) const;

  private:
    const Gpu& gpu_;
    cu::Module module_ = nullptr;
};

// The shape of a launch's blocks, and whether the launch may overlap the previous kernel.
struct Block {
    unsigned x = 1, y = 1;
    unsigned shared = 0;   // bytes of dynamic shared memory
    bool overlap = false;  // may start before the previous kernel has ended
};

// Launches `blocks` blocks on `stream`. The context must be current. Throws DriverError naming
// `purpose`.
inline void launch(const Driver& driver, const char* purpose, cu::Function function,
                   unsigned blocks, const Block& block, cu::Stream stream, void** parameters) {
    static constexpr cu::LaunchAttribute kMayOverlap{cu::kOverlap, 0, {1}};
    const cu::LaunchConfig config{{blocks, 1, 1}, {block.x, block.y, 1}, block.shared,
                                  stream,         &kMayOverlap,          block.overlap ? 1u : 0u};
    driver(purpose, driver.launch, &config, function, parameters, static_cast<void**>(nullptr));
}

}  // namespace vitrail
