// Memory of calls. While a call runs its session has a CallMemory; between calls it is idle, and the
// next call of any session on the GPU uses it.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.hpp"

namespace vitrail {

// A stream, and buffers that grow to the largest call on it.
class CallMemory : NonCopyable {
  public:
    explicit CallMemory(const Gpu& gpu) : stream(gpu) {}
    ~CallMemory() { release(); }

    // Device bytes.
    size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    bool holds(size_t arena_bytes, size_t input_bytes, size_t output_bytes) const {
        return arena_bytes <= arena.bytes() && input_bytes <= inputs.bytes() &&
               output_bytes <= outputs.bytes();
    }
    // Grows the buffers; a call that is not larger than an earlier call allocates nothing. If the
    // buffers would then have more than `limit` bytes, they are freed first. The context must be
    // current.
    void reserve(size_t arena_bytes, size_t input_bytes, size_t output_bytes, size_t limit);
    void release() noexcept;

    Stream stream;  // must outlive the buffers
    StreamBuffer arena{stream, "the activations"};
    StreamBuffer inputs{stream, "the inputs"};
    StreamBuffer outputs{stream, "the outputs"};
    PinnedBuffer host_inputs{stream.gpu(), "the inputs"};
    PinnedBuffer host_outputs{stream.gpu(), "the outputs"};

  private:
    bool outputs_are_unset_ = false;  // outputs are new memory that nothing has written
    std::atomic<size_t> bytes_{0};    // other threads ask too
};

// The memory of all sessions on a GPU in this process. There is never more idle memory than there
// are sessions, so that the last session leaves none.
class SharedMemory : NonCopyable {
  public:
    explicit SharedMemory(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

    // That of `gpu`, the device `ordinal` of its driver; all models there share it.
    static std::shared_ptr<SharedMemory> of(const std::shared_ptr<const Gpu>& gpu, int ordinal);

    // A session counts from `join` to `leave`.
    void join();
    void leave() noexcept;

    // Idle memory, `last` if it is idle: then its session's parameters are packed for it. Memory of
    // more than `limit` bytes is freed before it is used. New memory if nothing is idle.
    std::unique_ptr<CallMemory> take(const CallMemory* last, size_t limit);
    void give(std::unique_ptr<CallMemory> memory) noexcept;

    // Frees the idle memory. Returns its device bytes.
    size_t trim() noexcept;
    // Device bytes of idle memory and of calls that run.
    size_t bytes() const;

  private:
    const std::shared_ptr<const Gpu> gpu_;
    mutable std::mutex mutex_;
    size_t sessions_ = 0;
    std::vector<std::unique_ptr<CallMemory>> idle_;
    std::vector<const CallMemory*> used_;
};

}  // namespace vitrail
