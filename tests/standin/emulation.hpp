// Launches that compute: the PTX that tests name for cubins, the emulator that runs it, and the
// launches that wait. A launch waits until something needs its result, so that the blocks of
// launches that may overlap run together, as on a GPU. Without the emulator nothing here does
// anything, and its library is not opened.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../emulator/emulator.h"
#include "abi.hpp"
#include "memory.hpp"

namespace standin {

// What a launch did that a GPU would not do.
struct Fault {
    int code;  // a Result, which every later call on the device gives too
    std::string sentence;
    int device = 0;
};

// A launch that waits, with its parameters where the PTX has them.
struct PendingLaunch {
    std::string name;
    emulator_module* module = nullptr;
    uint32_t grid[3] = {};
    uint32_t block[3] = {};
    uint32_t shared = 0;
    bool pdl = false;  // it may begin before the launch before it has ended
    std::vector<uint8_t> parameters;
};

// The functions of the emulator's library.
class Emulator {
  public:
    // A sentence if it cannot be opened, else nothing.
    std::string open(const char* path) {
        void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return dlerror();
        const auto find = [&](auto& function, const char* name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            return function != nullptr;
        };
        const bool whole = find(load, "emulator_load") && find(error, "emulator_error") &&
                           find(last_fault, "emulator_last_fault") &&
                           find(parameters, "emulator_parameters") &&
                           find(run_chain, "emulator_run_chain");
        return whole ? "" : std::string(path) + " lacks a function of emulator.h";
    }

    decltype(&emulator_load) load = nullptr;
    decltype(&emulator_error) error = nullptr;
    decltype(&emulator_last_fault) last_fault = nullptr;
    decltype(&emulator_parameters) parameters = nullptr;
    decltype(&emulator_run_chain) run_chain = nullptr;
};

class Emulation {
  public:
    bool overlap = false;       // whether launches wait for those that may overlap them
    uint64_t launches = 0;      // emulated so far
    uint64_t overlapped = 0;    // of them, those that began before the one before was complete
    uint64_t instructions = 0;  // of warps
    double seconds = 0;
    emulator_options options{};

    std::string open(const char* path) { return emulator_.open(path); }
    bool opened() const { return emulator_.load != nullptr; }

    // `cubin` was made of `ptx`.
    void name_source(std::string cubin, std::string ptx) {
        sources_[std::move(cubin)] = {std::move(ptx), nullptr};
    }
    // The module of a cubin's PTX, parsed at the first call; null if no test named it. Throws a
    // sentence if the PTX does not parse.
    emulator_module* module_of(const std::string& cubin) {
        const auto found = sources_.find(cubin);
        if (found == sources_.end() || !opened()) return nullptr;
        Source& source = found->second;
        if (source.module == nullptr) source.module = emulator_.load(source.ptx.c_str());
        if (source.module == nullptr) throw std::string(emulator_.error());
        return source.module;
    }

    // Offsets and sizes of a kernel's parameters, and with them the bytes of all.
    std::vector<std::pair<uint32_t, uint32_t>> parameters(emulator_module* module,
                                                          const std::string& kernel,
                                                          uint32_t& bytes) const {
        static constexpr int kMost = 256;
        uint32_t offsets[kMost], sizes[kMost];
        const int count =
            emulator_.parameters(module, kernel.c_str(), &bytes, offsets, sizes, kMost);
        std::vector<std::pair<uint32_t, uint32_t>> all;
        for (int i = 0; i < count && i < kMost; ++i) all.emplace_back(offsets[i], sizes[i]);
        return all;
    }

    // Whether a launch on `stream` of `device` can join those that wait.
    bool joins(int device, const void* stream, bool pdl) const {
        return pending_.empty() || (device == device_ && stream == stream_ && pdl);
    }
    void add(int device, void* stream, PendingLaunch launch) {
        device_ = device;
        stream_ = stream;
        pending_.push_back(std::move(launch));
    }
    void forget() { pending_.clear(); }

    // Runs what waits; the fault has the code 0 if there is none.
    Fault run(const Memory& memory) {
        if (pending_.empty()) return {kSuccess, ""};
        std::vector<PendingLaunch> chain = std::move(pending_);
        pending_.clear();
        std::vector<emulator_launch> entries;
        for (const PendingLaunch& one : chain) {
            emulator_launch entry{};
            entry.module = one.module;
            entry.kernel = one.name.c_str();
            std::copy(one.grid, one.grid + 3, entry.grid);
            std::copy(one.block, one.block + 3, entry.block);
            entry.shared_bytes = one.shared;
            entry.parameters = one.parameters.data();
            entry.pdl = one.pdl;
            entries.push_back(entry);
        }
        std::vector<emulator_range> ranges;
        memory.each([&](const Range& range) {
            if (!range.is_on(device_)) return;  // a kernel sees the memory of its device alone
            ranges.push_back({range.start, range.bytes, range.map(), range.name.c_str()});
        });
        std::vector<emulator_report> reports(chain.size());
        const int failed =
            emulator_.run_chain(entries.data(), static_cast<int>(entries.size()), ranges.data(),
                                static_cast<int>(ranges.size()), &options, reports.data());
        launches += chain.size();
        for (const emulator_report& report : reports) {
            overlapped += report.overlapped;
            instructions += report.warp_instructions;
            seconds += report.seconds;
        }
        if (failed == 0) return {kSuccess, ""};
        const std::string sentence = emulator_.error();
        const uint64_t address = emulator_.last_fault().address;
        return {code_of(sentence, address), sentence + memory.freed(address), device_};
    }

  private:
    struct Source {
        std::string ptx;
        emulator_module* module;
    };

    // `address`: of global memory, if the fault is about one.
    static int code_of(const std::string& sentence, uint64_t address) {
        if (sentence.find("misaligned") != std::string::npos) return kMisalignedAddress;
        return address != 0 ? kIllegalAddress : kLaunchFailed;
    }

    Emulator emulator_;
    std::unordered_map<std::string, Source> sources_;  // by the bytes of a cubin
    std::vector<PendingLaunch> pending_;
    int device_ = 0;  // of those that wait
    void* stream_ = nullptr;
};

}  // namespace standin
