// The NVIDIA driver. Its library is opened at run time, so neither compiling nor loading this code
// needs CUDA. Types and constants are those of the CUDA driver API (cuda.h).
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vitrail {

namespace cu {

using Result = int;  // CUresult; 0 is CUDA_SUCCESS
using Device = int;
using Pointer = uint64_t;
using Context = struct ContextOpaque*;
using Module = struct ModuleOpaque*;
using Function = struct FunctionOpaque*;
using Stream = struct StreamOpaque*;

constexpr Result kInvalidValue = 1;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotInitialized = 3;
constexpr Result kStubLibrary = 34;
constexpr Result kNoDevice = 100;
constexpr Result kInvalidDevice = 101;
constexpr Result kNotSupported = 801;
constexpr Result kSystemNotReady = 802;        // the fabric manager does not run
constexpr Result kDriverMismatch = 803;        // library and kernel module differ in version
constexpr Result kCompatibilityRefused = 804;  // the library is for newer GPUs

constexpr int kMultiprocessors = 16;           // CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
constexpr int kThreadsPerMultiprocessor = 39;  // ..._MAX_THREADS_PER_MULTIPROCESSOR
constexpr int kCapabilityMajor = 75;           // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kCapabilityMinor = 76;           // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
constexpr int kSharedPerMultiprocessor = 81;   // ..._MAX_SHARED_MEMORY_PER_MULTIPROCESSOR

constexpr int kMaxThreads = 0;        // CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK
constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kSharedCarveout = 9;    // CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
constexpr int kDefaultMaxShared = 48 << 10;
constexpr int kReservedShared = 1 << 10;         // bytes that CUDA reserves per block
constexpr int kMaxBlocksPerMultiprocessor = 32;  // on current GPUs

constexpr int kOverlap = 6;      // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr int kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING
constexpr int kL2Promotion = 2;  // CU_TENSOR_MAP_L2_PROMOTION_L2_128B
constexpr int kRelaxed = 2;      // CU_STREAM_CAPTURE_MODE_RELAXED

struct alignas(64) TensorMap {
    uint64_t words[16];
};

struct LaunchAttribute {
    int id;
    int padding;
    union {
        int overlap;
        char bytes[64];
        uint64_t align;
    } value;
};

struct LaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned shared;
    Stream stream;
    const LaunchAttribute* attributes;
    unsigned count;
};

}  // namespace cu

// The base of classes that own a resource.
struct NonCopyable {
    NonCopyable() = default;
    NonCopyable(const NonCopyable&) = delete;
    NonCopyable& operator=(const NonCopyable&) = delete;
};

// A failed call of the driver. The message names the call and the driver's reason.
class DriverError : public std::runtime_error {
  public:
    DriverError(const std::string& message, cu::Result code)
        : std::runtime_error(message), code_(code) {}
    cu::Result code() const { return code_; }

  private:
    cu::Result code_;
};

struct DeviceInfo {
    std::string name;
    std::pair<int, int> capability;  // compute capability: major, minor
};

// The driver and its devices. If `available` is false, `reason` says why, and the other fields hold
// the values that were found before the failure.
struct DriverInfo {
    bool available = false;
    std::string reason;
    int version = 0;  // highest CUDA version the driver supports: 1000 * major + 10 * minor
    std::vector<DeviceInfo> devices;
};

// A shared library. The destructor closes it.
class Library : NonCopyable {
  public:
    explicit Library(const char* name) : handle_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
        if (handle_ == nullptr) {
            const char* text = dlerror();
            throw std::runtime_error(text != nullptr ? text : std::string(name) + ": not found");
        }
    }
    ~Library() { dlclose(handle_); }

    void* find(const char* name) const { return dlsym(handle_, name); }

  private:
    void* handle_;
};

// A function of the driver. `call` is null if the driver is too old to have the function.
// `Parameters` must be the function's parameters in cuda.h.
template <typename... Parameters>
struct Function {
    Function(const Library& library, const char* name)
        : name(name), call(reinterpret_cast<cu::Result (*)(Parameters...)>(library.find(name))) {}

    const char* const name;
    cu::Result (*const call)(Parameters...);
};

class Driver {
    const Library library_;  // must be the first member: the functions are looked up in it

    Function<cu::Result, const char**> error_name_{library_, "cuGetErrorName"};
    Function<cu::Result, const char**> error_text_{library_, "cuGetErrorString"};

  public:
    // Opens the library and looks up the functions. It does not start the driver.
    explicit Driver(const char* library = "libcuda.so.1") : library_(library) {}

    // Calls `function`. Throws DriverError naming `purpose`, the function and the driver's reason.
    template <typename... Parameters, typename... Arguments>
    void operator()(const char* purpose, const Function<Parameters...>& function,
                    Arguments... arguments) const {
        if (function.call == nullptr) {
            throw std::runtime_error(std::string(function.name) +
                                     ": this driver is too old for it");
        }
        const cu::Result result = function.call(arguments...);
        if (result != 0) fail(result, function.name, purpose);
    }

    [[noreturn]] void fail(cu::Result result, const char* name, const std::string& purpose) const;

