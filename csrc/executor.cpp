#include "executor.hpp"

#include <algorithm>
#include <cstring>

namespace vitrail {

namespace {

constexpr int64_t kMaxRows = int64_t{1} << 31;  // kernels count rows in 32 bits
constexpr size_t kIdleFrames = 16;

// Rounds up by at most an eighth.
int64_t rounded(int64_t count) {
    int64_t step = 1;
    while (count / step >= 16) step *= 2;
    return round_up(count, step);
}

// Calls `visit(argument, offset)` for every argument, at its offset among the parameters. Returns
// the total bytes.
template <typename Visit>
uint32_t lay_out(const std::vector<Argument>& arguments, Visit visit) {
    uint32_t offset = 0;
    for (const Argument& argument : arguments) {
        offset = round_up(offset, argument.alignment());
        visit(argument, offset);
        offset += argument.size();
    }
    return offset;
}

}  // namespace

// -- kernels -------------------------------------------------------------------------------------

Kernel::Kernel(const Gpu& gpu, const KernelBinary& record)
    : binary(record),
      // an ELF file must be aligned: this copy is, its bytes within the record may not be
      module(gpu, binary.function.c_str(),
             std::vector<char>(binary.cubin.begin(), binary.cubin.end()).data()) {
    binary.cubin = {};
    const Gpu::RelaxedCapture relaxed(gpu);
    const char* name = binary.function.c_str();
    entry = module.entry(binary.function);
    if (static_cast<uint32_t>(entry.threads) < binary.threads) {
        throw FormatError(binary.function + ": got a kernel of at most " +
                          std::to_string(entry.threads) + " threads, wanted " +
                          std::to_string(binary.threads));
    }
    if (binary.shared == 0) return;
    const Driver& driver = gpu.driver();
    const int shared = static_cast<int>(binary.shared);
    if (shared > cu::kDefaultMaxShared) {
        driver(name, driver.function_set, entry.function, cu::kMaxDynamicShared, shared);
    }
    driver(name, driver.function_set, entry.function, cu::kSharedCarveout,
           gpu.carveout(static_cast<int>(binary.threads), shared));
}

void Kernels::load(std::string_view record) {
    const KernelBinary binary = KernelBinary::parse(record);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (loaded_.count(binary.key) != 0) return;
    const Gpu::ContextGuard current(*gpu_);
    loaded_.emplace(binary.key, std::make_unique<const Kernel>(*gpu_, binary));
}

const Kernel* Kernels::find(const std::string& key) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = loaded_.find(key);
    return entry == loaded_.end() ? nullptr : entry->second.get();
}

// -- executable ----------------------------------------------------------------------------------

Executable::Executable(std::shared_ptr<const Kernels> kernels, Plan plan, cu::Pointer weights)
    : kernels_(std::move(kernels)),
      plan_(std::move(plan)),
      weights_(weights),
      table_(plan_.kernel_keys.size()) {
    if (weights % 16 != 0) throw std::invalid_argument("weights: wanted a multiple of 16");
}

Executable::~Executable() = default;

const Kernel* Executable::kernel(uint32_t index) const {
    const Kernel* kernel = table_[index].load(std::memory_order_acquire);
    if (kernel != nullptr) return kernel;
    kernel = kernels_->find(plan_.kernel_keys[index]);
    if (kernel != nullptr) {
        check(*kernel, index);
        table_[index].store(kernel, std::memory_order_release);
    }
    return kernel;
}

// Throws FormatError unless the kernel takes the parameters that the plan passes to it.
void Executable::check(const Kernel& kernel, uint32_t index) const {
    for (const Launch& launch : plan_.launches) {
        for (const Variant& variant : launch.variants) {
            if (variant.kernel != index) continue;
            const auto refuse = [&](const std::string& why) {
                throw FormatError(launch.label + ": " + kernel.binary.function + ": " + why);
            };
            const auto& sizes = kernel.entry.parameters;
            size_t number = 0, maps = 0;
            lay_out(variant.arguments, [&](const Argument& argument, uint32_t) {
                if (argument.type == ArgumentType::kMap) {
                    if (maps == kernel.binary.boxes.size()) refuse("more tensor maps than boxes");
                    const Box& box = kernel.binary.boxes[maps++];
                    if (argument.columns * box.bytes > argument.stride) {
                        refuse("a tensor map whose rows are longer than its stride");
                    }
                }
                if (sizes && (number >= sizes->size() || (*sizes)[number] != argument.size())) {
                    refuse("parameter " + std::to_string(number) + ": got " +
                           std::to_string(argument.size()) + " bytes, wanted " +
                           (number < sizes->size() ? std::to_string((*sizes)[number]) : "none"));
                }
                ++number;
            });
            if (sizes && number != sizes->size()) {
                refuse("got " + std::to_string(number) + " parameters, wanted " +
                       std::to_string(sizes->size()));
            }
            if (maps != kernel.binary.boxes.size()) refuse("fewer tensor maps than boxes");
        }
    }
}

