#include "common.h"

PYBIND11_MODULE(common, module) {
  bind_bilinear(module);
  bind_boxes(module);
  bind_narrow_index(module);
  bind_paste(module);
  bind_rle(module);
  bind_roi_tile(module);
}
