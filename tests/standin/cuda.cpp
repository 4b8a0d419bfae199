// A stand-in for libcuda.so.1 on machines without a GPU: device memory is host memory, work is
// done at once and in the order of the calls, and a launch computes a digest of what it was given,
// or, if a test named the PTX of its cubin, what the PTX says (emulation.hpp). Every call is
// checked; control.hpp lists what tests may set and ask. Here: the device, contexts, modules,
// tensor maps and launches.

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>

#include "abi.hpp"
#include "errors.hpp"
#include "fatbin.hpp"
#include "launch.hpp"
#include "state.hpp"
#include "tensor_map.hpp"

using namespace standin;

namespace {

// -- the device

int device_attribute(const Device& s, int attribute, int& value) {
    switch (attribute) {
        case kMaxThreadsPerBlock: return value = 1024, kSuccess;
        case kMaxBlockX: return value = 1024, kSuccess;
        case kMaxBlockY: return value = 1024, kSuccess;
        case kMaxBlockZ: return value = 64, kSuccess;
        case kMaxGridX: return value = 2147483647, kSuccess;
        case kMaxGridY: return value = 65535, kSuccess;
        case kMaxGridZ: return value = 65535, kSuccess;
        case kMaxShared: return value = kSharedUnasked, kSuccess;
        case kWarpSize: return value = 32, kSuccess;
        case kMaxRegisters: return value = 65536, kSuccess;
        case kMultiprocessors: return value = s.multiprocessors, kSuccess;
        case kThreadsPerMultiprocessor: return value = 2048, kSuccess;
        case kUnifiedAddressing: return value = 1, kSuccess;
        case kMajor: return value = s.major, kSuccess;
        case kMinor: return value = s.minor, kSuccess;
        case kSharedPerMultiprocessor:
            return value = static_cast<int>(shared_optin(s.major, s.minor) + 1024), kSuccess;
        case kSharedOptin:
            return value = static_cast<int>(shared_optin(s.major, s.minor)), kSuccess;
        case kMemoryPools: return value = 1, kSuccess;
        default: return kInvalidValue;
    }
}

bool wrong_device(Call& call, int device) {
    if (call.failed() || (device >= 0 && device < call->count)) return call.failed();
    const std::string last = std::to_string(call->count - 1);
    const std::string wanted = call->count == 1 ? "only 0" : "0 to " + last;
    call.complain(kInvalidDevice, named(device) + ", there is " + wanted);
    return true;
}

// -- contexts: no locks, a thread's stack is its own

bool wrong_context(Call& call, const void* context) {
    const int device = device_of(context);
    if (device >= 0 && call->devices[device].retains > 0) return false;
    call.complain(kInvalidContext, "the context is not alive");
    return true;
}

int set_current(void* context) {
    if (contexts.depth == 0 && context != nullptr) ++contexts.depth;
    if (contexts.depth == 0) return kSuccess;
    if (context == nullptr) return --contexts.depth, kSuccess;
    contexts.stack[contexts.depth - 1] = context;
    return kSuccess;
}

int push(void* context) {
    if (contexts.depth == Contexts::kDepth) return kInvalidValue;
    contexts.stack[contexts.depth++] = context;
    return kSuccess;
}

int pop(void** context) {
    if (contexts.depth == 0) return kInvalidContext;
    --contexts.depth;
    if (context != nullptr) *context = contexts.stack[contexts.depth];
    return kSuccess;
}

Kernel* find_function(Call& call, void* function) {
    auto* kernel = static_cast<Kernel*>(function);
    const auto found = call->functions.find(kernel);
    if (found == call->functions.end())
        return call.complain(kInvalidHandle, "the function is not of a loaded module"), nullptr;
    const bool elsewhere = call.elsewhere("the function", found->second->device, kInvalidHandle);
    return elsewhere ? nullptr : kernel;
}

}  // namespace

