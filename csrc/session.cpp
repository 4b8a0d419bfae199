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
    : model_(std::move(model)), overlap_(overlap), stream_(model_->gpu()) {}

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

// Runs the items in parts. If memory runs out, frees the session's own memory and goes on with half
// as many items at a time. The bits stay the same: an item's result does not depend on the others.
void Session::run(EndpointId id, const Items& items, size_t n, float* out, int32_t* status) {
    const Endpoint& endpoint = model_->endpoint(id);
    size_t max_items = endpoint.max_items;
    if (status == nullptr) statuses_.resize(n);
    int32_t* statuses = status != nullptr ? status : statuses_.data();
    for (size_t first = 0; first < n;) {
        const size_t count = std::min(max_items, n - first);
        try {
            run_part(id, items, first, count, out + first * endpoint.width, statuses + first);
            first += count;
        } catch (const DriverError& error) {
            stream_.settle();
            if (error.code() != cu::kOutOfMemory) throw;
            release();
            if (count == 1) throw;
            max_items = (count + 1) / 2;
        } catch (...) {
            stream_.settle();
            throw;
        }
    }
    if (status != nullptr) return;
    for (size_t i = 0; i < n; ++i) {
        if (statuses[i] == 0) continue;
        const char* result =
            endpoint.result == BufferRole::kLogits ? "class scores are" : "embedding is";
        throw NotFinite(std::string(items.name()) + " " + std::to_string(i) + ": the " + result +
                        " not finite");
    }
}

void Session::run_part(EndpointId id, const Items& items, size_t first, size_t count, float* out,
                       int32_t* status) {
    const Gpu::ContextGuard current(stream_.gpu());
    const Driver& driver = stream_.gpu().driver();
    const Endpoint& endpoint = model_->endpoint(id);
    const Sizes sizes = items.sizes(first, count);
    const Endpoint::Layout layout = endpoint.layout(sizes);
    const Workspace& workspace = grow(id, sizes);
    items.write(first, count, layout, host_inputs_.data());
    externals_.clear();
    for (const BufferRole role : endpoint.roles) {
        const size_t offset = layout.offset[static_cast<size_t>(role)];
        const size_t end = offset + layout.bytes[static_cast<size_t>(role)];
        if (role == BufferRole::kTable) {
            externals_.push_back(endpoint.table);
        } else if (is_output(role)) {
            externals_.push_back(outputs_.address() + offset);
        } else {
            // clears the gap after each input: it may hold bytes of an earlier call
            std::memset(host_inputs_.data() + end, 0, gap(end));
            externals_.push_back(inputs_.address() + offset);
        }
    }
    driver("the inputs", driver.copy_in, inputs_.address(),
           static_cast<const void*>(host_inputs_.data()), layout.inputs, stream_.get());
    endpoint.executable->run(*workspace.frame, sizes, arena_.address(), externals_, stream_.get(),
                             overlap_);
    driver("the outputs", driver.copy_out, static_cast<void*>(host_outputs_.data()),
           outputs_.address(), layout.outputs, stream_.get());
    stream_.wait("the outputs");
    const size_t width = endpoint.width;
    char* outputs = host_outputs_.data();
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

// Allocates the memory for a call of `sizes`. A call that is not larger than an earlier call
// allocates nothing.
const Session::Workspace& Session::grow(EndpointId id, const Sizes& sizes) {
    const Endpoint& endpoint = model_->endpoint(id);
    Workspace& workspace = workspaces_[static_cast<size_t>(id)];
    if (!workspace.frame || !workspace.frame->capacity().covers(sizes)) {
        Sizes capacity = Executable::capacity(sizes);
        if (workspace.frame) {
            const Sizes& before = workspace.frame->capacity();
            capacity.sequences = std::max(capacity.sequences, before.sequences);
            capacity.tokens = std::max(capacity.tokens, before.tokens);
            capacity.longest = std::max(capacity.longest, before.longest);
        }
        const Endpoint::Layout layout = endpoint.layout(capacity);
        const auto arena = static_cast<size_t>(endpoint.executable->arena_bytes(capacity));
        workspace = {std::make_unique<Frame>(*endpoint.executable, capacity), arena, layout.inputs,
                     layout.outputs};
    }
    // on every call, because endpoints share the memory, and `release` may have freed it
    arena_.reserve(workspace.arena);
    inputs_.reserve(workspace.inputs);
    host_inputs_.reserve(workspace.inputs);
    host_outputs_.reserve(workspace.outputs);
    outputs_are_unset_ = outputs_.reserve(workspace.outputs) || outputs_are_unset_;
    if (outputs_are_unset_) {  // the gaps between outputs are copied too, but no kernel writes them
        const Driver& driver = stream_.gpu().driver();
        std::memset(host_outputs_.data(), 0, workspace.outputs);
        driver("the outputs", driver.copy_in, outputs_.address(),
               static_cast<const void*>(host_outputs_.data()), workspace.outputs, stream_.get());
        stream_.wait("the outputs");
        outputs_are_unset_ = false;
    }
    return workspace;
}

void Session::release() noexcept {
    for (Workspace& workspace : workspaces_) workspace = {};
    arena_.release();
    inputs_.release();
    outputs_.release();
    host_inputs_.release();
    host_outputs_.release();
    stream_.settle();  // memory that is freed in stream order is free only now
}

}  // namespace vitrail
