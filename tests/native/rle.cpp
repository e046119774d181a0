#include "common/rle.h"

#include <pybind11/stl.h>

#include "common.h"

namespace py = pybind11;

void bind_rle(py::module_& module) {
  module.def("encode_runs", [](const std::vector<int64_t>& runs) {
    const std::vector<uint8_t> bytes = cascadeops::encode_runs(runs);
    return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  });
  module.def("encoded_length", [](int64_t value) { return cascadeops::encode_count(value, nullptr); });
}
