// Counts what a thread allocates by operator new, and fails on demand, in a unit of its own so that
// the compiler sees no malloc behind a new. Of libraries, as the stand-in is one, nothing fails.
#include <cstdlib>
#include <new>

#include "driver.hpp"

thread_local uint64_t allocations = 0;
thread_local uint64_t allocation_fault = 0;

// What std::thread::hardware_concurrency asks: enough threads to see one fail after another.
extern "C" int get_nprocs() noexcept { return 8; }

extern char __executable_start, etext;  // the linker's: where the program's code begins and ends

namespace {

void count(const void* caller) {
    ++allocations;
    const bool own = caller >= &__executable_start && caller < &etext;
    if (own && allocation_fault != 0 && --allocation_fault == 0) throw std::bad_alloc();
}

}  // namespace

void* operator new(size_t bytes) {
    count(__builtin_return_address(0));
    if (void* found = std::malloc(bytes)) return found;
    throw std::bad_alloc();
}
void* operator new(size_t bytes, std::align_val_t alignment) {
    count(__builtin_return_address(0));
    const auto side = static_cast<size_t>(alignment);
    if (void* found = std::aligned_alloc(side, (bytes + side - 1) / side * side)) return found;
    throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
