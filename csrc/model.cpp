#include "model.hpp"

#include <algorithm>
#include <utility>

namespace vitrail {

namespace {

constexpr size_t kCallBytes = size_t{1} << 30;  // of device memory, for the activations of a call
constexpr size_t kMostItems = 4096;

struct Served {
    const char* name;
    size_t value_bytes;  // of a pixel's channel; 0 for texts
    Role result;
};
constexpr std::array<Served, kWhats> kServed = {{
    {"image.uint8", sizeof(uint8_t), Role::kEmbedding},
    {"image.float", sizeof(float), Role::kEmbedding},
    {"scores.uint8", sizeof(uint8_t), Role::kLogits},
    {"scores.float", sizeof(float), Role::kLogits},
    {"text", 0, Role::kEmbedding},
}};

// How a plan calls the buffers of a role; those of one tower begin with the tower's name.
constexpr std::array<const char*, kRoles> kImageBuffers = {
    "cu_seqlens", "token_rows", "pixels", "", "", "table", "vision.embedding", "vision.status",
    "vision.logits"};
constexpr std::array<const char*, kRoles> kTextBuffers = {
    "cu_seqlens", "token_rows", "", "ids", "positions", "", "text.embedding", "text.status", ""};

std::shared_ptr<const Gpu> open_gpu(const char* library, int ordinal) {
    try {
        return std::make_shared<const Gpu>(library != nullptr ? library : "libcuda.so.1", ordinal);
    } catch (const DriverError& error) {
        switch (error.code()) {
            case cu::kStubLibrary:
            case cu::kNoDevice:
            case cu::kInvalidDevice:
            case cu::kSystemNotReady:
            case cu::kDriverMismatch:
            case cu::kCompatibilityRefused:
                break;
            default:
                throw;
        }
        throw NoDevice("device " + std::to_string(ordinal) + ": " + error.what());
    } catch (const std::runtime_error& error) {
        throw NoDevice(std::string("the NVIDIA driver: ") + error.what());
    }
}

}  // namespace

Program::Layout Program::layout(const Sizes& sizes) const {
    Layout layout;
    const Plan& plan = executable->plan();
    for (size_t i = 0; i < roles.size(); ++i) {
        const Buffer& buffer = plan.buffers[plan.externals[i]];
        size_t bytes = static_cast<size_t>(buffer.rows.at(sizes) * buffer.row_bytes);
        if (roles[i] == Role::kTable) continue;
        if (roles[i] == Role::kPixels) {
            bytes = static_cast<size_t>(sizes.sequences) * image_bytes;
        }
        size_t& total = is_output(roles[i]) ? layout.out : layout.in;
        layout.at[static_cast<size_t>(roles[i])] = total;
        layout.bytes[static_cast<size_t>(roles[i])] = bytes;
        total += round_up<size_t>(bytes, kAlignment);
    }
    return layout;
}

Model::Model(const std::string& folder, const char* driver, int ordinal)
    : package_(folder, VITRAIL_VERSION), gpu_(open_gpu(driver, ordinal)) {
    const auto [major, minor] = gpu_->info().capability;
    arch_ = static_cast<uint32_t>(10 * major + minor);
    const Build& build = package_.build(arch_);
    kernels_ = std::make_shared<Kernels>(gpu_);
    std::vector<uint32_t> numbers = build.images;
    for (const ProgramFile& program : build.programs) numbers.push_back(program.plan);
    const std::vector<std::string> records = package_.read(numbers);
    for (size_t i = 0; i < build.images.size(); ++i) {
        if (Image::parse(records[i]).arch != arch_) {
            throw FormatError(folder + "/" + package_.files[build.images[i]].path +
                              ": got a kernel for another architecture");
        }
        kernels_->load(records[i]);
    }
    upload();
    for (size_t i = 0; i < build.programs.size(); ++i) {
        add(build.programs[i], records[build.images.size() + i]);
    }
}

// Weights go to the device as they are read, so that they are read once and held by nobody.
void Model::upload() {
    const Gpu& gpu = *gpu_;
    const Driver& driver = gpu.driver();
    const size_t bytes = static_cast<size_t>(package_.arena_bytes);
    weights_ = std::make_unique<Fixed>(gpu, "the weights", bytes);
    const Stream stream(gpu);
    const auto copy = [&](size_t, uint64_t at, std::string_view chunk) {
        if (at == 0) package_.check_header(chunk);
        const uint64_t before = package_.arena_offset > at ? package_.arena_offset - at : 0;
        if (before >= chunk.size()) return;
        chunk.remove_prefix(static_cast<size_t>(before));
        const cu::Pointer to = weights_->address() + (at + before - package_.arena_offset);
        const Gpu::Current current(gpu);
        const Gpu::Relaxed relaxed(gpu);  // memory that is not pinned is copied at once
        driver("the weights", driver.copy_in, to, static_cast<const void*>(chunk.data()),
               chunk.size(), stream.get());
        stream.wait("the weights");  // `chunk` is the next one's from here on
    };
    try {
        package_.read({package_.weights}, copy);
    } catch (...) {
        stream.settle();
        throw;
    }
}

void Model::add(const ProgramFile& file, const std::string& plan) {
    const auto served = std::find_if(kServed.begin(), kServed.end(),
                                   [&](const Served& each) { return each.name == file.name; });
    Program& program = programs_[static_cast<size_t>(served - kServed.begin())];
    program.result = served->result;
    const bool text = served->value_bytes == 0;
    if (program.executable) throw FormatError(package_.folder + ": got two of " + file.name);
    program.executable =
        std::make_unique<Executable>(kernels_, Plan::parse(plan), weights_->address());
    if (text) {
        program.tokens = package_.text->context;
        program.width = package_.text->embedding;
    } else {
        const VisionFacts& facts = *package_.vision;
        program.image_bytes =
            size_t{facts.height} * facts.width * facts.channels * served->value_bytes;
        program.tokens = facts.tokens;
        program.width = program.result == Role::kLogits ? static_cast<uint32_t>(facts.labels.size())
                                                        : facts.embedding;
        program.table = weights_->address() + static_cast<cu::Pointer>(file.table);
    }
    check(program, file);
    const auto& names = text ? kTextBuffers : kImageBuffers;
    const Plan& parsed = program.executable->plan();
    for (const uint32_t number : parsed.externals) {
        const auto role = std::find(names.begin(), names.end(), parsed.buffers[number].name);
        program.roles.push_back(static_cast<Role>(role - names.begin()));
    }
    const auto bytes = [&](size_t items) {
        const auto count = static_cast<int64_t>(items);
        const Sizes sizes{count, count * program.tokens, program.tokens};
        const Program::Layout layout = program.layout(sizes);
        return program.executable->arena_bytes(sizes) + layout.in + layout.out;
    };
    while (program.most < kMostItems && bytes(2 * program.most) <= kCallBytes) program.most *= 2;
}

// Whether the plan is one over what the model says it takes, and nothing is left to be found out.
void Model::check(const Program& program, const ProgramFile& file) const {
    const Plan& plan = program.executable->plan();
    const auto refuse = [&](const std::string& why) {
        throw FormatError(package_.folder + "/" + package_.files[file.plan].path + ": " + why);
    };
    if (plan.weight_bytes != package_.weight_bytes) {
        refuse("got a plan over " + std::to_string(plan.weight_bytes) + " bytes of weights, " +
               "wanted " + std::to_string(package_.weight_bytes));
    }
    const Sizes one{1, program.tokens, program.tokens};
    std::array<int64_t, kRoles> wanted{};
    wanted.fill(-1);
    const auto want = [&](Role role, int64_t bytes) { wanted[static_cast<size_t>(role)] = bytes; };
    want(Role::kOffsets, 8);
    want(Role::kRows, 4);
    want(program.result, 4 * int64_t{program.width});
    const bool embeds = program.result == Role::kEmbedding, text = program.image_bytes == 0;
    if (embeds) want(Role::kStatus, 4);
    if (text) want(Role::kIds, 4 * int64_t{program.tokens});
    if (text) want(Role::kPositions, 4 * int64_t{program.tokens});
    const auto& names = text ? kTextBuffers : kImageBuffers;
    for (const uint32_t number : plan.externals) {
        const Buffer& buffer = plan.buffers[number];
        const auto role = std::find(names.begin(), names.end(), buffer.name);
        const int64_t bytes = buffer.rows.at(one) * buffer.row_bytes;
        if (role == names.end() || buffer.name.empty()) refuse("got a buffer " + buffer.name);
        const auto place = static_cast<size_t>(role - names.begin());
        bool fits = bytes == wanted[place];
        if (place == static_cast<size_t>(Role::kPixels)) {  // not read past the last patch
            fits = bytes > 0 && bytes <= static_cast<int64_t>(program.image_bytes);
        }
        if (place == static_cast<size_t>(Role::kTable)) {  // then another, or the end
            const auto whole = round_up<int64_t>(bytes, kAlignment);
            const int64_t stop = file.table + whole;
            const auto begins = [&](const ProgramFile& other) { return other.table == stop; };
            const auto& programs = package_.build(arch_).programs;
            fits = bytes > 0 && (stop == static_cast<int64_t>(package_.arena_bytes) ||
                                 std::any_of(programs.begin(), programs.end(), begins));
        }
        if (!fits) {
            refuse("got " + buffer.name + " of " + std::to_string(bytes) + " bytes for one item");
        }
    }
    if (plan.externals.size() != (embeds ? 6 : 5)) {
        refuse("got " + std::to_string(plan.externals.size()) + " buffers of the caller's");
    }
    const std::vector<std::string> missing = program.executable->missing();
    if (!missing.empty()) refuse("got no kernel image " + missing.front());
}

const Program& Model::program(What what) const {
    const Program& program = programs_[static_cast<size_t>(what)];
    if (!program.executable) {
        const char* name = kServed[static_cast<size_t>(what)].name;
        throw std::invalid_argument(package_.folder + ": got a call for " + name +
                                    ", which the model does not have");
    }
    return program;
}

}  // namespace vitrail
