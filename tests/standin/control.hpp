// What tests set and ask beside the driver's own functions. Any thread may call any of them, but
// what they set is for all threads. At the start: checks and compute on, rows off, nothing
// recorded, one device of 80 GiB of memory, compute capability 9.0 and 132 multiprocessors.
#pragma once

#include <cstddef>
#include <cstdint>

#include "state.hpp"
#include "tensor_map.hpp"

namespace standin {

// Live objects, as `standin_live` gives them.
struct Live {
    uint64_t allocations;  // of device memory
    uint64_t bytes;        // in them, and freed on streams since one was waited for
    uint64_t pinned;       // allocations of host memory
    uint64_t modules;
    uint64_t streams;
    uint64_t events;
    uint64_t retains;  // of the primary context, less releases
};

// What was emulated so far, as `standin_emulated` gives it.
struct Emulated {
    uint64_t launches;
    uint64_t overlapped;    // of them, those that began before the launch before was complete
    uint64_t instructions;  // of warps
    double seconds;
};

}  // namespace standin

#pragma GCC visibility push(default)
extern "C" {
// Device 0. 1 where its context is retained, which is too late; 0 where it was set.
int standin_device(int major, int minor, int multiprocessors);
// One device more, with 80 GiB of memory; its ordinal, or -1 if there are 8. Streams, events,
// modules and memory belong to a device: they may be used, and given back, while the context of
// their device is current, and by nothing else. In this the stand-in is stricter than CUDA. As in
// CUDA, an event of another device may be waited for and queried.
int standin_add_device(int major, int minor, int multiprocessors);
// Memory of a device in all; allocations past it give 2.
void standin_memory(int device, uint64_t bytes);
// The most bytes that a device's allocations held since this was last asked.
uint64_t standin_peak(int device);

// Checks of handles, contexts, shapes, parameters and addresses.
void standin_checks(int on);
// Copies and digests. Without them, and without checks, records and faults, the driver does
// nothing: no call that a warmed runtime makes locks, allocates or is counted, and cuMemAlloc gives
// addresses that are not mapped. Loading modules and pinned memory work as ever.
void standin_compute(int on);
// Whether digests leave out the outermost dimension of tensor maps: 1 at the start, for runtimes
// that encode maps over capacities.
void standin_rows_off(int on);
// Whether waiting for a stream takes back what launches on it wrote: each forward then finds memory
// as if it were the first, so that its digests follow from its own calls alone. 0 at the start. New
// memory is then alike in every byte.
void standin_undo(int on);
// Keeps what is launched, until standin_reset().
void standin_record(int on);
// Whether some thread captures a CUDA graph: functions for modules and memory then give 900 to
// threads that cuThreadExchangeStreamCaptureMode has not relaxed, and give back what they should.
void standin_capturing(int on);

// In what follows, -1 as a device is any of them, or all together.

// Memory that a launch may use beside what was allocated: a CPU tensor's. 0; 1 and a complaint
// where it overlaps another range, or was not registered. The same start again replaces the range.
int standin_register(uint64_t start, uint64_t bytes, int device);
int standin_unregister(uint64_t start);

// The n-th call from now (1: the next), or the n-th launch, returns `code`. After 214, 700, 702,
// 710, 714..719 and 999 every later call does, until standin_reset(); of several devices, every
// later call that needs the same context. n = 0 takes it back. Calls that give something back do so
// even then: nobody can call them again. Of one device, calls count while its context is current.
void standin_fail(int device, uint64_t n, int code);
void standin_fail_launch(int device, uint64_t n, int code);

// Calls and launches so far; of one device, those while its context was current. cuGetErrorName,
// cuGetErrorString and cuThreadExchangeStreamCaptureMode do not count.
uint64_t standin_calls(int device);
uint64_t standin_launches(int device);
void standin_live(int device, standin::Live* live);
// The latest complaint, a sentence with the call's name; "" where there is none. The text is the
// thread's until it asks again.
const char* standin_complaint(void);
// Forgets faults, records and the complaint. Objects, counts and settings stay.
void standin_reset(void);

// The emulator's library (tests/emulator), to be opened before launches compute. 1 and a complaint
// if it does not open.
int standin_emulator(const char* path);
// `image`, a whole cubin or fatbin, was compiled from the text `ptx`: modules loaded from then on
// compute. Of a fatbin that is the cubin for the device. 1 and a complaint if the image is neither;
// PTX that does not parse fails cuModuleLoadData.
int standin_ptx(const void* image, const char* ptx);
// The order in which warps run, which follows from the seed; whether launches wait, so that those
// with the attribute of programmatic launch run together with the one before; whether races are
// looked for. A fault is an error of the call that needed the result: of the launch itself without
// overlap.
void standin_emulate(uint64_t seed, int overlap, int races);
// Whether memory allocated from then on notices reads, by kernels or copies, of bytes that nobody
// wrote.
void standin_track(int on);
// The name, in faults, of a range that begins at `start`, and whether its bytes count as not
// written. 1 and a complaint if there is none.
int standin_name(uint64_t start, const char* name, int track);
// 1 and a complaint if nobody wrote some of these bytes.
int standin_unwritten(uint64_t start, uint64_t bytes);
// Runs the launches that wait; the code of a fault, or 0.
int standin_finish(void);
void standin_emulated(standin::Emulated* emulated);

uint64_t standin_records(void);
// 1 where there is no such record.
int standin_record_at(uint64_t index, standin::Record* record);
// Decodes 128 bytes; 1 where they are no map that cuTensorMapEncodeTiled made.
int standin_tensor_map(const void* bytes, standin::TensorMap* map);
}
#pragma GCC visibility pop
