// What a launch is checked for, what it computes, and what is kept of it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "abi.hpp"
#include "state.hpp"
#include "tensor_map.hpp"

namespace standin {

// Dynamic shared memory a block may opt in to, bytes (CUDA C++ guide, compute capabilities).
inline uint32_t shared_optin(int major, int minor) {
    if (major == 8) return minor == 0 || minor == 7 ? 166912 : 101376;
    if (major == 9 || major == 10 || major == 11) return 232448;
    return major == 12 ? 101376 : 65536;
}

constexpr uint32_t kSharedUnasked = 49152;  // what needs no cuFuncSetAttribute, with static memory

inline int64_t shared_allowed(const Kernel& kernel) {
    if (kernel.allowed >= 0) return kernel.allowed;
    return int64_t{kSharedUnasked} - std::min(kernel.shared, kSharedUnasked);
}

// One parameter of a launch.
struct Argument {
    enum What { kNumber, kPointer, kMap } what = kNumber;
    const uint8_t* bytes = nullptr;
    uint32_t size = 0;
    uint64_t address = 0;          // of a pointer, or of a map's base
    const Range* range = nullptr;  // that holds the address; null for numbers
    TensorMap map{};
};

class Launch {
  public:
    // `ptx`: what the kernel was compiled from; null if no test named it.
    Launch(Call& call, const LaunchConfig& config, const Kernel& kernel, emulator_module* ptx)
        : call_(call), config_(config), kernel_(kernel), ptx_(ptx) {}

    int run(void** parameters, void** extra) {
        if (call_.checking() && wrong_shape()) return call_.code;
        if (wrong_attributes() || !gather(parameters, extra)) return call_.code;
        if (call_.checking() && call_.wrong_stream(config_.stream)) return call_.code;
        if (call_->compute && ptx_ != nullptr) {
            if (!emulate()) return call_.code;
        } else if (call_->compute) {
            call_.finish();
            if (call_.failed()) return call_.code;
            compute();
        }
        if (call_->record) keep();
        return call_.code;
    }

  private:
    bool refuse(int code, const std::string& sentence) {
        call_.complain(code, kernel_.name + ": " + sentence);
        return true;
    }

    bool out_of_range(const std::string& what, int axis, uint64_t got, uint64_t most) {
        return refuse(kInvalidValue, what + "xyz"[axis] + " is " + std::to_string(got) +
                                         ", wanted 1.." + std::to_string(most));
    }

    bool wrong_shape() {
        static constexpr uint64_t kGrid[3] = {2147483647, 65535, 65535};
        static constexpr uint64_t kBlock[3] = {1024, 1024, 64};
        uint64_t threads = 1;
        for (int i = 0; i < 3; ++i) {
            const uint64_t grid = config_.grid[i], block = config_.block[i];
            if (grid < 1 || grid > kGrid[i]) return out_of_range("grid ", i, grid, kGrid[i]);
            if (block < 1 || block > kBlock[i]) return out_of_range("block ", i, block, kBlock[i]);
            threads *= block;
        }
        if (threads > kernel_.threads)
            return refuse(kInvalidValue, "a block of " + std::to_string(threads) +
                                             " threads, wanted at most " +
                                             std::to_string(kernel_.threads));
        if (kernel_.required[0] != 0 &&
            !std::equal(config_.block, config_.block + 3, kernel_.required))
            return refuse(kInvalidValue, "it was compiled for blocks of " +
                                             std::to_string(kernel_.threads) + " threads, got " +
                                             std::to_string(threads));
        if (config_.shared > shared_allowed(kernel_))
            return refuse(kInvalidValue,
                          std::to_string(config_.shared) + " bytes of dynamic shared memory, " +
                              std::to_string(shared_allowed(kernel_)) + " are allowed");
        return false;
    }

