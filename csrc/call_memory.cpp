#include "call_memory.hpp"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

namespace vitrail {

void CallMemory::reserve(size_t arena_bytes, size_t input_bytes, size_t output_bytes,
                         size_t limit) {
    const size_t grown = std::max(arena.bytes(), arena_bytes) +
                         std::max(inputs.bytes(), input_bytes) +
                         std::max(outputs.bytes(), output_bytes);
    if (grown > limit) release();
    try {
        arena.reserve(arena_bytes);
        inputs.reserve(input_bytes);
        host_inputs.reserve(input_bytes);
        host_outputs.reserve(output_bytes);
        outputs_are_unset_ = outputs.reserve(output_bytes) || outputs_are_unset_;
    } catch (...) {
        bytes_ = arena.bytes() + inputs.bytes() + outputs.bytes();
        throw;
    }
    bytes_ = arena.bytes() + inputs.bytes() + outputs.bytes();
    if (outputs_are_unset_) {  // the gaps between outputs are copied too, but no kernel writes them
        const Driver& driver = stream.gpu().driver();
        std::memset(host_outputs.data(), 0, outputs.bytes());
        driver("the outputs", driver.copy_in, outputs.address(),
               static_cast<const void*>(host_outputs.data()), outputs.bytes(), stream.get());
        stream.wait("the outputs");
        outputs_are_unset_ = false;
    }
}

void CallMemory::release() noexcept {
    arena.release();
    inputs.release();
    outputs.release();
    host_inputs.release();
    host_outputs.release();
    stream.settle();  // memory that is freed in stream order is free only now
    bytes_ = 0;
}

std::shared_ptr<SharedMemory> SharedMemory::of(const std::shared_ptr<const Gpu>& gpu, int ordinal) {
    using Key = std::pair<const Driver*, int>;
    static std::mutex mutex;
    // never destroyed: a model may be freed while the process ends
    static auto& by_gpu = *new std::map<Key, std::weak_ptr<SharedMemory>>;
    const std::lock_guard<std::mutex> lock(mutex);
    std::weak_ptr<SharedMemory>& entry = by_gpu[{&gpu->driver(), ordinal}];
    std::shared_ptr<SharedMemory> shared = entry.lock();
    if (!shared) entry = shared = std::make_shared<SharedMemory>(gpu);
    return shared;
}

void SharedMemory::join() {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.reserve(sessions_ + 1);  // so that later calls allocate nothing, and `give` cannot fail
    used_.reserve(sessions_ + 1);
    ++sessions_;
}

void SharedMemory::leave() noexcept {
    bool has_left = false;
    for (;;) {
        std::unique_ptr<CallMemory> freed;  // destroyed without the lock
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!has_left) --sessions_;
        has_left = true;
        // more than one if an earlier session left while `take` was making memory
        if (idle_.empty() || idle_.size() + used_.size() <= sessions_) return;
        freed = std::move(idle_.back());
        idle_.pop_back();
    }
}

std::unique_ptr<CallMemory> SharedMemory::take(const CallMemory* last, size_t limit) {
    std::unique_ptr<CallMemory> memory;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        // the memory used last, then the largest within the limit, then any
        const auto rank = [&](const std::unique_ptr<CallMemory>& idle) {
            const bool fits = idle->bytes() <= limit;
            return std::make_tuple(fits, fits && idle.get() == last, fits ? idle->bytes() : 0);
        };
        const auto best = std::max_element(
            idle_.begin(), idle_.end(),
            [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
        if (best != idle_.end()) {
            memory = std::move(*best);
            idle_.erase(best);
            used_.push_back(memory.get());
        }
    }
    if (!memory) {
        memory = std::make_unique<CallMemory>(*gpu_);
        const std::lock_guard<std::mutex> lock(mutex_);
        used_.push_back(memory.get());
    }
    if (memory->bytes() > limit) memory->release();
    return memory;
}

void SharedMemory::give(std::unique_ptr<CallMemory> memory) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_.erase(std::find(used_.begin(), used_.end(), memory.get()));
    idle_.push_back(std::move(memory));
}

size_t SharedMemory::trim() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t freed = 0;
    for (const std::unique_ptr<CallMemory>& idle : idle_) {
        freed += idle->bytes();
        idle->release();
    }
    return freed;
}

size_t SharedMemory::bytes() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t total = 0;
    for (const std::unique_ptr<CallMemory>& idle : idle_) total += idle->bytes();
    for (const CallMemory* used : used_) total += used->bytes();
    return total;
}

}  // namespace vitrail
