// What tests set and ask; control.hpp says what it means.

#include "control.hpp"

#include <mutex>
#include <string>
#include <utility>

#include "fatbin.hpp"
#include "state.hpp"
#include "tensor_map.hpp"

using namespace standin;

namespace {

// The state under its mutex; settings take effect when it goes.
class Settings {
  public:
    Settings() : state_(state()), lock_(state_.mutex) {}
    ~Settings() { settle(state_); }
    State* operator->() { return &state_; }
    Tally& tally(int device) {
        return device == kAnyDevice ? state_.tally : state_.devices[device].tally;
    }

    // Runs the launches that wait, which leaves a fault of theirs as later calls' error.
    int finish() {
        const Fault fault = state_.emulation.run(state_.memory);
        if (fault.code == 0) return 0;
        state_.devices[fault.device].sticky = fault.code;
        state_.complaint = fault.sentence;
        return fault.code;
    }

  private:
    State& state_;
    std::lock_guard<std::mutex> lock_;
};

void become(Device& device, int major, int minor, int multiprocessors) {
    device.major = major;
    device.minor = minor;
    device.multiprocessors = multiprocessors;
}

void add_live(const State& s, int device, Live& live) {
    const DeviceMemory& memory = s.memory.of[device];
    live.allocations += memory.live;
    live.bytes += memory.bytes;
    for (const auto& [address, owner] : s.pinned) live.pinned += owner == device;
    for (const Module* module : s.modules) live.modules += module->device == device;
    live.streams += handles.live(kStream, device);
    live.events += handles.live(kEvent, device);
    live.retains += s.devices[device].retains;
}

}  // namespace

extern "C" {

int standin_device(int major, int minor, int multiprocessors) {
    Settings s;
    if (s->devices[0].retains > 0) return 1;
    become(s->devices[0], major, minor, multiprocessors);
    return 0;
}

int standin_add_device(int major, int minor, int multiprocessors) {
    Settings s;
    if (s->count == kMostDevices) return -1;
    become(s->devices[s->count], major, minor, multiprocessors);
    return s->count++;
}

void standin_memory(int device, uint64_t bytes) { Settings()->memory.of[device].limit = bytes; }
uint64_t standin_peak(int device) {
    Settings s;
    DeviceMemory& memory = s->memory.of[device];
    return std::exchange(memory.peak, memory.bytes);
}
void standin_checks(int on) { Settings()->checks = on != 0; }
void standin_compute(int on) { Settings()->compute = on != 0; }
void standin_rows_off(int on) { Settings()->rows_off = on != 0; }
void standin_undo(int on) { Settings()->memory.undo = on != 0; }
void standin_record(int on) { Settings()->record = on != 0; }
void standin_capturing(int on) { Settings()->capturing = on != 0; }

int standin_register(uint64_t start, uint64_t bytes, int device) {
    Settings s;
    if (bytes != 0 && s->memory.enlist(start, bytes, device)) return 0;
    s->complaint = "standin_register: the range is empty, or overlaps another";
    return 1;
}

int standin_unregister(uint64_t start) {
    Settings s;
    s.finish();
    if (s->memory.delist(start)) return 0;
    s->complaint = "standin_unregister: no registered range begins there";
    return 1;
}

void standin_fail(int device, uint64_t n, int code) {
    Settings s;
    Tally& tally = s.tally(device);
    tally.fail_call = n == 0 ? 0 : tally.calls + n;
    tally.call_code = code;
}

void standin_fail_launch(int device, uint64_t n, int code) {
    Settings s;
    Tally& tally = s.tally(device);
    tally.fail_launch = n == 0 ? 0 : tally.launches + n;
    tally.launch_code = code;
}

uint64_t standin_calls(int device) { return Settings().tally(device).calls; }
uint64_t standin_launches(int device) { return Settings().tally(device).launches; }

void standin_live(int device, Live* live) {
    Settings s;
    *live = {};
    for (int one = 0; one < s->count; ++one)
        if (device == one || device == kAnyDevice) add_live(*s.operator->(), one, *live);
}

const char* standin_complaint(void) {
    static thread_local std::string mine;
    mine = Settings()->complaint;
    return mine.c_str();
}

void standin_reset(void) {
    Settings s;
    s->tally.fail_call = s->tally.fail_launch = 0;
    for (Device& device : s->devices) {
        device.tally.fail_call = device.tally.fail_launch = 0;
        device.sticky = 0;
    }
    s->complaint.clear();
    s->records.clear();
    s->emulation.forget();
}

int standin_emulator(const char* path) {
    Settings s;
    const std::string wrong = s->emulation.open(path);
    if (!wrong.empty()) s->complaint = "standin_emulator: " + wrong;
    return wrong.empty() ? 0 : 1;
}

int standin_ptx(const void* image, const char* ptx) {
    Settings s;
    try {
        std::string cubin = CubinReader::bytes(cubin_of(image, s->devices[0].arch()));
        s->emulation.name_source(std::move(cubin), ptx);
        return 0;
    } catch (const std::string& sentence) {
        s->complaint = "standin_ptx: " + sentence;
    } catch (const ImageError& error) {
        s->complaint = "standin_ptx: " + error.sentence;
    }
    return 1;
}

void standin_emulate(uint64_t seed, int overlap, int races) {
    Settings s;
    s.finish();
    s->emulation.options.seed = seed;
    s->emulation.options.races = races;
    s->emulation.overlap = overlap != 0;
}

void standin_track(int on) { Settings()->memory.tracked = on != 0; }

int standin_name(uint64_t start, const char* name, int track) {
    Settings s;
    Range* range = s->memory.begins(start);
    if (range == nullptr) {
        s->complaint = "standin_name: no range begins there";
        return 1;
    }
    range->name = name;
    if (track != 0) range->track();
    return 0;
}

int standin_unwritten(uint64_t start, uint64_t bytes) {
    Settings s;
    const std::string wrong = s->memory.unwritten(start, bytes);
    if (!wrong.empty()) s->complaint = wrong;
    return wrong.empty() ? 0 : 1;
}

int standin_finish(void) {
    Settings s;
    return s.finish();
}

void standin_emulated(Emulated* out) {
    Settings s;
    const Emulation& e = s->emulation;
    *out = {e.launches, e.overlapped, e.instructions, e.seconds};
}

uint64_t standin_records(void) { return Settings()->records.size(); }

int standin_record_at(uint64_t index, Record* record) {
    Settings s;
    if (index >= s->records.size()) return 1;
    *record = s->records[index].record;
    return 0;
}

int standin_tensor_map(const void* bytes, TensorMap* map) { return decode(bytes, *map) ? 0 : 1; }
}
