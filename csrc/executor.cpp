#include "executor.hpp"

#include <algorithm>
#include <cstring>

namespace vitrail {

namespace {

constexpr int64_t kMostRows = int64_t{1} << 31;  // kernels count rows in 32 bits
constexpr size_t kIdleFrames = 16;

// Up by an eighth at most, so that calls of similar sizes share an arena.
int64_t rounded(int64_t count) {
    int64_t step = 1;
    while (count / step >= 16) step *= 2;
    return round_up(count, step);
}

// Calls `use(argument, offset)` for every argument at its place among the parameters; returns
// their bytes.
template <typename Use>
uint32_t lay_out(const std::vector<Argument>& arguments, Use use) {
    uint32_t at = 0;
    for (const Argument& argument : arguments) {
        at = round_up(at, argument.alignment());
        use(argument, at);
        at += argument.size();
    }
    return at;
}

}  // namespace

// -- kernels -------------------------------------------------------------------------------------

Kernel::Kernel(const Gpu& gpu, const Image& wanted)
    : image(wanted),
      // an ELF file: at an address as malloc gives it, not wherever it stands in the record
      module(gpu, image.function.c_str(),
             std::vector<char>(image.machine.begin(), image.machine.end()).data()) {
    image.machine = {};
    const Gpu::Relaxed relaxed(gpu);
    const char* name = image.function.c_str();
    entry = module.entry(image.function);
    if (static_cast<uint32_t>(entry.threads) < image.threads) {
        throw FormatError(image.function + ": got a kernel of at most " +
                          std::to_string(entry.threads) + " threads, wanted " +
                          std::to_string(image.threads));
    }
    if (image.shared == 0) return;
    const Driver& driver = gpu.driver();
    const int shared = static_cast<int>(image.shared);
    if (shared > cu::kSharedWithoutAsking) {
        driver(name, driver.function_set, entry.function, cu::kMaxDynamicShared, shared);
    }
    driver(name, driver.function_set, entry.function, cu::kSharedCarveout,
           gpu.carveout(static_cast<int>(image.threads), shared));
}

void Kernels::load(std::string_view record) {
    const Image image = Image::parse(record);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (loaded_.count(image.key) != 0) return;
    const Gpu::Current current(*gpu_);
    loaded_.emplace(image.key, std::make_unique<const Kernel>(*gpu_, image));
}

const Kernel* Kernels::find(const std::string& key) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = loaded_.find(key);
    return found == loaded_.end() ? nullptr : found->second.get();
}

// -- executable ----------------------------------------------------------------------------------

Executable::Executable(std::shared_ptr<const Kernels> kernels, Plan plan, cu::Pointer weights)
    : kernels_(std::move(kernels)),
      plan_(std::move(plan)),
      weights_(weights),
      table_(plan_.images.size()) {
    if (weights % 16 != 0) throw std::invalid_argument("weights: wanted a multiple of 16");
}

Executable::~Executable() = default;

const Kernel* Executable::kernel(uint32_t image) const {
    const Kernel* found = table_[image].load(std::memory_order_acquire);
    if (found != nullptr) return found;
    found = kernels_->find(plan_.images[image]);
    if (found != nullptr) {
        check(*found, image);
        table_[image].store(found, std::memory_order_release);
    }
    return found;
}

