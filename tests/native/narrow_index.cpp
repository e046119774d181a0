#include "narrow_index.h"

#include "common.h"

using cascadeops::Narrow;

void bind_narrow_index(pybind11::module_& module) {
  module.def("narrow_sum", [](int a, int b) -> int64_t { return Narrow(a) + Narrow(b); });
  module.def("narrow_sum_with_int", [](int a, int b) -> int64_t { return Narrow(a) + b; });
  module.def("narrow_sum_with_int64", [](int a, int64_t b) { return Narrow(a) + b; });
  module.def("narrow_product", [](int a, int b) -> int64_t { return Narrow(a) * Narrow(b); });
  module.def("narrow_product_with_float", [](int a, float b) { return Narrow(a) * b; });
  module.def("narrow_shift", [](int a, int b) -> int64_t { return Narrow(a) << Narrow(b); });
  module.def("narrow_cast", [](int64_t a) -> int64_t { return static_cast<Narrow>(a); });
  module.def("narrow_cast_of_float", [](float a) -> int64_t { return static_cast<Narrow>(a); });
  module.def("narrow_negative", [](int a) -> int64_t { return -Narrow(a); });
  module.def("narrow_next", [](int a) -> int64_t {
    Narrow next = a;
    return ++next;
  });
  module.def("narrow_add", [](int a, int64_t b) -> int64_t {
    Narrow sum = a;
    return sum += b;
  });
}
