// The driver's functions for memory, streams and events. All work is done by the time a call
// returns, but for launches that wait for those that may overlap them (`Call::finish` runs them);
// so streams and events have nothing else to wait for, but must be alive.

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "abi.hpp"
#include "state.hpp"

using namespace standin;

namespace {

int allocate(Call& call, uint64_t* address, size_t bytes, bool pooled = false) {
    if (call.failed()) return call.code;
    if (address == nullptr || bytes == 0) return call.complain(kInvalidValue, "0 bytes were asked");
    *address = call->memory.allocate(call.number(), bytes, pooled);
    return *address != 0 ? kSuccess : kOutOfMemory;
}

int release(Call& call, uint64_t address, bool on_stream = false) {
    call.finish();
    if (call.wrong_range(call->memory.begins(address), "the memory", kInvalidValue))
        return call.code;
    if (call->memory.release(address, on_stream) || pretended.holds(address)) return call.code;
    if (call.failed()) return call.code;
    return call.complain(kInvalidValue, call->memory.why(address) +
                                            ", does not begin one, or is of no stream");
}

int copy(Call& call, uint64_t device, size_t bytes, void* stream, void* to, const void* from) {
    call.finish();
    if (call.failed() || call.wrong_stream(stream) || bytes == 0) return call.code;
    if (to == nullptr || from == nullptr)
        return call.complain(kInvalidValue, "an address is null");
    const Range* range = call->memory.find(device, bytes);
    if (call.checking() && range == nullptr)
        return call.complain(kInvalidValue, call->memory.why(device, bytes));
    if (call.wrong_range(range, "the memory", kInvalidValue)) return call.code;
    const bool inward = reinterpret_cast<uint64_t>(to) == device;
    if (inward) call->memory.mark(device, bytes);
    const std::string unwritten = call->memory.unwritten(device, bytes);
    if (call.checking() && !unwritten.empty()) return call.complain(kInvalidValue, unwritten);
    if (call->compute) std::memcpy(to, from, bytes);
    return kSuccess;
}

int make(void** handle, Kind kind) {
    *handle = handles.make(kind, std::max(0, device_of(contexts.current())));
    return *handle != nullptr ? kSuccess : kOutOfMemory;
}

template <typename T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

extern "C" {

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    if (noop()) return (*address = pretended.allocate(bytes)) != 0 ? kSuccess : kOutOfMemory;
    Call call("cuMemAlloc", kUnsafe);
    return allocate(call, address, bytes);
}

int cuMemFree_v2(uint64_t address) {
    if (noop() && pretended.holds(address)) return kSuccess;
    Call call("cuMemFree", kUnsafe);
    return release(call, address);
}

int cuMemAllocAsync(uint64_t* address, size_t bytes, void* stream) {
    if (noop()) return (*address = pretended.allocate(bytes)) != 0 ? kSuccess : kOutOfMemory;
    Call call("cuMemAllocAsync", kUnsafe);
    if (call.failed() || call.wrong_stream(stream)) return call.code;
    return allocate(call, address, bytes, true);
}

int cuMemFreeAsync(uint64_t address, void* stream) {
    if (noop() && pretended.holds(address)) return kSuccess;
    Call call("cuMemFreeAsync", kUnsafe);
    if (!call.failed() && call.wrong_stream(stream)) return call.code;
    return release(call, address, true);
}

// Host memory is the caller's to write, so it is real whatever the settings.
int cuMemHostAlloc(void** address, size_t bytes, uint32_t flags) {
    Call call("cuMemHostAlloc", kUnsafe);
    if (call.failed()) return call.code;
    if (bytes == 0 || flags > 7)
        return call.complain(kInvalidValue, "0 bytes, or flags that are none");
    *address = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (*address == nullptr) return kOutOfMemory;
    call->pinned[*address] = call.number();
    return kSuccess;
}

int cuMemFreeHost(void* address) {
    Call call("cuMemFreeHost", kUnsafe);
    call.finish();
    const auto found = call->pinned.find(address);
    if (found != call->pinned.end() &&
        call.elsewhere("the memory", found->second, kInvalidValue))
        return call.code;
    if (call->pinned.erase(address) != 0) return std::free(address), call.code;
    return call.failed() ? call.code : call.complain(kInvalidValue, "it is not allocated");
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
    if (noop()) return kSuccess;
    Call call("cuMemcpyHtoDAsync", kContext);
    return copy(call, to, bytes, stream, pointer<void>(to), from);
}

int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
    if (noop()) return kSuccess;
    Call call("cuMemcpyDtoHAsync", kContext);
    return copy(call, from, bytes, stream, to, pointer<const void>(from));
}

int cuStreamCreate(void** stream, uint32_t flags) {
    if (noop()) return make(stream, kStream);
    Call call("cuStreamCreate", kContext);
    if (call.failed()) return call.code;
    if (flags > 1) return call.complain(kInvalidValue, "flags must be 0 or 1");
    return make(stream, kStream);
}

int cuStreamDestroy_v2(void* stream) {
    if (noop()) return handles.drop(stream, kStream) ? kSuccess : kInvalidHandle;
    Call call("cuStreamDestroy", kContext);
    call.finish();
    if (call.elsewhere("the stream", stream, kStream)) return call.code;
    if (handles.drop(stream, kStream) || call.failed()) return call.code;
    return call.complain(kInvalidHandle, "the stream is not alive");
}

int cuStreamSynchronize(void* stream) {
    if (noop()) return kSuccess;
    Call call("cuStreamSynchronize", kContext);
    call.finish();
    call->memory.take_back(call.number(), stream);  // even where it fails: nobody waits again
    call->memory.wait(call.number());
    if (!call.failed()) call.wrong_stream(stream);
    return call.code;
}

int cuStreamWaitEvent(void* stream, void* event, uint32_t flags) {
    if (noop()) return kSuccess;
    Call call("cuStreamWaitEvent", kContext);
    call.finish();
    if (call.failed() || call.wrong_stream(stream) || call.wrong_event(event, true))
        return call.code;
    return flags <= 1 ? kSuccess : call.complain(kInvalidValue, "flags must be 0 or 1");
}

int cuEventCreate(void** event, uint32_t flags) {
    if (noop()) return make(event, kEvent);
    Call call("cuEventCreate", kContext);
    if (call.failed()) return call.code;
    if (flags > 7) return call.complain(kInvalidValue, "flags must be 0..7");
    return make(event, kEvent);
}

int cuEventRecord(void* event, void* stream) {
    if (noop()) return kSuccess;
    Call call("cuEventRecord", kContext);
    if (!call.failed() && !call.wrong_event(event)) call.wrong_stream(stream);
    return call.code;
}

int cuEventDestroy_v2(void* event) {
    if (noop()) return handles.drop(event, kEvent) ? kSuccess : kInvalidHandle;
    Call call("cuEventDestroy", kContext);
    if (call.elsewhere("the event", event, kEvent)) return call.code;
    if (handles.drop(event, kEvent) || call.failed()) return call.code;
    return call.complain(kInvalidHandle, "the event is not alive");
}

int cuEventQuery(void* event) {
    if (noop()) return kSuccess;
    Call call("cuEventQuery", kContext);
    call.finish();
    if (!call.failed()) call.wrong_event(event, true);
    return call.code;
}

int cuEventSynchronize(void* event) {
    if (noop()) return kSuccess;
    Call call("cuEventSynchronize", kContext);
    call.finish();
    if (!call.failed()) call.wrong_event(event, true);
    return call.code;
}

}  // extern "C"
