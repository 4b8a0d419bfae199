// The C interface.
#include <algorithm>
#include <cstring>
#include <iterator>
#include <set>

#include "../standin/tensor_map.hpp"
#include "emulator.h"
#include "launch.hpp"
#include "opcodes.hpp"

using namespace emulator;

struct emulator_module {
    std::unique_ptr<Module> module;
};

namespace {

// A launch's parameters, aligned as a GPU has them.
struct ParameterCopy {
    std::vector<u8> bytes;
    u8* start;

    ParameterCopy(const void* parameters, u32 size) : bytes(size + 256) {
        start = bytes.data();
        while (reinterpret_cast<u64>(start) % 128 != 0) ++start;
        if (size != 0) std::memcpy(start, parameters, size);
    }
};

struct Results {  // of a thread's latest run
    std::string error;
    emulator_fault fault{0, 0};
    std::vector<std::vector<emulator_site>> sites;
};
thread_local Results results;

Kernel* kernel_of(const emulator_module* module, const char* name) {
    for (const auto& kernel : module->module->kernels)
        if (name == nullptr || kernel->name == name) return kernel.get();
    return nullptr;
}

Options options_of(const emulator_options& values) {
    Options options;
    options.seed = values.seed;
    options.limit = values.limit;
    options.races = values.races != 0;
    options.counters = values.counters != 0;
    options.strict = values.strict != 0;
    options.resident = values.resident;
    options.multiprocessors = values.multiprocessors == 0 ? 132 : values.multiprocessors;
    return options;
}

void report_counters(const Launch& launch, emulator_report& report) {
    const Counters& counters = launch.counters;
    report = {};
    report.seconds = launch.seconds;
    report.warp_instructions = counters.warp_instructions;
    report.thread_instructions = counters.thread_instructions;
    report.blocks = counters.blocks;
    std::copy(counters.by_class, counters.by_class + kClasses, report.by_class);
    report.mma = counters.mma;
    report.wgmma = counters.wgmma;
    report.wgmma_macs = counters.wgmma_macs;
    report.tensor_loads = counters.tensor_loads;
    report.tensor_load_bytes = counters.tensor_load_bytes;
    report.tensor_stores = counters.tensor_stores;
    report.tensor_store_bytes = counters.tensor_store_bytes;
    report.barrier_waits = counters.barrier_waits;
    report.mbarrier_waits = counters.mbarrier_waits;
    report.in_flight_moves = counters.in_flight_moves;
    report.same_writes = counters.same_writes;
    report.injected_fences = counters.injected_fences;
    report.overlapped = counters.overlapped;
}
static_assert(EMULATOR_CLASS_COUNT == kClasses);

std::vector<emulator_site> sites_of(const Launch& launch) {
    std::vector<emulator_site> sites;
    const Kernel& kernel = *launch.kernel;
    for (size_t i = 0; i < launch.counters.sites.size(); ++i) {
        const Site& site = launch.counters.sites[i];
        const Instruction& instruction = kernel.code[i];
        if (site.runs == 0) continue;
        sites.push_back({kernel.opcodes[instruction.opcode].c_str(),
                         kernel.sources[instruction.source].c_str(), instruction.line,
                         instruction.instruction_class, site.runs, site.ideal, site.actual,
                         site.bytes, site.waits});
    }
    return sites;
}

int fail(const std::string& message, int launch, u64 address) {
    results.error = message;
    results.fault = {launch, address};
    return 1;
}

void add_ranges(Device& device, const emulator_range* ranges, int count,
                const std::vector<Launch>& launches) {
    for (int i = 0; i < count; ++i)
        device.memory.ranges.push_back({ranges[i].start, ranges[i].bytes, ranges[i].written,
                                        ranges[i].name == nullptr ? "?" : ranges[i].name});
    std::set<u64> starts;
    for (const Launch& launch : launches)
        for (const auto& [start, bytes] : launch.kernel->variable_ranges)
            if (starts.insert(start).second)
                device.memory.ranges.push_back({start, bytes, nullptr, "a variable of the module"});
}

}  // namespace

