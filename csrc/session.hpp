// Calls of a model, one at a time: host memory in, host memory out. A session has a stream and
// memory of its own, which grow to the largest call and stay.
#pragma once

#include <array>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.hpp"
#include "model.hpp"

namespace vitrail {

// An item's result is not finite, and the caller did not ask for the status of each.
class NotFinite : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// What one call is about; a part of it goes through at once.
class Items {
  public:
    virtual ~Items() = default;
    virtual const char* name() const = 0;  // of one, in errors
    virtual Sizes sizes(size_t first, size_t count) const = 0;
    // Writes the inputs of `count` items to their places from `to` on.
    virtual void write(size_t first, size_t count, const Program::Layout& layout,
                       char* to) const = 0;
};

class Session {
  public:
    Session(std::shared_ptr<const Model> model, bool overlap);
    ~Session() { release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

    // `pixels`: (n, H, W, C) uint8 or (n, C, H, W) float. `out`: (n, D) embeddings, or (n, labels)
    // logits, as `what` says. `status`: (n,), 0 where an item is finite, or null. Throws NotFinite,
    // std::invalid_argument, and DriverError with kOutOfMemory where one item alone does not fit.
    void images(What what, const void* pixels, size_t n, float* out, int32_t* status);
    // `ids`: rows of `stride`, of which the first `lengths` (null: all) are a text's.
    void texts(const int32_t* ids, const int32_t* lengths, size_t stride, size_t n, float* out,
               int32_t* status);

  private:
    // A program at the sizes it has grown to.
    struct Ready {
        std::unique_ptr<Frame> frame;
        size_t arena = 0, in = 0, out = 0;  // bytes
    };

    void all(What what, const Items& items, size_t n, float* out, int32_t* status);
    void piece(What what, const Items& items, size_t first, size_t count, float* out,
               int32_t* status);
    const Ready& grow(What what, const Sizes& sizes);
    void release() noexcept;

    const std::shared_ptr<const Model> model_;
    const bool overlap_;
    std::mutex mutex_;
    Stream stream_;
    Growing arena_{stream_, "the activations"};
    Growing in_{stream_, "the inputs"};
    Growing out_{stream_, "the outputs"};
    Pinned from_{stream_.gpu(), "the inputs"};
    Pinned to_{stream_.gpu(), "the outputs"};
    std::array<Ready, kWhats> ready_;
    std::vector<cu::Pointer> externals_;
    std::vector<int32_t> lengths_;   // of texts, cut
    std::vector<int32_t> statuses_;  // where the caller wants none
    bool fresh_ = false;             // nothing was written yet to the outputs' memory
};

}  // namespace vitrail
