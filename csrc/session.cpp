#include "session.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace vitrail {

namespace {

// The buffer of a role within the inputs or the outputs.
int32_t* buffer_at(char* memory, const Endpoint::Layout& layout, BufferRole role) {
    return reinterpret_cast<int32_t*>(memory + layout.offset[static_cast<size_t>(role)]);
}

// Bytes from `end` to the next buffer.
size_t gap(size_t end) { return round_up<size_t>(end, kAlignment) - end; }

class Pixels : public Items {
  public:
    Pixels(const Endpoint& endpoint, const void* pixels)
        : endpoint_(endpoint), pixels_(static_cast<const char*>(pixels)) {}

    const char* name() const override { return "image"; }

    Sizes sizes(size_t, size_t count) const override {
        const auto batch = static_cast<int64_t>(count);
        return {batch, batch * endpoint_.tokens, endpoint_.tokens};
    }

    void write(size_t first, size_t count, const Endpoint::Layout& layout,
               char* inputs) const override {
        int32_t* offsets = buffer_at(inputs, layout, BufferRole::kOffsets);
        int32_t* rows = buffer_at(inputs, layout, BufferRole::kRows);
        for (size_t i = 0; i <= count; ++i) offsets[i] = static_cast<int32_t>(i * endpoint_.tokens);
        std::copy(offsets, offsets + count, rows);  // the class token is an image's first token
        if (layout.bytes[static_cast<size_t>(BufferRole::kDistillationRows)] != 0) {
            int32_t* distillation = buffer_at(inputs, layout, BufferRole::kDistillationRows);
            for (size_t i = 0; i < count; ++i) distillation[i] = rows[i] + 1;
        }
        std::memcpy(buffer_at(inputs, layout, BufferRole::kPixels),
                    pixels_ + first * endpoint_.image_bytes, count * endpoint_.image_bytes);
    }

  private:
    const Endpoint& endpoint_;
    const char* const pixels_;
};

class Texts : public Items {
  public:
    Texts(const int32_t* ids, size_t stride, const std::vector<int32_t>& lengths)
        : ids_(ids), stride_(stride), lengths_(lengths) {}

    const char* name() const override { return "text"; }

    Sizes sizes(size_t first, size_t count) const override {
        Sizes sizes{static_cast<int64_t>(count), 0, 0};
        for (size_t i = first; i < first + count; ++i) {
            sizes.tokens += lengths_[i];
            sizes.longest = std::max<int64_t>(sizes.longest, lengths_[i]);
        }
        return sizes;
    }

    void write(size_t first, size_t count, const Endpoint::Layout& layout,
               char* inputs) const override {
        int32_t* offsets = buffer_at(inputs, layout, BufferRole::kOffsets);
        int32_t* rows = buffer_at(inputs, layout, BufferRole::kRows);
        int32_t* ids = buffer_at(inputs, layout, BufferRole::kIds);
        int32_t* positions = buffer_at(inputs, layout, BufferRole::kPositions);
        int32_t total = 0;
        for (size_t i = 0; i < count; ++i) {
            const int32_t length = lengths_[first + i];
            const int32_t* text = ids_ + (first + i) * stride_;
            std::copy(text, text + length, ids + total);
            for (int32_t place = 0; place < length; ++place) positions[total + place] = place;
            offsets[i] = total;
            total += length;
            rows[i] = total - 1;  // the end token is a text's last token
        }
        offsets[count] = total;
    }

  private:
    const int32_t* const ids_;
    const size_t stride_;
    const std::vector<int32_t>& lengths_;
};

// The number of a text's ids up to and including its end token. The end token is pooled.
int32_t length_to_end(const TextFacts& facts, const int32_t* ids, int64_t length, size_t index) {
    const auto refuse = [&](const std::string& why) {
        throw std::invalid_argument("text " + std::to_string(index) + ": " + why);
    };
    if (length < 1 || length > facts.context) {
        refuse("got " + std::to_string(length) + " ids, wanted 1 to " +
               std::to_string(facts.context));
    }
    for (int64_t i = 0; i < length; ++i) {
        if (ids[i] >= 0 && static_cast<uint32_t>(ids[i]) < facts.vocab) continue;
        refuse("got id " + std::to_string(ids[i]) + " at " + std::to_string(i) + ", wanted 0 to " +
               std::to_string(facts.vocab - 1));
    }
    const int32_t* stop = ids + length;
    const int32_t* end =
        facts.eos < 0 ? std::max_element(ids, stop) : std::find(ids, stop, facts.eos);
    if (end == stop) {
        refuse("got no end token (" + std::to_string(facts.eos) + ") among its " +
               std::to_string(length) + " ids");
    }
    return static_cast<int32_t>(end - ids) + 1;
}

}  // namespace

