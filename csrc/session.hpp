// Calls of a model with inputs and results in host memory. A session has its own stream and memory,
// which grow to the largest call and stay. Calls of one session run one after another.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.hpp"
#include "model.hpp"

namespace vitrail {

// An item's result is not finite, and the caller did not ask for a status per item.
class NotFinite : public std::runtime_error {
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
    ~Session() { release(); }

    // `pixels`: (n, H, W, C) uint8 or (n, C, H, W) float. `out`: (n, D) embeddings or (n, labels)
    // logits, as `id` says. `status`: null, or (n,), set to 0 for each item whose result is finite.
    // Throws NotFinite, std::invalid_argument, and DriverError with kOutOfMemory if even one item
    // does not fit.
    void images(EndpointId id, const void* pixels, size_t n, float* out, int32_t* status);
    // `ids`: n rows of `stride` ids. The first `lengths[i]` ids of row i are its text; with null,
    // the whole row.
    void texts(const int32_t* ids, const int32_t* lengths, size_t stride, size_t n, float* out,
               int32_t* status);

  private:
    // The frame and the memory, in bytes, that an endpoint has grown to.
    struct Workspace {
        std::unique_ptr<Frame> frame;
        size_t arena = 0, inputs = 0, outputs = 0;
    };

    void run(EndpointId id, const Items& items, size_t n, float* out, int32_t* status);
    void run_part(EndpointId id, const Items& items, size_t first, size_t count, float* out,
                  int32_t* status);
    const Workspace& grow(EndpointId id, const Sizes& sizes);
    void release() noexcept;

    const std::shared_ptr<const Model> model_;
    const bool overlap_;
    std::mutex mutex_;
    Stream stream_;
    StreamBuffer arena_{stream_, "the activations"};
    StreamBuffer inputs_{stream_, "the inputs"};
    StreamBuffer outputs_{stream_, "the outputs"};
    PinnedBuffer host_inputs_{stream_.gpu(), "the inputs"};
    PinnedBuffer host_outputs_{stream_.gpu(), "the outputs"};
    std::array<Workspace, kEndpointCount> workspaces_;
    std::vector<cu::Pointer> externals_;
    std::vector<int32_t> lengths_;    // of the texts, up to and including the end token
    std::vector<int32_t> statuses_;   // used if the caller passes none
    bool outputs_are_unset_ = false;  // outputs_ is new memory that nothing has written
};

}  // namespace vitrail
