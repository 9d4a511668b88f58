#include "cpu/team.h"

#include <unistd.h>

#include <atomic>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ddpm_fast {

namespace {

constexpr int kMostShares = 32;      // further members begin with the share of another one
constexpr std::size_t kApart = 128;  // two cache lines: processors fetch them in pairs

// A member looks this many times, for about 40 us, before it sleeps. Idle processors: 3 convolutions and 3 norms of 8x8
// maps take 1.94 ms, and 2.2 ms if members sleep at once. Busy processors: 0, 300, 2000 and 10000 make no difference.
constexpr int kSpins = 2000;

const pid_t loaded_in = getpid();

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns whether a counter that wraps around is at `target` or beyond.
bool is_reached(std::uint32_t value, std::uint32_t target) { return static_cast<std::int32_t>(value - target) >= 0; }

void wait_for(const std::atomic<std::uint32_t>& counter, std::uint32_t target) {
  for (int i = 0; i < kSpins; ++i) {
    if (is_reached(counter.load(std::memory_order_acquire), target)) return;
    pause();
  }
  for (;;) {
    const std::uint32_t seen = counter.load(std::memory_order_acquire);
    if (is_reached(seen, target)) return;
    counter.wait(seen, std::memory_order_acquire);
  }
}

void wake_waiting(std::atomic<std::uint32_t>& counter) {
  // Some standard libraries look for waiting threads by a load that could otherwise come before the counter's store.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  counter.notify_all();
}

int shares_of(int threads) { return threads < kMostShares ? threads : kMostShares; }

}  // namespace

// Loops are numbered from 0. A run has fewer than 2^31 of them, and a loop has fewer than 2^31 chunks.
struct Team {
  // The next chunk of a share: the number of the loop, and the chunks that are claimed. A claim in a later loop replaces
  // both, so nobody resets tickets, and a member that comes late cannot claim a chunk of another loop.
  struct alignas(kApart) Ticket {
    std::atomic<std::uint64_t> value;
  };

  explicit Team(int all_threads) : threads(all_threads) {
    for (int i = 0; i < shares_of(threads); ++i) new (&tickets[i].value) std::atomic<std::uint64_t>(0);
  }
  ~Team() {}

  const int threads;

  union {
    Ticket tickets[kMostShares];  // a short loop would notice the time to write those that nobody uses
  };
  alignas(kApart) std::atomic<std::int64_t> done{0};        // chunks of the current loop
  alignas(kApart) std::atomic<std::uint32_t> completed{0};  // loops
  alignas(kApart) std::atomic<bool> failed{false};
};

TeamMember::TeamMember(Team& team, int index) : team_(team), index_(index) {}

int threads_of(const TeamMember& member) { return member.team_.threads; }

bool TeamMember::claim(const Chunks& loop, Range& range) {
  const int shares = shares_of(loop.threads);
  for (; searched_ < shares; ++searched_, end_ = -1) {
    if (end_ < 0) {
      share_ = (index_ + searched_) % shares;
      first_ = share_ * loop.chunks / shares;
      end_ = (share_ + 1) * loop.chunks / shares;
    }
    std::atomic<std::uint64_t>& ticket = team_.tickets[share_].value;
    // Relaxed: the counter `completed` orders what the chunks read and write.
    std::uint64_t seen = ticket.load(std::memory_order_relaxed);
    for (;;) {
      const auto at = static_cast<std::uint32_t>(seen >> 32);
      if (at != loop_ && is_reached(at, loop_)) return false;  // the others are in a later loop
      const std::int64_t claimed = at == loop_ ? static_cast<std::uint32_t>(seen) : 0, next = first_ + claimed;
      if (next >= end_) break;
      const std::uint64_t now = static_cast<std::uint64_t>(loop_) << 32 | static_cast<std::uint64_t>(claimed + 1);
      if (!ticket.compare_exchange_weak(seen, now, std::memory_order_relaxed)) continue;
      ++claimed_;
      range.begin = next * loop.items;
      range.end = range.begin + loop.items < loop.count ? range.begin + loop.items : loop.count;
      return true;
    }
  }
  return false;
}

void TeamMember::finish(const Chunks& loop) {
  const std::uint32_t completed = loop_ + 1;
  if (claimed_ > 0 && team_.done.fetch_add(claimed_, std::memory_order_acq_rel) + claimed_ == loop.chunks) {
    team_.done.store(0, std::memory_order_relaxed);  // nobody adds to it before the next line
    team_.completed.store(completed, std::memory_order_release);
    wake_waiting(team_.completed);
  } else {
    wait_for(team_.completed, completed);
  }
  loop_ = completed;
  searched_ = 0;
  end_ = -1;
  claimed_ = 0;
}

void TeamMember::fail() { team_.failed.store(true, std::memory_order_relaxed); }

#ifdef _OPENMP

bool can_start_threads() { return getpid() == loaded_in; }

void start_team(int threads, void (*body)(void*, TeamMember&), void* context) {
  Team team(threads);
  // OpenMP's own wait at the end of the region. A wait that sleeps, as in `finish`, made loops of 1 ms up to three times
  // slower with busy neighbours, because threads that slept come late to the end.
#pragma omp parallel num_threads(threads)
  {
    TeamMember member(team, omp_get_thread_num());
    try {
      body(context, member);
    } catch (const std::bad_alloc&) {
      member.fail();
    }
  }
  if (team.failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

#else

bool can_start_threads() { return false; }

void start_team(int threads, void (*body)(void*, TeamMember&), void* context) {
  Team team(threads);
  TeamMember member(team, 0);
  body(context, member);
  if (team.failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

#endif

}  // namespace ddpm_fast
