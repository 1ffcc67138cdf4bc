// Read bandwidth of memory by threads: `probe THREADS... ` prints one line of JSON, GB/s (10^9) for each count.
// Every thread sums its part of 256 MiB on huge pages, eight 64-byte lines at a time; the best of several passes.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {
constexpr size_t kBytes = size_t{256} << 20;
constexpr int kPasses = 5;
typedef uint64_t Line __attribute__((vector_size(64)));

uint64_t sum(const Line* from, const Line* to) {
  Line total[8] = {};
  for (; from < to; from += 8)
    for (int i = 0; i < 8; i++) total[i] += from[i];
  uint64_t out = 0;
  for (auto& line : total)
    for (int i = 0; i < 8; i++) out += line[i];
  return out;
}

double pass(const Line* data, int threads, std::atomic<uint64_t>* sink) {
  const size_t lines = kBytes / sizeof(Line) / threads / 8 * 8;
  std::vector<std::thread> team;
  auto began = std::chrono::steady_clock::now();
  for (int t = 0; t < threads; t++)
    team.emplace_back([=] { *sink += sum(data + t * lines, data + (t + 1) * lines); });
  for (auto& each : team) each.join();
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - began;
  return threads * lines * sizeof(Line) / seconds.count() / 1e9;
}
}  // namespace

int main(int count, char** words) {
  void* block = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) return 1;
  madvise(block, kBytes, MADV_HUGEPAGE);
  auto* data = static_cast<Line*>(block);
  for (size_t i = 0; i < kBytes / sizeof(Line); i++) data[i] = Line{} + i;
  std::atomic<uint64_t> sink{0};
  printf("{");
  for (int at = 1; at < count; at++) {
    int threads = std::max(1, atoi(words[at]));
    double best = 0;
    for (int i = 0; i < kPasses; i++) best = std::max(best, pass(data, threads, &sink));
    printf("%s\"%d\": %.2f", at > 1 ? ", " : "", threads, best);
  }
  printf("}\n");
  return 0;
}
