// The teams of csrc/cpu/team.h on std::thread, for ThreadSanitizer, which does not know OpenMP's own threads.
//
//     g++ -fopenmp -fsanitize=thread -c ...; g++ -fsanitize=thread ... (no -fopenmp: this file has what it would link)
//     ./team_races [race]
//
// Each item of a loop reads its neighbours of the loop before. With "race" every second loop has no end, so that the
// sanitizer has something to find.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace {

thread_local int thread_number = 0;

}  // namespace

extern "C" {

// The functions that compilers call for `#pragma omp parallel`.
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) {
    others.emplace_back([=] {
      thread_number = static_cast<int>(i);
      body(data);
    });
  }
  body(data);
  for (std::thread& other : others) other.join();
}

int omp_get_thread_num() { return thread_number; }

}  // extern "C"

namespace ddpm_fast::DDPM_FAST_ISA {

// Runs `loops` loops over `count` items in one team. Returns the sum of the last loop's items.
std::int64_t run_loops(int threads, int loops, std::int64_t count, std::int64_t grain, bool with_race) {
  struct Context {
    int loops;
    std::int64_t count, grain;
    bool with_race;
    std::vector<std::int64_t> items[2];
  } context{loops, count, grain, with_race, {std::vector<std::int64_t>(count, 1), std::vector<std::int64_t>(count)}};
  const auto body = [](void* of, TeamMember& member) {
    Context& all = *static_cast<Context*>(of);
    for (int loop = 0; loop < all.loops; ++loop) {
      const std::vector<std::int64_t>& from = all.items[loop % 2];
      const std::int64_t last = all.count - 1;
      std::vector<std::int64_t>& to = all.items[(loop + 1) % 2];
      const auto one = [&](std::int64_t i) {
        to[i] = (from[i > 0 ? i - 1 : last] + from[i] + from[i < last ? i + 1 : 0]) % 1000003;
      };
      if (all.with_race && loop % 2) {
        for (std::int64_t i = 0; i < all.count; ++i) one(i);  // all members write all items
      } else {
        parallel_for(all.count, all.grain, {-reinterpret_cast<std::intptr_t>(&member)}, one);
      }
    }
  };
  start_team(threads, body, &context);
  std::int64_t sum = 0;
  for (const std::int64_t item : context.items[loops % 2]) sum += item;
  return sum;
}

// Returns whether a loop outside of a program throws what one of its items throws.
bool passes_errors_on(int threads) {
  std::vector<int> items(1000);
  try {
    parallel_for(1000, 8, {threads}, [&](std::int64_t i) {
      items[i] = 1;
      if (i == 500) throw std::bad_alloc();
    });
  } catch (const std::bad_alloc&) {
    return true;
  }
  return false;
}

}  // namespace ddpm_fast::DDPM_FAST_ISA

int main(int count, char** arguments) {
  using namespace ddpm_fast::DDPM_FAST_ISA;
  const bool with_race = count > 1 && std::strcmp(arguments[1], "race") == 0;
  bool same = true;
  for (const int items : {1, 40, 1000}) {
    const std::int64_t expected = run_loops(1, 50, items, 8, false);
    for (const int threads : {2, 3, 5}) {
      same = same && run_loops(threads, 50, items, 8, with_race) == expected;
      same = same && passes_errors_on(threads);
    }
  }
  std::puts(same ? "same" : "different");
}
