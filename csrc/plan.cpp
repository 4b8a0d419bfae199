#include "plan.hpp"

#include <algorithm>

namespace vitrail {

namespace {

constexpr uint32_t kMostParameterBytes = 4096;  // of a kernel, on every architecture
constexpr int64_t kLargest = int64_t{1} << 40;  // of numbers whose products must fit 64 bits

Affine read_affine(Reader& in) {
    Affine affine;
    affine.sequences = in.number<int32_t>();
    affine.tokens = in.number<int32_t>();
    affine.longest = in.number<int32_t>();
    affine.constant = in.number<int64_t>();
    in.want(affine.constant >= -kLargest && affine.constant <= kLargest, "a size out of range");
    return affine;
}

Buffer read_buffer(Reader& in) {
    Buffer buffer;
    buffer.name = in.string();
    buffer.rows = read_affine(in);
    buffer.row_bytes = in.number<int64_t>();
    buffer.slot = in.number<int32_t>();
    in.want(buffer.row_bytes > 0 && buffer.row_bytes < kLargest / 65536, "rows of no such size");
    in.want(buffer.external() || buffer.rows.grows(), "an arena buffer that can shrink");
    return buffer;
}

Argument read_argument(Reader& in) {
    Argument argument;
    const auto kind = in.number<uint8_t>();
    in.want(kind < static_cast<uint8_t>(Kind::kCount), "an argument of an unknown kind");
    argument.kind = static_cast<Kind>(kind);
    switch (argument.kind) {
        case Kind::kInt32:
        case Kind::kInt64:
            argument.integer = read_affine(in);
            break;
        case Kind::kFloat:
            argument.number = in.number<float>();
            break;
        case Kind::kPointer:
        case Kind::kMap:
            argument.place.buffer = in.number<int32_t>();
            argument.place.offset = in.number<int64_t>();
            if (argument.kind == Kind::kMap) {
                argument.rows = read_affine(in);
                argument.columns = in.number<int64_t>();
                argument.stride = in.number<int64_t>();
                in.want(argument.columns > 0 && argument.columns < kLargest &&
                            argument.stride > 0 && argument.stride < kLargest,
                        "a tensor map of no such size");
            }
            break;
        default:
            break;
    }
    return argument;
}

Variant read_variant(Reader& in) {
    Variant variant;
    variant.until = in.number<int64_t>();
    variant.image = in.number<uint32_t>();
    variant.grid.times = read_affine(in);
    variant.grid.rows = read_affine(in);
    variant.grid.block = in.number<uint32_t>();
    variant.grid.per_multiprocessor = in.number<uint32_t>();
    in.want(variant.grid.block > 0, "a grid of blocks of no rows");
    variant.arguments = in.list(read_argument);
    uint32_t bytes = 0;
    for (const Argument& argument : variant.arguments) bytes += argument.size() + 64;
    in.want(bytes <= 4 * kMostParameterBytes, "a kernel with too many arguments");
    return variant;
}

Launch read_launch(Reader& in) {
    Launch launch;
    launch.label = in.string();
    launch.rows = read_affine(in);
    launch.variants = in.list(read_variant);
    in.want(!launch.variants.empty(), "a launch without a kernel");
    const auto rising = [](const Variant& a, const Variant& b) { return a.until < b.until; };
    in.want(std::is_sorted(launch.variants.begin(), launch.variants.end(), rising),
            "a launch whose kernels are not in order of rows");
    return launch;
}

void check_place(const Reader& in, const Plan& plan, const Argument& argument) {
    const Place& place = argument.place;
    if (place.buffer != kWeights) {
        in.want(place.buffer >= 0 && static_cast<size_t>(place.buffer) < plan.buffers.size(),
                "an argument in a buffer that does not exist");
        in.want(place.offset == 0, "an argument inside a buffer");
        return;
    }
    const auto offset = static_cast<uint64_t>(place.offset);
    in.want(place.offset >= 0 && offset < plan.weight_bytes, "an argument past the weights");
    if (argument.kind == Kind::kMap) {
        const int64_t rows = argument.rows.at(Sizes{});
        in.want(rows > 0 && static_cast<uint64_t>(rows) <=
                        (plan.weight_bytes - offset) / static_cast<uint64_t>(argument.stride),
                "a tensor map past the weights");
    }
}

void check(const Reader& in, const Plan& plan) {
    for (const Launch& launch : plan.launches) {
        for (const Variant& variant : launch.variants) {
            in.want(variant.image < plan.images.size(), "a launch of an image that is not listed");
            for (const Argument& argument : variant.arguments) {
                if (argument.kind == Kind::kPointer || argument.kind == Kind::kMap) {
                    check_place(in, plan, argument);
                }
            }
        }
    }
}

}  // namespace

Plan Plan::parse(std::string_view bytes) {
    Reader in(bytes, "plan", kPlanMagic);
    Plan plan;
    plan.name = in.string();
    plan.weight_bytes = in.number<uint64_t>();
    plan.buffers = in.list(read_buffer);
    plan.images = in.list([](Reader& reader) { return reader.string(); });
    plan.launches = in.list(read_launch);
    in.end();
    const auto count = static_cast<int64_t>(plan.buffers.size());
    std::vector<int64_t> at(plan.buffers.size(), -1);
    int64_t brought = 0;
    for (int64_t number = 0; number < count; ++number) {
        const int32_t slot = plan.buffers[static_cast<size_t>(number)].slot;
        in.want(slot < count && slot >= -count, "a buffer in a slot that does not exist");
        if (slot >= 0) {
            plan.slots = std::max(plan.slots, static_cast<uint32_t>(slot) + 1);
        } else {
            at[static_cast<size_t>(-1 - slot)] = number;
            ++brought;
        }
    }
    for (int64_t place = 0; place < brought; ++place) {
        in.want(at[static_cast<size_t>(place)] >= 0, "two buffers in one place of the caller's");
        plan.externals.push_back(static_cast<uint32_t>(at[static_cast<size_t>(place)]));
    }
    check(in, plan);
    return plan;
}

Image Image::parse(std::string_view bytes) {
    Reader in(bytes, "kernel image", kImageMagic);
    Image image;
    image.key = in.string();
    image.function = in.string();
    image.arch = in.number<uint32_t>();
    image.threads = in.number<uint32_t>();
    image.shared = in.number<uint32_t>();
    image.overlaps = in.number<uint8_t>() != 0;
    image.boxes = in.list([](Reader& reader) {
        Box box;
        box.type = reader.number<uint32_t>();
        box.swizzle = reader.number<uint32_t>();
        box.bytes = reader.number<uint32_t>();
        box.rows = reader.number<uint32_t>();
        box.columns = reader.number<uint32_t>();
        return box;
    });
    image.machine = in.bytes();
    in.end();
    in.want(image.threads >= 32 && image.threads <= 1024, "a block of an impossible size");
    in.want(!image.machine.empty(), "no machine code");
    return image;
}

}  // namespace vitrail