    bool wrong_attributes() {
        for (uint32_t i = 0; i < config_.attribute_count; ++i) {
            const LaunchAttribute& attribute = config_.attributes[i];
            if (attribute.id == kPdl) {
                pdl_ = attribute.value.pdl;
                if (call_.checking() && pdl_ != 0 && call_.device().major < 9)
                    return refuse(kInvalidValue, "programmatic launch before sm_90");
            } else if (call_.checking()) {
                return refuse(kInvalidValue,
                              "launch attribute " + std::to_string(attribute.id) + ", wanted 6");
            }
        }
        return false;
    }

    // Finds the bytes of every parameter, and what it is.
    bool gather(void** parameters, void** extra) {
        const uint8_t* packed = nullptr;
        if (parameters == nullptr && extra != nullptr && (packed = unpack(extra)) == nullptr)
            return false;
        if (parameters == nullptr && packed == nullptr && !kernel_.parameters.empty())
            return !refuse(kInvalidValue, "it has parameters, and none were given");
        arguments_.resize(kernel_.parameters.size());
        for (size_t i = 0; i < arguments_.size(); ++i) {
            Argument& one = arguments_[i];
            one.size = kernel_.parameters[i].size;
            one.bytes = packed != nullptr ? packed + kernel_.parameters[i].offset
                                          : static_cast<const uint8_t*>(parameters[i]);
            if (one.bytes == nullptr)
                return !refuse(kInvalidValue, "parameter " + std::to_string(i) + " is missing");
            if (!classify(one, "parameter " + std::to_string(i))) return false;
        }
        return true;
    }

    // The buffer given by CU_LAUNCH_PARAM_BUFFER_POINTER (1) and _SIZE (2), ended by 0.
    const uint8_t* unpack(void** extra) {
        const uint8_t* buffer = nullptr;
        size_t size = 0;
        for (; *extra != nullptr; extra += 2) {
            const auto key = reinterpret_cast<uintptr_t>(*extra);
            if (key == 1) buffer = static_cast<const uint8_t*>(extra[1]);
            if (key == 2) size = *static_cast<const size_t*>(extra[1]);
        }
        if (buffer != nullptr && size == kernel_.buffer()) return buffer;
        refuse(kInvalidValue, "a parameter buffer of " + std::to_string(size) + " bytes, wanted " +
                                  std::to_string(kernel_.buffer()));
        return nullptr;
    }

    bool classify(Argument& one, const std::string& name) {
        if (one.size == kMapBytes) {
            if (!decode(one.bytes, one.map))
                return !call_.checking() ||
                       !refuse(kInvalidValue, name + " is no tensor map, or was changed");
            return place(one, Argument::kMap, one.map.base, extent(one.map), name + "'s map");
        }
        uint64_t value = 0;
        if (one.size == sizeof value) std::memcpy(&value, one.bytes, sizeof value);
        return value >> 32 == 0 || place(one, Argument::kPointer, value, 1, name);
    }

    bool place(Argument& one, Argument::What what, uint64_t address, uint64_t bytes,
               const std::string& name) {
        one.range = call_->memory.find(address, bytes);
        one.address = address;
        if (one.range != nullptr) one.what = what;
        if (!call_.checking()) return true;
        if (one.range == nullptr)
            return !refuse(kIllegalAddress, name + ": " + call_->memory.why(address, bytes));
        if (call_.wrong_range(one.range, kernel_.name + ": " + name, kIllegalAddress)) return false;
        if (address == one.range->start && address % 16 != 0)
            return !refuse(kIllegalAddress, name + ": its range is not 16-byte aligned");
        return true;
    }

    // The head of what a parameter points to: 8 bytes, zeros where the memory ends before.
    static uint64_t head(const Argument& one) {
        uint64_t value = 0;
        std::memcpy(&value, reinterpret_cast<const void*>(one.address), head_bytes(one));
        return value;
    }
    static size_t head_bytes(const Argument& one) {
        return std::min<uint64_t>(8, one.range->bytes - (one.address - one.range->start));
    }

