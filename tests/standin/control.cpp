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

    // Runs the launches that wait, which leaves a fault of theirs as later calls' error.
    int finish() {
        const Fault fault = state_.emulation.run(state_.memory);
        if (fault.code == 0) return 0;
        state_.sticky = fault.code;
        state_.complaint = fault.sentence;
        return fault.code;
    }

  private:
    State& state_;
    std::lock_guard<std::mutex> lock_;
};

}  // namespace

extern "C" {

int standin_device(int major, int minor, int multiprocessors) {
    Settings s;
    if (s->retains > 0) return 1;
    s->major = major;
    s->minor = minor;
    s->multiprocessors = multiprocessors;
    return 0;
}

void standin_memory(uint64_t bytes) { Settings()->memory.limit = bytes; }
void standin_checks(int on) { Settings()->checks = on != 0; }
void standin_compute(int on) { Settings()->compute = on != 0; }
void standin_rows_off(int on) { Settings()->rows_off = on != 0; }
void standin_undo(int on) { Settings()->memory.undo = on != 0; }
void standin_record(int on) { Settings()->record = on != 0; }
void standin_capturing(int on) { Settings()->capturing = on != 0; }

int standin_register(uint64_t start, uint64_t bytes) {
    Settings s;
    if (bytes != 0 && s->memory.enlist(start, bytes)) return 0;
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

void standin_fail(uint64_t n, int code) {
    Settings s;
    s->fail_call = n == 0 ? 0 : s->calls + n;
    s->call_code = code;
}

void standin_fail_launch(uint64_t n, int code) {
    Settings s;
    s->fail_launch = n == 0 ? 0 : s->launches + n;
    s->launch_code = code;
}

uint64_t standin_calls(void) { return Settings()->calls; }
uint64_t standin_launches(void) { return Settings()->launches; }

void standin_live(Live* live) {
    Settings s;
    *live = {s->memory.live,        s->memory.bytes,      s->pinned.size(), s->modules.size(),
             handles.live(kStream), handles.live(kEvent), s->retains};
}

const char* standin_complaint(void) {
    static thread_local std::string mine;
    mine = Settings()->complaint;
    return mine.c_str();
}

void standin_reset(void) {
    Settings s;
    s->fail_call = s->fail_launch = 0;
    s->sticky = 0;
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
        const auto device = static_cast<uint32_t>(10 * s->major + s->minor);
        std::string cubin = CubinReader::bytes(cubin_of(image, device));
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