Session::Session(std::shared_ptr<const Model> model, bool overlap)
    : model_(std::move(model)), overlap_(overlap) {
    model_->memory().join();
}

void Session::limit(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes != 0 ? bytes : SIZE_MAX;
    max_images_ = {};
}

void Session::images(EndpointId id, const void* pixels, size_t n, float* out, int32_t* status) {
    const Endpoint& endpoint = model_->endpoint(id);
    const std::lock_guard<std::mutex> lock(mutex_);
    run(id, Pixels(endpoint, pixels), n, out, status);
}

void Session::texts(const int32_t* ids, const int32_t* lengths, size_t stride, size_t n, float* out,
                    int32_t* status) {
    model_->endpoint(EndpointId::kText);
    const TextFacts& facts = *model_->folder().text;
    const std::lock_guard<std::mutex> lock(mutex_);
    lengths_.clear();
    for (size_t i = 0; i < n; ++i) {
        const int64_t length = lengths != nullptr ? lengths[i] : static_cast<int64_t>(stride);
        if (length > static_cast<int64_t>(stride)) {
            throw std::invalid_argument("text " + std::to_string(i) + ": got " +
                                        std::to_string(length) + " ids in a row of " +
                                        std::to_string(stride));
        }
        lengths_.push_back(length_to_end(facts, ids + i * stride, length, i));
    }
    run(EndpointId::kText, Texts(ids, stride, lengths_), n, out, status);
}

void Session::run(EndpointId id, const Items& items, size_t n, float* out, int32_t* status) {
    const Endpoint& endpoint = model_->endpoint(id);
    if (status == nullptr) statuses_.resize(n);
    int32_t* statuses = status != nullptr ? status : statuses_.data();
    std::unique_ptr<CallMemory> memory;
    try {
        run_parts(id, items, n, out, statuses, memory);
    } catch (...) {
        if (memory) {
            memory->stream.settle();
            model_->memory().give(std::move(memory));
        }
        throw;
    }
    if (memory) model_->memory().give(std::move(memory));
    if (status != nullptr) return;
    for (size_t i = 0; i < n; ++i) {
        if (statuses[i] == 0) continue;
        const char* result =
            endpoint.result == BufferRole::kLogits ? "class scores are" : "embedding is";
        throw NotFinite(std::string(items.name()) + " " + std::to_string(i) + ": the " + result +
                        " not finite");
    }
}

// Runs the items in parts within the limit. If memory runs out, frees the memory that no other call
// uses and goes on with half as many items at a time. The bits stay the same: an item's result does
// not depend on the others.
void Session::run_parts(EndpointId id, const Items& items, size_t n, float* out, int32_t* status,
                        std::unique_ptr<CallMemory>& memory) {
    const Endpoint& endpoint = model_->endpoint(id);
    size_t max_items = endpoint.max_items;
    for (size_t first = 0; first < n;) {
        const size_t count = fitting(id, items, first, std::min(max_items, n - first));
        try {
            if (!memory) memory = model_->memory().take(last_, limit_);
            last_ = memory.get();
            run_part(id, items, first, count, out + first * endpoint.width, status + first,
                     *memory);
            first += count;
        } catch (const DriverError& error) {
            if (error.code() != cu::kOutOfMemory) throw;
            if (memory) {
                memory->stream.settle();
                memory->release();
            }
            for (Workspace& workspace : workspaces_) workspace = {};
            model_->memory().trim();
            if (count == 1) throw;
            max_items = (count + 1) / 2;
        }
    }
}

// How many of `count` items from `first` on fit the limit. Throws LimitTooSmall if not even one does.
// The answer for an earlier call's size is known without an allocation.
size_t Session::fitting(EndpointId id, const Items& items, size_t first, size_t count) {
    if (limit_ == SIZE_MAX) return count;
    const Workspace& workspace = workspaces_[static_cast<size_t>(id)];
    size_t& max_images = max_images_[static_cast<size_t>(id)];
    if (max_images != 0) return std::min(count, max_images);
    if (workspace.frame && workspace.bytes() <= limit_ &&
        workspace.frame->capacity().covers(items.sizes(first, count))) {
        return count;
    }
    const Endpoint& endpoint = model_->endpoint(id);
    const bool images = endpoint.image_bytes != 0;  // they all have one size
    const auto bytes = [&](size_t n) {
        return endpoint.bytes(Executable::capacity(items.sizes(first, n)));
    };
    if (const size_t needed = bytes(1); needed > limit_) {
        throw LimitTooSmall("the session's limit: got " + std::to_string(limit_) +
                            " bytes, wanted " + std::to_string(needed) + " for one " +
                            items.name());
    }
    size_t fits = 1, beyond = (images ? endpoint.max_items : count) + 1;
    while (beyond - fits > 1) {
        const size_t middle = fits + (beyond - fits) / 2;
        (bytes(middle) <= limit_ ? fits : beyond) = middle;
    }
    if (images) max_images = fits;
    return std::min(count, fits);
}

