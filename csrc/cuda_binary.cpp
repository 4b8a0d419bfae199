#include "cuda_binary.hpp"

#include <cstring>

namespace vitrail {

namespace {

// Checks that the code is whole. The driver gets no length: it trusts the header of the code.
const void* checked(std::string_view code) {
    struct {
        uint32_t magic;
        uint16_t version, header;
        uint64_t body;
    } fatbin{};
    static_assert(sizeof fatbin == 16, "the header of a fatbin");
    const std::string got = "CUDA binary: got " + std::to_string(code.size()) + " bytes, ";
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
    return code.data();
}

}  // namespace

CudaBinary::CudaBinary(std::shared_ptr<const Gpu> gpu, std::string_view code)
    : gpu_(std::move(gpu)), module_(*gpu_, "CUDA binary", checked(code)) {}

// The context must be current.
const Entry& CudaBinary::entry(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto entry = entries_.find(name);
    if (entry != entries_.end()) return entry->second;
    return entries_.emplace(name, module_.entry(name)).first->second;
}

void CudaBinary::launch(const std::string& name, int64_t blocks, std::pair<int, int> threads,
                        const std::vector<Argument>& arguments, cu::Stream stream, bool overlap,
                        int shared) {
    const Gpu::ContextGuard current(*gpu_);
    const Entry& entry = this->entry(name);
    const auto refuse = [&](const std::string& subject, int64_t got, const std::string& wanted) {
        throw std::invalid_argument(name + ": " + subject + ": got " + std::to_string(got) +
                                    ", wanted " + wanted);
    };
    const auto [x, y] = threads;
    if (x < 1 || y < 1 || int64_t{x} * y > entry.threads) {
        refuse("threads", int64_t{x} * y, "1 to " + std::to_string(entry.threads));
    }
    if (blocks < 0 || blocks >= kMaxBlocks) refuse("blocks", blocks, "0 to 2^31 - 1");
    if (shared < 0 || shared > cu::kDefaultMaxShared) {
        refuse("bytes of shared memory", shared, "0 to " + std::to_string(cu::kDefaultMaxShared));
    }
    const auto& sizes = entry.parameters;
    if (sizes && arguments.size() != sizes->size()) {
        refuse("parameters", static_cast<int64_t>(arguments.size()), std::to_string(sizes->size()));
    }
    std::vector<int64_t> values(arguments.size());  // little-endian: the low bytes come first
    std::vector<void*> pointers(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) {
        const auto [value, size] = arguments[i];
        const std::string parameter = "parameter " + std::to_string(i);
        if (sizes && static_cast<size_t>(size) != (*sizes)[i]) {
            refuse(parameter + ": bytes", size, std::to_string((*sizes)[i]));
        }
        if (size != 1 && size != 2 && size != 4 && size != 8) {
            refuse(parameter + ": bytes", size, "1, 2, 4 or 8");
        }
        const int64_t max = size == 8 ? INT64_MAX : (int64_t{1} << (8 * size - 1)) - 1;
        if (value > max || value < -max - 1) {
            refuse(parameter, value, "an integer of " + std::to_string(size) + " bytes");
        }
        values[i] = value;
        pointers[i] = &values[i];
    }
    if (blocks == 0) return;
    const Block block{static_cast<unsigned>(x), static_cast<unsigned>(y),
                      static_cast<unsigned>(shared), overlap};
    vitrail::launch(gpu_->driver(), name.c_str(), entry.function, static_cast<unsigned>(blocks),
                    block, stream, pointers.data());
}

}  // namespace vitrail
