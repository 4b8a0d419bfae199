#include "session.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace vitrail {

namespace {

int32_t* place(char* to, const Program::Layout& layout, Role role) {
    return reinterpret_cast<int32_t*>(to + layout.at[static_cast<size_t>(role)]);
}

size_t gap(size_t stop) { return round_up<size_t>(stop, kAlignment) - stop; }

class Pixels : public Items {
  public:
    Pixels(const Program& program, const void* pixels)
        : program_(program), pixels_(static_cast<const char*>(pixels)) {}

    const char* name() const override { return "image"; }

    Sizes sizes(size_t, size_t count) const override {
        const auto batch = static_cast<int64_t>(count);
        return {batch, batch * program_.tokens, program_.tokens};
    }

    void write(size_t first, size_t count, const Program::Layout& layout, char* to) const override {
        int32_t* offsets = place(to, layout, Role::kOffsets);
        int32_t* rows = place(to, layout, Role::kRows);
        for (size_t i = 0; i <= count; ++i) offsets[i] = static_cast<int32_t>(i * program_.tokens);
        std::copy(offsets, offsets + count, rows);  // the class token is an image's first
        std::memcpy(place(to, layout, Role::kPixels), pixels_ + first * program_.image_bytes,
                    count * program_.image_bytes);
    }

  private:
    const Program& program_;
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

    void write(size_t first, size_t count, const Program::Layout& layout, char* to) const override {
        int32_t* offsets = place(to, layout, Role::kOffsets);
        int32_t* rows = place(to, layout, Role::kRows);
        int32_t* ids = place(to, layout, Role::kIds);
        int32_t* positions = place(to, layout, Role::kPositions);
        int32_t total = 0;
        for (size_t i = 0; i < count; ++i) {
            const int32_t length = lengths_[first + i];
            const int32_t* row = ids_ + (first + i) * stride_;
            std::copy(row, row + length, ids + total);
            for (int32_t at = 0; at < length; ++at) positions[total + at] = at;
            offsets[i] = total;
            total += length;
            rows[i] = total - 1;  // the end token is a text's last
        }
        offsets[count] = total;
    }

