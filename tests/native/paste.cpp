#include "common/paste.h"

#include "common.h"

namespace py = pybind11;
using namespace cascadeops;

void bind_paste(py::module_& module) {
  module.def("probability_byte", &probability_byte);
  py::class_<PasteAxis>(module, "PasteAxis")
      .def(py::init([](float first, float last, int32_t cells) { return PasteAxis{first, last, cells}; }))
      .def("position", [](const PasteAxis& axis, int32_t pixel) { return axis.position(pixel); })
      .def("reached", [](const PasteAxis& axis, int32_t pixels) {
        const Span span = axis.reached(pixels);
        return py::make_tuple(span.begin, span.end);
      });
}