extern "C" {

int cuGetErrorName(int code, const char** text) {
    const Error* error = find_error(code);
    *text = error != nullptr ? error->name : nullptr;
    return error != nullptr ? kSuccess : kInvalidValue;
}

int cuGetErrorString(int code, const char** text) {
    const Error* error = find_error(code);
    *text = error != nullptr ? error->words : nullptr;
    return error != nullptr ? kSuccess : kInvalidValue;
}

int cuDriverGetVersion(int* version) {
    Call call("cuDriverGetVersion", kNothing);
    *version = 13000;
    return call.code;
}

int cuInit(uint32_t flags) {
    Call call("cuInit", kNothing);
    if (call.failed()) return call.code;
    if (flags != 0) return call.complain(kInvalidValue, "flags must be 0");
    call->started = true;
    return kSuccess;
}

int cuDeviceGetCount(int* count) {
    Call call("cuDeviceGetCount", kStarted);
    if (!call.failed()) *count = call->count;
    return call.code;
}

int cuDeviceGet(int* device, int ordinal) {
    Call call("cuDeviceGet", kStarted);
    if (wrong_device(call, ordinal)) return call.code;
    *device = ordinal;
    return kSuccess;
}

int cuDeviceGetName(char* name, int size, int device) {
    Call call("cuDeviceGetName", kStarted);
    if (wrong_device(call, device)) return call.code;
    const Device& found = call->devices[device];
    std::snprintf(name, static_cast<size_t>(size), "stand-in sm_%d%d", found.major.load(),
                  found.minor.load());
    return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    Call call("cuDeviceGetAttribute", kStarted);
    if (wrong_device(call, device)) return call.code;
    if (device_attribute(call->devices[device], attribute, *value) == kSuccess) return kSuccess;
    return call.complain(kInvalidValue, "attribute " + std::to_string(attribute) +
                                            " is not known to the stand-in");
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    Call call("cuDevicePrimaryCtxRetain", kStarted);
    if (wrong_device(call, device)) return call.code;
    ++call->devices[device].retains;
    *context = primary_contexts + device;
    return kSuccess;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    Call call("cuDevicePrimaryCtxRelease", kStarted);
    call.finish();
    if (!call.failed() && wrong_device(call, device)) return call.code;
    const bool known = device >= 0 && device < call->count;
    auto* const retains = known ? &call->devices[device].retains : nullptr;
    if (known && *retains > 0) return --*retains, call.code;
    return call.failed() ? call.code : call.complain(kInvalidContext, "it is not retained");
}

int cuCtxGetCurrent(void** context) {
    if (noop()) return *context = contexts.current(), kSuccess;
    Call call("cuCtxGetCurrent", kStarted);
    *context = contexts.current();
    return call.code;
}

int cuCtxSetCurrent(void* context) {
    if (noop()) return set_current(context);
    Call call("cuCtxSetCurrent", kStarted);
    if (context == nullptr) return set_current(context), call.code;
    if (call.failed() || (call.checking() && wrong_context(call, context))) return call.code;
    return set_current(context);
}

int cuCtxPushCurrent_v2(void* context) {
    if (noop()) return push(context);
    Call call("cuCtxPushCurrent", kStarted);
    if (call.failed() || (call.checking() && wrong_context(call, context))) return call.code;
    return push(context) == kSuccess ? kSuccess
                                     : call.complain(kInvalidValue, "64 contexts are on the stack");
}

int cuCtxPopCurrent_v2(void** context) {
    if (noop()) return pop(context);
    Call call("cuCtxPopCurrent", kStarted);
    if (pop(context) == kSuccess || call.failed()) return call.code;
    return call.complain(kInvalidContext, "no context is on the stack");
}

// Of the thread alone: no call that is counted, or that can be made to fail.
int cuThreadExchangeStreamCaptureMode(int* mode) {
    if (*mode < 0 || *mode > kRelaxed) return kInvalidValue;
    std::swap(*mode, capture_mode);
    return kSuccess;
}

int cuModuleLoadData(void** module, const void* image) {
    Call call("cuModuleLoadData", kUnsafe);
    if (call.failed()) return call.code;
    auto made = std::make_unique<Module>();
    try {
        const void* cubin = cubin_of(image, call.device().arch());
        made->cubin = CubinReader::read(cubin);
        made->ptx = call->emulation.module_of(CubinReader::bytes(cubin));
    } catch (const std::string& sentence) {
        return call.complain(kInvalidImage, sentence);
    } catch (const ImageError& error) {
        return call.complain(error.code, error.sentence);
    }
    made->device = call.number();
    if (!made->cubin.runs_on(call.device().arch()))
        return call.complain(kNoBinaryForGpu, "the cubin is for sm_" +
                                                  std::to_string(made->cubin.arch) +
                                                  ", the device is another");
    for (Kernel& kernel : made->cubin.kernels) call->functions[&kernel] = made.get();
    call->modules.insert(made.get());
    *module = made.get();
    call->loaded.push_back(std::move(made));
    return kSuccess;
}

int cuModuleUnload(void* module) {
    Call call("cuModuleUnload", kUnsafe);
    call.finish();
    auto* found = static_cast<Module*>(module);
    if (call->modules.count(found) != 0 &&
        call.elsewhere("the module", found->device, kInvalidHandle))
        return call.code;
    if (call->modules.erase(found) == 0)
        return call.failed() ? call.code : call.complain(kInvalidHandle, "it is not loaded");
    for (Kernel& kernel : found->cubin.kernels) call->functions.erase(&kernel);
    return call.code;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    Call call("cuModuleGetFunction", kUnsafe);
    if (call.failed()) return call.code;
    auto* found = static_cast<Module*>(module);
    if (call->modules.count(found) == 0)
        return call.complain(kInvalidHandle, "the module is not loaded");
    if (call.elsewhere("the module", found->device, kInvalidHandle)) return call.code;
    for (Kernel& kernel : found->cubin.kernels)
        if (kernel.name == name) return *function = &kernel, kSuccess;
    return call.complain(kNotFound, std::string("the module has no ") + name);
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    Call call("cuFuncSetAttribute", kContext);
    if (call.failed()) return call.code;
    Kernel* kernel = find_function(call, function);
    if (kernel == nullptr) return call.code;
    if (attribute == kFunctionCarveout && value >= -1 && value <= 100)
        return kernel->carveout = value, kSuccess;
    if (attribute != kFunctionDynamicShared)
        return call.complain(kInvalidValue, "attribute " + std::to_string(attribute) + " = " +
                                                std::to_string(value) +
                                                ", wanted 8, or 9 of -1 to 100");
    const Device& device = call.device();
    const int64_t most = int64_t{shared_optin(device.major, device.minor)} - kernel->shared;
    if (value < 0 || value > most)
        return call.complain(kInvalidValue, kernel->name + ": " + std::to_string(value) +
                                                " bytes of dynamic shared memory, wanted 0.." +
                                                std::to_string(most));
    kernel->allowed = value;
    return kSuccess;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
    Call call("cuFuncGetAttribute", kContext);
    if (call.failed()) return call.code;
    const Kernel* kernel = find_function(call, function);
    if (kernel == nullptr) return call.code;
    int64_t found = 0;
    switch (attribute) {
        case kFunctionThreads: found = kernel->threads; break;
        case kFunctionShared: found = kernel->shared; break;
        case kFunctionLocal: found = kernel->local; break;
        case kFunctionRegisters: found = kernel->registers; break;
        case kFunctionBinary: found = kernel->arch; break;
        case kFunctionDynamicShared: found = shared_allowed(*kernel); break;
        default:
            return call.complain(kInvalidValue, "attribute " + std::to_string(attribute) +
                                                    " is not known to the stand-in");
    }
    *value = static_cast<int>(found);
    return kSuccess;
}

int cuFuncGetParamInfo(void* function, size_t index, size_t* offset, size_t* size) {
    Call call("cuFuncGetParamInfo", kContext);
    if (call.failed()) return call.code;
    const Kernel* kernel = find_function(call, function);
    if (kernel == nullptr) return call.code;
    // Callers ask until there are no more: the end is no reason to complain.
    if (index >= kernel->parameters.size()) return kInvalidValue;
    *offset = kernel->parameters[index].offset;
    if (size != nullptr) *size = kernel->parameters[index].size;
    return kSuccess;
}

int cuTensorMapEncodeTiled(void* out, int type, uint32_t rank, void* base, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps,
                           int interleave, int swizzle, int promotion, int fill) {
    TensorMap map{};
    map.base = reinterpret_cast<uint64_t>(base);
    map.rank = rank;
    if (rank >= 1 && rank <= kMostDims) {
        std::copy(dims, dims + rank, map.dims);
        std::copy(strides, strides + rank - 1, map.strides);
        std::copy(box, box + rank, map.box);
        std::copy(steps, steps + rank, map.steps);
    }
    map.type = static_cast<uint32_t>(type);
    map.interleave = static_cast<uint32_t>(interleave);
    map.swizzle = static_cast<uint32_t>(swizzle);
    map.promotion = static_cast<uint32_t>(promotion);
    map.fill = static_cast<uint32_t>(fill);
    if (noop()) return encode(map, out), kSuccess;
    Call call("cuTensorMapEncodeTiled", kStarted);
    if (call.failed()) return call.code;
    if (call.device().major < 9)
        return call.complain(kNotSupported, "there are no maps before sm_90");
    if (out == nullptr || reinterpret_cast<uintptr_t>(out) % 64 != 0)
        return call.complain(kInvalidValue, "the map's own address is no multiple of 64");
    const std::string fault = fault_of(map);
    if (!fault.empty()) return call.complain(kInvalidValue, fault);
    encode(map, out);
    return kSuccess;
}

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void** extra) {
    if (noop()) return kSuccess;
    Call call("cuLaunchKernelEx", kContext, true);
    if (call.failed()) return call.code;
    Kernel* kernel = find_function(call, function);
    if (kernel == nullptr) return call.code;
    return Launch(call, *config, *kernel, call->functions.at(kernel)->ptx).run(parameters, extra);
}

}  // extern "C"
