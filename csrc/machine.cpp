#include "machine.hpp"

#include "memory.hpp"

namespace vitrail {

Module::Module(const Gpu& gpu, const char* where, const void* code) : gpu_(gpu) {
    const Gpu::Current current(gpu);
    const Gpu::Relaxed relaxed(gpu);
    gpu.driver()(where, gpu.driver().module_load, &module_, code);
}

Module::~Module() {
    give_back(gpu_, [this](const Driver& driver) { driver.module_unload.call(module_); });
}

Entry Module::entry(const std::string& name) const {
    const Gpu::Relaxed relaxed(gpu_);
    const Driver& driver = gpu_.driver();
    const char* text = name.c_str();
    Entry found;
    driver(text, driver.module_function, &found.function, module_, text);
    // asking also has a driver that loads lazily load it now
    driver(text, driver.function_get, &found.threads, cu::kMaxThreads, found.function);
    const auto& ask = driver.function_parameter;
    if (ask.call == nullptr) return found;
    std::vector<size_t>& sizes = found.parameters.emplace();
    for (size_t offset = 0, size = 0;; sizes.push_back(size)) {
        const cu::Result end = ask.call(found.function, sizes.size(), &offset, &size);
        if (end == cu::kInvalidValue) return found;  // there is no parameter of this number
        if (end != 0) driver.fail(end, ask.name, name);
    }
}

}  // namespace vitrail
