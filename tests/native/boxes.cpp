#include "common/boxes.h"

#include "common.h"

namespace py = pybind11;
using namespace cascadeops;

namespace {

Box box_of(const py::tuple& box) {
  return {box[0].cast<float>(), box[1].cast<float>(), box[2].cast<float>(), box[3].cast<float>()};
}

}  // namespace

void bind_boxes(py::module_& module) {
  module.def("iou_above", [](const py::tuple& first, const py::tuple& second, double threshold) {
    const Box a = box_of(first), b = box_of(second);
    return iou_above(a, box_area(a), b, box_area(b), make_iou_test(threshold));
  });
  module.def("is_in_doubt", [](const py::tuple& first, const py::tuple& second, double threshold) {
    const Box a = box_of(first), b = box_of(second);
    return compare_iou(a, box_area(a), b, box_area(b), make_iou_test(threshold)) == kIouDoubt;
  });
  module.def("is_finite", [](const py::tuple& box) { return is_finite(box_of(box)); });
}