    Function<int*> version{library_, "cuDriverGetVersion"};
    Function<unsigned> init{library_, "cuInit"};
    Function<int*> device_count{library_, "cuDeviceGetCount"};
    Function<cu::Device*, int> device_get{library_, "cuDeviceGet"};
    Function<char*, int, cu::Device> device_name{library_, "cuDeviceGetName"};
    Function<int*, int, cu::Device> device_attribute{library_, "cuDeviceGetAttribute"};
    Function<cu::Context*, cu::Device> context_retain{library_, "cuDevicePrimaryCtxRetain"};
    Function<cu::Device> context_release{library_, "cuDevicePrimaryCtxRelease_v2"};
    Function<cu::Context*> context_current{library_, "cuCtxGetCurrent"};
    Function<cu::Context> context_push{library_, "cuCtxPushCurrent_v2"};
    Function<cu::Context*> context_pop{library_, "cuCtxPopCurrent_v2"};
    Function<cu::Module*, const void*> module_load{library_, "cuModuleLoadData"};
    Function<cu::Module> module_unload{library_, "cuModuleUnload"};
    Function<cu::Function*, cu::Module, const char*> module_function{library_,
                                                                     "cuModuleGetFunction"};
    Function<cu::Function, int, int> function_set{library_, "cuFuncSetAttribute"};
    Function<int*, int, cu::Function> function_get{library_, "cuFuncGetAttribute"};
    // since CUDA 12.4
    Function<cu::Function, size_t, size_t*, size_t*> function_parameter{library_,
                                                                        "cuFuncGetParamInfo"};
    Function<cu::TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*,
             const uint32_t*, const uint32_t*, int, int, int, int>
        tensor_map{library_, "cuTensorMapEncodeTiled"};
    Function<const cu::LaunchConfig*, cu::Function, void**, void**> launch{library_,
                                                                           "cuLaunchKernelEx"};
    Function<cu::Pointer*, size_t> allocate{library_, "cuMemAlloc_v2"};
    Function<cu::Pointer> free{library_, "cuMemFree_v2"};
    Function<cu::Pointer*, size_t, cu::Stream> allocate_async{library_, "cuMemAllocAsync"};
    Function<cu::Pointer, cu::Stream> free_async{library_, "cuMemFreeAsync"};
    Function<void**, size_t, unsigned> host_allocate{library_, "cuMemHostAlloc"};
    Function<void*> host_free{library_, "cuMemFreeHost"};
    Function<cu::Pointer, const void*, size_t, cu::Stream> copy_in{library_,
                                                                   "cuMemcpyHtoDAsync_v2"};
    Function<void*, cu::Pointer, size_t, cu::Stream> copy_out{library_, "cuMemcpyDtoHAsync_v2"};
    Function<cu::Stream*, unsigned> stream_create{library_, "cuStreamCreate"};
    Function<cu::Stream> stream_destroy{library_, "cuStreamDestroy_v2"};
    Function<cu::Stream> stream_wait{library_, "cuStreamSynchronize"};
    // since CUDA 10.1
    Function<int*> capture_mode{library_, "cuThreadExchangeStreamCaptureMode"};
};

// A device and its primary context, which PyTorch uses too.
class Gpu : NonCopyable {
  public:
    explicit Gpu(const char* library = "libcuda.so.1", int ordinal = 0);
    ~Gpu();

    const Driver& driver() const { return driver_; }
    const DeviceInfo& info() const { return info_; }
    int multiprocessors() const { return multiprocessors_; }

    // The shared-memory carveout, in percent, that fits as many blocks as the multiprocessor's
    // threads allow. The driver's own choice may fit fewer blocks.
    int carveout(int threads, int shared) const;

    // Whether the device has stream-ordered memory. The value is true until an allocation fails:
    // some virtual devices have no such memory, but report that only when it is allocated.
    bool pools() const { return pools_; }
    void without_pools() const { pools_ = false; }

    // Makes the context current on this thread during the guard's lifetime.
    class ContextGuard : NonCopyable {
      public:
        explicit ContextGuard(const Gpu& gpu);
        ~ContextGuard();

      private:
        const Gpu& gpu_;
        bool pushed_ = false;
    };

    // During its lifetime, this thread may load kernels and allocate memory while another thread
    // captures a CUDA graph. Without this guard the driver refuses, and the other thread's capture
    // breaks too. The context must be current.
    class RelaxedCapture : NonCopyable {
      public:
        explicit RelaxedCapture(const Gpu& gpu) noexcept;
        ~RelaxedCapture();

      private:
        const Function<int*>& exchange_;
        int previous_mode_ = cu::kRelaxed;
        bool exchanged_ = false;
    };

  private:
    const Driver& driver_;
    cu::Device device_ = 0;
    cu::Context context_ = nullptr;
    DeviceInfo info_;
    int multiprocessors_ = 0;
    int threads_ = 0;  // the most threads that are resident on a multiprocessor
    int shared_ = 0;   // bytes of shared memory per multiprocessor
    mutable std::atomic<bool> pools_{true};
};

// Describes the driver of this machine. Never throws: if a step fails, `reason` says which and why.
// Starts the driver, so a process that is forked afterwards cannot use CUDA.
DriverInfo probe();

// Whether this process is a fork of one in which `Gpu` or `probe` had started the driver. Both fail
// in it with a sentence that says so, as the driver itself would with a number.
bool driver_lost() noexcept;

}  // namespace vitrail
