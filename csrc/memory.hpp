// Streams and memory of a GPU, given back with their owner even where the driver has failed.
#pragma once

#include <cstddef>
#include <utility>

#include "driver.hpp"

namespace vitrail {

// Calls `back` with the context current where that can be had, and without it otherwise: a driver
// that is lost takes nothing back, and one that failed once may.
template <typename Back>
void give_back(const Gpu& gpu, Back back) noexcept {
    try {
        const Gpu::Current current(gpu);
        const Gpu::Relaxed relaxed(gpu);
        back(gpu.driver());
        return;
    } catch (...) {
    }
    back(gpu.driver());
}

class Stream {
  public:
    explicit Stream(const Gpu& gpu) : gpu_(gpu) {
        const Gpu::Current current(gpu);
        const Gpu::Relaxed relaxed(gpu);
        const auto flags = static_cast<unsigned>(cu::kNonBlocking);
        gpu.driver()("a stream", gpu.driver().stream_create, &stream_, flags);
    }
    ~Stream() {
        give_back(gpu_, [this](const Driver& driver) { driver.stream_destroy.call(stream_); });
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    const Gpu& gpu() const { return gpu_; }
    cu::Stream get() const { return stream_; }

    // The context must be current.
    void wait(const char* where) const {
        const Gpu::Relaxed relaxed(gpu_);
        gpu_.driver()(where, gpu_.driver().stream_wait, stream_);
    }
    void settle() const noexcept {  // whatever is on it, and whether it fails: it ends
        give_back(gpu_, [this](const Driver& driver) { driver.stream_wait.call(stream_); });
    }

  private:
    const Gpu& gpu_;
    cu::Stream stream_ = nullptr;
};

// Device memory for as long as the model: weights.
class Fixed {
  public:
    Fixed(const Gpu& gpu, const char* where, size_t bytes) : gpu_(gpu) {
        const Gpu::Current current(gpu);
        const Gpu::Relaxed relaxed(gpu);
        gpu.driver()(where, gpu.driver().allocate, &address_, bytes);
    }
    ~Fixed() {
        give_back(gpu_, [this](const Driver& driver) { driver.free.call(address_); });
    }
    Fixed(const Fixed&) = delete;
    Fixed& operator=(const Fixed&) = delete;

    cu::Pointer address() const { return address_; }

  private:
    const Gpu& gpu_;
    cu::Pointer address_ = 0;
};

// Device memory in the order of a stream, where the device has that; it grows and never shrinks but
// by `release`. The context must be current for `reserve`.
class Growing {
  public:
    Growing(const Stream& stream, const char* where) : stream_(stream), where_(where) {}
    ~Growing() { release(); }
    Growing(const Growing&) = delete;
    Growing& operator=(const Growing&) = delete;

    cu::Pointer address() const { return address_; }

    // Whether it had to grow, and so holds nothing that was there before.
    bool reserve(size_t bytes) {
        if (bytes <= bytes_) return false;
        if (bytes_ != 0) {
            release();         // first, so that there are never two
            stream_.settle();  // until then the memory is held all the same
        }
        const Gpu::Relaxed relaxed(stream_.gpu());
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
            driver.stream_wait.call(stream_.get());  // nothing else orders the two
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
            if (pooled_) driver(where_, driver.allocate_async, &address_, bytes, stream_.get());
        } catch (const DriverError& error) {
            if (error.code() != cu::kNotSupported) throw;
            gpu.without_pools();
            pooled_ = false;
        }
        if (!pooled_) driver(where_, driver.allocate, &address_, bytes);
    }

    const Stream& stream_;
    const char* const where_;
    cu::Pointer address_ = 0;
    size_t bytes_ = 0;
    bool pooled_ = true;
};

// Pinned host memory. Nothing on the stream may use it when it grows or is released.
class Pinned {
  public:
    Pinned(const Gpu& gpu, const char* where) : gpu_(gpu), where_(where) {}
    ~Pinned() { release(); }
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

    char* data() const { return static_cast<char*>(data_); }

    void reserve(size_t bytes) {
        if (bytes <= bytes_) return;
        release();
        const Gpu::Relaxed relaxed(gpu_);
        const Driver& driver = gpu_.driver();
        driver(where_, driver.host_allocate, &data_, bytes, 0u);
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
    const char* const where_;
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace vitrail