    // The digest: FNV-1a over the name with its 0, grid, block and shared size, then of every
    // parameter: a number's bytes; a pointer's head; a map's dimensions (without the outermost
    // where rows are off), strides, box, swizzle and type, and its base's head. Never an address.
    void compute() {
        uint64_t sum = hash(kHashStart, kernel_.name.c_str(), kernel_.name.size() + 1);
        sum = hash(sum, config_.grid, sizeof config_.grid);
        sum = hash(sum, config_.block, sizeof config_.block);
        sum = hash(sum, &config_.shared, sizeof config_.shared);
        for (const Argument& one : arguments_) {
            if (one.what == Argument::kNumber) {
                sum = hash(sum, one.bytes, one.size);
                continue;
            }
            if (one.what == Argument::kMap) {
                const TensorMap& map = one.map;
                const uint32_t dims = call_->rows_off ? map.rank - 1 : map.rank;
                sum = hash(sum, map.dims, dims * sizeof map.dims[0]);
                sum = hash(sum, map.strides, (map.rank - 1) * sizeof map.strides[0]);
                sum = hash(sum, map.box, map.rank * sizeof map.box[0]);
                sum = hash(sum, &map.swizzle, sizeof map.swizzle);
                sum = hash(sum, &map.type, sizeof map.type);
            }
            const uint64_t value = head(one);
            sum = hash(sum, &value, sizeof value);
        }
        digest_ = sum;
        if (arguments_.empty() || arguments_[0].what == Argument::kNumber) return;
        const Argument& out = arguments_[0];
        call_->memory.note(call_.number(), config_.stream, out.address, head_bytes(out));
        std::memcpy(reinterpret_cast<void*>(out.address), &sum, head_bytes(out));
    }

    // Hands the launch to the emulator: at once, or after those that it may overlap. A parameter
    // is known by its ordinal: PTX and cubin align the offsets differently.
    bool emulate() {
        Emulation& emulation = call_->emulation;
        PendingLaunch launch;
        launch.name = kernel_.name;
        launch.module = ptx_;
        std::copy(config_.grid, config_.grid + 3, launch.grid);
        std::copy(config_.block, config_.block + 3, launch.block);
        launch.shared = config_.shared;
        launch.pdl = pdl_ != 0;
        uint32_t bytes = 0;
        const auto places = emulation.parameters(ptx_, kernel_.name, bytes);
        launch.parameters.resize(bytes);
        bool same = places.size() == arguments_.size();
        for (size_t i = 0; same && i < places.size(); ++i) {
            same = places[i].second == arguments_[i].size;
            if (same)
                std::memcpy(launch.parameters.data() + places[i].first, arguments_[i].bytes,
                            arguments_[i].size);
        }
        if (!same) return !refuse(kInvalidImage, "its PTX has other parameters than its cubin");
        if (!emulation.joins(call_.number(), config_.stream, launch.pdl)) call_.finish();
        if (call_.failed()) return false;
        emulation.add(call_.number(), config_.stream, std::move(launch));
        if (!emulation.overlap) call_.finish();
        return !call_.failed();
    }

    void keep() {
        Kept& kept = call_->records.emplace_back();
        kept.name = kernel_.name;
        kept.parameters = kernel_.parameters;
        kept.bytes.resize(kernel_.buffer());
        for (size_t i = 0; i < arguments_.size(); ++i)
            std::memcpy(kept.bytes.data() + kernel_.parameters[i].offset, arguments_[i].bytes,
                        arguments_[i].size);
        Record& record = kept.record;
        record.name = kept.name.c_str();
        std::copy(config_.grid, config_.grid + 3, record.grid);
        std::copy(config_.block, config_.block + 3, record.block);
        record.shared = config_.shared;
        record.pdl = static_cast<uint32_t>(pdl_);
        record.carveout = kernel_.carveout;
        record.device = static_cast<uint32_t>(call_.number());
        record.stream = reinterpret_cast<uint64_t>(config_.stream);
        record.digest = digest_;
        record.count = kept.parameters.size();
        record.parameters = kept.parameters.data();
        record.bytes = kept.bytes.data();
    }

    Call& call_;
    const LaunchConfig& config_;
    const Kernel& kernel_;
    emulator_module* ptx_;
    std::vector<Argument> arguments_;
    int32_t pdl_ = 0;
    uint64_t digest_ = 0;
};

}  // namespace standin