namespace {

const Variant& variant_for(const Launch& launch, int64_t rows) {
    for (const Variant& variant : launch.variants) {
        if (rows <= variant.max_rows) return variant;
    }
    return launch.variants.back();
}

}  // namespace

std::vector<std::string> Executable::missing(const Sizes& sizes) const {
    std::vector<std::string> keys;
    for (const Launch& launch : plan_.launches) {
        const uint32_t index = variant_for(launch, launch.rows.at(sizes)).kernel;
        const std::string& key = plan_.kernel_keys[index];
        if (kernel(index) == nullptr && std::find(keys.begin(), keys.end(), key) == keys.end()) {
            keys.push_back(key);
        }
    }
    return keys;
}

std::vector<std::string> Executable::missing() const {
    std::vector<std::string> keys;
    for (uint32_t index = 0; index < plan_.kernel_keys.size(); ++index) {
        if (kernel(index) == nullptr) keys.push_back(plan_.kernel_keys[index]);
    }
    return keys;
}

Sizes Executable::capacity(const Sizes& sizes) {
    Sizes capacity = sizes;
    capacity.sequences = rounded(sizes.sequences);
    // sequences of equal length: whole sequences are added, and tokens are not rounded again
    const bool equal = sizes.tokens == sizes.sequences * sizes.longest;
    capacity.tokens = equal ? capacity.sequences * sizes.longest : rounded(sizes.tokens);
    return capacity;
}

namespace {

std::vector<uint64_t> slot_bytes(const Plan& plan, const Sizes& sizes) {
    std::vector<uint64_t> bytes(plan.slots, 0);
    for (const Buffer& buffer : plan.buffers) {
        if (buffer.external()) continue;
        const auto size = static_cast<uint64_t>(buffer.rows.at(sizes) * buffer.row_bytes);
        auto& slot = bytes[static_cast<size_t>(buffer.slot)];
        slot = std::max(slot, round_up(size, kAlignment));
    }
    return bytes;
}

void check_sizes(const Sizes& sizes, const Sizes& capacity) {
    const auto& s = sizes;
    if (s.sequences < 0 || s.tokens < 0 || s.longest < 0 || s.tokens >= kMaxRows ||
        s.sequences > s.tokens || s.longest > s.tokens || !capacity.covers(sizes)) {
        throw std::invalid_argument(
            "got " + std::to_string(s.sequences) + " sequences of " + std::to_string(s.tokens) +
            " tokens, the longest of " + std::to_string(s.longest) + ", for a capacity of " +
            std::to_string(capacity.sequences) + ", " + std::to_string(capacity.tokens) + ", " +
            std::to_string(capacity.longest) + "; wanted no sequence without tokens, no more " +
            "than the capacity, and less than 2^31 tokens");
    }
}

}  // namespace

uint64_t Executable::arena_bytes(const Sizes& capacity) const {
    check_sizes(capacity, capacity);
    uint64_t total = 0;
    for (const uint64_t bytes : slot_bytes(plan_, capacity)) total += bytes;
    return total;
}

// An idle frame of this capacity, if possible one that is packed for this arena: PyTorch's
// allocator gives a thread the same few arenas again and again. If kIdleFrames are idle, a frame of
// another arena is packed anew; else a new frame is made.
std::unique_ptr<Frame> Executable::take(const Sizes& capacity, cu::Pointer arena) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto best = idle_.end();
        for (auto it = idle_.begin(); it != idle_.end(); ++it) {
            if (!((*it)->capacity() == capacity)) continue;
            const bool packed = (*it)->arena() == arena;
            if (packed || (best == idle_.end() && idle_.size() == kIdleFrames)) best = it;
            if (packed) break;
        }
        if (best != idle_.end()) {
            std::unique_ptr<Frame> frame = std::move(*best);
            idle_.erase(best);
            return frame;
        }
    }
    return std::make_unique<Frame>(*this, capacity);
}

void Executable::give(std::unique_ptr<Frame> frame) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.size() == kIdleFrames) idle_.erase(idle_.begin());  // least recently used
    idle_.push_back(std::move(frame));
}

