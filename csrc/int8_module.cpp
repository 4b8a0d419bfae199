// The int8 operators of vitrail._C: bindings only. Addresses are integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "int8_cpu.hpp"

namespace py = pybind11;

namespace vitrail {
namespace {

using Address = uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_int8(py::module_& m) {
    m.def("int8_instructions", &int8::instructions);
    m.def("use_int8_instructions", &int8::use, py::arg("name"));
    m.def(
        "norm_quant",
        [](Address out, Address out_scale, Address x, Address smooth, Address picks, int64_t rows,
           int64_t width, float eps, int threads) {
            int8::norm_quant({at<int8_t>(out), at<float>(out_scale), at<float>(x),
                              at<float>(smooth), at<int32_t>(picks), rows, width, eps},
                             threads);
        },
        py::arg("out"), py::arg("out_scale"), py::arg("x"), py::arg("smooth"), py::arg("picks"),
        py::arg("rows"), py::arg("width"), py::arg("eps"), py::arg("threads"), ReleaseGil());
    m.def(
        "linear_int8",
        [](Address out, Address codes, Address code_scale, Address x, Address x_scale,
           Address weight, Address weight_scale, Address bias, int64_t rows, int64_t columns,
           int64_t depth, int activation, bool gated, bool is_unsigned, int threads) {
            int8::linear({at<float>(out), at<int8_t>(codes), at<float>(code_scale), at<int8_t>(x),
                          at<float>(x_scale), at<int8_t>(weight), at<float>(weight_scale),
                          at<float>(bias), rows, columns, depth,
                          static_cast<int8::Activation>(activation), gated, is_unsigned},
                         threads);
        },
        py::arg("out"), py::arg("codes"), py::arg("code_scale"), py::arg("x"), py::arg("x_scale"),
        py::arg("weight"), py::arg("weight_scale"), py::arg("bias"), py::arg("rows"),
        py::arg("columns"), py::arg("depth"), py::arg("activation"), py::arg("gated"),
        py::arg("is_unsigned"), py::arg("threads"), ReleaseGil());
    m.def(
        "linear_int8_grouped",
        [](Address out, Address x, Address x_scale, Address weight, Address weight_scale,
           Address shift, Address bias, Address scale, Address residual, Address residual_rows,
           int64_t rows, int64_t columns, int64_t depth, int64_t group, int threads) {
            int8::linear_grouped(
                {at<float>(out), at<int8_t>(x), at<float>(x_scale), at<int8_t>(weight),
                 at<float>(weight_scale), at<float>(shift), at<float>(bias), at<float>(scale),
                 at<float>(residual), at<int32_t>(residual_rows), rows, columns, depth, group},
                threads);
        },
        py::arg("out"), py::arg("x"), py::arg("x_scale"), py::arg("weight"),
        py::arg("weight_scale"), py::arg("shift"), py::arg("bias"), py::arg("scale"),
        py::arg("residual"), py::arg("residual_rows"), py::arg("rows"), py::arg("columns"),
        py::arg("depth"), py::arg("group"), py::arg("threads"), ReleaseGil());
}

}  // namespace vitrail
