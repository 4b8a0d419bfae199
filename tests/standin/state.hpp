// What the stand-in remembers: settings, faults, memory, handles. One mutex guards all of it but
// what is atomic; the driver that does nothing (`noop`) takes neither it nor memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "abi.hpp"
#include "cubin.hpp"
#include "emulation.hpp"
#include "memory.hpp"

namespace standin {

// Streams and events: a handle is the address of a slot, which holds the kind and the device.
// Without locks, and a slot is used again only after all the others, so that a destroyed handle is
// noticed.
enum Kind : uint32_t { kNone = 0, kStream = 1, kEvent = 2 };

class Handles {
  public:
    // Null where all slots are taken.
    void* make(Kind kind, int device) {
        for (uint32_t tries = 0; tries < kSlots; ++tries) {
            std::atomic<uint32_t>& slot = slots_[next_.fetch_add(1) % kSlots];
            uint32_t none = kNone;
            if (!slot.compare_exchange_strong(none, value(kind, device))) continue;
            live_[device][kind].fetch_add(1);
            return &slot;
        }
        return nullptr;
    }
    // The device of a handle of this kind; -1 if it is not alive.
    int device_of(const void* handle, Kind kind) const {
        const std::atomic<uint32_t>* slot = find(handle);
        const uint32_t found = slot == nullptr ? uint32_t{kNone} : slot->load();
        return (found & kKinds) == kind ? static_cast<int>(found / (kKinds + 1)) : -1;
    }
    bool drop(void* handle, Kind kind) {
        const int device = device_of(handle, kind);
        if (device < 0) return false;
        uint32_t wanted = value(kind, device);
        auto* slot = const_cast<std::atomic<uint32_t>*>(find(handle));
        if (!slot->compare_exchange_strong(wanted, kNone)) return false;
        live_[device][kind].fetch_sub(1);
        return true;
    }
    uint64_t live(Kind kind, int device) const { return live_[device][kind].load(); }

  private:
    static constexpr uint32_t kSlots = 1 << 16;
    static constexpr uint32_t kKinds = 3;  // the bits of a slot that are the kind
    static uint32_t value(Kind kind, int device) {
        return kind + (kKinds + 1) * static_cast<uint32_t>(device);
    }
    const std::atomic<uint32_t>* find(const void* handle) const {
        const auto address = reinterpret_cast<uintptr_t>(handle);
        const auto first = reinterpret_cast<uintptr_t>(slots_);
        const uintptr_t apart = address - first;
        if (address < first || apart >= sizeof slots_ || apart % sizeof slots_[0] != 0)
            return nullptr;
        return slots_ + apart / sizeof slots_[0];
    }
    std::atomic<uint32_t> slots_[kSlots];
    std::atomic<uint32_t> next_;
    std::atomic<uint64_t> live_[kMostDevices][3];
};

struct Module {
    Cubin cubin;
    int device = 0;
    emulator_module* ptx = nullptr;  // what the cubin was made of, if a test named it
};

// One launch, as `standin_record_at` gives it; what it points to lives until standin_reset().
struct Record {
    const char* name;
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared;
    uint32_t pdl;
    int32_t carveout;
    uint32_t device;
    uint64_t stream;
    uint64_t digest;  // 0 for a launch that was emulated, or where nothing was computed
    uint64_t count;   // of parameters
    const Parameter* parameters;
    const uint8_t* bytes;  // of the parameters, at their offsets
};

struct Kept {
    std::string name;
    std::vector<Parameter> parameters;
    std::vector<uint8_t> bytes;
    Record record;
};

// Calls that were made, and the faults that are due.
struct Tally {
    uint64_t calls = 0, launches = 0;
    uint64_t fail_call = 0, fail_launch = 0;  // the count at which a fault is due; 0: none
    int call_code = 0, launch_code = 0;

    bool has_faults() const { return fail_call != 0 || fail_launch != 0; }
    // Counts a call; the code of the fault that strikes it, or 0.
    int count(bool launch) {
        ++calls;
        if (launch) ++launches;
        if (fail_call != 0 && calls == fail_call) return fail_call = 0, call_code;
        if (launch && fail_launch != 0 && launches == fail_launch)
            return fail_launch = 0, launch_code;
        return 0;
    }
};

struct Device {
    std::atomic<int> major{9}, minor{0}, multiprocessors{132};
    std::atomic<uint64_t> retains{0};
    Tally tally;     // of the calls while its context is current
    int sticky = 0;  // what every call returns while its context is current

    uint32_t arch() const { return static_cast<uint32_t>(10 * major + minor); }
};

struct State {
    std::mutex mutex;

    std::atomic<bool> started{false};
    std::atomic<int> count{1};  // of devices
    Device devices[kMostDevices];

    bool checks = true, compute = true, record = false, rows_off = true, capturing = false;
    Tally tally;  // of all calls
    std::string complaint;