void Executable::check_call(const Sizes& sizes, const Sizes& capacity, cu::Pointer arena,
                            const std::vector<cu::Pointer>& externals) const {
    check_sizes(sizes, capacity);
    if (externals.size() != plan_.externals.size()) {
        throw std::invalid_argument(plan_.name + ": got " + std::to_string(externals.size()) +
                                    " buffers, wanted " + std::to_string(plan_.externals.size()));
    }
    for (size_t i = 0; i < externals.size(); ++i) {
        if (externals[i] % 16 != 0) {
            throw std::invalid_argument(plan_.buffers[plan_.externals[i]].name +
                                        ": wanted an address that is a multiple of 16");
        }
    }
    if (arena % 16 != 0) throw std::invalid_argument("arena: wanted a multiple of 16");
}

void Executable::run(const Sizes& sizes, const Sizes& capacity, cu::Pointer arena,
                     const std::vector<cu::Pointer>& externals, cu::Stream stream, bool overlap) {
    check_call(sizes, capacity, arena, externals);
    if (sizes.tokens == 0) return;
    std::unique_ptr<Frame> frame = take(capacity, arena);
    try {
        frame->run(sizes, arena, externals, stream, overlap);
    } catch (...) {
        give(std::move(frame));
        throw;
    }
    give(std::move(frame));
}

void Executable::run(Frame& frame, const Sizes& sizes, cu::Pointer arena,
                     const std::vector<cu::Pointer>& externals, cu::Stream stream, bool overlap) {
    check_call(sizes, frame.capacity(), arena, externals);
    if (sizes.tokens != 0) frame.run(sizes, arena, externals, stream, overlap);
}

// -- frame ---------------------------------------------------------------------------------------

Frame::Frame(const Executable& executable, const Sizes& capacity)
    : executable_(executable), capacity_(capacity) {
    const Plan& plan = executable.plan();
    uint64_t start = 0;
    for (const uint64_t bytes : slot_bytes(plan, capacity)) {
        slots_.push_back(start);
        start += bytes;
    }
    uint32_t total = 0;
    packed_.resize(plan.launches.size());
    for (size_t i = 0; i < plan.launches.size(); ++i) {
        packed_[i].resize(plan.launches[i].variants.size());
        for (size_t j = 0; j < packed_[i].size(); ++j) {
            packed_[i][j].offset = total;
            const auto nothing = [](const Argument&, uint32_t) {};
            total += round_up(lay_out(plan.launches[i].variants[j].arguments, nothing), 64u);
        }
    }
    bytes_.resize((total + sizeof(cu::TensorMap) - 1) / sizeof(cu::TensorMap));
    chosen_.resize(plan.launches.size());
}

cu::Pointer Frame::resolve(const Address& address) const {
    if (address.buffer == kWeights) {
        return executable_.weights() + static_cast<uint64_t>(address.offset);
    }
    const int32_t slot = executable_.plan().buffers[static_cast<size_t>(address.buffer)].slot;
    return arena_ + slots_[static_cast<size_t>(slot)];
}

void Frame::encode(const std::string& label, char* destination, const Argument& argument,
                   const Box& box, cu::Pointer base, int64_t rows) const {
    const uint64_t dims[2] = {static_cast<uint64_t>(argument.columns), static_cast<uint64_t>(rows)};
    const uint64_t strides[1] = {static_cast<uint64_t>(argument.stride)};
    const uint32_t sides[2] = {box.columns, box.rows};
    const uint32_t steps[2] = {1, 1};
    const Driver& driver = executable_.gpu().driver();
    driver(label.c_str(), driver.tensor_map, reinterpret_cast<cu::TensorMap*>(destination),
           static_cast<int>(box.type), 2u, reinterpret_cast<void*>(base), &dims[0], &strides[0],
           &sides[0], &steps[0], 0, static_cast<int>(box.swizzle), cu::kL2Promotion, 0);
}

