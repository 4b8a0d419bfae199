// The NVIDIA driver, opened at run time: nothing here needs CUDA to be installed, neither to
// compile nor to load. Types and constants are those of the CUDA driver API (cuda.h).
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vitrail {

struct Device {
    std::string name;
    std::pair<int, int> capability;  // compute capability: major, minor
};

// What the driver says of itself. With `available` false, `reason` says why, and the other fields
// hold what was learnt before that.
struct DriverInfo {
    bool available = false;
    std::string reason;
    int version = 0;  // highest CUDA version the driver serves: 1000 * major + 10 * minor
    std::vector<Device> devices;
};

// A shared library, closed with its owner.
class Library {
  public:
    explicit Library(const char* name) : handle_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {
        if (handle_ == nullptr) throw std::runtime_error(last_error(name));
    }
    ~Library() { dlclose(handle_); }
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;

    // The function `name`, whose type the caller vouches for.
    template <typename Function>
    Function* function(const char* name) const {
        void* symbol = dlsym(handle_, name);
        if (symbol == nullptr) throw std::runtime_error(last_error(name));
        return reinterpret_cast<Function*>(symbol);
    }

  private:
    static std::string last_error(const char* name) {
        const char* text = dlerror();
        return text != nullptr ? text : std::string(name) + ": not found";
    }

    void* handle_;
};

class Driver {
  public:
    // Opens the library and finds the functions; starts nothing.
    explicit Driver(const char* library = "libcuda.so.1") : library_(library) {}

    int version() const {
        int version = 0;
        check(version_(&version), "cuDriverGetVersion");
        return version;
    }

    std::vector<Device> devices() const {
        check(init_(0), "cuInit");
        int count = 0;
        check(count_(&count), "cuDeviceGetCount");
        std::vector<Device> devices;
        for (int ordinal = 0; ordinal < count; ++ordinal) devices.push_back(device(ordinal));
        return devices;
    }

  private:
    using Result = int;  // CUresult; 0 is CUDA_SUCCESS
    using Handle = int;  // CUdevice
    static constexpr int kCapabilityMajor = 75;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    static constexpr int kCapabilityMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR

    Device device(int ordinal) const {
        Handle handle = 0;
        check(get_(&handle, ordinal), "cuDeviceGet");
        char name[256] = {};
        check(name_(name, sizeof name - 1, handle), "cuDeviceGetName");
        Device device{name, {0, 0}};
        check(attribute_(&device.capability.first, kCapabilityMajor, handle),
              "cuDeviceGetAttribute");
        check(attribute_(&device.capability.second, kCapabilityMinor, handle),
              "cuDeviceGetAttribute");
        return device;
    }

    // Every call goes through here, so that a failure names the call and the driver's own words.
    void check(Result result, const char* call) const {
        if (result == 0) return;
        const char* text = nullptr;
        error_name_(result, &text);
        throw std::runtime_error(std::string(call) + ": " +
                                 (text != nullptr ? text : "error " + std::to_string(result)));
    }

    template <typename... Arguments>
    using Call = Result(Arguments...);

    Library library_;
    Call<Result, const char**>* error_name_ = find<Result, const char**>("cuGetErrorName");
    Call<int*>* version_ = find<int*>("cuDriverGetVersion");
    Call<unsigned>* init_ = find<unsigned>("cuInit");
    Call<int*>* count_ = find<int*>("cuDeviceGetCount");
    Call<Handle*, int>* get_ = find<Handle*, int>("cuDeviceGet");
    Call<char*, int, Handle>* name_ = find<char*, int, Handle>("cuDeviceGetName");
    Call<int*, int, Handle>* attribute_ = find<int*, int, Handle>("cuDeviceGetAttribute");

    template <typename... Arguments>
    Call<Arguments...>* find(const char* name) const {
        return library_.function<Call<Arguments...>>(name);
    }
};

// The driver of this machine. Never throws: where a step fails, `reason` says which and why.
// Starts the driver, so a process forked afterwards cannot use CUDA.
inline DriverInfo probe() {
    DriverInfo info;
    try {
        // Never closed: a driver that has been started must stay loaded until the process ends.
        static const Driver* const driver = new Driver();
        info.version = driver->version();
        info.devices = driver->devices();
        info.available = !info.devices.empty();
        if (!info.available) info.reason = "the driver knows no device";
    } catch (const std::exception& error) {
        info.reason = error.what();
    }
    return info;
}

}  // namespace vitrail
