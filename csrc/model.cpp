#include "model.hpp"

#include <algorithm>
#include <utility>

namespace vitrail {

namespace {

constexpr size_t kCallBytes = size_t{1} << 30;  // device memory that one run may use
constexpr size_t kMaxItems = 4096;

struct EndpointInfo {
    const char* name;
    size_t value_bytes;  // of one channel of a pixel; 0 for texts
    BufferRole result;
};
constexpr std::array<EndpointInfo, kEndpointCount> kEndpoints = {{
    {"image.uint8", sizeof(uint8_t), BufferRole::kEmbedding},
    {"image.float", sizeof(float), BufferRole::kEmbedding},
    {"scores.uint8", sizeof(uint8_t), BufferRole::kLogits},
    {"scores.float", sizeof(float), BufferRole::kLogits},
    {"text", 0, BufferRole::kEmbedding},
}};

// The names of the buffers in plans, by role; "" if a tower has no such buffer.
constexpr std::array<const char*, kRoles> kImageBuffers = {
    "cu_seqlens",    "token_rows",    "pixels",           "", "", "table", "vision.embedding",
    "vision.status", "vision.logits", "distillation_rows"};
constexpr std::array<const char*, kRoles> kTextBuffers = {
    "cu_seqlens",     "token_rows",  "", "ids", "positions", "",
    "text.embedding", "text.status", "", ""};

constexpr std::array kNoDeviceCodes = {cu::kStubLibrary,    cu::kNoDevice,
                                       cu::kInvalidDevice,  cu::kSystemNotReady,
                                       cu::kDriverMismatch, cu::kCompatibilityRefused};

std::shared_ptr<const Gpu> open_gpu(const char* library, int ordinal) {
    try {
        return std::make_shared<const Gpu>(library != nullptr ? library : "libcuda.so.1", ordinal);
    } catch (const DriverError& error) {
        const auto& codes = kNoDeviceCodes;
        if (std::find(codes.begin(), codes.end(), error.code()) == codes.end()) throw;
        throw NoDevice("device " + std::to_string(ordinal) + ": " + error.what());
    } catch (const std::runtime_error& error) {
        throw NoDevice(std::string("the NVIDIA driver: ") + error.what());
    }
}

}  // namespace

Endpoint::Layout Endpoint::layout(const Sizes& sizes) const {
    Layout layout;
    const Plan& plan = executable->plan();
    for (size_t i = 0; i < roles.size(); ++i) {
        const Buffer& buffer = plan.buffers[plan.externals[i]];
        size_t bytes = static_cast<size_t>(buffer.rows.at(sizes) * buffer.row_bytes);
        if (roles[i] == BufferRole::kTable) continue;
        if (roles[i] == BufferRole::kPixels) {
            bytes = static_cast<size_t>(sizes.sequences) * image_bytes;
        }
        size_t& total = is_output(roles[i]) ? layout.outputs : layout.inputs;
        layout.offset[static_cast<size_t>(roles[i])] = total;
        layout.bytes[static_cast<size_t>(roles[i])] = bytes;
        total += round_up<size_t>(bytes, kAlignment);
    }
    return layout;
}

size_t Endpoint::bytes(const Sizes& sizes) const {
    const Layout whole = layout(sizes);
    return static_cast<size_t>(executable->arena_bytes(sizes)) + whole.inputs + whole.outputs;
}

Model::Model(const std::string& folder, const char* driver, int ordinal)
    : folder_(folder), gpu_(open_gpu(driver, ordinal)) {
    memory_ = SharedMemory::of(gpu_, ordinal);
    const auto [major, minor] = gpu_->info().capability;
    arch_ = static_cast<uint32_t>(10 * major + minor);
    const Build& build = folder_.build(arch_);
    kernels_ = std::make_shared<Kernels>(gpu_);
    std::vector<uint32_t> numbers = build.kernels;
    for (const EndpointFile& endpoint : build.endpoints) numbers.push_back(endpoint.plan);
    const std::vector<std::string> records = folder_.read(numbers);
    for (size_t i = 0; i < build.kernels.size(); ++i) {
        if (KernelBinary::parse(records[i]).arch != arch_) {
            throw FormatError(folder + "/" + folder_.files[build.kernels[i]].path +
                              ": got a kernel for another architecture");
        }
        kernels_->load(records[i]);
    }
    upload();
    for (size_t i = 0; i < build.endpoints.size(); ++i) {
        add(build.endpoints[i], records[build.kernels.size() + i]);
    }
}

// Copies each chunk of the weights to the device as it is read, so the host never holds them all.
void Model::upload() {
    const Gpu& gpu = *gpu_;
    const Driver& driver = gpu.driver();
    const size_t bytes = static_cast<size_t>(folder_.arena_bytes);
    weights_ = std::make_unique<DeviceBuffer>(gpu, "the weights", bytes);
    const Stream stream(gpu);
    const auto copy = [&](size_t, uint64_t offset, std::string_view chunk) {
        if (offset == 0) folder_.check_header(chunk);
        const uint64_t arena = folder_.arena_offset;
        const uint64_t skipped = arena > offset ? arena - offset : 0;
        if (skipped >= chunk.size()) return;
        chunk.remove_prefix(static_cast<size_t>(skipped));
        const cu::Pointer destination = weights_->address() + (offset + skipped - arena);
        const Gpu::ContextGuard current(gpu);
        const Gpu::RelaxedCapture relaxed(gpu);  // memory that is not pinned is copied at once
        driver("the weights", driver.copy_in, destination, static_cast<const void*>(chunk.data()),
               chunk.size(), stream.get());
        stream.wait("the weights");  // the memory of `chunk` is used again for the next chunk
    };
    try {
        folder_.read({folder_.weights}, copy);
    } catch (...) {
        stream.settle();
        throw;
    }
}

void Model::add(const EndpointFile& file, const std::string& plan) {
    const auto info =
        std::find_if(kEndpoints.begin(), kEndpoints.end(),
                     [&](const EndpointInfo& candidate) { return candidate.name == file.name; });
    Endpoint& endpoint = endpoints_[static_cast<size_t>(info - kEndpoints.begin())];
    endpoint.result = info->result;
    const bool text = info->value_bytes == 0;
    if (endpoint.executable) throw FormatError(folder_.path + ": got two of " + file.name);
    endpoint.executable =
        std::make_unique<Executable>(kernels_, Plan::parse(plan), weights_->address());
    if (text) {
        endpoint.tokens = folder_.text->context;
        endpoint.width = folder_.text->embedding;
    } else {
        const VisionFacts& facts = *folder_.vision;
        endpoint.image_bytes =
            size_t{facts.height} * facts.width * facts.channels * info->value_bytes;
        endpoint.tokens = facts.tokens;
        endpoint.width = endpoint.result == BufferRole::kLogits
                             ? static_cast<uint32_t>(facts.labels.size())
                             : facts.embedding;
        endpoint.table = weights_->address() + static_cast<cu::Pointer>(file.table);
    }
    check(endpoint, file);
    const auto& names = text ? kTextBuffers : kImageBuffers;
    const Plan& parsed = endpoint.executable->plan();
    for (const uint32_t number : parsed.externals) {
        const auto role = std::find(names.begin(), names.end(), parsed.buffers[number].name);
        endpoint.roles.push_back(static_cast<BufferRole>(role - names.begin()));
    }
    const auto bytes = [&](size_t items) {
        const auto count = static_cast<int64_t>(items);
        return endpoint.bytes({count, count * endpoint.tokens, endpoint.tokens});
    };
    size_t& items = endpoint.max_items;
    while (items < kMaxItems && bytes(2 * items) <= kCallBytes) items *= 2;
}

// Throws FormatError unless the plan's buffers have the sizes that the model's facts demand, and
// all kernels are loaded and take the plan's parameters.
void Model::check(const Endpoint& endpoint, const EndpointFile& file) const {
    const Plan& plan = endpoint.executable->plan();
    const auto refuse = [&](const std::string& why) {
        throw FormatError(folder_.path + "/" + folder_.files[file.plan].path + ": " + why);
    };
    if (plan.weight_bytes != folder_.weight_bytes) {
        refuse("got a plan over " + std::to_string(plan.weight_bytes) + " bytes of weights, " +
               "wanted " + std::to_string(folder_.weight_bytes));
    }
    const Sizes one_item{1, endpoint.tokens, endpoint.tokens};
    std::array<int64_t, kRoles> wanted{};
    wanted.fill(-1);
    const auto want = [&](BufferRole role, int64_t bytes) {
        wanted[static_cast<size_t>(role)] = bytes;
    };
    want(BufferRole::kOffsets, 8);
    want(BufferRole::kRows, 4);
    want(endpoint.result, 4 * int64_t{endpoint.width});
    const bool embeds = endpoint.result == BufferRole::kEmbedding, text = endpoint.image_bytes == 0;
    want(embeds ? BufferRole::kStatus : BufferRole::kDistillationRows, 4);
    if (text) want(BufferRole::kIds, 4 * int64_t{endpoint.tokens});
    if (text) want(BufferRole::kPositions, 4 * int64_t{endpoint.tokens});
    size_t count = embeds ? 6 : 5;
    const auto& names = text ? kTextBuffers : kImageBuffers;
    for (const uint32_t number : plan.externals) {
        const Buffer& buffer = plan.buffers[number];
        const auto name = std::find(names.begin(), names.end(), buffer.name);
        const int64_t bytes = buffer.rows.at(one_item) * buffer.row_bytes;
        if (name == names.end() || buffer.name.empty()) refuse("got a buffer " + buffer.name);
        const auto role = static_cast<BufferRole>(name - names.begin());
        bool fits = bytes == wanted[static_cast<size_t>(role)];
        if (role == BufferRole::kDistillationRows) ++count;
        if (role == BufferRole::kPixels) {  // a plan ignores pixels past the last whole patch
            fits = bytes > 0 && bytes <= static_cast<int64_t>(endpoint.image_bytes);
        }
        if (role == BufferRole::kTable) {  // ends at the next table or with the arena
            const int64_t end = file.table + round_up<int64_t>(bytes, kAlignment);
            const auto begins = [&](const EndpointFile& other) { return other.table == end; };
            const auto& endpoints = folder_.build(arch_).endpoints;
            fits = bytes > 0 && (end == static_cast<int64_t>(folder_.arena_bytes) ||
                                 std::any_of(endpoints.begin(), endpoints.end(), begins));
        }
        if (!fits) {
            refuse("got " + buffer.name + " of " + std::to_string(bytes) + " bytes for one item");
        }
    }
    if (plan.externals.size() != count) {
        refuse("got " + std::to_string(plan.externals.size()) + " buffers of the caller's");
    }
    const std::vector<std::string> missing = endpoint.executable->missing();
    if (!missing.empty()) refuse("got no kernel " + missing.front());
}

const Endpoint& Model::endpoint(EndpointId id) const {
    const Endpoint& endpoint = endpoints_[static_cast<size_t>(id)];
    if (!endpoint.executable) {
        const char* name = kEndpoints[static_cast<size_t>(id)].name;
        throw std::invalid_argument(folder_.path + ": got a call for " + name +
                                    ", which the model does not have");
    }
    return endpoint;
}

}  // namespace vitrail