// Writes all parameters that stay while the arena stays, and lists those that may change.
void Frame::pack(const Launch& launch, const Variant& variant, PackedLaunch& packed) {
    packed.pointers.clear();
    packed.integers.clear();
    packed.externals.clear();
    packed.kernel = executable_.kernel(variant.kernel);
    char* parameters = reinterpret_cast<char*>(bytes_.data()) + packed.offset;
    size_t maps = 0;
    lay_out(variant.arguments, [&](const Argument& argument, uint32_t offset) {
        char* destination = parameters + offset;
        packed.pointers.push_back(destination);
        if (argument.type == ArgumentType::kInt32 || argument.type == ArgumentType::kInt64) {
            packed.integers.push_back(
                {&argument.integer, destination, argument.type == ArgumentType::kInt64});
        } else if (argument.type == ArgumentType::kFloat) {
            std::memcpy(destination, &argument.number, sizeof argument.number);
        } else if (argument.type == ArgumentType::kNull) {
            std::memset(destination, 0, argument.size());
        } else {
            const bool map = argument.type == ArgumentType::kMap;
            const Box* box = map ? &packed.kernel->binary.boxes[maps++] : nullptr;
            const int32_t buffer = argument.address.buffer;
            const int32_t slot = buffer == kWeights
                                     ? 0
                                     : executable_.plan().buffers[static_cast<size_t>(buffer)].slot;
            if (slot < 0) {
                packed.externals.push_back(
                    {&argument, destination, static_cast<size_t>(-1 - slot), box});
                return;
            }
            const cu::Pointer base = resolve(argument.address);
            if (map) {
                encode(launch.label, destination, argument, *box, base,
                       argument.rows.at(capacity_));
            } else {
                std::memcpy(destination, &base, sizeof base);
            }
        }
    });
    packed.ready = true;
}

void Frame::write(const Launch& launch, ExternalArgument& external, cu::Pointer base,
                  const Sizes& sizes) {
    if (external.box == nullptr) {
        std::memcpy(external.destination, &base, sizeof base);
        return;
    }
    const int64_t rows = external.argument->rows.at(sizes);
    if (base == external.base && rows == external.rows) return;
    external.rows = -1;  // in case encode throws
    encode(launch.label, external.destination, *external.argument, *external.box, base, rows);
    external.base = base;
    external.rows = rows;
}

// Chooses the variant of every launch, computes its grid and writes its integers.
void Frame::settle(const Sizes& sizes) {
    settled_ = {};
    const Plan& plan = executable_.plan();
    for (size_t i = 0; i < plan.launches.size(); ++i) {
        const Launch& launch = plan.launches[i];
        const Variant& variant = variant_for(launch, launch.rows.at(sizes));
        PackedLaunch& packed = packed_[i][static_cast<size_t>(&variant - launch.variants.data())];
        if (!packed.ready) {
            if (executable_.kernel(variant.kernel) == nullptr) {
                throw std::runtime_error(launch.label + ": got no kernel " +
                                         plan.kernel_keys[variant.kernel] + ", wanted it loaded");
            }
            pack(launch, variant, packed);
        }
        const int64_t blocks = variant.grid.blocks(sizes, executable_.gpu().multiprocessors());
        if (blocks < 0 || blocks >= kMaxBlocks) {
            throw std::invalid_argument(launch.label + ": got " + std::to_string(blocks) +
                                        " blocks, wanted less than 2^31");
        }
        packed.blocks = static_cast<unsigned>(blocks);
        for (const IntegerArgument& argument : packed.integers) {
            const int64_t value = argument.integer->at(sizes);
            if (argument.wide) {
                std::memcpy(argument.destination, &value, sizeof value);
            } else {
                const auto narrow = static_cast<int32_t>(value);
                std::memcpy(argument.destination, &narrow, sizeof narrow);
            }
        }
        chosen_[i] = &packed;
    }
    settled_ = sizes;
}

void Frame::run(const Sizes& sizes, cu::Pointer arena, const std::vector<cu::Pointer>& externals,
                cu::Stream stream, bool overlap) {
    const Gpu& gpu = executable_.gpu();
    const Gpu::ContextGuard current(gpu);
    if (arena != arena_) {
        for (auto& launch : packed_) {
            for (PackedLaunch& packed : launch) packed.ready = false;
        }
        arena_ = arena;
        settled_ = {};
    }
    if (!(settled_ == sizes)) settle(sizes);
    const auto& launches = executable_.plan().launches;
    const Driver& driver = gpu.driver();
    bool first = true;  // the first kernel must not overlap the caller's work on the stream
    for (size_t i = 0; i < launches.size(); ++i) {
        PackedLaunch& packed = *chosen_[i];
        if (packed.blocks == 0) continue;
        for (ExternalArgument& external : packed.externals) {
            write(launches[i], external, externals[external.external], sizes);
        }
        const KernelBinary& binary = packed.kernel->binary;
        const Block block{binary.threads, 1, binary.shared, overlap && binary.overlaps && !first};
        first = false;
        launch(driver, launches[i].label.c_str(), packed.kernel->entry.function, packed.blocks,
               block, stream, packed.pointers.data());
    }
}

}  // namespace vitrail
