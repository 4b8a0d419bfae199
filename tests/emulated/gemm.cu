// A matrix product of the kind that is written by hand for sm_90: out = x w^T + bias, fp16 with
// fp32 sums, a producer warpgroup and two consumers. Blocks of a cluster of two compute 128 x 256
// each; each loads half of the tile of w for both. Faults are planted in it; nothing else uses it.
#include <cuda_fp16.h>

#include <cstdint>

struct alignas(64) TensorMap {
    char bytes[128];
};

constexpr int kBlockM = 128, kBlockN = 256, kBlockK = 64, kStages = 4;
constexpr uint32_t kTileX = kBlockM * kBlockK * 2, kTileW = kBlockN * kBlockK * 2;  // bytes
constexpr uint32_t kStage = kTileX + kTileW;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void init(uint32_t mbarrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(count));
}

__device__ __forceinline__ void wait(uint32_t mbarrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra.uni again;\n}" ::"r"(
            mbarrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void expect(uint32_t mbarrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void load(uint32_t to, const TensorMap& map, uint32_t mbarrier,
                                     int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
        "l"(&map), "r"(mbarrier), "r"(column), "r"(row)
        : "memory");
}

// To the same address of every block that the mask names; each block's mbarrier gets the bytes.
__device__ __forceinline__ void load_multicast(uint32_t to, const TensorMap& map, uint32_t mbarrier,
                                               int column, int row, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
        "l"(&map), "r"(mbarrier), "r"(column), "r"(row), "h"(mask)
        : "memory");
}

// Arrives at the mbarrier of the same address in another block.
__device__ __forceinline__ void arrive_at(uint32_t mbarrier, int rank) {
    asm volatile(
        "{\n.reg .b32 far;\nmapa.shared::cluster.u32 far, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [far];\n}" ::"r"(mbarrier),
        "r"(rank)
        : "memory");
}

__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
}

// Rows of 128 bytes with the swizzle of that width, 1024 bytes from 8 rows to the next.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    return uint64_t{address >> 4 & 0x3fff} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 |
           uint64_t{1} << 62;
}

// clang-format off
#define EIGHT(operand, i) operand(i), operand(i + 1), operand(i + 2), operand(i + 3), \
    operand(i + 4), operand(i + 5), operand(i + 6), operand(i + 7)
#define SUMS(operand) EIGHT(operand, 0), EIGHT(operand, 8), EIGHT(operand, 16), \
    EIGHT(operand, 24), EIGHT(operand, 32), EIGHT(operand, 40), EIGHT(operand, 48), \
    EIGHT(operand, 56), EIGHT(operand, 64), EIGHT(operand, 72), EIGHT(operand, 80), \
    EIGHT(operand, 88), EIGHT(operand, 96), EIGHT(operand, 104), EIGHT(operand, 112), \
    EIGHT(operand, 120)
#define SUM(i) "+f"(sums[i])
// clang-format on

__device__ __forceinline__ void multiply(float (&sums)[128], uint64_t x, uint64_t w, int adds) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.ne.b32 adds, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "
        "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "
        "%124, %125, %126, %127}, %128, %129, adds, 1, 1, 0, 0;\n}"
        : SUMS(SUM)
        : "l"(x), "l"(w), "r"(adds));
}

__device__ __forceinline__ void produce(const TensorMap& x_map, const TensorMap& w_map, int row,
                                        int column, int steps, uint32_t rank, uint32_t tiles,
                                        uint32_t full, uint32_t empty) {
#pragma unroll 1  // so that each instruction stands once in the PTX
    for (int i = 0; i < steps; ++i) {
        const int stage = i % kStages;
        const uint32_t mbarrier = full + 8 * stage, x = tiles + stage * kStage;
        wait(empty + 8 * stage, (i / kStages & 1) ^ 1);
        expect(mbarrier, kStage);
        load(x, x_map, mbarrier, i * kBlockK, row);
        load_multicast(x + kTileX + rank * (kTileW / 2), w_map, mbarrier, i * kBlockK,
                       column + int(rank) * (kBlockN / 2), 3);
    }
}

__device__ __forceinline__ void consume(float (&sums)[128], int group, int thread, int steps,
                                        uint32_t tiles, uint32_t full, uint32_t empty) {
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        const int stage = i % kStages;
        const uint32_t x = tiles + stage * kStage + group * 64 * 128;
        const uint32_t w = tiles + stage * kStage + kTileX;
        wait(full + 8 * stage, i / kStages & 1);
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int j = 0; j < kBlockK / 16; ++j)
            multiply(sums, descriptor(x + 32 * j), descriptor(w + 32 * j), i + j > 0);
        asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::
                         : "memory");
        if (thread < 2) arrive_at(empty + 8 * stage, thread);
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
         __half* out, const float* bias, int m, int n, int k) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t tiles = shared_address(shared), full = tiles + kStages * kStage;
    const uint32_t empty = full + 8 * kStages;
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    const int across = (n + kBlockN - 1) / kBlockN;
    const int row = (blockIdx.x / (2 * across) * 2 + rank) * kBlockM;
    const int column = blockIdx.x / 2 % across * kBlockN;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            init(full + 8 * stage, 1);
            init(empty + 8 * stage, 4);  // two consumers of two blocks
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_barrier();
    const int steps = (k + kBlockK - 1) / kBlockK, group = threadIdx.x / 128;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce(x_map, w_map, row, column, steps, rank, tiles, full, empty);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
        float sums[128] = {};
        consume(sums, group - 1, thread, steps, tiles, full, empty);
        for (int i = 0; i < kBlockN / 8; ++i)
            for (int half = 0; half < 2; ++half) {
                const int r = row + (group - 1) * 64 + warp * 16 + lane / 4 + 8 * half;
                const int c = column + 8 * i + 2 * (lane % 4);
                if (r < m && c < n)
                    *reinterpret_cast<__half2*>(out + int64_t{r} * n + c) = __floats2half2_rn(
                        sums[4 * i + 2 * half] + bias[c], sums[4 * i + 2 * half + 1] + bias[c + 1]);
            }
    }
    cluster_barrier();  // a block may not end while others arrive at its mbarriers
}
