// Kernels written in CUDA C++, as cuda_images.py built them: loaded whole, launched by name. Any
// number of threads may use one at once.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "machine.hpp"

namespace vitrail {

class CudaImage {
  public:
    // A parameter of a kernel: an integer or an address, and its size of 1, 2, 4 or 8 bytes.
    using Argument = std::pair<int64_t, int>;

    // `code`: a fatbin or a cubin. Throws std::invalid_argument for what is neither, or is cut
    // short, DriverError where the driver has no use for it.
    CudaImage(std::shared_ptr<const Gpu> gpu, std::string_view code);

    // Puts a launch of `blocks` blocks of `threads` (x, y) on `stream`; of 0 blocks nothing but
    // the checks. `overlap`: it may begin before the kernel before it has ended. `shared`: bytes of
    // dynamic shared memory, at most 48 KiB. Throws std::invalid_argument for arguments, blocks,
    // threads or bytes that the kernel does not take, DriverError where the driver refuses, naming
    // the function.
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
