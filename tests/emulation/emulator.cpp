#include "emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "sanitizer.h"

// The statics that __shared__ makes lie in a section of their own, whose ends the linker knows.
extern char __start_emulated_shared[] __attribute__((visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((visibility("hidden")));

namespace emulation {
namespace {

constexpr unsigned kMaxThreads = 1024, kMaxBlocksX = 0x7fffffff, kMaxBlocksYZ = 65535, kMaxThreadsZ = 64;
constexpr int64_t kSharedWithoutAsking = 48 << 10, kMaxShared = 227 << 10;  // the second: of an H100
constexpr size_t kStack = 128 << 10, kBeyondShared = 4 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN, -1

enum class State { kReady, kWaiting, kEnded };

struct Thread {
  jmp_buf context;
  ucontext_t start;
  char* stack = nullptr;
  bool started = false;
  State state = State::kEnded;
  // What it waits for; mask 0 stands for the whole block.
  const char* operation = nullptr;
  Place place{};
  unsigned mask = 0;
  uint64_t value = 0;
};

struct Warp {
  uint64_t values[kWarp];  // of the last meeting
};

Thread threads[kMaxThreads];
Warp warps[kMaxThreads / kWarp];
unsigned num_threads, current;
int votes;  // of the last meeting of the block
jmp_buf scheduler;
const std::function<void()>* program;
std::string fault_text;
bool running = false;

alignas(128) char dynamic_shared[kMaxShared + kBeyondShared];
int64_t allowed_shared = kSharedWithoutAsking;
std::mt19937_64 random_order;
int64_t num_launches = 0;
int device_guards = 0;
std::string unchecked_kernel;

void to_scheduler() {
  Thread& self = threads[current];
  if (_setjmp(self.context) == 0) {
    leave_thread();
    _longjmp(scheduler, 1);
  }
  enter_thread();
}

void run_forever() {
  enter_thread();
  for (;;) {
    (*program)();
    threads[current].state = State::kEnded;
    to_scheduler();
  }
}

void prepare(Thread& thread) {
  if (thread.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0)
      throw std::runtime_error("no memory for stacks");
    thread.stack = static_cast<char*>(memory);
  }
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = thread.stack;
  thread.start.uc_stack.ss_size = kStack;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, run_forever, 0);
}

void resume(unsigned index) {
  Thread& thread = threads[index];
  current = index;
  threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
  if (_setjmp(scheduler) == 0) {
    leave_host(thread.stack, kStack);
    if (thread.started) _longjmp(thread.context, 1);
    thread.started = true;
    setcontext(&thread.start);
  }
  enter_host();
}

void wait(const char* operation, Place place, unsigned mask, uint64_t value) {
  Thread& self = threads[current];
  self.state = State::kWaiting;
  self.operation = operation;
  self.place = place;
  self.mask = mask;
  self.value = value;
  to_scheduler();
}

bool same_meeting(const Thread& a, const Thread& b) {
  return b.state == State::kWaiting && a.mask == b.mask && a.operation == b.operation && a.place.line == b.place.line &&
         (a.place.file == b.place.file || std::strcmp(a.place.file, b.place.file) == 0);
}

// Lets the lanes go on whose meeting is complete; whether there are any.
bool release_lanes(unsigned warp) {
  const unsigned first = warp * kWarp, count = std::min<unsigned>(kWarp, num_threads - first);
  bool any = false;
  for (unsigned i = 0; i < count; ++i) {
    const Thread& asking = threads[first + i];
    if (asking.state != State::kWaiting || asking.mask == 0) continue;
    const unsigned mask = asking.mask;
    bool complete = count == kWarp || mask >> count == 0;
    for (unsigned j = 0; complete && j < count; ++j)
      complete = !(mask >> j & 1) || same_meeting(asking, threads[first + j]);
    for (unsigned j = 0; complete && j < count; ++j) {
      if (!(mask >> j & 1)) continue;
      warps[warp].values[j] = threads[first + j].value;
      threads[first + j].state = State::kReady;
    }
    any |= complete;
  }
  return any;
}

bool release_block() {
  votes = 0;
  for (unsigned i = 0; i < num_threads; ++i) {
    if (threads[i].mask != 0 || !same_meeting(threads[0], threads[i])) return false;
    votes += threads[i].value != 0;
  }
  for (unsigned i = 0; i < num_threads; ++i) threads[i].state = State::kReady;
  return true;
}

std::string text_of(dim3 size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

// Who waits where when nobody can go on.
std::string describe_standstill() {
  std::string text = "threads wait for each other:";
  std::vector<bool> told(num_threads, false);
  for (unsigned i = 0; i < num_threads; ++i) {
    if (told[i]) continue;
    unsigned count = 0;
    for (unsigned j = i; j < num_threads; ++j) {
      const bool same = threads[i].state == threads[j].state &&
                        (threads[i].state == State::kEnded || same_meeting(threads[i], threads[j]));
      told[j] = told[j] || same;
      count += same;
    }
    text += " " + std::to_string(count) + " (first: " + std::to_string(i) + ") ";
    text += threads[i].state == State::kEnded
                ? std::string("have ended;")
                : std::string("at ") + threads[i].operation + ", " + threads[i].place.file + ":" +
                      std::to_string(threads[i].place.line) + ";";
  }
  return text;
}

__attribute__((no_sanitize("address"))) void poison_shared_memory(size_t dynamic) {
  for (char* byte = __start_emulated_shared; byte < __stop_emulated_shared; ++byte) *byte = static_cast<char>(kPoison);
  std::memset(dynamic_shared, kPoison, dynamic + kBeyondShared);
}

void run_block(size_t shared, std::vector<unsigned>& order) {
  poison_shared_memory(shared);
  forbid(dynamic_shared + shared, kBeyondShared);
  for (unsigned i = 0; i < num_threads; ++i) {
    if (!threads[i].started) prepare(threads[i]);
    threads[i].state = State::kReady;
  }
  std::shuffle(order.begin(), order.end(), random_order);
  for (bool moved = true; moved && fault_text.empty();) {
    moved = false;
    const size_t first = random_order() % num_threads;
    for (size_t i = 0; i < num_threads && fault_text.empty(); ++i) {
      const unsigned index = order[(first + i) % num_threads];
      if (threads[index].state != State::kReady) continue;
      moved = true;
      resume(index);
    }
    for (unsigned warp = 0; warp * kWarp < num_threads; ++warp) moved |= release_lanes(warp);
    moved |= release_block();
  }
  allow(dynamic_shared + shared, kBeyondShared);
  if (!fault_text.empty()) return;
  if (std::any_of(threads, threads + num_threads, [](const Thread& thread) { return thread.state != State::kEnded; }))
    fault_text = describe_standstill();
  else if (std::any_of(dynamic_shared + shared, dynamic_shared + shared + kBeyondShared,
                       [](char byte) { return byte != static_cast<char>(kPoison); }))
    fault_text = "writes beyond its " + std::to_string(shared) + " bytes of dynamic shared memory";
}

std::string fault_of_launch(dim3 blocks, dim3 block, size_t shared) {
  const std::string sizes = text_of(blocks) + " blocks of " + text_of(block) + " threads";
  if (device_guards == 0) return "is launched without a device guard";
  if (!unchecked_kernel.empty()) return "is launched, but no launch check has followed that of " + unchecked_kernel;
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0 || block.x == 0 || block.y == 0 || block.z == 0)
    return "is launched with " + sizes + ", which is an error on a GPU";
  if (blocks.x > kMaxBlocksX || blocks.y > kMaxBlocksYZ || blocks.z > kMaxBlocksYZ || block.z > kMaxThreadsZ ||
      uint64_t{block.x} * block.y * block.z > kMaxThreads)
    return "is launched with " + sizes + ", more than a GPU takes";
  if (static_cast<int64_t>(shared) > allowed_shared)
    return "asks for " + std::to_string(shared) + " bytes of dynamic shared memory, and is allowed " +
           std::to_string(allowed_shared);
  return "";
}

}  // namespace

const uint64_t* meet_warp(const char* operation, Place place, unsigned mask, uint64_t value) {
  const unsigned warp = current / kWarp;
  if (!(mask >> current % kWarp & 1)) fault(std::string(operation) + ": the mask does not name the lane that calls it");
  wait(operation, place, mask, value);
  return warps[warp].values;
}

int meet_block(const char* operation, Place place, bool value) {
  wait(operation, place, 0, value);
  return votes;
}

void fault(const std::string& text) {
  fault_text = text + " (block " + text_of(blockIdx) + ", thread " + text_of(threadIdx) + ")";
  for (;;) to_scheduler();
}

bool is_running() { return running; }

char* dynamic_shared_memory() { return dynamic_shared; }

bool allow_shared_memory(int64_t bytes) {
  if (bytes < 0 || bytes > kMaxShared) return false;
  allowed_shared = std::max(bytes, kSharedWithoutAsking);
  return true;
}

void enter_device_guard() { ++device_guards; }
void leave_device_guard() { --device_guards; }
void check_launch() { unchecked_kernel.clear(); }

void run(const char* kernel, dim3 blocks, dim3 block, size_t shared, const std::function<void()>& thread) {
  fault_text = fault_of_launch(blocks, block, shared);
  allowed_shared = kSharedWithoutAsking;
  unchecked_kernel.clear();
  if (fault_text.empty()) {
    unchecked_kernel = kernel;
    ++num_launches;
    gridDim = blocks;
    blockDim = block;
    num_threads = block.x * block.y * block.z;
    program = &thread;
    running = true;
    std::vector<unsigned> order(num_threads);
    std::iota(order.begin(), order.end(), 0u);
    std::vector<uint64_t> block_order(uint64_t{blocks.x} * blocks.y * blocks.z);
    std::iota(block_order.begin(), block_order.end(), uint64_t{0});
    std::shuffle(block_order.begin(), block_order.end(), random_order);
    for (size_t i = 0; i < block_order.size() && fault_text.empty(); ++i) {
      const uint64_t index = block_order[i];
      blockIdx = {static_cast<unsigned>(index % blocks.x), static_cast<unsigned>(index / blocks.x % blocks.y),
                  static_cast<unsigned>(index / blocks.x / blocks.y)};
      run_block(shared, order);
    }
    running = false;
  }
  if (fault_text.empty()) return;
  unchecked_kernel.clear();
  for (Thread& stopped : threads) stopped.started = false;  // somewhere in their program
  throw std::runtime_error(std::string("emulated CUDA: ") + kernel + ": " + fault_text);
}

}  // namespace emulation

namespace {

int64_t launches() { return emulation::num_launches; }
void seed(int64_t value) { emulation::random_order.seed(static_cast<uint64_t>(value)); }

}  // namespace

// launches(): how many there have been. seed(n): of the random order.
STABLE_TORCH_LIBRARY(cascadeops_emulation, library) {
  library.def("launches() -> int");
  library.def("seed(int value) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(cascadeops_emulation, CompositeExplicitAutograd, library) {
  library.impl("launches", TORCH_BOX(&launches));
  library.impl("seed", TORCH_BOX(&seed));
}
