// A loop that runs on several threads.
#pragma once

#include <cstdint>
#include <new>

#include "common/args.h"
#include "cpu/team.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// Returns the chunks of a loop whose threads get at least `grain` items each. A chunk has a quarter of that: a thread
// that finishes early takes what another has not begun.
inline Chunks chunks_of(std::int64_t count, std::int64_t grain, int threads) {
  if (grain < 1) grain = 1;
  const std::int64_t most = count / grain;
  if (threads > most) threads = most < 1 ? 1 : static_cast<int>(most);
  constexpr std::int64_t kChunksOfGrain = 4, kMostChunks = 1 << 30;
  std::int64_t items = threads <= 1 ? count : grain / kChunksOfGrain;
  if (items < count / kMostChunks + 1) items = count / kMostChunks + 1;
  return {count, items, (count + items - 1) / items, threads};
}

template <class Body>
inline void run_chunks(TeamMember& member, const Chunks& loop, const Body& body) {
  Range range;
  while (member.claim(loop, range)) {
    try {
      for (std::int64_t i = range.begin; i < range.end; ++i) body(i);
    } catch (const std::bad_alloc&) {
      member.fail();
    }
  }
}

// Runs body(i) for i in [0, count). The calling thread throws std::bad_alloc if any thread ran out of memory.
//
// Outside of a program it starts up to `threads` threads, each of which gets at least `grain` items, because waking it
// costs time. It starts none after a fork (see can_start_threads). Inside of a program every member of the team calls
// this function, and it returns when all items are done.
//
// An item runs on another thread in each run, so it may not depend on its thread.
template <class Body>
inline void parallel_for(std::int64_t count, std::int64_t grain, const StreamOrThreads& where, const Body& body) {
  if (count <= 0) return;
  const Chunks loop = chunks_of(count, grain, where.threads());
  if (TeamMember* const member = where.member()) {
    run_chunks(*member, loop, body);
    member->finish(loop);
  } else if (loop.threads > 1 && can_start_threads()) {
    struct Context {
      const Chunks& loop;
      const Body& body;
    } context{loop, body};
    const auto run = [](void* of, TeamMember& member) {
      const auto& [all, one] = *static_cast<Context*>(of);
      run_chunks(member, all, one);
    };
    start_team(loop.threads, run, &context);
  } else {
    for (std::int64_t i = 0; i < count; ++i) body(i);
  }
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