void Session::run_part(EndpointId id, const Items& items, size_t first, size_t count, float* out,
                       int32_t* status, CallMemory& memory) {
    const Gpu::ContextGuard current(model_->gpu());
    const Driver& driver = model_->gpu().driver();
    const Stream& stream = memory.stream;
    const Endpoint& endpoint = model_->endpoint(id);
    const Sizes sizes = items.sizes(first, count);
    const Endpoint::Layout layout = endpoint.layout(sizes);
    const Workspace& workspace = grow(id, sizes, memory);
    // on every call, because endpoints and sessions share the memory
    memory.reserve(workspace.arena, workspace.inputs, workspace.outputs, limit_);
    items.write(first, count, layout, memory.host_inputs.data());
    externals_.clear();
    for (const BufferRole role : endpoint.roles) {
        const size_t offset = layout.offset[static_cast<size_t>(role)];
        const size_t end = offset + layout.bytes[static_cast<size_t>(role)];
        if (role == BufferRole::kTable) {
            externals_.push_back(endpoint.table);
        } else if (is_output(role)) {
            externals_.push_back(memory.outputs.address() + offset);
        } else {
            // clears the gap after each input: it may hold bytes of an earlier call
            std::memset(memory.host_inputs.data() + end, 0, gap(end));
            externals_.push_back(memory.inputs.address() + offset);
        }
    }
    driver("the inputs", driver.copy_in, memory.inputs.address(),
           static_cast<const void*>(memory.host_inputs.data()), layout.inputs, stream.get());
    endpoint.executable->run(*workspace.frame, sizes, memory.arena.address(), externals_,
                             stream.get(), overlap_);
    driver("the outputs", driver.copy_out, static_cast<void*>(memory.host_outputs.data()),
           memory.outputs.address(), layout.outputs, stream.get());
    stream.wait("the outputs");
    const size_t width = endpoint.width;
    char* outputs = memory.host_outputs.data();
    std::memcpy(out, buffer_at(outputs, layout, endpoint.result), count * width * sizeof(float));
    if (endpoint.result == BufferRole::kEmbedding) {
        std::memcpy(status, buffer_at(outputs, layout, BufferRole::kStatus),
                    count * sizeof(int32_t));
        return;
    }
    for (size_t i = 0; i < count; ++i) {  // no kernel checks logits
        const float* row = out + i * width;
        status[i] = !std::all_of(row, row + width, [](float x) { return std::isfinite(x); });
    }
}

// The frame for a call of `sizes`, and the bytes that the call needs. A call that is not larger than
// an earlier call allocates nothing. Where the memory of the earlier call was given back, a frame for
// this call alone takes the place of its frame.
const Session::Workspace& Session::grow(EndpointId id, const Sizes& sizes,
                                        const CallMemory& memory) {
    const Endpoint& endpoint = model_->endpoint(id);
    Workspace& workspace = workspaces_[static_cast<size_t>(id)];
    const bool usable = workspace.frame && workspace.bytes() <= limit_ &&
                        memory.holds(workspace.arena, workspace.inputs, workspace.outputs);
    if (usable && workspace.frame->capacity().covers(sizes)) return workspace;
    Sizes capacity = Executable::capacity(sizes);
    if (usable) {
        const Sizes& before = workspace.frame->capacity();
        const Sizes both{std::max(capacity.sequences, before.sequences),
                         std::max(capacity.tokens, before.tokens),
                         std::max(capacity.longest, before.longest)};
        if (endpoint.bytes(both) <= limit_) capacity = both;
    }
    const Endpoint::Layout layout = endpoint.layout(capacity);
    const auto arena = static_cast<size_t>(endpoint.executable->arena_bytes(capacity));
    workspace = {std::make_unique<Frame>(*endpoint.executable, capacity), arena, layout.inputs,
                 layout.outputs};
    return workspace;
}

}  // namespace vitrail
