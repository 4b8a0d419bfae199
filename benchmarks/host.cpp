// What C++ does for a forward without Python: `host LIBRARY FOLDER (SEQUENCES TOKENS LONGEST)...`.
// A line a size: sequences, the allocations of the first call and of the thousands after it, and
// microseconds of one of these. LIBRARY is the driver stand-in, FOLDER has a plan and its kernels.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <new>

#include "executor.hpp"

namespace {

long allocations = 0;

void* counted(size_t size) {
    ++allocations;
    if (void* memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}

}  // namespace

// The forms of new that all others go through.
void* operator new(size_t size) { return counted(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void* operator new(size_t size, std::align_val_t alignment) {
    ++allocations;
    const auto to = static_cast<size_t>(alignment);
    if (void* memory = std::aligned_alloc(to, (size + to - 1) / to * to)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

using namespace vitrail;
constexpr int kCalls = 1000, kRounds = 100;

std::string read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void measure(Executable& executable, const Sizes& sizes) {
    const Sizes capacity = Executable::capacity(sizes);
    constexpr cu::Pointer kArena = cu::Pointer{1} << 40;  // nothing looks there
    std::vector<cu::Pointer> externals;
    for (size_t i = 0; i < executable.plan().externals.size(); ++i) {
        externals.push_back((cu::Pointer{2} << 40) + (i << 32));
    }
    const auto call = [&] {
        executable.run(sizes, capacity, kArena, externals, nullptr, false);
    };
    long before = allocations;
    call();
    const long first = allocations - before;
    std::vector<double> took(kRounds);
    before = allocations;
    for (double& each : took) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < kCalls; ++i) {
            externals.back() ^= 256;  // as an output that is elsewhere each time
            call();
        }
        const std::chrono::duration<double, std::micro> all =
            std::chrono::steady_clock::now() - start;
        each = all.count() / kCalls;
    }
    const long later = allocations - before;
    std::nth_element(took.begin(), took.begin() + kRounds / 2, took.end());
    std::printf("%lld %ld %ld %.3f\n", static_cast<long long>(sizes.sequences), first, later,
                took[kRounds / 2]);
}

}  // namespace

int main(int count, char** arguments) {
    const char* library = arguments[1];
    const std::filesystem::path folder = arguments[2];
    const Library standin(library);
    for (const char* setting : {"standin_checks", "standin_compute"}) {
        reinterpret_cast<void (*)(int)>(standin.find(setting))(0);
    }
    const auto gpu = std::make_shared<const Gpu>(library, 0);
    const auto kernels = std::make_shared<Kernels>(gpu);
    for (int i = 0;; ++i) {
        const std::string record = read(folder / ("kernel" + std::to_string(i)));
        if (record.empty()) break;
        kernels->load(record);
    }
    const std::string record = read(folder / "plan");
    Executable executable(kernels, Plan::parse(record), 1 << 30);
    for (int i = 3; i + 2 < count; i += 3) {
        const auto number = [&](int at) { return std::atoll(arguments[at]); };
        measure(executable, {number(i), number(i + 1), number(i + 2)});
    }
}