// Whether the kernel takes what the plan hands to it.
void Executable::check(const Kernel& kernel, uint32_t image) const {
    for (const Launch& launch : plan_.launches) {
        for (const Variant& variant : launch.variants) {
            if (variant.image != image) continue;
            const auto refuse = [&](const std::string& why) {
                throw FormatError(launch.label + ": " + kernel.image.function + ": " + why);
            };
            const auto& sizes = kernel.entry.parameters;
            size_t number = 0, maps = 0;
            lay_out(variant.arguments, [&](const Argument& argument, uint32_t) {
                if (argument.kind == Kind::kMap) {
                    if (maps == kernel.image.boxes.size()) refuse("more tensor maps than boxes");
                    const Box& box = kernel.image.boxes[maps++];
                    if (argument.columns * box.bytes > argument.stride) {
                        refuse("a tensor map of rows longer than they are apart");
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
            if (maps != kernel.image.boxes.size()) refuse("fewer tensor maps than boxes");
        }
    }
}

namespace {

const Variant& variant_for(const Launch& launch, int64_t rows) {
    for (const Variant& variant : launch.variants) {
        if (rows <= variant.until) return variant;
    }
    return launch.variants.back();
}

}  // namespace

std::vector<std::string> Executable::missing(const Sizes& sizes) const {
    std::vector<std::string> keys;
    for (const Launch& launch : plan_.launches) {
        const uint32_t image = variant_for(launch, launch.rows.at(sizes)).image;
        if (kernel(image) == nullptr &&
            std::find(keys.begin(), keys.end(), plan_.images[image]) == keys.end()) {
            keys.push_back(plan_.images[image]);
        }
    }
    return keys;
}

std::vector<std::string> Executable::missing() const {
    std::vector<std::string> keys;
    for (uint32_t image = 0; image < plan_.images.size(); ++image) {
        if (kernel(image) == nullptr) keys.push_back(plan_.images[image]);
    }
    return keys;
}

Sizes Executable::capacity(const Sizes& sizes) {
    Sizes capacity = sizes;
    capacity.sequences = rounded(sizes.sequences);
    // sequences of one length stay so: the tokens of whole ones, rounded once
    const bool even = sizes.tokens == sizes.sequences * sizes.longest;
    capacity.tokens = even ? capacity.sequences * sizes.longest : rounded(sizes.tokens);
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
    if (s.sequences < 0 || s.tokens < 0 || s.longest < 0 || s.tokens >= kMostRows ||
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

// A frame that is packed for this arena. PyTorch's allocator gives a thread the same few again and
// again, so each may have a frame of its own; past the limit one is packed anew.
std::unique_ptr<Frame> Executable::take(const Sizes& capacity, cu::Pointer arena) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto best = idle_.end();
        for (auto it = idle_.begin(); it != idle_.end(); ++it) {
            if (!((*it)->capacity() == capacity)) continue;
            const bool same = (*it)->arena() == arena;
            if (same || (best == idle_.end() && idle_.size() == kIdleFrames)) best = it;
            if (same) break;
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
    if (idle_.size() == kIdleFrames) idle_.erase(idle_.begin());  // unused for longest
    idle_.push_back(std::move(frame));
}

void Executable::check_call(const Sizes& sizes, const Sizes& capacity, cu::Pointer arena,
                            const std::vector<cu::Pointer>& externals) const {
    check_sizes(sizes, capacity);
    if (externals.size() != plan_.externals.size()) {
        throw std::invalid_argument(plan_.name + ": got " + std::to_string(externals.size()) +
                                    " buffers, wanted " +
                                    std::to_string(plan_.externals.size()));
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
            packed_[i][j].first = total;
            const auto nothing = [](const Argument&, uint32_t) {};
            total += round_up(lay_out(plan.launches[i].variants[j].arguments, nothing), 64u);
        }
    }
    bytes_.resize((total + sizeof(cu::TensorMap) - 1) / sizeof(cu::TensorMap));
    chosen_.resize(plan.launches.size());
}

cu::Pointer Frame::address(const Place& place) const {
    if (place.buffer == kWeights) {
        return executable_.weights() + static_cast<uint64_t>(place.offset);
    }
    const int32_t slot = executable_.plan().buffers[static_cast<size_t>(place.buffer)].slot;
    return arena_ + slots_[static_cast<size_t>(slot)];
}

void Frame::encode(const std::string& label, char* where, const Argument& argument,
                   const Box& box, cu::Pointer base, int64_t rows) const {
    const uint64_t dims[2] = {static_cast<uint64_t>(argument.columns),
                              static_cast<uint64_t>(rows)};
    const uint64_t strides[1] = {static_cast<uint64_t>(argument.stride)};
    const uint32_t sides[2] = {box.columns, box.rows};
    const uint32_t steps[2] = {1, 1};
    const Driver& driver = executable_.gpu().driver();
    driver(label.c_str(), driver.tensor_map, reinterpret_cast<cu::TensorMap*>(where),
           static_cast<int>(box.type), 2u, reinterpret_cast<void*>(base), &dims[0], &strides[0],
           &sides[0], &steps[0], 0, static_cast<int>(box.swizzle), cu::kL2Promotion, 0);
}

// Everything that no later call changes while the arena stays; what may change is noted.
void Frame::pack(const Launch& launch, const Variant& variant, Packed& packed) {
    packed.pointers.clear();
    packed.numbers.clear();
    packed.outside.clear();
    packed.kernel = executable_.kernel(variant.image);
    char* first = reinterpret_cast<char*>(bytes_.data()) + packed.first;
    size_t maps = 0;
    lay_out(variant.arguments, [&](const Argument& argument, uint32_t at) {
        char* where = first + at;
        packed.pointers.push_back(where);
        if (argument.kind == Kind::kInt32 || argument.kind == Kind::kInt64) {
            packed.numbers.push_back({&argument.integer, where, argument.kind == Kind::kInt64});
        } else if (argument.kind == Kind::kFloat) {
            std::memcpy(where, &argument.number, sizeof argument.number);
        } else if (argument.kind == Kind::kNull) {
            std::memset(where, 0, argument.size());
        } else {
            const bool map = argument.kind == Kind::kMap;
            const Box* box = map ? &packed.kernel->image.boxes[maps++] : nullptr;
            const int32_t buffer = argument.place.buffer;
            const int32_t slot =
                buffer == kWeights ? 0
                                   : executable_.plan().buffers[static_cast<size_t>(buffer)].slot;
            if (slot < 0) {
                packed.outside.push_back({&argument, where, static_cast<size_t>(-1 - slot), box});
                return;
            }
            const cu::Pointer base = address(argument.place);
            if (map) {
                encode(launch.label, where, argument, *box, base, argument.rows.at(capacity_));
            } else {
                std::memcpy(where, &base, sizeof base);
            }
        }
    });
    packed.ready = true;
}

void Frame::place(const Launch& launch, Outside& outside, cu::Pointer base, const Sizes& sizes) {
    if (outside.box == nullptr) {
        std::memcpy(outside.where, &base, sizeof base);
        return;
    }
    const int64_t rows = outside.argument->rows.at(sizes);
    if (base == outside.base && rows == outside.rows) return;
    outside.rows = -1;  // until it is encoded
    encode(launch.label, outside.where, *outside.argument, *outside.box, base, rows);
    outside.base = base;
    outside.rows = rows;
}

// Which variant of every launch serves, its grid and its numbers, before anything is launched.
void Frame::settle(const Sizes& sizes) {
    settled_ = {};
    const Plan& plan = executable_.plan();
    for (size_t i = 0; i < plan.launches.size(); ++i) {
        const Launch& launch = plan.launches[i];
        const Variant& variant = variant_for(launch, launch.rows.at(sizes));
        Packed& packed = packed_[i][static_cast<size_t>(&variant - launch.variants.data())];
        if (!packed.ready) {
            if (executable_.kernel(variant.image) == nullptr) {
                throw std::runtime_error(launch.label + ": got no kernel image " +
                                         plan.images[variant.image] + ", wanted it loaded");
            }
            pack(launch, variant, packed);
        }
        const int64_t blocks = variant.grid.blocks(sizes, executable_.gpu().multiprocessors());
        if (blocks < 0 || blocks >= kMostBlocks) {
            throw std::invalid_argument(launch.label + ": got " + std::to_string(blocks) +
                                        " blocks, wanted less than 2^31");
        }
        packed.blocks = static_cast<unsigned>(blocks);
        for (const Number& number : packed.numbers) {
            const int64_t value = number.integer->at(sizes);
            if (number.wide) {
                std::memcpy(number.where, &value, sizeof value);
            } else {
                const auto narrow = static_cast<int32_t>(value);
                std::memcpy(number.where, &narrow, sizeof narrow);
            }
        }
        chosen_[i] = &packed;
    }
    settled_ = sizes;
}

void Frame::run(const Sizes& sizes, cu::Pointer arena, const std::vector<cu::Pointer>& externals,
                cu::Stream stream, bool overlap) {
    const Gpu& gpu = executable_.gpu();
    const Gpu::Current current(gpu);
    if (arena != arena_) {
        for (auto& launch : packed_) {
            for (Packed& packed : launch) packed.ready = false;
        }
        arena_ = arena;
        settled_ = {};
    }
    if (!(settled_ == sizes)) settle(sizes);
    const auto& launches = executable_.plan().launches;
    const Driver& driver = gpu.driver();
    bool first = true;  // what was on the stream before is not ours, and may not be overlapped
    for (size_t i = 0; i < launches.size(); ++i) {
        Packed& packed = *chosen_[i];
        if (packed.blocks == 0) continue;
        for (Outside& outside : packed.outside) {
            place(launches[i], outside, externals[outside.external], sizes);
        }
        const Image& image = packed.kernel->image;
        const Block block{image.threads, 1, image.shared, overlap && image.overlaps && !first};
        first = false;
        launch(driver, launches[i].label.c_str(), packed.kernel->entry.function, packed.blocks,
               block, stream, packed.pointers.data());
    }
}

}  // namespace vitrail
