#include "plan.hpp"

#include <algorithm>
#include <map>

#include "numbers.hpp"

namespace vitrail {

namespace {

constexpr uint32_t kMaxParameterBytes = 4096;     // of a kernel, on every architecture
constexpr int64_t kMaxNumber = int64_t{1} << 40;  // products of these fit into 64 bits

Affine read_affine(Reader& in) {
    Affine affine;
    in.read(affine.sequences, affine.tokens, affine.longest, affine.constant);
    in.want(affine.constant >= -kMaxNumber && affine.constant <= kMaxNumber, "a size out of range");
    return affine;
}

Buffer read_buffer(Reader& in) {
    Buffer buffer;
    buffer.name = in.string();
    buffer.rows = read_affine(in);
    in.read(buffer.row_bytes, buffer.slot);
    in.want(buffer.row_bytes > 0 && buffer.row_bytes < kMaxNumber / 65536,
            "a row size out of range");
    in.want(buffer.external() || buffer.rows.grows(), "an arena buffer that can shrink");
    return buffer;
}

Argument read_argument(Reader& in) {
    Argument argument;
    const auto type = in.number<uint8_t>();
    in.want(type < static_cast<uint8_t>(ArgumentType::kCount), "an argument of an unknown type");
    argument.type = static_cast<ArgumentType>(type);
    switch (argument.type) {
        case ArgumentType::kInt32:
        case ArgumentType::kInt64:
            argument.integer = read_affine(in);
            break;
        case ArgumentType::kFloat:
            in.read(argument.number);
            break;
        case ArgumentType::kPointer:
        case ArgumentType::kMap:
            in.read(argument.address.buffer, argument.address.offset);
            if (argument.type == ArgumentType::kMap) {
                argument.rows = read_affine(in);
                in.read(argument.columns, argument.stride);
                in.want(argument.columns > 0 && argument.columns < kMaxNumber &&
                            argument.stride > 0 && argument.stride < kMaxNumber,
                        "a tensor map whose size is out of range");
            }
            break;
        default:
            break;
    }
    return argument;
}

Variant read_variant(Reader& in) {
    Variant variant;
    in.read(variant.max_rows, variant.kernel);
    variant.grid.times = read_affine(in);
    variant.grid.rows = read_affine(in);
    in.read(variant.grid.block, variant.grid.per_multiprocessor);
    in.want(variant.grid.block > 0, "a grid whose blocks have no rows");
    variant.arguments = in.list(read_argument);
    uint32_t bytes = 0;
    for (const Argument& argument : variant.arguments) bytes += argument.size() + 64;
    in.want(bytes <= 4 * kMaxParameterBytes, "a kernel with too many arguments");
    return variant;
}

Launch read_launch(Reader& in) {
    Launch launch;
    launch.label = in.string();
    launch.rows = read_affine(in);
    launch.variants = in.list(read_variant);
    in.want(!launch.variants.empty(), "a launch without a kernel");
    const auto smaller = [](const Variant& a, const Variant& b) { return a.max_rows < b.max_rows; };
    in.want(std::is_sorted(launch.variants.begin(), launch.variants.end(), smaller),
            "a launch whose kernels are not in order of rows");
    return launch;
}

void check_address(const Reader& in, const Plan& plan, const Argument& argument) {
    const Address& address = argument.address;
    if (address.buffer != kWeights) {
        in.want(address.buffer >= 0 && static_cast<size_t>(address.buffer) < plan.buffers.size(),
                "an argument in a buffer that does not exist");
        in.want(address.offset == 0, "an argument inside a buffer");
        return;
    }
    const auto offset = static_cast<uint64_t>(address.offset);
    in.want(address.offset >= 0 && offset < plan.weight_bytes, "an argument past the weights");
    if (argument.type == ArgumentType::kMap) {
        const int64_t rows = argument.rows.at(Sizes{});
        in.want(
            rows > 0 && static_cast<uint64_t>(rows) <=
                            (plan.weight_bytes - offset) / static_cast<uint64_t>(argument.stride),
            "a tensor map past the weights");
    }
}

void check(const Reader& in, const Plan& plan) {
    for (const Launch& launch : plan.launches) {
        for (const Variant& variant : launch.variants) {
            in.want(variant.kernel < plan.kernel_keys.size(), "a launch of an unlisted kernel");
            for (const Argument& argument : variant.arguments) {
                if (argument.type == ArgumentType::kPointer ||
                    argument.type == ArgumentType::kMap) {
                    check_address(in, plan, argument);
                }
            }
        }
    }
}

// Sets `slots` and `externals`.
void number_buffers(const Reader& in, Plan& plan) {
    const auto count = static_cast<int32_t>(plan.buffers.size());
    std::map<int32_t, uint32_t> externals;  // index by position
    for (uint32_t index = 0; index < plan.buffers.size(); ++index) {
        const int32_t slot = plan.buffers[index].slot;
        in.want(slot < count && slot >= -count, "a buffer in a slot that does not exist");
        if (slot >= 0) {
            plan.slots = std::max(plan.slots, static_cast<uint32_t>(slot) + 1);
        } else {
            in.want(externals.emplace(-1 - slot, index).second,
                    "two buffers of the caller at one position");
        }
    }
    for (const auto& [position, index] : externals) {
        in.want(position == static_cast<int32_t>(plan.externals.size()),
                "a gap among the buffers of the caller");
        plan.externals.push_back(index);
    }
}

}  // namespace

Plan Plan::parse(std::string_view bytes) {
    Reader in(bytes, "plan", magic("plan"));
    Plan plan;
    plan.name = in.string();
    in.read(plan.weight_bytes);
    plan.buffers = in.list(read_buffer);
    plan.kernel_keys = in.list([](Reader& reader) { return reader.string(); });
    plan.launches = in.list(read_launch);
    in.end();
    number_buffers(in, plan);
    check(in, plan);
    return plan;
}

KernelBinary KernelBinary::parse(std::string_view bytes) {
    Reader in(bytes, "kernel binary", magic("kernel"));
    KernelBinary binary;
    binary.key = in.string();
    binary.function = in.string();
    in.read(binary.arch, binary.threads, binary.shared);
    binary.overlaps = in.number<uint8_t>() != 0;
    binary.boxes = in.list([](Reader& reader) {
        Box box;
        reader.read(box.type, box.swizzle, box.bytes, box.rows, box.columns);
        return box;
    });
    binary.cubin = in.bytes();
    in.end();
    in.want(binary.threads >= 32 && binary.threads <= 1024, "a block of an impossible size");
    in.want(!binary.cubin.empty(), "no machine code");
    return binary;
}

}  // namespace vitrail
