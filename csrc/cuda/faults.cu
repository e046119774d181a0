// The words of csrc/cuda/faults.cuh and the sentences that they stand for. No kernel lives here.

#include <atomic>
#include <cstring>
#include <string>

#include "checks.h"
#include "cuda/faults.cuh"
#include "cuda/launch.cuh"

namespace cascadeops {
namespace {

constexpr int kMaxDevices = 256;

std::atomic<uint64_t*> words{nullptr};  // one of each device

uint64_t* allocate_words() {
  // Page-locked memory may not be allocated while a stream is captured, unless the capture is told that it is harmless.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  void* memory = nullptr;
  const cudaError_t error =
      cudaHostAlloc(&memory, kMaxDevices * sizeof(uint64_t), cudaHostAllocPortable | cudaHostAllocMapped);
  STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
  STD_CUDA_CHECK(error);
  std::memset(memory, 0, kMaxDevices * sizeof(uint64_t));
  return static_cast<uint64_t*>(memory);
}

const char* rule_of(Fault fault) {
  switch (fault) {
    case Fault::kNone:
      break;
    case Fault::kBoxProposals:
      return "box_proposals: logits must not be NaN";
    case Fault::kMaskTargets:
      return "mask_targets: index must be in [-1, G), its window must lie in bitmaps, and boxes must be finite";
    case Fault::kMatchBoxes:
      return "match_boxes: boxes and gt_boxes must be finite in valid rows";
    case Fault::kMulticlassNms:
      return "multiclass_nms: boxes must be finite and scores not NaN";
    case Fault::kMultiscaleRoiAlign:
      return "multiscale_roi_align: rois must have a batch index in [-1, N) and finite coordinates";
    case Fault::kPaddedNms:
      return "padded_nms: boxes must be finite and scores not NaN";
    case Fault::kPasteMasks:
      return "paste_masks: boxes must be finite";
    case Fault::kPasteMasksRle:
      return "paste_masks_rle: boxes must be finite";
    case Fault::kPolygonMaskTargets:
      return "polygon_mask_targets: index must be in [-1, G), offsets must rise within their range, and boxes and "
             "vertices must be finite";
  }
  return "a fault of another version of cascadeops";
}

std::string take_fault(int device) {
  uint64_t* const first = words.load();
  if (first == nullptr || device < 0 || device >= kMaxDevices) return "";
  const uint64_t word = __atomic_exchange_n(first + device, uint64_t{0}, __ATOMIC_ACQ_REL);
  if (word == 0) return "";
  return std::string(rule_of(static_cast<Fault>(word >> 56))) + "; see row " + std::to_string(word << 8 >> 8) +
         " (found by a kernel on cuda:" + std::to_string(device) + ", which left that row out)";
}

}  // namespace

uint64_t* fault_word(const torch::stable::Tensor& tensor) {
  static uint64_t* const first = [] {
    words.store(allocate_words());
    return words.load();
  }();
  const int device = tensor.get_device_index();
  check(device < kMaxDevices, "cascadeops: a device index must be below ", kMaxDevices, ", got ", device);
  return first + device;
}

void raise_device_fault(const torch::stable::Tensor& tensor) {
  const std::string fault = take_fault(tensor.get_device_index());
  check(fault.empty(), fault);
}

}  // namespace cascadeops

// For cascadeops.raise_device_faults: the sentence of the fault noted on a device, which is then forgotten; "" for
// none.
extern "C" __attribute__((visibility("default"))) const char* cascadeops_take_device_fault(int device) {
  thread_local std::string fault;
  fault = cascadeops::take_fault(device);
  return fault.c_str();
}
