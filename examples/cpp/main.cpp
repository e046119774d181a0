// Finds objects in a picture with a detector that `python -m models.export` has compiled, without Python:
//
//     detect scnet.pt2 street.ppm _C.abi3.so [_C_cuda.abi3.so]
//
// prints a line for each object: class, score, box (x1 y1 x2 y2 in pixels of the picture), mask (COCO run lengths).
// The last arguments are the operators' libraries, which lie in the installed package cascadeops; the second one only
// for a package that was compiled for a GPU. They know nothing of Python: loading one declares its operators to
// PyTorch's dispatcher, where the compiled detector finds them by name, and so does this program.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace {

struct Size {
  int64_t height, width;
};

void load_operators(const char* path) {
  if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
}

template <typename Function>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// uint8 [height, width, 3] of a binary PPM file without comments.
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  file.get();
  if (!file || magic != "P6" || width < 1 || height < 1 || largest != 255)
    throw std::runtime_error(path + ": not a binary PPM file (P6, 255, no comments)");
  at::Tensor pixels = at::empty({height, width, 3}, at::kByte);
  if (!file.read(static_cast<char*>(pixels.mutable_data_ptr()), pixels.numel()))
    throw std::runtime_error(path + ": too short");
  return pixels;
}

// Numbers with blanks between them.
std::vector<double> numbers(const std::string& text) {
  std::istringstream stream(text);
  std::vector<double> values;
  for (double value; stream >> value;) values.push_back(value);
  return values;
}

std::vector<std::string> lines(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> values;
  for (std::string value; std::getline(stream, value);) values.push_back(value);
  return values;
}

// The largest size whose shorter and longer sides are within these limits.
Size resized(Size size, double short_side, double long_side) {
  const auto [least, most] = std::minmax(size.height, size.width);
  const double factor = std::min(long_side / most, short_side / least);
  const auto side = [factor](int64_t length) {
    return std::max(static_cast<int64_t>(length * factor + 0.5), int64_t{1});
  };
  return {side(size.height), side(size.width)};
}

// The size at which a picture goes into the detector: as the weights were trained, or the largest that fits its input.
Size size_in_network(Size picture, const std::vector<double>& resize, Size input) {
  const Size asked = resize.empty() ? picture : resized(picture, resize[0], resize[1]);
  if (asked.height <= input.height && asked.width <= input.width) return asked;
  return picture.height <= picture.width ? resized(picture, input.height, input.width)
                                         : resized(picture, input.width, input.height);
}

void detect(const std::string& package_path, const std::string& picture_path) {
  const auto preprocess = find_operator<std::tuple<at::Tensor, at::Tensor>(
      at::TensorList, at::IntArrayRef, int64_t, int64_t, at::ArrayRef<double>, at::ArrayRef<double>, at::ScalarType,
      bool)>("cascadeops::preprocess");
  const auto paste_masks_rle =
      find_operator<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, int64_t, int64_t, double)>(
          "cascadeops::paste_masks_rle");

  const at::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader detector(package_path);
  auto facts = detector.get_metadata();
  if (facts["format"] != "cascadeops-detector-1")
    throw std::runtime_error(package_path + ": no package of python -m models.export");
  if (facts["arithmetic"] != "mmdetection")  // others resize boxes and paste masks by rules of their own
    throw std::runtime_error(package_path + ": this program knows mmdetection's arithmetic, not " +
                             facts["arithmetic"]);
  const at::Device device(facts["AOTI_DEVICE_KEY"]);

  const at::Tensor pixels = read_ppm(picture_path);
  const Size picture{pixels.size(0), pixels.size(1)};
  const std::vector<double> size = numbers(facts["size"]), mean = numbers(facts["mean"]), std = numbers(facts["std"]);
  const Size input{static_cast<int64_t>(size[0]), static_cast<int64_t>(size[1])};
  const Size seen = size_in_network(picture, numbers(facts["resize"]), input);
  const auto [images, image_sizes] =
      preprocess.call({pixels.to(device)}, {seen.height, seen.width}, input.height, input.width, mean, std, at::kFloat,
                      /*channels_last=*/true);

  // boxes [1, D, 4], scores [1, D], labels [1, D], mask_probs [1, D, 28, 28] of a detector with masks, count [1]
  const std::vector<at::Tensor> results = detector.run({images, image_sizes});
  const auto count = results.back()[0].item<int64_t>();
  const double scale_x = static_cast<double>(picture.width) / seen.width;
  const double scale_y = static_cast<double>(picture.height) / seen.height;
  const at::Tensor scale = at::tensor({scale_x, scale_y, scale_x, scale_y}, at::kFloat).to(device);
  const at::Tensor boxes_on_device = results[0][0].slice(0, 0, count) * scale;
  const at::Tensor boxes = boxes_on_device.to(at::kCPU), scores = results[1][0].to(at::kFloat).to(at::kCPU);
  const at::Tensor labels = results[2][0].to(at::kCPU);
  at::Tensor run_lengths, offsets;  // uint8: the text of all masks one after the other; where each begins and ends
  if (results.size() == 5) {
    std::tie(run_lengths, offsets) = paste_masks_rle.call(results[3][0].slice(0, 0, count), boxes_on_device,
                                                          picture.height, picture.width, /*threshold=*/0.5);
    run_lengths = run_lengths.to(at::kCPU), offsets = offsets.to(at::kCPU);
  }

  const std::vector<std::string> names = lines(facts["class_names"]);
  for (int64_t i = 0; i < count; ++i) {
    std::printf("%s %.9g", names.at(labels[i].item<int64_t>()).c_str(), scores[i].item<float>());
    for (int64_t side = 0; side < 4; ++side) std::printf(" %.9g", boxes[i][side].item<float>());
    if (offsets.defined()) {
      const int64_t begin = offsets[i].item<int64_t>(), end = offsets[i + 1].item<int64_t>();
      std::printf(" %.*s", static_cast<int>(end - begin), run_lengths.const_data_ptr<uint8_t>() + begin);
    }
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: %s model.pt2 picture.ppm _C.abi3.so [_C_cuda.abi3.so]\n", argv[0]);
    return 2;
  }
  try {
    for (int i = 3; i < argc; ++i) load_operators(argv[i]);
    detect(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
