// Faults in the data of a CUDA operator: a box that is not finite, an index out of range. The CPU kernels raise for
// them. A CUDA kernel cannot, and asking it would stall the device; so it leaves the row out and notes the fault in a
// word that the host reads at the next synchronisation: the operators that synchronise anyway (nms, batched_nms,
// paste_masks_rle) and cascadeops.raise_device_faults raise it there.
//
// There is one word for each device, in page-locked host memory that all devices see: after a synchronisation the host
// reads it without a copy, and a CUDA graph that was captured with its address notes its faults like any other launch.
// A word holds one fault. Which one remains of several is not defined.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace cascadeops {

enum class Fault : uint8_t {
  kNone,
  kBoxProposals,
  kMaskTargets,
  kMatchBoxes,
  kMulticlassNms,
  kMultiscaleRoiAlign,
  kPaddedNms,
  kPasteMasks,
  kPasteMasksRle,
  kPolygonMaskTargets,
};

// The word of the tensor's device, which lives as long as the process.
uint64_t* fault_word(const torch::stable::Tensor& tensor);

__device__ __forceinline__ void note_fault(uint64_t* word, Fault fault, int64_t row) {
  *static_cast<volatile uint64_t*>(word) = uint64_t{static_cast<uint8_t>(fault)} << 56 | static_cast<uint64_t>(row);
}

// Throws the fault that was noted on the tensor's device, if any, and forgets it. Call it after a synchronisation.
void raise_device_fault(const torch::stable::Tensor& tensor);

}  // namespace cascadeops
