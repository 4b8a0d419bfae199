// Kernels written in CUDA C++ and compiled by cuda_binaries.py. A binary is loaded once, and its
// kernels are launched by name. Any number of threads may use one CudaBinary at once.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cubin.hpp"

namespace vitrail {

class CudaBinary {
  public:
    // A kernel parameter: an integer or an address, and its size of 1, 2, 4 or 8 bytes.
    using Argument = std::pair<int64_t, int>;

    // `code`: a fatbin or a cubin. Throws std::invalid_argument if it is neither or is truncated,
    // DriverError if the driver refuses it.
    CudaBinary(std::shared_ptr<const Gpu> gpu, std::string_view code);

    // Launches `blocks` blocks of `threads` (x, y) on `stream`; with 0 blocks, only checks the
    // arguments. `overlap`: the launch may start before the previous kernel has ended. `shared`:
    // bytes of dynamic shared memory, at most 48 KiB. Throws std::invalid_argument for arguments,
    // blocks, threads or bytes that the kernel does not take, DriverError naming the kernel if the
    // driver refuses.
    void launch(const std::string& name, int64_t blocks, std::pair<int, int> threads,
                const std::vector<Argument>& arguments, cu::Stream stream, bool overlap,
                int shared = 0);

  private:
    const Entry& entry(const std::string& name);

    std::shared_ptr<const Gpu> gpu_;
    Module module_;
    std::mutex mutex_;
    std::map<std::string, Entry> entries_;  // looked up so far
};

}  // namespace vitrail
