// Counts what a thread of the program allocates by operator new, in a unit of its own so that the
// compiler sees no malloc behind a new. The stand-in is a library apart, and not counted.
#include <cstdlib>
#include <new>

#include "driver.hpp"

thread_local uint64_t allocations = 0;

void* operator new(size_t bytes) {
    ++allocations;
    if (void* found = std::malloc(bytes)) return found;
    throw std::bad_alloc();
}
void* operator new(size_t bytes, std::align_val_t alignment) {
    ++allocations;
    const auto side = static_cast<size_t>(alignment);
    if (void* found = std::aligned_alloc(side, (bytes + side - 1) / side * side)) return found;
    throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
