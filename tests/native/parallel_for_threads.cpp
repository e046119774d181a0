// torch_parallel_for with plain threads, for the ThreadSanitizer build: it cannot see how the OpenMP runtime inside
// PyTorch hands work over, and would report every input as a race.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 4;

}  // namespace

extern "C" __attribute__((visibility("hidden"))) int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                                                            void (*body)(int64_t, int64_t, void*),
                                                                            void* context) {
  const int64_t per_thread = std::max(std::max<int64_t>(grain, 1), (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(kThreads);
  for (int64_t from = begin, i = 0; from < end; from += per_thread, ++i) {
    threads.emplace_back([=, &errors] {
      try {
        body(from, std::min(from + per_thread, end), context);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return std::any_of(errors.begin(), errors.end(), [](const auto& error) { return error != nullptr; });
}
