// The part of NVIDIA's driver API that the stand-in exports, without cuda.h: types, constants and
// signatures. A test compares them with a cuda.h where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace standin {

enum Result : int {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kInvalidDevice = 101,
    kInvalidImage = 200,
    kInvalidContext = 201,
    kNoBinaryForGpu = 209,
    kEccUncorrectable = 214,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kIllegalAddress = 700,
    kLaunchOutOfResources = 701,
    kLaunchTimeout = 702,
    kAssert = 710,
    kHardwareStackError = 714,
    kIllegalInstruction = 715,
    kMisalignedAddress = 716,
    kInvalidAddressSpace = 717,
    kInvalidPc = 718,
    kLaunchFailed = 719,
    kNotSupported = 801,
    kUnknown = 999,
};

enum DeviceAttribute : int {
    kMaxThreadsPerBlock = 1,
    kMaxBlockX = 2,
    kMaxBlockY = 3,
    kMaxBlockZ = 4,
    kMaxGridX = 5,
    kMaxGridY = 6,
    kMaxGridZ = 7,
    kMaxShared = 8,
    kWarpSize = 10,
    kMaxRegisters = 12,
    kMultiprocessors = 16,
    kThreadsPerMultiprocessor = 39,
    kUnifiedAddressing = 41,
    kMajor = 75,
    kMinor = 76,
    kSharedOptin = 97,
    kMemoryPools = 115,
};

enum FunctionAttribute : int {
    kFunctionThreads = 0,
    kFunctionShared = 1,
    kFunctionLocal = 3,
    kFunctionRegisters = 4,
    kFunctionBinary = 6,
    kFunctionDynamicShared = 8,
    kFunctionCarveout = 9,
};

constexpr uint32_t kPdl = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
constexpr size_t kMapBytes = 128;

struct LaunchAttribute {
    uint32_t id;
    uint32_t pad;
    union {
        char bytes[64];
        int32_t pdl;  // programmaticStreamSerializationAllowed
    } value;
};

struct LaunchConfig {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared;  // bytes of dynamic shared memory
    void* stream;
    LaunchAttribute* attributes;
    uint32_t attribute_count;
};

}  // namespace standin

// X(name, parameter types...); every function returns a Result as int. Handles are void*, enums int
// or uint32_t, device pointers uint64_t.
#define STANDIN_FUNCTIONS(X)                                                                     \
    X(cuGetErrorName, int, const char**)                                                         \
    X(cuGetErrorString, int, const char**)                                                       \
    X(cuDriverGetVersion, int*)                                                                  \
    X(cuInit, uint32_t)                                                                          \
    X(cuDeviceGetCount, int*)                                                                    \
    X(cuDeviceGet, int*, int)                                                                    \
    X(cuDeviceGetName, char*, int, int)                                                          \
    X(cuDeviceGetAttribute, int*, int, int)                                                      \
    X(cuDevicePrimaryCtxRetain, void**, int)                                                     \
    X(cuDevicePrimaryCtxRelease_v2, int)                                                         \
    X(cuCtxGetCurrent, void**)                                                                   \
    X(cuCtxSetCurrent, void*)                                                                    \
    X(cuCtxPushCurrent_v2, void*)                                                                \
    X(cuCtxPopCurrent_v2, void**)                                                                \
    X(cuModuleLoadData, void**, const void*)                                                     \
    X(cuModuleUnload, void*)                                                                     \
    X(cuModuleGetFunction, void**, void*, const char*)                                           \
    X(cuFuncSetAttribute, void*, int, int)                                                       \
    X(cuFuncGetAttribute, int*, int, void*)                                                      \
    X(cuFuncGetParamInfo, void*, size_t, size_t*, size_t*)                                       \
    X(cuTensorMapEncodeTiled, void*, int, uint32_t, void*, const uint64_t*, const uint64_t*,     \
      const uint32_t*, const uint32_t*, int, int, int, int)                                      \
    X(cuLaunchKernelEx, const standin::LaunchConfig*, void*, void**, void**)                     \
    X(cuMemAlloc_v2, uint64_t*, size_t)                                                          \
    X(cuMemFree_v2, uint64_t)                                                                    \
    X(cuMemAllocAsync, uint64_t*, size_t, void*)                                                 \
    X(cuMemFreeAsync, uint64_t, void*)                                                           \
    X(cuMemHostAlloc, void**, size_t, uint32_t)                                                  \
    X(cuMemFreeHost, void*)                                                                      \
    X(cuMemcpyHtoDAsync_v2, uint64_t, const void*, size_t, void*)                                \
    X(cuMemcpyDtoHAsync_v2, void*, uint64_t, size_t, void*)                                      \
    X(cuStreamCreate, void**, uint32_t)                                                          \
    X(cuStreamDestroy_v2, void*)                                                                 \
    X(cuStreamSynchronize, void*)                                                                \
    X(cuStreamWaitEvent, void*, void*, uint32_t)                                                 \
    X(cuEventCreate, void**, uint32_t)                                                           \
    X(cuEventRecord, void*, void*)                                                               \
    X(cuEventDestroy_v2, void*)                                                                  \
    X(cuEventQuery, void*)                                                                       \
    X(cuEventSynchronize, void*)

#define STANDIN_DECLARE(name, ...) int name(__VA_ARGS__);
#ifndef STANDIN_WITHOUT_FUNCTIONS  // beside a cuda.h, whose types have other names
#pragma GCC visibility push(default)
extern "C" {
STANDIN_FUNCTIONS(STANDIN_DECLARE)
}
#pragma GCC visibility pop
#endif
