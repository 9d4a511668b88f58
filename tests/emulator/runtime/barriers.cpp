// __syncthreads, and the barrier of a cluster.

#include <algorithm>
#include <cstring>

#include "image.h"
#include "machine.h"

namespace emulator {
namespace {

bool same_place(Source a, Source b) { return a.line == b.line && !std::strcmp(a.file, b.file); }

void release_block(Block& block) {
  ++block.epoch;
  block.at_barrier = 0;
  // All of them now know what one of them knew of cluster barriers.
  std::uint16_t seen = 0;
  for (const Thread& thread : block.threads) seen = std::max(seen, thread.cluster_seen);
  for (Thread& thread : block.threads) {
    if (thread.state != State::kAtBlockBarrier) continue;
    thread.cluster_seen = seen;
    make_ready(thread);
  }
}

}  // namespace

// All threads of a block have to come, and to the same place in the source. A device is content where the threads that
// have exited are missing; here that is reported, as most who write it did not mean it.
void block_barrier(Source here) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  if (block.at_barrier == 0) {
    block.barrier = here;
    if (block.live < block.threads.size()) {
      fail("divergent barrier", 0, "__syncthreads at %s after %zu thread(s) of the block have exited",
           to_string(here).c_str(), block.threads.size() - block.live);
    }
  } else if (!same_place(here, block.barrier)) {
    fail("divergent barrier", 0, "__syncthreads at %s while %u thread(s) wait in the one at %s",
         to_string(here).c_str(), block.at_barrier, to_string(block.barrier).c_str());
  }
  thread.state = State::kAtBlockBarrier;
  thread.waits_at = here;
  recheck_warp(thread);
  if (++block.at_barrier == block.live) release_block(block);
  suspend(thread.fiber);
}

void leave_barriers(const Thread& thread) {
  const Block& block = *thread.block;
  if (block.at_barrier > 0) {
    fail("divergent barrier", 0, "it exits while %u thread(s) wait in __syncthreads at %s", block.at_barrier,
         to_string(block.barrier).c_str());
  }
}

void cluster_arrive(Source here, bool release) {
  Thread& thread = *machine.current;
  if (thread.cluster_arrivals != thread.cluster_waits) {
    fail("cluster", 0, "arrives twice at the cluster barrier without waiting, at %s", to_string(here).c_str());
  }
  ++thread.cluster_arrivals;
  machine.cluster_release &= release;
  if (release) thread.touched_peer = false;
  std::size_t expected = 0;
  for (const Block& block : machine.blocks) expected += block.threads.size();
  if (++machine.cluster_arrivals < expected) return;
  for (Block& block : machine.blocks) {
    for (Thread& each : block.threads) {
      each.cluster_complete = each.cluster_arrivals;
      each.cluster_release = machine.cluster_release;
      if (each.state == State::kAtClusterBarrier) make_ready(each);
    }
  }
  machine.cluster_arrivals = 0;
  machine.cluster_release = true;
}

void cluster_wait(Source here) {
  Thread& thread = *machine.current;
  if (thread.cluster_arrivals == thread.cluster_waits) {
    fail("cluster", 0, "waits at the cluster barrier without having arrived, at %s", to_string(here).c_str());
  }
  if (thread.cluster_complete < thread.cluster_arrivals) {
    thread.state = State::kAtClusterBarrier;
    thread.waits_at = here;
    recheck_warp(thread);
    suspend(thread.fiber);
  }
  thread.cluster_waits = thread.cluster_arrivals;
  if (thread.cluster_release) thread.cluster_seen = thread.cluster_waits;
}

void* map_to_rank(const void* shared, unsigned rank, Source here) {
  const std::size_t offset = reinterpret_cast<Address>(shared) - reinterpret_cast<Address>(shared_memory());
  if (offset >= image().shared_size) {
    fail("cluster", 0, "maps an address that is not in its shared memory, at %s", to_string(here).c_str());
  }
  if (rank >= machine.ranks()) {
    fail("cluster", 0, "maps to rank %u of a cluster of %u, at %s", rank, machine.ranks(), to_string(here).c_str());
  }
  Block& block = machine.blocks[rank];
  return (&block == machine.resident ? shared_memory() : block.shared.aside.data()) + offset;
}

}  // namespace emulator
