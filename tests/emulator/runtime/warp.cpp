// Shuffles and __syncwarp: operations that the lanes named by a mask perform together.

#include <algorithm>

#include "machine.h"

namespace emulator {
namespace {

const char* name(WarpOp op) { return op == WarpOp::kSync ? "__syncwarp" : "__shfl_xor_sync"; }

std::string describe(const Thread& thread) {
  char mask[16];
  std::snprintf(mask, sizeof mask, "%08x", thread.mask);
  return std::string(name(thread.op)) + " at " + to_string(thread.waits_at) + ", mask " + mask;
}

// The lanes of a warp: pointers into its block, and null past the block's end.
using Warp = std::array<Thread*, kWarpSize>;
Warp warp_of(const Thread& thread) {
  Warp warp{};
  auto& threads = thread.block->threads;
  const unsigned first = thread.number - thread.lane();
  for (unsigned lane = 0; lane < kWarpSize && first + lane < threads.size(); ++lane)
    warp[lane] = &threads[first + lane];
  return warp;
}

bool named(unsigned mask, unsigned lane) { return mask >> lane & 1; }

void complete(const Warp& warp, unsigned mask) {
  std::array<std::uint16_t, kWarpSize> latest{};
  bool reported = false;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!named(mask, lane)) continue;
    for (unsigned i = 0; i < kWarpSize; ++i) latest[i] = std::max(latest[i], warp[lane]->warp_clock[i]);
    ++latest[lane];
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!named(mask, lane)) continue;
    Thread& thread = *warp[lane];
    if (thread.op == WarpOp::kSync) {
      thread.warp_clock = latest;  // a shuffle exchanges registers: it orders no memory
    } else {
      const unsigned source = (lane ^ static_cast<unsigned>(thread.argument)) % kWarpSize;
      if (!named(mask, source)) {
        if (!reported) {
          report("warp mask", 0, "%s: lane %u reads lane %u, which takes no part", describe(thread).c_str(), lane,
                 source);
        }
        reported = true;
      }
      thread.result = named(mask, source) ? warp[source]->value : ~std::uint64_t{0};
    }
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (named(mask, lane)) make_ready(*warp[lane]);
  }
}

// Returns whether a lane that the thread waits for can still run.
bool on_the_way(const Thread& thread, unsigned lane) {
  lane %= kWarpSize;
  const auto& threads = thread.block->threads;
  const unsigned number = thread.number - thread.lane() + lane;
  return named(thread.mask, lane) && number < threads.size() && threads[number].state == State::kReady;
}

// Runs the operation once all the lanes it names are there; reports those that will not come.
void check_complete(const Thread& thread) {
  // Most often another lane is still on the way. A neighbour's turn comes next, or came last.
  for (unsigned distance = 1; distance <= kWarpSize / 2; ++distance) {
    if (on_the_way(thread, thread.lane() + distance) || on_the_way(thread, thread.lane() - distance)) return;
  }
  const Warp warp = warp_of(thread);
  bool all = true;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!named(thread.mask, lane)) continue;
    const Thread* other = warp[lane];
    const char* absent = !other                                     ? "does not exist"
                         : other->state == State::kExited           ? "has exited"
                         : other->state == State::kAtBlockBarrier   ? "waits in __syncthreads"
                         : other->state == State::kAtClusterBarrier ? "waits at a cluster barrier"
                                                                    : nullptr;
    if (absent) fail("warp mask", 0, "%s: it names lane %u, which %s", describe(thread).c_str(), lane, absent);
    const bool with_us = other->state == State::kInWarpOp && other->mask == thread.mask && other->op == thread.op &&
                         other->waits_at.line == thread.waits_at.line;
    if (with_us) continue;
    all = false;
    // It may be in another operation before this one, but not one that waits for us.
    if (other->state == State::kInWarpOp && named(other->mask, thread.lane())) {
      fail("warp mask", 0, "%s: lane %u, which it names, is in %s", describe(thread).c_str(), lane,
           describe(*other).c_str());
    }
  }
  if (all) complete(warp, thread.mask);
}

}  // namespace

std::uint64_t warp_op(WarpOp op, unsigned mask, std::uint64_t value, int argument, Source here) {
  Thread& thread = *machine.current;
  thread.op = op;
  thread.mask = mask;
  thread.value = value;
  thread.argument = argument;
  thread.waits_at = here;
  if (!named(mask, thread.lane())) {
    fail("warp mask", 0, "%s: it does not name lane %u, which calls it", describe(thread).c_str(), thread.lane());
  }
  thread.state = State::kInWarpOp;
  check_complete(thread);
  suspend(thread.fiber);
  return thread.result;
}

void recheck_warp(const Thread& thread) {
  for (const Thread* other : warp_of(thread)) {
    if (other && other->state == State::kInWarpOp && named(other->mask, thread.lane())) return check_complete(*other);
  }
}

}  // namespace emulator
