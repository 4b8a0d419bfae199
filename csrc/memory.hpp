// RAII for streams and memory. Destructors release even after a driver call has failed.
#pragma once

#include <cstddef>
#include <utility>

#include "driver.hpp"

namespace vitrail {

// Calls `release` with the context current. If the context cannot be made current, calls `release`
// anyway: after one failed call the driver may still free the resource. In a fork, which has no
// driver, the resource is the parent's.
template <typename Release>
void give_back(const Gpu& gpu, Release release) noexcept {
    if (driver_lost()) return;
    try {
        const Gpu::ContextGuard current(gpu);
        const Gpu::RelaxedCapture relaxed(gpu);
        release(gpu.driver());
        return;
    } catch (...) {
    }
    release(gpu.driver());
}

class Stream : NonCopyable {
  public:
    explicit Stream(const Gpu& gpu) : gpu_(gpu) {
        const Gpu::ContextGuard current(gpu);
        const Gpu::RelaxedCapture relaxed(gpu);
        const auto flags = static_cast<unsigned>(cu::kNonBlocking);
        gpu.driver()("a stream", gpu.driver().stream_create, &stream_, flags);
    }
    ~Stream() {
        give_back(gpu_, [this](const Driver& driver) { driver.stream_destroy.call(stream_); });
    }

    const Gpu& gpu() const { return gpu_; }
    cu::Stream get() const { return stream_; }

    // The context must be current.
    void wait(const char* purpose) const {
        const Gpu::RelaxedCapture relaxed(gpu_);
        gpu_.driver()(purpose, gpu_.driver().stream_wait, stream_);
    }
    // Waits until all work on the stream has ended, whether it failed or not.
    void settle() const noexcept {
        give_back(gpu_, [this](const Driver& driver) { driver.stream_wait.call(stream_); });
    }

  private:
    const Gpu& gpu_;
    cu::Stream stream_ = nullptr;
};

// Device memory of a fixed size: the weights.
class DeviceBuffer : NonCopyable {
  public:
    DeviceBuffer(const Gpu& gpu, const char* purpose, size_t bytes) : gpu_(gpu) {
        const Gpu::ContextGuard current(gpu);
        const Gpu::RelaxedCapture relaxed(gpu);
        gpu.driver()(purpose, gpu.driver().allocate, &address_, bytes);
    }
    ~DeviceBuffer() {
        give_back(gpu_, [this](const Driver& driver) { driver.free.call(address_); });
    }

    cu::Pointer address() const { return address_; }

  private:
    const Gpu& gpu_;
    cu::Pointer address_ = 0;
};

// Device memory that grows with `reserve` and is freed by `release`. Uses stream-ordered allocation
// if the device supports it. The context must be current for `reserve`.
class StreamBuffer : NonCopyable {
  public:
    StreamBuffer(const Stream& stream, const char* purpose) : stream_(stream), purpose_(purpose) {}
    ~StreamBuffer() { release(); }

    cu::Pointer address() const { return address_; }
    size_t bytes() const { return bytes_; }

    // Returns whether the buffer was allocated anew, which loses its contents.
    bool reserve(size_t bytes) {
        if (bytes <= bytes_) return false;
        if (bytes_ != 0) {
            release();         // first: two buffers at once might not fit
            stream_.settle();  // only then is the memory free
        }
        const Gpu::RelaxedCapture relaxed(stream_.gpu());
        allocate(bytes);
        bytes_ = bytes;
        return true;
    }
    void release() noexcept {
        if (bytes_ == 0) return;
        give_back(stream_.gpu(), [this](const Driver& driver) {
            if (pooled_) {
                driver.free_async.call(address_, stream_.get());
                return;
            }
            driver.stream_wait.call(stream_.get());  // or the work could outlive the memory
            driver.free.call(address_);
        });
        address_ = 0;
        bytes_ = 0;
    }

  private:
    void allocate(size_t bytes) {
        const Gpu& gpu = stream_.gpu();
        const Driver& driver = gpu.driver();
        pooled_ = gpu.pools();
        try {
            if (pooled_) driver(purpose_, driver.allocate_async, &address_, bytes, stream_.get());
        } catch (const DriverError& error) {
            if (error.code() != cu::kNotSupported) throw;
            gpu.without_pools();
            pooled_ = false;
        }
        if (!pooled_) driver(purpose_, driver.allocate, &address_, bytes);
    }

    const Stream& stream_;
    const char* const purpose_;
    cu::Pointer address_ = 0;
    size_t bytes_ = 0;
    bool pooled_ = true;
};

// Pinned host memory. No work on a stream may use it when it grows or is released.
class PinnedBuffer : NonCopyable {
  public:
    PinnedBuffer(const Gpu& gpu, const char* purpose) : gpu_(gpu), purpose_(purpose) {}
    ~PinnedBuffer() { release(); }

    char* data() const { return static_cast<char*>(data_); }

    void reserve(size_t bytes) {
        if (bytes <= bytes_) return;
        release();
        const Gpu::RelaxedCapture relaxed(gpu_);
        const Driver& driver = gpu_.driver();
        driver(purpose_, driver.host_allocate, &data_, bytes, 0u);
        bytes_ = bytes;
    }
    void release() noexcept {
        if (bytes_ == 0) return;
        give_back(gpu_, [this](const Driver& driver) { driver.host_free.call(data_); });
        data_ = nullptr;
        bytes_ = 0;
    }

  private:
    const Gpu& gpu_;
    const char* const purpose_;
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace vitrail