    Memory memory;
    Emulation emulation;
    std::unordered_map<void*, int> pinned;  // and the device of the context
    std::unordered_set<Module*> modules;
    std::unordered_map<Kernel*, Module*> functions;  // of the live modules
    // Modules that were unloaded stay, so that no later one gets their address.
    std::deque<std::unique_ptr<Module>> loaded;
    std::deque<Kept> records;
};

inline State& state() {
    static State* const state = new State();  // outlives the threads that still call at exit
    return *state;
}

inline Handles handles;
inline std::atomic<bool> doing_nothing{false};

inline bool noop() { return doing_nothing.load(std::memory_order_relaxed); }

// After every change of a setting, under the mutex. A fault or a record needs the other driver.
inline void settle(State& s) {
    bool idle = !s.checks && !s.compute && !s.record && !s.capturing && !s.tally.has_faults();
    for (const Device& device : s.devices)
        idle = idle && device.sticky == 0 && !device.tally.has_faults();
    if (idle) pretended.reserve();
    doing_nothing.store(idle);
}

inline char primary_contexts[kMostDevices];

// The device of a context; -1 if it is none.
inline int device_of(const void* context) {
    for (int device = 0; device < kMostDevices; ++device)
        if (context == primary_contexts + device) return device;
    return -1;
}

inline std::string named(int device) { return "device " + std::to_string(device); }

// A thread's contexts. Plain numbers: nothing is allocated or destroyed with the thread.
struct Contexts {
    static constexpr int kDepth = 64;
    void* stack[kDepth];
    int depth;
    void* current() const { return depth == 0 ? nullptr : stack[depth - 1]; }
};
inline thread_local Contexts contexts;
inline thread_local int capture_mode = 0;  // CU_STREAM_CAPTURE_MODE_GLOBAL

// After these a context is lost: the real driver fails every later call with the same code.
inline bool is_sticky(int code) {
    return code == kEccUncorrectable || code == kIllegalAddress || code == kLaunchTimeout ||
           code == kAssert || (code >= kHardwareStackError && code <= kLaunchFailed) ||
           code == kUnknown;
}

// kUnsafe: a context, and in modes other than relaxed that nobody captures a graph.
enum Need { kNothing, kStarted, kContext, kUnsafe };

// A call of the driver: holds the mutex, counts, and is where faults strike. Its code says whether
// the function goes on; functions that give something back do so in any case, as a caller that
// saw them fail cannot do it again.
class Call {
  public:
    Call(const char* name, Need need, bool launch = false)
        : name_(name), state_(state()), lock_(state_.mutex) {
        const int device = device_of(contexts.current());
        device_ = device < 0 ? 0 : device;
        code = fault(launch, device, need >= kContext);
        if (code == 0 && need != kNothing && !state_.started) code = kNotInitialized;
        if (code == 0 && need >= kContext && state_.checks &&
            (device < 0 || state_.devices[device].retains == 0))
            complain(kInvalidContext, "the thread has no current context");
        if (code == 0 && need == kUnsafe && state_.capturing && capture_mode != kRelaxed)
            complain(kCaptureUnsupported, "a graph is captured, and this thread is not relaxed");
    }

    State* operator->() { return &state_; }
    bool failed() const { return code != 0; }
    bool checking() const { return state_.checks; }
    // That of the current context; 0 without one.
    int number() const { return device_; }
    Device& device() { return state_.devices[device_]; }

    int complain(int with, const std::string& sentence) {
        state_.complaint = std::string(name_) + ": " + sentence;
        return code = with;
    }

    // Runs the launches that wait. A fault of theirs is this call's error, and every later one's.
    void finish() {
        const Fault fault = state_.emulation.run(state_.memory);
        if (fault.code == 0) return;
        state_.devices[fault.device].sticky = fault.code;
        const int before = code;
        complain(before == 0 ? fault.code : before, fault.sentence);
        if (fault.device != device_) code = before;  // it is an error of that device's calls
    }

    // Complains if something of `device` is used while another's context is current.
    bool elsewhere(const std::string& what, int device, int with) {
        if (!checking() || device == device_) return false;
        complain(with, what + " is of " + named(device) + ", the current context of " +
                           named(device_));
        return true;
    }

    // The legacy and the per-thread default stream need no creation.
    bool wrong_stream(void* stream) {
        if (reinterpret_cast<uintptr_t>(stream) <= 2) return false;
        return wrong_handle(stream, kStream, "the stream");
    }
    // A stream may wait for an event of another device; nothing else may use one.
    bool wrong_event(void* event, bool of_any_device = false) {
        return wrong_handle(event, kEvent, "the event", of_any_device);
    }
    bool wrong_handle(const void* handle, Kind kind, const std::string& what, bool any = false) {
        if (!checking()) return false;
        const int device = handles.device_of(handle, kind);
        if (device < 0) return complain(kInvalidHandle, what + " is not alive"), true;
        return !any && elsewhere(what, device, kInvalidHandle);
    }
    // The same for a stream or an event, if it is alive.
    bool elsewhere(const std::string& what, const void* handle, Kind kind) {
        const int device = handles.device_of(handle, kind);
        return device >= 0 && elsewhere(what, device, kInvalidHandle);
    }
    // Complains about device memory of another device.
    bool wrong_range(const Range* range, const std::string& what, int with) {
        if (range == nullptr || range->is_on(device_)) return false;
        return elsewhere(what, range->device, with);
    }

    int code = 0;

  private:
    // `current`: the device of the current context, or -1. A lost device fails all calls if it is
    // the only one; of several, those that need its context.
    int fault(bool launch, int current, bool needs_context) {
        int struck = state_.tally.count(launch);
        Device& device = this->device();
        if (current >= 0)
            if (const int own = device.tally.count(launch); struck == 0) struck = own;
        if (state_.count > 1 && (current < 0 || !needs_context)) return struck;
        if (device.sticky != 0) return device.sticky;
        if (is_sticky(struck)) device.sticky = struck;
        return struck;
    }

    const char* name_;
    State& state_;
    int device_ = 0;
    std::lock_guard<std::mutex> lock_;
};

}  // namespace standin
