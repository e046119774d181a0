// Stands for the CUDA toolkit's header of this name.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;
