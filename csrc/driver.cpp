#include "driver.hpp"

#include <algorithm>
#include <map>
#include <mutex>

namespace vitrail {

void Driver::fail(cu::Result result, const char* name, const std::string& where) const {
    const char* code = nullptr;
    const char* text = nullptr;
    if (error_name_.call != nullptr) error_name_.call(result, &code);
    if (error_text_.call != nullptr) error_text_.call(result, &text);
    std::string message = where.empty() ? name : where + ": " + name;
    message += ": " + (code != nullptr ? std::string(code) : "error " + std::to_string(result));
    if (text != nullptr) message += std::string(" (") + text + ")";
    throw DriverError(message, result);
}

namespace {

int attribute(const Driver& driver, int which, cu::Device device) {
    int value = 0;
    driver("", driver.device_attribute, &value, which, device);
    return value;
}

DeviceInfo describe(const Driver& driver, cu::Device device) {
    char name[256] = {};
    driver("", driver.device_name, name, static_cast<int>(sizeof name - 1), device);
    return {name,
            {attribute(driver, cu::kCapabilityMajor, device),
             attribute(driver, cu::kCapabilityMinor, device)}};
}

// Opened once and never closed: a driver that has been started must stay until the process ends.
const Driver& kept(const char* library) {
    static std::mutex mutex;
    static auto& drivers = *new std::map<std::string, Driver>;
    const std::lock_guard<std::mutex> lock(mutex);
    return drivers.try_emplace(library, library).first->second;
}

}  // namespace

Gpu::Gpu(const char* library, int ordinal) : driver_(kept(library)) {
    driver_("", driver_.init, 0u);
    driver_("", driver_.device_get, &device_, ordinal);
    info_ = describe(driver_, device_);
    multiprocessors_ = attribute(driver_, cu::kMultiprocessors, device_);
    threads_ = attribute(driver_, cu::kThreadsAtOnce, device_);
    shared_ = attribute(driver_, cu::kSharedAtOnce, device_);
    driver_("the context", driver_.context_retain, &context_, device_);
}

int Gpu::carveout(int threads, int shared) const {
    const int64_t blocks = std::clamp(threads_ / std::max(threads, 1), 1, cu::kBlocksAtOnce);
    const int64_t wanted = blocks * (int64_t{shared} + cu::kSharedOfBlock);
    return static_cast<int>(std::min<int64_t>(100, (100 * wanted + shared_ - 1) / shared_));
}

Gpu::~Gpu() { driver_.context_release.call(device_); }

Gpu::Current::Current(const Gpu& gpu) : gpu_(gpu) {
    cu::Context found = nullptr;
    gpu.driver_("the context", gpu.driver_.context_current, &found);
    if (found == gpu.context_) return;
    gpu.driver_("the context", gpu.driver_.context_push, gpu.context_);
    pushed_ = true;
}

Gpu::Current::~Current() {
    cu::Context popped = nullptr;
    if (pushed_) gpu_.driver_.context_pop.call(&popped);
}

// Where it fails, whatever is called next says why.
Gpu::Relaxed::Relaxed(const Gpu& gpu) noexcept : exchange_(gpu.driver_.capture_mode) {
    exchanged_ = exchange_.call != nullptr && exchange_.call(&before_) == 0;
}

Gpu::Relaxed::~Relaxed() {
    if (exchanged_) exchange_.call(&before_);
}

DriverInfo probe() {
    DriverInfo info;
    try {
        const Driver& driver = kept("libcuda.so.1");
        driver("", driver.version, &info.version);
        driver("", driver.init, 0u);
        int count = 0;
        driver("", driver.device_count, &count);
        for (int ordinal = 0; ordinal < count; ++ordinal) {
            cu::Device device = 0;
            driver("", driver.device_get, &device, ordinal);
            info.devices.push_back(describe(driver, device));
        }
        info.available = !info.devices.empty();
        if (!info.available) info.reason = "the driver knows no device";
    } catch (const std::exception& error) {
        info.reason = error.what();
    }
    return info;
}

}  // namespace vitrail
