// An exported model on a GPU: its weights, kernels and programs. Never changed once it is loaded;
// sessions run it.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "executor.hpp"
#include "memory.hpp"
#include "package.hpp"

namespace vitrail {

// No library of the driver, or no such device.
class NoDevice : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// What the buffers are that a program's caller brings.
enum class Role : uint8_t {
    kOffsets,    // (B + 1,) int32: where each sequence begins, and the last ends
    kRows,       // (B,) int32: the pooled token of each
    kPixels,     // uint8 (B, H, W, C) or float (B, C, H, W)
    kIds,        // (M,) int32
    kPositions,  // (M,) int32
    kTable,      // (T, C) float: among the weights
    kEmbedding,  // (B, D) float
    kStatus,     // (B,) int32: 0 where all of an item's embedding is finite
    kLogits,     // (B, labels) float
    kCount
};
constexpr bool is_output(Role role) {
    return role == Role::kEmbedding || role == Role::kStatus || role == Role::kLogits;
}
constexpr size_t kRoles = static_cast<size_t>(Role::kCount);

enum class What : uint8_t { kUint8, kFloat, kScoresUint8, kScoresFloat, kText, kCount };
constexpr size_t kWhats = static_cast<size_t>(What::kCount);

// A plan of the model, ready to run.
struct Program {
    std::unique_ptr<Executable> executable;
    std::vector<Role> roles;  // of the buffers, in the plan's order
    size_t image_bytes = 0;   // of pixels, for plans over images
    uint32_t tokens = 0;      // of an image, or the most of a text
    Role result = Role::kEmbedding;
    uint32_t width = 0;  // numbers of an item's result
    cu::Pointer table = 0;
    size_t most = 1;  // items that go through at once

    // Where everything begins among the inputs, or among the outputs, of a call.
    struct Layout {
        std::array<size_t, kRoles> at{}, bytes{};
        size_t in = 0, out = 0;  // bytes of all inputs, of all outputs
    };
    Layout layout(const Sizes& sizes) const;
};

class Model {
  public:
    // `driver`: the driver's library, null for libcuda.so.1. Throws FormatError for a folder that
    // is not an export for this Vitrail and this device, NoDevice, DriverError.
    Model(const std::string& folder, const char* driver, int ordinal);

    const Package& package() const { return package_; }
    uint32_t arch() const { return arch_; }
    const Gpu& gpu() const { return *gpu_; }
    // Throws std::invalid_argument where the model has none.
    const Program& program(What what) const;

  private:
    void add(const ProgramFile& file, const std::string& plan);
    void check(const Program& program, const ProgramFile& file) const;
    void upload();

    Package package_;
    std::shared_ptr<const Gpu> gpu_;
    uint32_t arch_ = 0;
    std::shared_ptr<Kernels> kernels_;
    std::unique_ptr<Fixed> weights_;
    std::array<Program, kWhats> programs_;
};

}  // namespace vitrail
