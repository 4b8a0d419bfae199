// Calls of a model with inputs and results in host memory. Calls of one session run one after
// another. Between calls a session has no memory of its own: see call_memory.hpp.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "model.hpp"

namespace vitrail {

// An item's result is not finite, and the caller did not ask for a status per item.
class NotFinite : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The session's limit holds not even one item.
class LimitTooSmall : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// The images or texts of one call. A call may run them in several parts.
class Items {
  public:
    virtual ~Items() = default;
    virtual const char* name() const = 0;  // of an item, for errors: "image"
    virtual Sizes sizes(size_t first, size_t count) const = 0;
    // Writes the inputs for `count` items into the memory at `inputs`.
    virtual void write(size_t first, size_t count, const Endpoint::Layout& layout,
                       char* inputs) const = 0;
};

class Session : NonCopyable {
  public:
    Session(std::shared_ptr<const Model> model, bool overlap);
    ~Session() { model_->memory().leave(); }

    // The most device bytes that a call uses beside the weights. 0: no limit.
    void limit(size_t bytes);
    SharedMemory& memory() const { return model_->memory(); }

    // `pixels`: (n, H, W, C) uint8 or (n, C, H, W) float. `out`: (n, D) embeddings or (n, labels)
    // logits, as `id` says. `status`: null, or (n,), set to 0 for each item whose result is finite.
    // Throws NotFinite, std::invalid_argument, LimitTooSmall, and DriverError with kOutOfMemory if
    // even one item does not fit.
    void images(EndpointId id, const void* pixels, size_t n, float* out, int32_t* status);
    // `ids`: n rows of `stride` ids. The first `lengths[i]` ids of row i are its text; with null,
    // the whole row.
    void texts(const int32_t* ids, const int32_t* lengths, size_t stride, size_t n, float* out,
               int32_t* status);

  private:
    // The frame of an endpoint, and the bytes of the largest call that it serves.
    struct Workspace {
        std::unique_ptr<Frame> frame;
        size_t arena = 0, inputs = 0, outputs = 0;

        size_t bytes() const { return arena + inputs + outputs; }
    };

    void run(EndpointId id, const Items& items, size_t n, float* out, int32_t* status);
    void run_parts(EndpointId id, const Items& items, size_t n, float* out, int32_t* status,
                   std::unique_ptr<CallMemory>& memory);
    void run_part(EndpointId id, const Items& items, size_t first, size_t count, float* out,
                  int32_t* status, CallMemory& memory);
    size_t fitting(EndpointId id, const Items& items, size_t first, size_t count);
    const Workspace& grow(EndpointId id, const Sizes& sizes, const CallMemory& memory);

    const std::shared_ptr<const Model> model_;
    const bool overlap_;
    std::mutex mutex_;
    size_t limit_ = SIZE_MAX;
    std::array<size_t, kEndpointCount> max_images_{};  // that fit the limit; 0: not known
    const CallMemory* last_ = nullptr;  // the memory of the latest call, to be compared only
    std::array<Workspace, kEndpointCount> workspaces_;
    std::vector<cu::Pointer> externals_;
    std::vector<int32_t> lengths_;   // of the texts, up to and including the end token
    std::vector<int32_t> statuses_;  // used if the caller passes none
};

}  // namespace vitrail
