// The parts of the test-only Python module `common`, which binds the functions of csrc/common.
#pragma once

#include <pybind11/pybind11.h>

void bind_bilinear(pybind11::module_& module);
void bind_boxes(pybind11::module_& module);
void bind_narrow_index(pybind11::module_& module);
void bind_paste(pybind11::module_& module);
void bind_rle(pybind11::module_& module);
void bind_roi_tile(pybind11::module_& module);
