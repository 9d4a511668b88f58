// A team of threads that runs the loops of one kernel, or of a whole program of kernels, in one parallel region.
//
// Each member of the team calls the same functions with the same arguments. The members share the items of each loop
// and wait for each other at its end. A member claims one chunk of items at a time, so one that the operating system
// has preempted delays a single chunk, and one that never got a thread delays none.
//
// team.cpp is compiled for the oldest processor. So this header has no inline functions, of which the linker would keep
// the copy of any instruction set.
#pragma once

#include <cstdint>

namespace ddpm_fast {

struct Team;

// The chunks of a loop. Each of `threads` members has a share of neighbouring chunks. It claims them first, because their
// data may be in the cache of its core: it had the same share of the loop before. Then it claims chunks of the others.
struct Chunks {
  std::int64_t count;  // items
  std::int64_t items;  // in a chunk
  std::int64_t chunks;
  int threads;
};

struct Range {
  std::int64_t begin, end;
};

class TeamMember {
 public:
  TeamMember(Team& team, int index);

  // Claims the next chunk of the current loop. Returns false if none is left.
  bool claim(const Chunks& loop, Range& range);

  // Waits until all chunks of the current loop are done, and goes to the next loop.
  void finish(const Chunks& loop);

  friend int threads_of(const TeamMember& member);

  // Says that a thread of the team ran out of memory. The team goes on, because its members wait for each other.
  void fail();

 private:
  Team& team_;
  int index_;
  std::uint32_t loop_ = 0;  // finished loops
  // The current loop:
  int searched_ = 0;                           // shares without chunks that are left
  std::int64_t share_, first_ = 0, end_ = -1;  // the share from which it claims, and its chunks
  std::int64_t claimed_ = 0;                   // chunks
};

// Returns whether threads can be started. After a fork the child has none of the threads of OpenMP, which would wait for
// them forever.
bool can_start_threads();

// Calls body(context, member) on up to `threads` threads, the calling thread among them. Throws std::bad_alloc if any of
// them ran out of memory: an exception that left the parallel region would end the process.
void start_team(int threads, void (*body)(void* context, TeamMember& member), void* context);

}  // namespace ddpm_fast
