// vitrail._C: bindings only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "driver.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Vitrail's native part: knows bytes, integers and the GPU driver, but no torch.";

    py::class_<vitrail::Device>(m, "Device")
        .def_readonly("name", &vitrail::Device::name)
        .def_readonly("capability", &vitrail::Device::capability);

    py::class_<vitrail::DriverInfo>(m, "Driver")
        .def_readonly("available", &vitrail::DriverInfo::available)
        .def_readonly("reason", &vitrail::DriverInfo::reason)
        .def_readonly("version", &vitrail::DriverInfo::version)
        .def_readonly("devices", &vitrail::DriverInfo::devices);

    m.def("version", [] { return VITRAIL_VERSION; }, "The version this module was built for.");
    m.def("driver", &vitrail::probe, py::call_guard<py::gil_scoped_release>(),
          "The NVIDIA driver and its devices; never raises where there is none.");
}
