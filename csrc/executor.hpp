// Runs plans: kernels by key, a plan made ready for a GPU, and calls in flight. Any number of
// threads may use one Executable at once. All memory is its caller's.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "driver.hpp"
#include "machine.hpp"
#include "plan.hpp"

namespace vitrail {

// One kernel in the context of a GPU, loaded once.
struct Kernel {
    Kernel(const Gpu& gpu, const Image& image);  // the context must be current

    Image image;  // without its machine code
    Module module;
    Entry entry;
};

// The kernels of a GPU by key, shared by all plans.
class Kernels {
  public:
    explicit Kernels(std::shared_ptr<const Gpu> gpu) : gpu_(std::move(gpu)) {}

    const Gpu& gpu() const { return *gpu_; }

    // Loads a record of Image unless its key is there. Throws FormatError for a damaged record,
    // DriverError where the driver refuses the machine code.
    void load(std::string_view record);

    // Null where it is not loaded.
    const Kernel* find(const std::string& key) const;

  private:
    std::shared_ptr<const Gpu> gpu_;
    mutable std::mutex mutex_;
    std::unordered_map<std::string, std::unique_ptr<const Kernel>> loaded_;
};

class Frame;

// A plan over given weights.
class Executable {
  public:
    Executable(std::shared_ptr<const Kernels> kernels, Plan plan, cu::Pointer weights);
    ~Executable();

    const Plan& plan() const { return plan_; }
    const Gpu& gpu() const { return kernels_->gpu(); }
    cu::Pointer weights() const { return weights_; }

    // Keys of the images that a call of these sizes needs and that are not loaded.
    std::vector<std::string> missing(const Sizes& sizes) const;
    // The same of all images, each checked against the plan where it is loaded.
    std::vector<std::string> missing() const;

    // The sizes that an arena for `sizes` is made for: somewhat larger ones share it.
    static Sizes capacity(const Sizes& sizes);
    uint64_t arena_bytes(const Sizes& capacity) const;

    // Puts every launch on `stream`. `arena`: arena_bytes(capacity) bytes, `capacity` at least
    // `sizes`; `externals`: the buffers that the caller brings, in the plan's order. Addresses are
    // multiples of 16. `overlap`: a kernel may be launched before the one before it has ended.
    // Throws DriverError naming the launch, std::invalid_argument for sizes or addresses that the
    // plan cannot take, std::runtime_error where an image is missing.
    void run(const Sizes& sizes, const Sizes& capacity, cu::Pointer arena,
             const std::vector<cu::Pointer>& externals, cu::Stream stream, bool overlap);

    // The same in a frame of the caller's, made for this executable; one call at a time.
    void run(Frame& frame, const Sizes& sizes, cu::Pointer arena,
             const std::vector<cu::Pointer>& externals, cu::Stream stream, bool overlap);

  private:
    friend class Frame;

    // The kernel of an image, from the plan's own table once it has been seen.
    const Kernel* kernel(uint32_t image) const;
    void check(const Kernel& kernel, uint32_t image) const;
    void check_call(const Sizes& sizes, const Sizes& capacity, cu::Pointer arena,
                    const std::vector<cu::Pointer>& externals) const;
    std::unique_ptr<Frame> take(const Sizes& capacity, cu::Pointer arena);
    void give(std::unique_ptr<Frame> frame);

    std::shared_ptr<const Kernels> kernels_;
    Plan plan_;
    cu::Pointer weights_;
    mutable std::vector<std::atomic<const Kernel*>> table_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Frame>> idle_;
};

// The parameters of every launch, packed once for an arena. What follows from sizes is written when
// they are not those of the call before; every call writes what follows from the caller's buffers.
// One call at a time.
class Frame {
  public:
    Frame(const Executable& executable, const Sizes& capacity);

    const Sizes& capacity() const { return capacity_; }
    cu::Pointer arena() const { return arena_; }

    void run(const Sizes& sizes, cu::Pointer arena, const std::vector<cu::Pointer>& externals,
             cu::Stream stream, bool overlap);

  private:
    // A number that follows from the sizes, and where it goes.
    struct Number {
        const Affine* integer;
        char* where;
        bool wide;  // of 64 bits
    };
    // An address in a buffer of the caller's, or a map over it.
    struct Outside {
        const Argument* argument;
        char* where;
        size_t external;
        const Box* box;        // null for an address
        cu::Pointer base = 0;  // of what stands there now
        int64_t rows = -1;     // as base; below 0: nothing does
    };
    // The parameters of one variant of a launch.
    struct Packed {
        bool ready = false;
        uint32_t first = 0;  // its bytes in bytes_
        const Kernel* kernel = nullptr;
        std::vector<void*> pointers;
        std::vector<Number> numbers;
        std::vector<Outside> outside;
        unsigned blocks = 0;  // for the sizes that were settled last
    };

    void settle(const Sizes& sizes);
    void pack(const Launch& launch, const Variant& variant, Packed& packed);
    void place(const Launch& launch, Outside& outside, cu::Pointer base, const Sizes& sizes);
    // In the weights or the arena.
    cu::Pointer address(const Place& place) const;
    void encode(const std::string& label, char* where, const Argument& argument, const Box& box,
                cu::Pointer base, int64_t rows) const;

    const Executable& executable_;
    const Sizes capacity_;
    cu::Pointer arena_ = 0;
    std::vector<uint64_t> slots_;               // where each begins in the arena
    std::vector<std::vector<Packed>> packed_;   // by launch and variant
    Sizes settled_;                             // what chosen_ is for; no tokens: for nothing
    std::vector<Packed*> chosen_;               // by launch
    std::vector<cu::TensorMap> bytes_;          // parameters, at multiples of 64 bytes
};

}  // namespace vitrail
