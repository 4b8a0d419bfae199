#include "driver.hpp"

#include <pthread.h>

#include <algorithm>
#include <map>
#include <mutex>

namespace vitrail {

void Driver::fail(cu::Result result, const char* name, const std::string& purpose) const {
    const char* code = nullptr;
    const char* text = nullptr;
    if (error_name_.call != nullptr) error_name_.call(result, &code);
    if (error_text_.call != nullptr) error_text_.call(result, &text);
    std::string message = purpose.empty() ? name : purpose + ": " + name;
    message += ": " + (code != nullptr ? std::string(code) : "error " + std::to_string(result));
    if (text != nullptr) message += std::string(" (") + text + ")";
    throw DriverError(message, result);
}

namespace {

int attribute(const Driver& driver, int id, cu::Device device) {
    int value = 0;
    driver("", driver.device_attribute, &value, id, device);
    return value;
}

DeviceInfo describe(const Driver& driver, cu::Device device) {
    char name[256] = {};
    driver("", driver.device_name, name, static_cast<int>(sizeof name - 1), device);
    return {name,
            {attribute(driver, cu::kCapabilityMajor, device),
             attribute(driver, cu::kCapabilityMinor, device)}};
}

// Opens each library once and never closes it: a started driver must stay until the process ends.
const Driver& open_driver(const char* library) {
    static std::mutex mutex;
    static auto& drivers = *new std::map<std::string, Driver>;
    const std::lock_guard<std::mutex> lock(mutex);
    return drivers.try_emplace(library, library).first->second;
}

std::atomic<bool> started{false};  // the driver, by this process or by a parent of it
std::atomic<bool> lost{false};

void refuse_lost() {
    if (!lost) return;
    throw DriverError(
        "this process was forked from one that had started CUDA, and CUDA does not survive a "
        "fork: start the process anew, or start CUDA in forked processes alone",
        cu::kNotInitialized);
}

void start(const Driver& driver) {
    refuse_lost();
    driver("", driver.init, 0u);
    if (!started.exchange(true)) pthread_atfork(nullptr, nullptr, [] { lost = true; });
}

}  // namespace

bool driver_lost() noexcept { return lost; }

Gpu::Gpu(const char* library, int ordinal) : driver_(open_driver(library)) {
    start(driver_);
    driver_("", driver_.device_get, &device_, ordinal);
    info_ = describe(driver_, device_);
    multiprocessors_ = attribute(driver_, cu::kMultiprocessors, device_);
    threads_ = attribute(driver_, cu::kThreadsPerMultiprocessor, device_);
    shared_ = attribute(driver_, cu::kSharedPerMultiprocessor, device_);
    driver_("the context", driver_.context_retain, &context_, device_);
}

int Gpu::carveout(int threads, int shared) const {
    const int64_t blocks =
        std::clamp(threads_ / std::max(threads, 1), 1, cu::kMaxBlocksPerMultiprocessor);
    const int64_t needed = blocks * (int64_t{shared} + cu::kReservedShared);
    return static_cast<int>(std::min<int64_t>(100, (100 * needed + shared_ - 1) / shared_));
}

Gpu::~Gpu() {
    if (!lost) driver_.context_release.call(device_);
}

Gpu::ContextGuard::ContextGuard(const Gpu& gpu) : gpu_(gpu) {
    refuse_lost();
    cu::Context current = nullptr;
    gpu.driver_("the context", gpu.driver_.context_current, &current);
    if (current == gpu.context_) return;
    gpu.driver_("the context", gpu.driver_.context_push, gpu.context_);
    pushed_ = true;
}

Gpu::ContextGuard::~ContextGuard() {
    cu::Context popped = nullptr;
    if (pushed_) gpu_.driver_.context_pop.call(&popped);
}

// A failure here is ignored: the next call of the driver reports the reason.
Gpu::RelaxedCapture::RelaxedCapture(const Gpu& gpu) noexcept : exchange_(gpu.driver_.capture_mode) {
    exchanged_ = exchange_.call != nullptr && exchange_.call(&previous_mode_) == 0;
}

Gpu::RelaxedCapture::~RelaxedCapture() {
    if (exchanged_) exchange_.call(&previous_mode_);
}

DriverInfo probe() {
    DriverInfo info;
    try {
        const Driver& driver = open_driver("libcuda.so.1");
        driver("", driver.version, &info.version);
        start(driver);
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
