// vitrail._C: bindings only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda_binary.hpp"
#include "driver.hpp"
#include "executor.hpp"

namespace py = pybind11;
using vitrail::CudaBinary;
using vitrail::Executable;
using vitrail::Gpu;
using vitrail::Kernels;
using vitrail::Sizes;

namespace vitrail {
void bind_int8(py::module_& m);  // int8_module.cpp
}

namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;
using Size = std::tuple<int64_t, int64_t, int64_t>;  // sequences, tokens, the longest sequence

Sizes sizes(const Size& size) { return {std::get<0>(size), std::get<1>(size), std::get<2>(size)}; }

// The class that bind_errors makes, for as long as the process.
PyObject* driver_error = nullptr;

void translate(std::exception_ptr thrown) {
    try {
        if (thrown) std::rethrow_exception(thrown);
    } catch (const vitrail::DriverError& error) {
        const py::object raised = py::handle(driver_error)(error.what());
        raised.attr("code") = error.code();
        PyErr_SetObject(driver_error, raised.ptr());
    } catch (const vitrail::FormatError& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    }
}

void bind_errors(py::module_& m) {
    driver_error = PyErr_NewException("vitrail._C.DriverError", PyExc_RuntimeError, nullptr);
    if (driver_error == nullptr) throw py::error_already_set();
    m.attr("DriverError") = py::handle(driver_error);
    py::register_exception_translator(&translate);
}

void bind_executor(py::module_& m) {
    py::class_<Gpu, std::shared_ptr<Gpu>>(m, "Gpu")
        .def(py::init<const char*, int>(), py::arg("library"), py::arg("ordinal"), ReleaseGil())
        .def_property_readonly("name", [](const Gpu& gpu) { return gpu.info().name; })
        .def_property_readonly("capability", [](const Gpu& gpu) { return gpu.info().capability; })
        .def_property_readonly("multiprocessors", &Gpu::multiprocessors);

    py::class_<CudaBinary>(m, "CudaBinary")
        .def(py::init([](std::shared_ptr<Gpu> gpu, std::string_view code) {
                 return std::make_unique<CudaBinary>(gpu, code);
             }),
             py::arg("gpu"), py::arg("code"), ReleaseGil())
        .def(
            "launch",
            [](CudaBinary& self, const std::string& function, int64_t blocks,
               std::pair<int, int> threads, const std::vector<CudaBinary::Argument>& arguments,
               uint64_t stream, bool overlap, int shared) {
                self.launch(function, blocks, threads, arguments,
                            reinterpret_cast<vitrail::cu::Stream>(stream), overlap, shared);
            },
            py::arg("function"), py::arg("blocks"), py::arg("threads"), py::arg("arguments"),
            py::arg("stream"), py::arg("overlap"), py::arg("shared") = 0, ReleaseGil());

    py::class_<Kernels, std::shared_ptr<Kernels>>(m, "Kernels")
        .def(py::init([](std::shared_ptr<Gpu> gpu) { return std::make_shared<Kernels>(gpu); }),
             py::arg("gpu"))
        .def(
            "load", [](Kernels& self, std::string_view record) { self.load(record); },
            py::arg("record"), ReleaseGil());

    py::class_<Executable>(m, "Executable")
        .def(
            py::init([](std::shared_ptr<Kernels> kernels, std::string_view plan, uint64_t weights) {
                return std::make_unique<Executable>(kernels, vitrail::Plan::parse(plan), weights);
            }),
            py::arg("kernels"), py::arg("plan"), py::arg("weights"))
        .def(
            "missing",
            [](const Executable& self, const Size& size) { return self.missing(sizes(size)); },
            py::arg("size"), ReleaseGil())
        .def_static(
            "capacity",
            [](const Size& size) {
                const Sizes found = Executable::capacity(sizes(size));
                return Size(found.sequences, found.tokens, found.longest);
            },
            py::arg("size"))
        .def(
            "arena_bytes",
            [](const Executable& self, const Size& capacity) {
                return self.arena_bytes(sizes(capacity));
            },
            py::arg("capacity"))
        .def(
            "run",
            [](Executable& self, const Size& size, const Size& capacity, uint64_t arena,
               const std::vector<uint64_t>& buffers, uint64_t stream, bool overlap) {
                self.run(sizes(size), sizes(capacity), arena, buffers,
                         reinterpret_cast<vitrail::cu::Stream>(stream), overlap);
            },
            py::arg("size"), py::arg("capacity"), py::arg("arena"), py::arg("buffers"),
            py::arg("stream"), py::arg("overlap"), ReleaseGil());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Vitrail's native part: knows bytes, integers and the GPU driver, but no torch.";

    py::class_<vitrail::DeviceInfo>(m, "Device")
        .def_readonly("name", &vitrail::DeviceInfo::name)
        .def_readonly("capability", &vitrail::DeviceInfo::capability);

    py::class_<vitrail::DriverInfo>(m, "Driver")
        .def_readonly("available", &vitrail::DriverInfo::available)
        .def_readonly("reason", &vitrail::DriverInfo::reason)
        .def_readonly("version", &vitrail::DriverInfo::version)
        .def_readonly("devices", &vitrail::DriverInfo::devices);

    bind_errors(m);
    bind_executor(m);
    vitrail::bind_int8(m);
    m.def("version", [] { return VITRAIL_VERSION; }, "The version this module was built for.");
    m.def("driver", &vitrail::probe, ReleaseGil(),
          "The NVIDIA driver and its devices; never raises where there is none.");
    m.def("driver_lost", &vitrail::driver_lost,
          "Whether this process was forked from one that had started the driver here.");
}
