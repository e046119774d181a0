#include "common/bilinear.h"

#include <pybind11/numpy.h>

#include "common.h"

namespace py = pybind11;
using namespace cascadeops;

namespace {

// Value of a map [H, W] at (y, x), from the taps of both axes.
double sample(const py::array_t<double, py::array::c_style | py::array::forcecast>& map, double y, double x) {
  const auto values = map.unchecked<2>();
  const auto rows = bilinear_taps(y, values.shape(0)), columns = bilinear_taps(x, values.shape(1));
  if (!rows.inside || !columns.inside) return 0;
  return rows.low_weight * (columns.low_weight * values(rows.low, columns.low) +
                            columns.high_weight * values(rows.low, columns.high)) +
         rows.high_weight * (columns.low_weight * values(rows.high, columns.low) +
                             columns.high_weight * values(rows.high, columns.high));
}

}  // namespace

void bind_bilinear(py::module_& module) {
  module.def("floor_log2", &floor_log2);
  module.def("roi_level", &roi_level);
  module.def("sample", &sample);
  module.def("taps", [](double position, int64_t size) {
    const auto taps = bilinear_taps(position, size);
    return py::make_tuple(taps.low, taps.high, taps.low_weight, taps.high_weight, taps.inside);
  });
  py::class_<RoiAxis<double>>(module, "RoiAxis")
      .def(py::init([](double low, double high, double scale, int64_t bins, int64_t ratio, bool aligned) {
        return roi_axis(low, high, scale, bins, ratio, aligned);
      }))
      .def_readonly("start", &RoiAxis<double>::start)
      .def_readonly("bin", &RoiAxis<double>::bin)
      .def_readonly("samples", &RoiAxis<double>::samples)
      .def("position", [](const RoiAxis<double>& axis, int64_t bin, int64_t i) { return axis.position(bin, i); })
      .def("first_sample_from", [](const RoiAxis<double>& axis, int64_t bin, double position) {
        return first_sample_from(axis, bin, position);
      });
}
