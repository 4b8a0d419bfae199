// What the driver that does nothing costs: nanoseconds of a launch, and the locks taken and
// allocations made by all calls of a warmed forward. First the same calls of the checked driver, to
// see that both are counted.

#include <dlfcn.h>
#include <pthread.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>

#include "abi.hpp"
#include "control.hpp"

extern "C" void* __libc_malloc(size_t);
extern "C" void* __libc_memalign(size_t, size_t);

namespace {
long locks = 0, allocations = 0;
}

// In the place of the C library's, for the stand-in too.
extern "C" {
void* malloc(size_t size) {
    ++allocations;
    return __libc_malloc(size);
}
void* aligned_alloc(size_t alignment, size_t size) {
    ++allocations;
    return __libc_memalign(alignment, size);
}
int pthread_mutex_lock(pthread_mutex_t* mutex) {
    using Lock = int(pthread_mutex_t*);
    static Lock* const lock = reinterpret_cast<Lock*>(dlsym(RTLD_NEXT, "pthread_mutex_lock"));
    ++locks;
    return lock(mutex);
}
}

namespace {

void check(int code, int line) {
    if (code == 0) return;
    std::printf("line %d: %d: %s\n", line, code, standin_complaint());
    std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

void forward(void* context, void* function, uint64_t weights, char* host) {
    void *stream, *event;
    uint64_t out = 0;
    int32_t number = 5;
    CHECK(cuCtxPushCurrent_v2(context));
    CHECK(cuStreamCreate(&stream, 1));
    CHECK(cuEventCreate(&event, 2));
    CHECK(cuMemAllocAsync(&out, 4096, stream));
    CHECK(cuMemcpyHtoDAsync_v2(out, host, 128, stream));
    alignas(64) char map[128];
    const uint64_t dims[] = {64, 16}, strides[] = {128};
    const uint32_t box[] = {64, 64}, steps[] = {1, 1};
    CHECK(cuTensorMapEncodeTiled(map, 6, 2, reinterpret_cast<void*>(weights), dims, strides, box,
                                 steps, 0, 3, 2, 0));
    void* parameters[] = {&out, &weights, &number};
    const standin::LaunchConfig config{{7, 1, 1}, {128, 1, 1}, 0, stream, nullptr, 0};
    CHECK(cuLaunchKernelEx(&config, function, parameters, nullptr));
    CHECK(cuMemcpyDtoHAsync_v2(host, out, 128, stream));
    CHECK(cuEventRecord(event, stream));
    CHECK(cuStreamWaitEvent(stream, event, 0));
    CHECK(cuEventQuery(event));
    CHECK(cuEventSynchronize(event));
    CHECK(cuStreamSynchronize(stream));
    CHECK(cuMemFreeAsync(out, stream));
    CHECK(cuEventDestroy_v2(event));
    CHECK(cuStreamDestroy_v2(stream));
    CHECK(cuCtxPopCurrent_v2(nullptr));
}

double launch_nanoseconds(void* function, uint64_t weights) {
    constexpr int kTimes = 1000000;
    int32_t number = 5;
    void* parameters[] = {&weights, &weights, &number};
    const standin::LaunchConfig config{{7, 1, 1}, {128, 1, 1}, 0, nullptr, nullptr, 0};
    double best = 1e9;
    for (int round = 0; round < 5; ++round) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < kTimes; ++i) cuLaunchKernelEx(&config, function, parameters, nullptr);
        const std::chrono::duration<double, std::nano> took =
            std::chrono::steady_clock::now() - start;
        best = std::min(best, took.count() / kTimes);
    }
    return best;
}

}  // namespace

int main(int, char** argv) {
    std::ifstream file(argv[1], std::ios::binary);
    const std::string image((std::istreambuf_iterator<char>(file)), {});
    void *context, *module, *function;
    CHECK(cuInit(0));
    CHECK(cuDevicePrimaryCtxRetain(&context, 0));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuModuleLoadData(&module, image.data()));
    CHECK(cuModuleGetFunction(&function, module, "plain"));
    uint64_t weights = 0;
    CHECK(cuMemAlloc_v2(&weights, 4096));
    static char host[128];

    locks = allocations = 0;
    forward(context, function, weights, host);
    std::printf("checked-locks %ld\nchecked-allocations %ld\n", locks, allocations);

    standin_checks(0);
    standin_compute(0);
    const uint64_t calls = standin_calls(standin::kAnyDevice);
    locks = allocations = 0;
    for (int i = 0; i < 100; ++i) forward(context, function, weights, host);
    const long locked = locks, allocated = allocations;
    std::printf("locks %ld\nallocations %ld\n", locked, allocated);
    std::printf("nanoseconds %.2f\n", launch_nanoseconds(function, weights));
    if (standin_calls(standin::kAnyDevice) != calls) return 1;
    standin_checks(1);
    CHECK(cuMemFree_v2(weights));
}
