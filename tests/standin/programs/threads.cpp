// Sixteen threads that each make the same chain of launches over memory of their own, while one
// asks what lives: all must end with the same digest, and ThreadSanitizer must see no race.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "abi.hpp"
#include "control.hpp"

namespace {

void check(int code, int line) {
    if (code == 0) return;
    std::printf("line %d: %d: %s\n", line, code, standin_complaint());
    std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

uint64_t chain(void* context, const std::string& image) {
    void *module, *function, *stream, *event;
    CHECK(cuCtxPushCurrent_v2(context));
    CHECK(cuModuleLoadData(&module, image.data()));
    CHECK(cuModuleGetFunction(&function, module, "plain"));
    CHECK(cuStreamCreate(&stream, 1));
    CHECK(cuEventCreate(&event, 2));
    uint64_t out = 0, x = 0, start = 1;
    CHECK(cuMemAllocAsync(&out, 64, stream));
    CHECK(cuMemcpyHtoDAsync_v2(out, &start, sizeof start, stream));
    for (int32_t i = 0; i < 300; ++i) {
        CHECK(cuMemAllocAsync(&x, 64, stream));
        void* parameters[] = {&out, &x, &i};
        const standin::LaunchConfig config{{7, 1, 1}, {128, 1, 1}, 0, stream, nullptr, 0};
        CHECK(cuLaunchKernelEx(&config, function, parameters, nullptr));
        CHECK(cuEventRecord(event, stream));
        CHECK(cuMemFreeAsync(x, stream));
    }
    uint64_t digest = 0;
    CHECK(cuMemcpyDtoHAsync_v2(&digest, out, sizeof digest, stream));
    CHECK(cuEventSynchronize(event));
    CHECK(cuMemFreeAsync(out, stream));
    CHECK(cuStreamSynchronize(stream));
    CHECK(cuEventDestroy_v2(event));
    CHECK(cuStreamDestroy_v2(stream));
    CHECK(cuModuleUnload(module));
    CHECK(cuCtxPopCurrent_v2(nullptr));
    return digest;
}

}  // namespace

int main(int, char** argv) {
    std::ifstream file(argv[1], std::ios::binary);
    const std::string image((std::istreambuf_iterator<char>(file)), {});
    void* context;
    CHECK(cuInit(0));
    CHECK(cuDevicePrimaryCtxRetain(&context, 0));
    std::atomic<bool> done{false};
    std::thread watcher([&] {
        standin::Live live;
        while (!done) {
            standin_live(standin::kAnyDevice, &live);
            standin_complaint();
            standin_record(done);
        }
    });
    std::vector<uint64_t> digests(16);
    std::vector<std::thread> threads;
    for (uint64_t& digest : digests)
        threads.emplace_back([&, place = &digest] { *place = chain(context, image); });
    for (std::thread& thread : threads) thread.join();
    done = true;
    watcher.join();
    standin::Live live;
    standin_live(standin::kAnyDevice, &live);
    const bool empty =
        live.allocations + live.bytes + live.modules + live.streams + live.events == 0;
    const bool alike = std::set<uint64_t>(digests.begin(), digests.end()).size() == 1;
    std::printf("%zu %s\n", digests.size(), alike && empty && digests[0] != 1 ? "alike" : "differ");
}
