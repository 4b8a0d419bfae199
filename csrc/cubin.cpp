#include "cubin.hpp"

#include "memory.hpp"

namespace vitrail {

Module::Module(const Gpu& gpu, const char* purpose, const void* code) : gpu_(gpu) {
    const Gpu::ContextGuard current(gpu);
    const Gpu::RelaxedCapture relaxed(gpu);
    gpu.driver()(purpose, gpu.driver().module_load, &module_, code);
}

Module::~Module() {
    give_back(gpu_, [this](const Driver& driver) { driver.module_unload.call(module_); });
}

Entry Module::entry(const std::string& name) const {
    const Gpu::RelaxedCapture relaxed(gpu_);
    const Driver& driver = gpu_.driver();
    const char* text = name.c_str();
    Entry entry;
    driver(text, driver.module_function, &entry.function, module_, text);
    // this query also makes a driver that loads lazily load the kernel now
    driver(text, driver.function_get, &entry.threads, cu::kMaxThreads, entry.function);
    const auto& query = driver.function_parameter;
    if (query.call == nullptr) return entry;
    std::vector<size_t>& sizes = entry.parameters.emplace();
    for (size_t offset = 0, size = 0;; sizes.push_back(size)) {
        const cu::Result result = query.call(entry.function, sizes.size(), &offset, &size);
        if (result == cu::kInvalidValue) return entry;  // past the last parameter
        if (result != 0) driver.fail(result, query.name, name);
    }
}

}  // namespace vitrail