extern "C" {

emulator_module* emulator_load(const char* ptx) {
    results.error.clear();
    try {
        return new emulator_module{parse(ptx)};
    } catch (const std::string& message) {
        fail(message, 0, 0);
    } catch (const std::exception& error) {
        fail(error.what(), 0, 0);
    }
    return nullptr;
}

void emulator_unload(emulator_module* module) { delete module; }

const char* emulator_error(void) { return results.error.c_str(); }
emulator_fault emulator_last_fault(void) { return results.fault; }

int emulator_parameters(const emulator_module* module, const char* name, uint32_t* bytes,
                        uint32_t* offsets, uint32_t* sizes, int capacity) {
    const Kernel* kernel = kernel_of(module, name);
    if (kernel == nullptr) return -1;
    *bytes = kernel->parameter_bytes;
    const int count = static_cast<int>(kernel->parameters.size());
    for (int i = 0; i < count && i < capacity; ++i) {
        offsets[i] = kernel->parameters[static_cast<size_t>(i)].offset;
        sizes[i] = kernel->parameters[static_cast<size_t>(i)].size;
    }
    return count;
}

int emulator_unknown(const emulator_module* module) {
    std::set<std::string> names;
    for (const auto& kernel : module->module->kernels)
        for (const Instruction& instruction : kernel->code)
            if (instruction.run == unknown_opcode)
                names.insert(kernel->opcodes[instruction.opcode]);
    results.error.clear();
    for (const std::string& name : names) results.error += name + " ";
    return static_cast<int>(names.size());
}

void emulator_tensor_map(void* out, uint64_t base, int type, int rank, const uint64_t* dims,
                         const uint64_t* strides, const uint32_t* box, int swizzle) {
    standin::TensorMap map{};
    map.base = base;
    map.rank = static_cast<u32>(rank);
    map.type = static_cast<u32>(type);
    map.swizzle = static_cast<u32>(swizzle);
    for (int i = 0; i < rank && i < 5; ++i) {
        map.dims[i] = dims[i];
        map.box[i] = box[i];
        map.steps[i] = 1;
        if (i + 1 < rank) map.strides[i] = strides[i];
    }
    standin::encode(map, out);
}

int emulator_run(const emulator_launch* launch, const emulator_range* ranges, int range_count,
                 const emulator_options* options, emulator_report* report) {
    return emulator_run_chain(launch, 1, ranges, range_count, options, report);
}

int emulator_run_chain(const emulator_launch* chain, int launch_count, const emulator_range* ranges,
                       int range_count, const emulator_options* options, emulator_report* reports) {
    results = Results();
    Device device;
    device.options = options_of(*options);
    std::vector<Launch> launches(static_cast<size_t>(launch_count));
    std::vector<ParameterCopy> parameters;
    parameters.reserve(launches.size());
    for (int i = 0; i < launch_count; ++i) {
        Launch& launch = launches[static_cast<size_t>(i)];
        launch.kernel = kernel_of(chain[i].module, chain[i].kernel);
        if (launch.kernel == nullptr)
            return fail(std::string("no kernel ") + (chain[i].kernel ? chain[i].kernel : ""), i, 0);
        launch.device = &device;
        launch.index = static_cast<u32>(i);
        std::copy(chain[i].grid, chain[i].grid + 3, launch.grid);
        std::copy(chain[i].block, chain[i].block + 3, launch.block);
        launch.shared_bytes = chain[i].shared_bytes;
        launch.overlaps = chain[i].pdl != 0;
        parameters.emplace_back(chain[i].parameters, launch.kernel->parameter_bytes);
        launch.parameters = parameters.back().start;
    }
    add_ranges(device, ranges, range_count, launches);
    u32 current = 0;
    int code = 0;
    try {
        run_chain(launches, device, current);
    } catch (const Fault& fault) {
        code = fail(launches[current].kernel->name + ": " + fault.message,
                    static_cast<int>(current), fault.address);
    }
    for (size_t i = 0; i < launches.size(); ++i) {
        if (reports != nullptr) report_counters(launches[i], reports[i]);
        if (device.options.counters) results.sites.push_back(sites_of(launches[i]));
    }
    return code;
}

int emulator_sites(int launch, const emulator_site** sites) {
    const size_t index = static_cast<size_t>(launch);
    if (launch < 0 || index >= results.sites.size()) return 0;
    *sites = results.sites[index].data();
    return static_cast<int>(results.sites[index].size());
}

const char* emulator_opcode(int index) {
    const auto& entries = opcode_table().entries();
    if (index < 0 || static_cast<size_t>(index) >= entries.size()) return nullptr;
    return std::next(entries.begin(), index)->first.c_str();
}

int emulator_break(const char* opcode, int mode) { return break_opcode(opcode, mode) ? 0 : 1; }

}  // extern "C"
