// Runs plans on a GPU. The caller owns all device memory. Any number of threads may run one
// Executable at once.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "cubin.hpp"
#include "driver.hpp"
#include "plan.hpp"

namespace vitrail {

// A kernel that is loaded into a GPU's context.
struct Kernel {
    Kernel(const Gpu& gpu, const KernelBinary& record);  // the context must be current

    KernelBinary binary;  // without the machine code
    Module module;
    Entry entry;
};

// The loaded kernels of a GPU by key. All plans share them.
class Kernels {
  public:
    explicit Kernels(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

    const Gpu& gpu() const { return *gpu_; }

    // Loads a KernelBinary unless its key is loaded already. Throws FormatError for a damaged
    // record, DriverError if the driver refuses the machine code.
    void load(std::string_view record);

    // Null if the kernel is not loaded.
    const Kernel* find(const std::string& key) const;

  private:
    std::shared_ptr<const Gpu> gpu_;
    mutable std::mutex mutex_;
    std::unordered_map<std::string, std::unique_ptr<const Kernel>> loaded_;
};

class Frame;

// A plan with the address of its weights.
class Executable {
  public:
    Executable(std::shared_ptr<const Kernels> kernels, Plan plan, cu::Pointer weights);
    ~Executable();

    const Plan& plan() const { return plan_; }
    const Gpu& gpu() const { return kernels_->gpu(); }
    cu::Pointer weights() const { return weights_; }

    // Keys of the kernels that a call of these sizes needs and that are not loaded yet. Throws
    // FormatError if a loaded kernel does not take the plan's parameters.
    std::vector<std::string> missing(const Sizes& sizes) const;
    // The same for all kernels of the plan.
    std::vector<std::string> missing() const;

    // `sizes` rounded up, so that calls of similar sizes can share an arena.
    static Sizes capacity(const Sizes& sizes);
    uint64_t arena_bytes(const Sizes& capacity) const;

    // Puts all launches on `stream`. `arena`: arena_bytes(capacity) bytes, where `capacity` covers
    // `sizes`. `externals`: the caller's buffers in the plan's order. Addresses are multiples of
    // 16. `overlap`: a kernel may start before the previous kernel has ended. Throws DriverError
    // naming the launch, std::invalid_argument for sizes or addresses that the plan cannot take,
    // std::runtime_error if a kernel is not loaded.
    void run(const Sizes& sizes, const Sizes& capacity, cu::Pointer arena,
             const std::vector<cu::Pointer>& externals, cu::Stream stream, bool overlap);

    // The same with a frame of this executable that the caller owns. A frame runs one call at a
    // time.
    void run(Frame& frame, const Sizes& sizes, cu::Pointer arena,
             const std::vector<cu::Pointer>& externals, cu::Stream stream, bool overlap);

  private:
    friend class Frame;

    // The kernel at an index of Plan::kernel_keys; null if it is not loaded.
    const Kernel* kernel(uint32_t index) const;
    void check(const Kernel& kernel, uint32_t index) const;
    void check_call(const Sizes& sizes, const Sizes& capacity, cu::Pointer arena,
                    const std::vector<cu::Pointer>& externals) const;
    std::unique_ptr<Frame> take(const Sizes& capacity, cu::Pointer arena);
    void give(std::unique_ptr<Frame> frame);

    std::shared_ptr<const Kernels> kernels_;
    Plan plan_;
    cu::Pointer weights_;
    mutable std::vector<std::atomic<const Kernel*>> table_;  // checked kernels, by index
    std::mutex mutex_;
    std::vector<std::unique_ptr<Frame>> idle_;
};

// The parameters of all launches, packed for one arena. Size-dependent parameters are rewritten
// only if the sizes changed; the caller's addresses are written on every call. A frame runs one
// call at a time.
class Frame {
  public:
    Frame(const Executable& executable, const Sizes& capacity);

    const Sizes& capacity() const { return capacity_; }
    cu::Pointer arena() const { return arena_; }

    void run(const Sizes& sizes, cu::Pointer arena, const std::vector<cu::Pointer>& externals,
             cu::Stream stream, bool overlap);

  private:
    // An integer parameter, which depends on the sizes.
    struct IntegerArgument {
        const Affine* integer;
        char* destination;
        bool wide;  // 64 bits, else 32
    };
    // The address of a caller's buffer, or a tensor map over one.
    struct ExternalArgument {
        const Argument* argument;
        char* destination;
        size_t external;       // index of the caller's buffer
        const Box* box;        // null for an address
        cu::Pointer base = 0;  // of the encoded map
        int64_t rows = -1;     // of the encoded map; negative: no map is encoded
    };
    // The parameters of one variant of a launch.
    struct PackedLaunch {
        bool ready = false;
        uint32_t offset = 0;  // in bytes_
        const Kernel* kernel = nullptr;
        std::vector<void*> pointers;
        std::vector<IntegerArgument> integers;
        std::vector<ExternalArgument> externals;
        unsigned blocks = 0;  // for the sizes settled_
    };

    void settle(const Sizes& sizes);
    void pack(const Launch& launch, const Variant& variant, PackedLaunch& packed);
    void write(const Launch& launch, ExternalArgument& external, cu::Pointer base,
               const Sizes& sizes);
    // In the weights or in the arena.
    cu::Pointer resolve(const Address& address) const;
    void encode(const std::string& label, char* destination, const Argument& argument,
                const Box& box, cu::Pointer base, int64_t rows) const;

    const Executable& executable_;
    const Sizes capacity_;
    cu::Pointer arena_ = 0;
    std::vector<uint64_t> slots_;                    // offset of each slot in the arena
    std::vector<std::vector<PackedLaunch>> packed_;  // by launch and variant
    Sizes settled_;                      // sizes that chosen_ was computed for; no tokens: none
    std::vector<PackedLaunch*> chosen_;  // by launch
    std::vector<cu::TensorMap> bytes_;   // the parameters, each launch's at a multiple of 64 bytes
};

}  // namespace vitrail