  private:
    const int32_t* const ids_;
    const size_t stride_;
    const std::vector<int32_t>& lengths_;
};

// How many of a text's ids count: up to its end token, as the model's text encoder pools it.
int32_t cut(const TextFacts& facts, const int32_t* ids, int64_t length, size_t number) {
    const auto refuse = [&](const std::string& why) {
        throw std::invalid_argument("text " + std::to_string(number) + ": " + why);
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

void Session::images(What what, const void* pixels, size_t n, float* out, int32_t* status) {
    const Program& program = model_->program(what);
    const std::lock_guard<std::mutex> lock(mutex_);
    all(what, Pixels(program, pixels), n, out, status);
}

void Session::texts(const int32_t* ids, const int32_t* lengths, size_t stride, size_t n, float* out,
                    int32_t* status) {
    model_->program(What::kText);
    const TextFacts& facts = *model_->package().text;
    const std::lock_guard<std::mutex> lock(mutex_);
    lengths_.clear();
    for (size_t i = 0; i < n; ++i) {
        const int64_t length = lengths != nullptr ? lengths[i] : static_cast<int64_t>(stride);
        if (length > static_cast<int64_t>(stride)) {
            throw std::invalid_argument("text " + std::to_string(i) + ": got " +
                                        std::to_string(length) + " ids in a row of " +
                                        std::to_string(stride));
        }
        lengths_.push_back(cut(facts, ids + i * stride, length, i));
    }
    all(What::kText, Texts(ids, stride, lengths_), n, out, status);
}

// Piece by piece. Where memory lacks, this session's own goes first, and then halves go through
// one after the other: an item's bits do not depend on what goes with it.
void Session::all(What what, const Items& items, size_t n, float* out, int32_t* status) {
    const Program& program = model_->program(what);
    size_t most = program.most;
    if (status == nullptr) statuses_.resize(n);
    int32_t* found = status != nullptr ? status : statuses_.data();
    for (size_t first = 0; first < n;) {
        const size_t count = std::min(most, n - first);
        try {
            piece(what, items, first, count, out + first * program.width, found + first);
            first += count;
        } catch (const DriverError& error) {
            stream_.settle();
            if (error.code() != cu::kOutOfMemory) throw;
            release();
            if (count == 1) throw;
            most = (count + 1) / 2;
        } catch (...) {
            stream_.settle();
            throw;
        }
    }
    if (status != nullptr) return;
    for (size_t i = 0; i < n; ++i) {
        if (found[i] == 0) continue;
        const char* result = program.result == Role::kLogits ? "class scores are" : "embedding is";
        throw NotFinite(std::string(items.name()) + " " + std::to_string(i) + ": the " + result +
                        " not finite");
    }
}

void Session::piece(What what, const Items& items, size_t first, size_t count, float* out,
                    int32_t* status) {
    const Gpu::Current current(stream_.gpu());
    const Driver& driver = stream_.gpu().driver();
    const Program& program = model_->program(what);
    const Sizes sizes = items.sizes(first, count);
    const Program::Layout layout = program.layout(sizes);
    const Ready& ready = grow(what, sizes);
    items.write(first, count, layout, from_.data());
    externals_.clear();
    for (const Role role : program.roles) {
        const bool output = is_output(role);
        const size_t at = layout.at[static_cast<size_t>(role)];
        const size_t stop = at + layout.bytes[static_cast<size_t>(role)];
        // the gap before the next input: nothing of an earlier call goes with this one
        if (!output && role != Role::kTable) std::memset(from_.data() + stop, 0, gap(stop));
        externals_.push_back(role == Role::kTable ? program.table
                             : output             ? out_.address() + at
                                                  : in_.address() + at);
    }
    driver("the inputs", driver.copy_in, in_.address(), static_cast<const void*>(from_.data()),
           layout.in, stream_.get());
    program.executable->run(*ready.frame, sizes, arena_.address(), externals_, stream_.get(),
                            overlap_);
    driver("the outputs", driver.copy_out, static_cast<void*>(to_.data()), out_.address(),
           layout.out, stream_.get());
    stream_.wait("the outputs");
    const size_t width = program.width;
    std::memcpy(out, place(to_.data(), layout, program.result), count * width * sizeof(float));
    if (program.result == Role::kEmbedding) {
        std::memcpy(status, place(to_.data(), layout, Role::kStatus), count * sizeof(int32_t));
        return;
    }
    for (size_t i = 0; i < count; ++i) {  // no kernel looks at logits
        const float* row = out + i * width;
        status[i] = !std::all_of(row, row + width, [](float x) { return std::isfinite(x); });
    }
}

// Makes room for a call of `sizes`, once for all calls that are not larger.
const Session::Ready& Session::grow(What what, const Sizes& sizes) {
    const Program& program = model_->program(what);
    Ready& ready = ready_[static_cast<size_t>(what)];
    if (!ready.frame || !ready.frame->capacity().covers(sizes)) {
        Sizes capacity = Executable::capacity(sizes);
        if (ready.frame) {
            const Sizes& before = ready.frame->capacity();
            capacity.sequences = std::max(capacity.sequences, before.sequences);
            capacity.tokens = std::max(capacity.tokens, before.tokens);
            capacity.longest = std::max(capacity.longest, before.longest);
        }
        const Program::Layout layout = program.layout(capacity);
        const auto arena = static_cast<size_t>(program.executable->arena_bytes(capacity));
        ready = {std::make_unique<Frame>(*program.executable, capacity), arena, layout.in,
                 layout.out};
    }
    // another program may have grown since, or the memory may have been given back
    arena_.reserve(ready.arena);
    in_.reserve(ready.in);
    from_.reserve(ready.in);
    to_.reserve(ready.out);
    fresh_ = out_.reserve(ready.out) || fresh_;
    if (fresh_) {  // what is between the outputs is copied too, and was never written
        const Driver& driver = stream_.gpu().driver();
        std::memset(to_.data(), 0, ready.out);
        driver("the outputs", driver.copy_in, out_.address(), static_cast<const void*>(to_.data()),
               ready.out, stream_.get());
        stream_.wait("the outputs");
        fresh_ = false;
    }
    return ready;
}

void Session::release() noexcept {
    for (Ready& ready : ready_) ready = {};
    arena_.release();
    in_.release();
    out_.release();
    from_.release();
    to_.release();
    stream_.settle();  // memory is free once the stream has come to that
}

}  // namespace vitrail
