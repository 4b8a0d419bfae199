// The driver stand-in's own functions (tests/standin/control.hpp), found in the library that
// libvitrail opens too, and what tests here share.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#define CHECK(good)                                                                 \
    do {                                                                            \
        if (!(good)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #good); \
            std::fprintf(stderr, "  vitrail_error: %s\n", vitrail_error());         \
            std::abort();                                                           \
        }                                                                           \
    } while (false)

// allocations.cpp. Of the thread, by the program's own code, the `allocation_fault`-th from now
// fails; 0: none.
extern thread_local uint64_t allocations, allocation_fault;

struct Live {
    uint64_t allocations, bytes, pinned, modules, streams, events, retains;

    bool operator==(const Live& o) const {
        return allocations == o.allocations && bytes == o.bytes && pinned == o.pinned &&
               modules == o.modules && streams == o.streams && events == o.events &&
               retains == o.retains;
    }
};

class Standin {
  public:
    explicit Standin(const char* path) : handle_(dlopen(path, RTLD_NOW)) {
        if (handle_ != nullptr) return;
        std::fprintf(stderr, "%s\n", dlerror());
        std::exit(2);
    }

    // kAll as a device: any of them, or all together.
    static constexpr int kAll = -1;

    void fail(uint64_t n, int code) const {
        find<void(int, uint64_t, int)>("standin_fail")(kAll, n, code);
    }
    void fail_launch(uint64_t n, int code, int device = kAll) const {
        find<void(int, uint64_t, int)>("standin_fail_launch")(device, n, code);
    }
    void reset() const { find<void()>("standin_reset")(); }
    void undo(bool on) const { find<void(int)>("standin_undo")(on); }
    void checks(bool on) const { find<void(int)>("standin_checks")(on); }
    void compute(bool on) const { find<void(int)>("standin_compute")(on); }
    void capturing(bool on) const { find<void(int)>("standin_capturing")(on); }
    int exchange_mode(int mode) const {
        find<int(int*)>("cuThreadExchangeStreamCaptureMode")(&mode);
        return mode;
    }
    void memory(uint64_t bytes, int device = 0) const {
        find<void(int, uint64_t)>("standin_memory")(device, bytes);
    }
    int add_device(int major, int minor, int multiprocessors) const {
        return find<int(int, int, int)>("standin_add_device")(major, minor, multiprocessors);
    }
    // Makes the primary context of a device current on this thread, and takes it away again.
    void push_context(int device) const {
        void* context = nullptr;
        find<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, device);
        find<int(void*)>("cuCtxPushCurrent_v2")(context);
    }
    void pop_context(int device) const {
        void* context = nullptr;
        find<int(void**)>("cuCtxPopCurrent_v2")(&context);
        find<int(int)>("cuDevicePrimaryCtxRelease_v2")(device);
    }
    uint64_t calls() const { return find<uint64_t(int)>("standin_calls")(kAll); }
    uint64_t launches(int device = kAll) const {
        return find<uint64_t(int)>("standin_launches")(device);
    }
    const char* complaint() const { return find<const char*()>("standin_complaint")(); }
    uint64_t peak() const { return find<uint64_t(int)>("standin_peak")(0); }
    Live live(int device = kAll) const {
        Live live{};
        find<void(int, Live*)>("standin_live")(device, &live);
        return live;
    }

  private:
    template <typename Function>
    Function* find(const char* name) const {
        return reinterpret_cast<Function*>(dlsym(handle_, name));
    }

    void* handle_;
};
