// The state of the emulated machine: threads, blocks and the cluster that runs, and the scheduler's interface.
//
// One cluster (a block, where there are no clusters) runs at a time, on one operating system thread, so a run with the
// same order is the same run. Nothing here is thread-safe: module.cpp holds a lock.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "report.h"
#include "shared_memory.h"

namespace emulator {

constexpr unsigned kWarpSize = 32, kMaxBlockSize = 1024, kMaxClusterSize = 16;

enum class State { kReady, kAtBlockBarrier, kAtClusterBarrier, kInWarpOp, kExited };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block;
  uint3 index;
  unsigned number;  // linear, in its block
  State state;
  Source waits_at;  // the barrier or warp operation, unless ready

  // The clock that orders this thread's memory accesses after those of others (races.cpp).
  std::array<std::uint16_t, kWarpSize> warp_clock;  // __syncwarp: how far each lane had come
  // Cluster barriers: arrived at, completed by all, waited for, and seen to be behind everybody's memory accesses.
  std::uint16_t cluster_arrivals, cluster_complete, cluster_waits, cluster_seen;
  bool cluster_release;  // whether the last one completed orders memory

  bool touched_peer;  // accessed another block's shared memory after its last arrival at a cluster barrier

  // The warp operation that it is in.
  WarpOp op;
  unsigned mask;
  int argument;
  std::uint64_t value, result;

  unsigned lane() const { return number % kWarpSize; }
};

struct Block {
  unsigned rank;  // in its cluster
  uint3 index;
  std::uint32_t number;  // linear, cluster after cluster
  std::vector<Thread> threads;
  unsigned live;               // threads that have not exited
  unsigned at_barrier;         // threads that wait in __syncthreads
  Source barrier;              // where the first of them waits
  std::uint16_t epoch;         // __syncthreads passed
  std::uint16_t needed_until;  // peers accessed its shared memory before this cluster barrier
  SharedMemory shared;

  // Threads that can run: the rest of this round, and those that became ready since it began.
  std::vector<std::uint16_t> round, next_round;
  std::size_t position;
};

// The order in which blocks, and the threads of a block, take their turns.
enum class Order { kNatural, kReversed, kShuffled };

struct LaunchRecord {
  std::string kernel;
  std::uint64_t blocks;
  unsigned threads, cluster;  // in a block; blocks in a cluster
  std::size_t dynamic_shared;
};

struct Machine {
  // Options
  Order order = Order::kNatural;
  std::uint64_t seed = 0;
  unsigned preempt = 0;  // where not 0: an access to memory hands over with probability 1/preempt

  // The launch
  dim3 grid, block_size, cluster_size;
  std::size_t dynamic_shared = 0;
  std::string kernel;
  std::uint32_t launch_number = 0;
  std::mt19937_64 random;
  bool abandoned = false;  // after a finding that leaves no way to go on

  // The cluster that runs
  std::vector<Block> blocks;
  unsigned cluster_arrivals = 0;  // threads at the cluster barrier
  bool cluster_release = true;    // whether all of these order memory by it
  Block* resident = nullptr;      // whose shared memory the __shared__ variables hold
  Thread* current = nullptr;      // null in the scheduler and in host code

  // Totals, and the launches that nobody has asked about yet
  std::uint64_t launches = 0, blocks_run = 0, accesses = 0;
  std::vector<LaunchRecord> log;

  unsigned ranks() const { return cluster_size.x * cluster_size.y * cluster_size.z; }
};
extern Machine machine;

void make_ready(Thread&);  // puts it among those that run in the next round
// The rest is called by the thread that runs.
void maybe_preempt();
// Effects of a thread's exit or barrier on the lanes that wait for it (warp.cpp), and for the barrier (barriers.cpp).
void recheck_warp(const Thread&);
void leave_barriers(const Thread&);

std::string to_string(const Thread&);
std::string name_of_thread(std::uint32_t block_number, unsigned thread_number);
uint3 block_index(std::uint32_t block_number);

}  // namespace emulator
