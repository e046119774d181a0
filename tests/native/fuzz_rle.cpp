// Run lengths from strangers, and our own writer of them, under AddressSanitizer and UBSan: scripts/fuzz_rle.py.
//
//   fuzz_rle EXECUTIONS SEED     random and mutated texts; ends with 1 at the first that is treated wrongly
//   fuzz_rle --check             reads lines "HEIGHT WIDTH HEX", prints the run lengths or "refused" for each
//
// `checked` has the rules of models/data/segmentation.py (a test compares the two): what it accepts is given to
// pycocotools. With -DMASK_API it is, to the maskApi.c that the harness is then compiled with: no text that passes may
// make that read or write beside its memory. `encode_runs` is the writer of csrc/common/rle.h.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "common/rle.h"

#ifdef MASK_API
extern "C" {
#include "maskApi.h"
}
#endif

namespace {

using Runs = std::vector<int64_t>;

struct Random {  // xorshift64*: a few instructions a number, and the same everywhere
  uint64_t state;
  uint64_t next() {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545F4914F6CDD1Dull;
  }
  int64_t below(int64_t limit) { return static_cast<int64_t>((next() >> 11) % static_cast<uint64_t>(limit)); }
};

// The run lengths of a mask of so many pixels; nothing for a text that is refused.
std::optional<Runs> checked(const std::string& text, int64_t pixels) {
  Runs runs;
  int64_t sum = 0;
  for (size_t at = 0; at < text.size();) {
    int64_t value = 0;
    for (int position = 0;; ++position) {
      if (at == text.size() || position > 5) return {};  // ends in the middle of a number; longer than any
      const int code = static_cast<unsigned char>(text[at++]) - 48;
      if (code < 0 || code > 63) return {};
      value |= static_cast<int64_t>(code & 31) << (5 * position);
      if (code & 32) continue;
      if (code & 16) value -= static_cast<int64_t>(1) << (5 * (position + 1));
      break;
    }
    if (runs.size() > 2) value += runs[runs.size() - 2];
    if (value < 0 || value > pixels) return {};
    sum += value;
    runs.push_back(value);
  }
  if (sum != pixels || static_cast<int64_t>(runs.size()) > pixels + 1) return {};
  return runs;
}

[[noreturn]] void fail(const char* what, const std::string& text, int64_t height, int64_t width) {
  std::printf("%s: height %" PRId64 ", width %" PRId64 ", text ", what, height, width);
  for (const unsigned char letter : text) std::printf("%02x", letter);
  std::printf("\n");
  std::exit(1);
}

Runs random_runs(Random& random, int64_t pixels) {
  Runs runs;
  for (int64_t left = pixels; left > 0;) {
    runs.push_back(random.below(4) ? random.below(left + 1) : random.below(3));
    if (runs.back() > left) runs.back() = left;
    left -= runs.back();
    if (static_cast<int64_t>(runs.size()) == pixels + 1) runs.back() += left, left = 0;
  }
  return runs;
}

void mutate(Random& random, std::string& text) {
  for (int64_t times = random.below(4); times > 0; --times) {
    const size_t at = static_cast<size_t>(random.below(static_cast<int64_t>(text.size()) + 1));
    switch (random.below(4)) {
      case 0:
        text.insert(at, 1, static_cast<char>(random.below(8) ? 48 + random.below(64) : random.below(256)));
        break;
      case 1:
        text.erase(at, 1 + static_cast<size_t>(random.below(3)));
        break;
      case 2:
        if (at < text.size()) text[at] = static_cast<char>(48 + random.below(64));
        break;
      default:
        text += text.substr(at);
    }
  }
}

#ifdef MASK_API
void draw(const std::string& text, const Runs& runs, int64_t height, int64_t width) {
  RLE mask, both;
  std::vector<char> copy(text.begin(), text.end());
  copy.push_back('\0');
  rleFrString(&mask, copy.data(), static_cast<siz>(height), static_cast<siz>(width));
  if (mask.m != runs.size()) fail("pycocotools reads other runs", text, height, width);
  for (size_t i = 0; i < runs.size(); ++i) {
    if (mask.cnts[i] != runs[i]) fail("pycocotools reads another run", text, height, width);
  }
  std::vector<byte> pixels(static_cast<size_t>(height * width));
  rleDecode(&mask, pixels.data(), 1);
  uint area = 0;
  double box[4], iou = 0;
  rleArea(&mask, 1, &area);
  rleToBbox(&mask, box, 1);
  rleIou(&mask, &mask, 1, 1, nullptr, &iou);
  RLE pair[2] = {mask, mask};
  rleMerge(pair, &both, 2, 0);
  int64_t drawn = 0;
  for (const byte pixel : pixels) drawn += pixel;
  if (drawn != area) fail("another area", text, height, width);
  rleFree(&both);
  rleFree(&mask);
}
#endif

int fuzz(int64_t executions, uint64_t seed) {
  Random random{seed * 2 + 1};
  int64_t accepted = 0;
  for (int64_t execution = 0; execution < executions; ++execution) {
    const int64_t height = 1 + random.below(execution % 64 ? 12 : 300),
                  width = 1 + random.below(execution % 64 ? 12 : 300);
    std::string text;
    if (random.below(3)) {
      const std::vector<uint8_t> bytes = cascadeops::encode_runs(random_runs(random, height * width));
      text.assign(bytes.begin(), bytes.end());
      mutate(random, text);
    } else {
      for (int64_t left = random.below(24); left > 0; --left) {
        text += static_cast<char>(random.below(16) ? 48 + random.below(64) : random.below(256));
      }
    }
    const std::optional<Runs> runs = checked(text, height * width);
    if (!runs) continue;
    ++accepted;
    const std::vector<uint8_t> written = cascadeops::encode_runs(*runs);
    const std::optional<Runs> again = checked(std::string(written.begin(), written.end()), height * width);
    if (!again || *again != *runs) fail("written and read, it is another mask", text, height, width);
#ifdef MASK_API
    draw(text, *runs, height, width);
#endif
  }
  std::printf("%" PRId64 " executions, %" PRId64 " accepted\n", executions, accepted);
  return 0;
}

int check() {
  int64_t height, width;
  char hex[4096];
  while (std::scanf("%" SCNd64 " %" SCNd64 " %4095s", &height, &width, hex) == 3) {
    std::string text;
    for (size_t at = 0; hex[0] != '-' && at + 1 < std::strlen(hex); at += 2) {
      text += static_cast<char>(std::stoi(std::string(hex + at, 2), nullptr, 16));
    }
    const std::optional<Runs> runs = checked(text, height * width);
    if (!runs) std::printf("refused");
    for (const int64_t run : runs.value_or(Runs{})) std::printf("%" PRId64 " ", run);
    std::printf("\n");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--check") == 0) return check();
  if (argc != 3) return 2;
  return fuzz(std::atoll(argv[1]), std::strtoull(argv[2], nullptr, 10));
}
