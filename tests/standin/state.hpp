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

// Streams and events: a handle is the address of a slot. Without locks, and a slot is used again
// only after all the others, so that a destroyed handle is noticed.
enum Kind : uint32_t { kNone = 0, kStream = 1, kEvent = 2 };

class Handles {
  public:
    // Null where all slots are taken.
    void* make(Kind kind) {
        for (uint32_t tries = 0; tries < kSlots; ++tries) {
            std::atomic<uint32_t>& slot = slots_[next_.fetch_add(1) % kSlots];
            uint32_t none = kNone;
            if (!slot.compare_exchange_strong(none, kind)) continue;
            live_[kind].fetch_add(1);
            return &slot;
        }
        return nullptr;
    }
    bool is(const void* handle, Kind kind) const {
        const std::atomic<uint32_t>* slot = find(handle);
        return slot != nullptr && slot->load() == kind;
    }
    bool drop(void* handle, Kind kind) {
        uint32_t wanted = kind;
        auto* slot = const_cast<std::atomic<uint32_t>*>(find(handle));
        if (slot == nullptr || !slot->compare_exchange_strong(wanted, kNone)) return false;
        live_[kind].fetch_sub(1);
        return true;
    }
    uint64_t live(Kind kind) const { return live_[kind].load(); }

  private:
    static constexpr uint32_t kSlots = 1 << 16;
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
    std::atomic<uint64_t> live_[3];
};

struct Module {
    Cubin cubin;
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
    uint32_t padding;
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

struct State {
    std::mutex mutex;

    std::atomic<int> major{9}, minor{0}, multiprocessors{132};
    std::atomic<bool> started{false};
    std::atomic<uint64_t> retains{0};

    bool checks = true, compute = true, record = false, rows_off = true, capturing = false;
    uint64_t calls = 0, launches = 0;
    uint64_t fail_call = 0, fail_launch = 0;  // the count at which a fault is due; 0: none
    int call_code = 0, launch_code = 0;
    int sticky = 0;
    std::string complaint;

    Memory memory;
    Emulation emulation;
    std::unordered_map<void*, size_t> pinned;
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
    const bool idle = !s.checks && !s.compute && !s.record && !s.capturing && s.sticky == 0 &&
                      s.fail_call == 0 && s.fail_launch == 0;
    if (idle) pretended.reserve();
    doing_nothing.store(idle);
}

inline char primary_context;

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
        code = fault(launch);
        if (code == 0 && need != kNothing && !state_.started) code = kNotInitialized;
        if (code == 0 && need >= kContext && state_.checks &&
            (contexts.current() == nullptr || state_.retains == 0))
            complain(kInvalidContext, "the thread has no current context");
        if (code == 0 && need == kUnsafe && state_.capturing && capture_mode != kRelaxed)
            complain(kCaptureUnsupported, "a graph is captured, and this thread is not relaxed");
    }

    State* operator->() { return &state_; }
    bool failed() const { return code != 0; }
    bool checking() const { return state_.checks; }

    int complain(int with, const std::string& sentence) {
        state_.complaint = std::string(name_) + ": " + sentence;
        return code = with;
    }

    // Runs the launches that wait. A fault of theirs is this call's error, and every later one's.
    void finish() {
        const Fault fault = state_.emulation.run(state_.memory);
        if (fault.code == 0) return;
        state_.sticky = fault.code;
        complain(code == 0 ? fault.code : code, fault.sentence);
    }

    // The legacy and the per-thread default stream need no creation.
    bool wrong_stream(void* stream) {
        if (reinterpret_cast<uintptr_t>(stream) <= 2 || !checking() || handles.is(stream, kStream))
            return false;
        complain(kInvalidHandle, "the stream is not alive");
        return true;
    }
    bool wrong_event(void* event) {
        if (!checking() || handles.is(event, kEvent)) return false;
        complain(kInvalidHandle, "the event is not alive");
        return true;
    }

    int code = 0;

  private:
    int fault(bool launch) {
        ++state_.calls;
        if (launch) ++state_.launches;
        if (state_.sticky != 0) return state_.sticky;
        int struck = 0;
        if (state_.fail_call != 0 && state_.calls == state_.fail_call) {
            struck = state_.call_code;
            state_.fail_call = 0;
        } else if (launch && state_.fail_launch != 0 && state_.launches == state_.fail_launch) {
            struck = state_.launch_code;
            state_.fail_launch = 0;
        }
        if (is_sticky(struck)) state_.sticky = struck;
        return struck;
    }

    const char* name_;
    State& state_;
    std::lock_guard<std::mutex> lock_;
};

}  // namespace standin
