// An exported model on a GPU: weights, kernels and endpoints. A model never changes once it is
// loaded. Sessions run it.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "call_memory.hpp"
#include "executor.hpp"
#include "export_folder.hpp"

namespace vitrail {

// There is no driver library, or no such device.
class NoDevice : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The roles of the buffers that an endpoint's caller brings, for B items.
enum class BufferRole : uint8_t {
    kOffsets,    // (B + 1,) int32: the first token of each sequence, then the number of tokens
    kRows,       // (B,) int32: the pooled token of each item
    kPixels,     // uint8 (B, H, W, C) or float (B, C, H, W)
    kIds,        // (M,) int32: the ids of all texts
    kPositions,  // (M,) int32
    kTable,      // (T, C) float: position table, stored with the weights
    kEmbedding,  // (B, D) float
    kStatus,     // (B,) int32: 0 if the item's embedding is finite
    kLogits,     // (B, labels) float
    kDistillationRows,  // (B,) int32: the distillation token of each image, if a head reads it
    kCount
};
constexpr bool is_output(BufferRole role) {
    return role == BufferRole::kEmbedding || role == BufferRole::kStatus ||
           role == BufferRole::kLogits;
}
constexpr size_t kRoles = static_cast<size_t>(BufferRole::kCount);

enum class EndpointId : uint8_t { kUint8, kFloat, kScoresUint8, kScoresFloat, kText, kCount };
constexpr size_t kEndpointCount = static_cast<size_t>(EndpointId::kCount);

// A plan of the model that callers can run, for example "scores.uint8".
struct Endpoint {
    std::unique_ptr<Executable> executable;
    std::vector<BufferRole> roles;  // roles of the caller's buffers, in the plan's order
    size_t image_bytes = 0;         // bytes of an image's pixels; 0 for texts
    uint32_t tokens = 0;            // tokens of an image, or of the longest text
    BufferRole result = BufferRole::kEmbedding;
    uint32_t width = 0;     // numbers in an item's result
    cu::Pointer table = 0;  // the position table; 0 for texts
    size_t max_items = 1;   // the most items of a run; a larger call runs in parts

    // The offset of each buffer within the inputs or the outputs of a call, and its bytes.
    struct Layout {
        std::array<size_t, kRoles> offset{}, bytes{};
        size_t inputs = 0, outputs = 0;  // bytes of all inputs, of all outputs
    };
    Layout layout(const Sizes& sizes) const;
    // Device bytes of arena, inputs and outputs.
    size_t bytes(const Sizes& sizes) const;
};

class Model {
  public:
    // `driver`: path of the driver's library, or null for libcuda.so.1. Throws NoDevice,
    // DriverError, or FormatError unless the folder has this version's numbers (numbers.hpp) and an
    // export for this device's architecture.
    Model(const std::string& folder, const char* driver, int ordinal);

    const ExportFolder& folder() const { return folder_; }
    uint32_t arch() const { return arch_; }
    const Gpu& gpu() const { return *gpu_; }
    SharedMemory& memory() const { return *memory_; }
    // Throws std::invalid_argument if the model does not have the endpoint.
    const Endpoint& endpoint(EndpointId id) const;

  private:
    void add(const EndpointFile& file, const std::string& plan);
    void check(const Endpoint& endpoint, const EndpointFile& file) const;
    void upload();

    ExportFolder folder_;
    std::shared_ptr<const Gpu> gpu_;
    std::shared_ptr<SharedMemory> memory_;
    uint32_t arch_ = 0;
    std::shared_ptr<Kernels> kernels_;
    std::unique_ptr<DeviceBuffer> weights_;
    std::array<Endpoint, kEndpointCount> endpoints_;
};

}  // namespace vitrail
