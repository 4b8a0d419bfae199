#include "cuda_image.hpp"

#include <cstring>

#include "memory.hpp"

namespace vitrail {

namespace {

constexpr int64_t kMostBlocks = int64_t{1} << 31;

// The driver is told no length: it reads as far as the image's own header says.
void check_whole(std::string_view code) {
    struct {
        uint32_t magic;
        uint16_t version, header;
        uint64_t body;
    } fatbin{};
    static_assert(sizeof fatbin == 16, "the head of a fatbin");
    const std::string got = "CUDA image: got " + std::to_string(code.size()) + " bytes, ";
    if (code.size() < 64) throw std::invalid_argument(got + "wanted a fatbin or a cubin");
    std::memcpy(&fatbin, code.data(), sizeof fatbin);
    if (fatbin.magic == 0xba55ed50) {
        if (fatbin.header > code.size() || fatbin.body > code.size() - fatbin.header) {
            throw std::invalid_argument(got + "wanted all of a fatbin of " +
                                        std::to_string(fatbin.header + fatbin.body));
        }
    } else if (code.substr(0, 4) != "\177ELF") {
        throw std::invalid_argument(got + "wanted a fatbin or a cubin");
    }
}

}  // namespace

CudaImage::CudaImage(std::shared_ptr<const Gpu> gpu, std::string_view code)
    : gpu_(std::move(gpu)) {
    check_whole(code);
    const Gpu::Current current(*gpu_);
    const Gpu::Relaxed relaxed(*gpu_);
    gpu_->driver()("CUDA image", gpu_->driver().module_load, &module_,
                   static_cast<const void*>(code.data()));
}

CudaImage::~CudaImage() {
    give_back(*gpu_, [this](const Driver& driver) { driver.module_unload.call(module_); });
}

// The context must be current.
const CudaImage::Kernel& CudaImage::kernel(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kernels_.find(name);
    if (found != kernels_.end()) return found->second;
    const Gpu::Relaxed relaxed(*gpu_);
    const Driver& driver = gpu_->driver();
    const char* text = name.c_str();
    Kernel made;
    driver(text, driver.module_function, &made.function, module_, text);
    // asking also has a driver that loads lazily load it now
    driver(text, driver.function_get, &made.threads, cu::kMaxThreads, made.function);
    made.known = driver.function_parameter.call != nullptr;
    if (made.known) made.parameters = parameter_sizes(driver, made.function, text);
    return kernels_.emplace(name, std::move(made)).first->second;
}

void CudaImage::launch(const std::string& name, int64_t blocks, std::pair<int, int> threads,
                       const std::vector<Argument>& arguments, cu::Stream stream, bool overlap) {
    const Gpu::Current current(*gpu_);
    const Kernel& kernel = this->kernel(name);
    const auto refuse = [&](const std::string& what, int64_t got, const std::string& wanted) {
        throw std::invalid_argument(name + ": " + what + ": got " + std::to_string(got) +
                                    ", wanted " + wanted);
    };
    const auto [x, y] = threads;
    if (x < 1 || y < 1 || int64_t{x} * y > kernel.threads) {
        refuse("threads", int64_t{x} * y, "1 to " + std::to_string(kernel.threads));
    }
    if (blocks < 0 || blocks >= kMostBlocks) refuse("blocks", blocks, "0 to 2^31 - 1");
    const std::vector<size_t>& sizes = kernel.parameters;
    if (kernel.known && arguments.size() != sizes.size()) {
        refuse("parameters", static_cast<int64_t>(arguments.size()), std::to_string(sizes.size()));
    }
    std::vector<int64_t> values(arguments.size());  // little endian: the first bytes of each
    std::vector<void*> pointers(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
        const auto [value, size] = arguments[i];
        const std::string what = "parameter " + std::to_string(i);
        if (kernel.known && static_cast<size_t>(size) != sizes[i]) {
            refuse(what + ": bytes", size, std::to_string(sizes[i]));
        }
        if (size != 1 && size != 2 && size != 4 && size != 8) {
            refuse(what + ": bytes", size, "1, 2, 4 or 8");
        }
        const int64_t most = size == 8 ? INT64_MAX : (int64_t{1} << (8 * size - 1)) - 1;
        if (value > most || value < -most - 1) {
            refuse(what, value, "an integer of " + std::to_string(size) + " bytes");
        }
        values[i] = value;
        pointers[i] = &values[i];
    }
    if (blocks == 0) return;
    cu::LaunchAttribute attribute{};
    attribute.id = cu::kOverlap;
    attribute.value.overlap = 1;
    const cu::LaunchConfig config{{static_cast<unsigned>(blocks), 1, 1},
                                  {static_cast<unsigned>(x), static_cast<unsigned>(y), 1},
                                  0,
                                  stream,
                                  &attribute,
                                  overlap ? 1u : 0u};
    const Driver& driver = gpu_->driver();
    driver(name.c_str(), driver.launch, &config, kernel.function, pointers.data(),
           static_cast<void**>(nullptr));
}

}  // namespace vitrail
