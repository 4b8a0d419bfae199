// Resizes and crops a batch of uint8 images of mixed sizes, bit for bit like Pillow (resize.hpp).
// cuda_binaries.py compiles these kernels when Vitrail is installed; CudaBinary loads them.
#include "resize.hpp"

using vitrail::resize::Image;
using vitrail::resize::kLines;
using vitrail::resize::kNumbers;
using vitrail::resize::kTogether;

constexpr int kLanes = 32;
constexpr int kThreads = 128;

// If this kernel overlaps the previous one, waits until the previous kernel's writes are visible.
// No load may come earlier, so pointers are not __restrict__: the compiler could move a load up.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Grid: groups * ceil(width * channels / 32) blocks of 32 x 4 threads. A thread computes one value
// in each of four lines of a group.
extern "C" __global__ void __launch_bounds__(kThreads)
    vitrail_resize_across(uint8_t* middle, const uint8_t* pixels, const Image* images,
                          const int32_t* groups, const int32_t* taps, int32_t width, int32_t stride,
                          int32_t channels) {
    wait_for_previous_kernel();
    const int32_t numbers = width * channels;
    const int32_t tiles = (numbers + kLanes - 1) / kLanes;
    const int32_t group = static_cast<int32_t>(blockIdx.x) / tiles;
    const int32_t at = static_cast<int32_t>(blockIdx.x) % tiles * kLanes + threadIdx.x;
    if (at >= numbers) return;
    vitrail::resize::across(middle, pixels, images[groups[group]], taps, group,
                            static_cast<int32_t>(threadIdx.y) * kTogether, at, width, stride,
                            channels);
}

// Grid: images * ceil(height * stride / 16 / 128) blocks of 128 threads. A thread computes 16 bytes
// of an output line; all threads of a line read the same weights.
extern "C" __global__ void __launch_bounds__(kThreads)
    vitrail_resize_down(uint8_t* out, const uint8_t* middle, const Image* images,
                        const int32_t* taps, int32_t height, int32_t numbers, int32_t stride) {
    wait_for_previous_kernel();
    const int32_t chunks = stride / kNumbers;
    const int32_t blocks = (height * chunks + kThreads - 1) / kThreads;
    const int32_t image = static_cast<int32_t>(blockIdx.x) / blocks;
    const int32_t chunk = static_cast<int32_t>(blockIdx.x) % blocks * kThreads + threadIdx.x;
    if (chunk >= height * chunks) return;
    vitrail::resize::down(out + int64_t{image} * height * numbers, middle, images[image], taps,
                          chunk / chunks, chunk % chunks * kNumbers, height, numbers, stride);
}

static_assert(kLines / kTogether * kLanes == kThreads, "a block handles the lines of one group");
