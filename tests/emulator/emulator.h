/* The C interface of the PTX emulator. Functions that can fail return 0, or 1 with a sentence in
   emulator_error(). A module may be run by several threads at once; errors and sites are each
   thread's own. Addresses are those of host memory. */
#ifndef EMULATOR_H
#define EMULATOR_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The order of emulator_report.by_class. */
#define EMULATOR_CLASSES                                                                       \
    "integer", "float", "convert", "move", "parameter", "global", "shared", "local", "atomic", \
        "async copy", "matrix move", "mma", "wgmma", "barrier", "branch", "exchange", "other"
#define EMULATOR_CLASS_COUNT 17

typedef struct emulator_module emulator_module;

/* Global memory that a kernel may use, with its name for messages. `written` has a byte
   for each byte of the range, 1 if that byte holds a value: a read of a 0 is a fault, a write makes
   it 1. Null: everything counts as written. */
typedef struct {
    uint64_t start, bytes;
    uint8_t* written;
    const char* name;
} emulator_range;

typedef struct {
    uint64_t seed;            /* of the scheduler. 0: round robin, asynchronous work done late */
    uint64_t limit;           /* warp instructions of a launch, after which it fails; 0: no limit */
    int32_t races;            /* checks order in shared memory, between blocks, and launches */
    int32_t counters;         /* counts bank conflicts, sectors, and instructions by site */
    int32_t strict;           /* faults also for registers that ptxas fences by itself (C7519) */
    uint32_t resident;        /* clusters of a launch that run together; 0: 1, or 4 in a chain */
    uint32_t multiprocessors; /* %nsmid; 0: 132 */
} emulator_options;

typedef struct {
    double seconds;
    uint64_t warp_instructions, thread_instructions, blocks;
    uint64_t by_class[EMULATOR_CLASS_COUNT]; /* warp instructions; with counters only */
    uint64_t mma, wgmma, wgmma_macs;         /* products of a warp, and multiply-adds */
    uint64_t tensor_loads, tensor_load_bytes, tensor_stores, tensor_store_bytes;
    uint64_t barrier_waits, mbarrier_waits;
    uint64_t in_flight_moves; /* movs of accumulators of products in flight */
    uint64_t same_writes;     /* unordered stores of equal values to one word of shared memory */
    uint64_t injected_fences; /* wgmma that ptxas would put a fence before (C7519) */
    uint64_t overlapped;      /* 1 if a block of it ran before the launch before was complete */
} emulator_report;

/* Of a run that failed: the index of the launch in the chain, and the address of global memory that
   the fault is about, or 0. */
typedef struct {
    int32_t launch;
    uint64_t address;
} emulator_fault;

/* One launch. `parameters` are the kernel's, at the offsets of emulator_parameters. With `pdl` it
   may start once every block of the launch before has executed griddepcontrol.launch_dependents or
   has ended; griddepcontrol.wait waits until all launches before are complete. */
typedef struct {
    emulator_module* module;
    const char* kernel; /* null: the module's first */
    uint32_t grid[3], block[3], shared_bytes;
    const void* parameters;
    int32_t pdl;
} emulator_launch;

/* An instruction that ran. For memory `actual` and `ideal` are shared memory's wavefronts or global
   memory's 32-byte sectors, `bytes` the bytes that lanes asked for. `source` is "file.py:line:column" or "". */
typedef struct {
    const char* opcode;
    const char* source;
    uint32_t line, instruction_class; /* of the PTX; index of EMULATOR_CLASSES */
    uint64_t runs, ideal, actual, bytes, waits;
} emulator_site;

/* Null: the text does not parse. */
emulator_module* emulator_load(const char* ptx);
void emulator_unload(emulator_module* module);

/* The calling thread's latest error; empty without one. emulator_last_fault() adds numbers. */
const char* emulator_error(void);
emulator_fault emulator_last_fault(void);

/* Parameters of a kernel, at most `capacity` of them written; returns their number, -1 without such
   a kernel. `bytes` is the size of the buffer. */
int emulator_parameters(const emulator_module* module, const char* kernel, uint32_t* bytes,
                        uint32_t* offsets, uint32_t* sizes, int capacity);

/* How many distinct opcodes the emulator does not know; emulator_error() lists them. They are a
   fault if they are executed. */
int emulator_unknown(const emulator_module* module);

/* Writes the 128 bytes of a tensor map, as tests/standin encodes them. Dimensions from the
   innermost; strides in bytes, of all dimensions but the innermost. */
void emulator_tensor_map(void* out, uint64_t base, int type, int rank, const uint64_t* dims,
                         const uint64_t* strides, const uint32_t* box, int swizzle);

int emulator_run(const emulator_launch* launch, const emulator_range* ranges, int range_count,
                 const emulator_options* options, emulator_report* report);

/* Launches of one stream, in order. `reports`: an array as long, or null. */
int emulator_run_chain(const emulator_launch* launches, int launch_count,
                       const emulator_range* ranges, int range_count,
                       const emulator_options* options, emulator_report* reports);

/* The sites of a launch of the calling thread's latest run, which had counters on; returns their
   number. They live until that thread's next run, or until the module is unloaded. */
int emulator_sites(int launch, const emulator_site** sites);

/* The opcodes that the emulator knows, by index; null past the last. */
const char* emulator_opcode(int index);

/* For tests of the emulator's own tests: modules loaded from now on have a wrong handler for an
   opcode. mode 0: right again; 1: it does nothing, or fails if it does nothing by design; 2: the
   lowest bit of its first result is inverted. Returns 1 if the opcode has no such mutation. */
int emulator_break(const char* opcode, int mode);

#ifdef __cplusplus
}
#endif
#endif
