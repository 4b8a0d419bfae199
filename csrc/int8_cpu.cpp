#include "int8_cpu.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>

namespace vitrail::int8 {
namespace {

// The instructions of that name, or the fastest if `name` is null; null if the CPU has none.
const Kernels* find(const char* name) {
    const auto wanted = [name](const Kernels& with) {
        return !name || std::strcmp(with.name, name) == 0;
    };
#if VITRAIL_AVX512_VNNI
    if (wanted(kAvx512) && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return &kAvx512;
#endif
#if VITRAIL_AVX_VNNI
    if (wanted(kAvxVnni) && __builtin_cpu_supports("avxvnni") && __builtin_cpu_supports("fma"))
        return &kAvxVnni;
#endif
    return nullptr;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{find(nullptr)};
    return kernels;
}

const Kernels& kernels() {
    const Kernels* const with = chosen();
    if (!with) throw std::runtime_error("int8: this processor or this build has no VNNI");
    return *with;
}

// Memory of a thread, kept for its next task.
class Room {
  public:
    uint8_t* take(size_t bytes) {
        if (bytes > size_) {
            data_.reset();  // before the next one, so that both are never held
            size_ = 0;
            void* data = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
            if (!data) throw std::bad_alloc();
            data_.reset(static_cast<uint8_t*>(data));
            size_ = bytes;
        }
        return data_.get();
    }

  private:
    struct Free {
        void operator()(uint8_t* data) const { std::free(data); }
    };
    std::unique_ptr<uint8_t, Free> data_;
    size_t size_ = 0;
};

// ---- threads

using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

// OpenMP's entry for a parallel region, as PyTorch's own OpenMP exports it. Its threads are those
// of PyTorch, so that no second set of threads competes with them.
Team team() {
    static const Team found = reinterpret_cast<Team>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Work {
    void (*run)(const void*, std::atomic<int64_t>&);
    const void* body;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
};

// Calls body(next) on every thread of a team; body claims its tasks from the counter.
template <class Body>
void parallel(int64_t tasks, int threads, const Body& body) {
    Work work;
    work.body = &body;
    work.run = [](const void* held, std::atomic<int64_t>& next) {
        (*static_cast<const Body*>(held))(next);
    };
    const auto region = [](void* data) {
        Work& shared = *static_cast<Work*>(data);
        try {
            shared.run(shared.body, shared.next);
        } catch (const std::bad_alloc&) {
            shared.failed = true;
        }
    };
    const auto count = static_cast<unsigned>(std::min<int64_t>(tasks, std::max(threads, 1)));
    if (count > 1 && team())
        team()(region, &work, count, 0);
    else
        region(&work);
    if (work.failed) throw std::bad_alloc();
}

// Row counts of tasks are multiples of kMostRows; a thread gets about four tasks.
int64_t rows_of(int64_t rows, int64_t panels, int threads) {
    if (threads <= 1 || panels % threads == 0 || panels >= 4 * threads) return rows;
    const int64_t wanted = (4 * threads + panels - 1) / panels;
    const int64_t each = (rows + wanted - 1) / wanted;
    return (std::max<int64_t>(each, 48) + kMostRows - 1) / kMostRows * kMostRows;
}

template <class Rows>
void product(const Kernels& with, const Weight& weight, int64_t rows, int threads,
             const Rows& compute) {
    if (rows == 0) return;
    const int64_t panels = (weight.columns + kPanel - 1) / kPanel;
    const int64_t each = rows_of(rows, panels, threads), parts = (rows + each - 1) / each;
    const int64_t groups = weight.depth / weight.group;
    parallel(panels * parts, threads, [&](std::atomic<int64_t>& next) {
        static thread_local Room room;
        const auto codes = static_cast<size_t>(kPanel * weight.depth);
        const auto integers = static_cast<size_t>(kPanel * groups) * sizeof(int32_t);
        uint8_t* const data =
            room.take(codes + integers + static_cast<size_t>(kMostRows * weight.depth));
        auto* const packed = reinterpret_cast<int8_t*>(data);
        auto* const begin = reinterpret_cast<int32_t*>(data + codes);
        int64_t ready = -1;
        for (int64_t task; (task = next.fetch_add(1)) < panels * parts;) {
            const int64_t panel = task / parts, first = task % parts * each;
            if (panel != ready) with.pack(weight, panel, packed, begin);
            ready = panel;
            compute(Task{panel, first, std::min(first + each, rows)}, packed, begin,
                    data + codes + integers);
        }
    });
}

}  // namespace

const char* instructions() {
    const Kernels* const with = chosen();
    return with ? with->name : "";
}

bool use(const char* name) {
    const Kernels* const with = find(name);
    if (with) chosen() = with;
    return with != nullptr;
}

void norm_quant(const NormQuant& call, int threads) {
    const Kernels& with = kernels();
    constexpr int64_t kEach = 64;
    const int64_t tasks = (call.rows + kEach - 1) / kEach;
    parallel(tasks, threads, [&](std::atomic<int64_t>& next) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;)
            with.norm_quant(
                call, Task{0, task * kEach, std::min((task + 1) * kEach, call.rows)});
    });
}

void linear(const Linear& call, int threads) {
    const Kernels& with = kernels();
    const Weight weight{call.weight, nullptr, call.columns, call.depth, call.depth};
    product(with, weight, call.rows, threads,
            [&](const Task& task, const int8_t* packed, const int32_t* begin, uint8_t* bytes) {
                with.linear(call, task, packed, begin, bytes);
            });
}

void linear_grouped(const LinearGrouped& call, int threads) {
    const Kernels& with = kernels();
    const Weight weight{call.weight, call.shift, call.columns, call.depth, call.group};
    product(with, weight, call.rows, threads,
            [&](const Task& task, const int8_t* packed, const int32_t* begin, uint8_t* bytes) {
                with.grouped(call, task, packed, begin, bytes);
            });
}

}  // namespace vitrail::int8
