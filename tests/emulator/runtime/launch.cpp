// Launching a grid and scheduling its threads.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>

#include "cards.h"
#include "image.h"
#include "machine.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

Machine machine;
int planted = 0;

namespace {

// The call that every thread of the launch makes.
struct {
  void (*run)(const void*);
  const void* call;
  std::size_t size;
} entry;

template <class T>
void arrange(std::vector<T>& turns) {
  if (machine.order == Order::kReversed) std::reverse(turns.begin(), turns.end());
  if (machine.order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), machine.random);
}

// The entry of a fiber: the kernel, with a copy of its arguments on the thread's own stack.
void thread_main() {
  alignas(16) char call[4096];
  std::memcpy(call, entry.call, entry.size);
  entry.run(call);
  Thread& thread = *machine.current;
  if (thread.touched_peer) {
    report("cluster", 0,
           "it exits without a cluster barrier after its last access to a peer's shared memory: the peer "
           "may have exited before");
  }
  thread.state = State::kExited;
  Block& block = *thread.block;
  if (--block.live == 0) {
    const auto waits =
        std::max_element(block.threads.begin(), block.threads.end(), [](const Thread& a, const Thread& b) {
          return a.cluster_waits < b.cluster_waits;
        })->cluster_waits;
    if (waits < block.needed_until) {
      report("cluster", 0,
             "its block exits without waiting at the cluster barrier that follows a peer's access to its "
             "shared memory");
    }
  }
  leave_barriers(thread);
  recheck_warp(thread);
  leave(thread.fiber);
}

bool can_run(const Block& block) { return block.position < block.round.size() || !block.next_round.empty(); }

// The thread whose turn it is: the next of the round, else the first of another round of some block; null where nobody
// can run.
Thread* next_thread() {
  Block* block = machine.resident;
  if (!block || block->position >= block->round.size()) {
    std::vector<Block*> candidates;
    for (Block& each : machine.blocks) {
      if (can_run(each)) candidates.push_back(&each);
    }
    if (candidates.empty()) return nullptr;
    arrange(candidates);
    block = candidates.front();
    if (block->position >= block->round.size()) {
      block->round.swap(block->next_round);
      block->next_round.clear();
      block->position = 0;
      arrange(block->round);
    }
  }
  return &block->threads[block->round[block->position++]];
}

void report_deadlock() {
  struct Group {
    std::string what;
    unsigned threads;
  };
  std::vector<Group> groups;
  for (const Block& block : machine.blocks) {
    for (const Thread& thread : block.threads) {
      std::string what =
          thread.state == State::kExited             ? "exited"
          : thread.state == State::kAtBlockBarrier   ? "wait in __syncthreads at " + to_string(thread.waits_at)
          : thread.state == State::kAtClusterBarrier ? "wait in a cluster barrier at " + to_string(thread.waits_at)
                                                     : "wait in a warp operation at " + to_string(thread.waits_at);
      if (machine.blocks.size() > 1) what += " (rank " + std::to_string(block.rank) + ")";
      if (groups.empty() || groups.back().what != what) groups.push_back({what, 0});
      ++groups.back().threads;
    }
  }
  std::string text;
  for (const Group& group : groups) text += std::to_string(group.threads) + " thread(s) " + group.what + "; ";
  fail("deadlock", 0, "in %s: %s", machine.kernel.c_str(), text.c_str());
}

void run_cluster() {
  while (!machine.abandoned) {
    Thread* thread = next_thread();
    if (!thread) {
      const bool done =
          std::all_of(machine.blocks.begin(), machine.blocks.end(), [](const Block& b) { return b.live == 0; });
      if (!done) report_deadlock();
      return;
    }
    make_resident(*thread->block);
    blockIdx = thread->block->index;
    threadIdx = thread->index;
    machine.current = thread;
    enter(thread->fiber);
    machine.current = nullptr;
    if (overflowed(thread->fiber)) {
      fail("stack", 0, "the local variables of %s need more than the %zu bytes of an emulated thread",
           to_string(*thread).c_str(), kStackSize);
    }
  }
}

void start_block(Block& block, unsigned rank, std::uint32_t number) {
  const unsigned size = machine.block_size.x * machine.block_size.y * machine.block_size.z;
  block.rank = rank;
  block.number = number;
  block.index = block_index(number);
  block.live = size;
  block.at_barrier = 0;
  block.epoch = 0;
  block.needed_until = 0;
  block.round.clear();
  block.next_round.clear();
  block.position = 0;
  reset_shared_memory(block);
  static std::array<char*, kMaxClusterSize> stacks;
  if (!stacks[rank]) stacks[rank] = allocate_stacks(kMaxBlockSize);
  block.threads.resize(size);
  for (unsigned i = 0; i < size; ++i) {
    Thread& thread = block.threads[i];
    thread = {};
    thread.block = &block;
    thread.number = i;
    thread.index = {i % machine.block_size.x, i / machine.block_size.x % machine.block_size.y,
                    i / machine.block_size.x / machine.block_size.y};
    thread.fiber.stack = stacks[rank] + i * kStackSize;
    prepare(thread.fiber, thread_main);
    make_ready(thread);
  }
}

void run_grid(std::uint32_t clusters) {
  std::vector<std::uint32_t> turns(clusters);
  for (std::uint32_t i = 0; i < clusters; ++i) turns[i] = i;
  arrange(turns);
  const unsigned ranks = machine.ranks();
  machine.blocks.resize(ranks);
  for (const std::uint32_t cluster : turns) {
    machine.cluster_arrivals = 0;
    machine.cluster_release = true;
    machine.resident = nullptr;
    for (unsigned rank = 0; rank < ranks; ++rank) start_block(machine.blocks[rank], rank, cluster * ranks + rank);
    run_cluster();
    machine.blocks_run += ranks;
    if (machine.abandoned) break;
  }
  machine.resident = nullptr;
}

}  // namespace

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  thread.block->next_round.push_back(static_cast<std::uint16_t>(thread.number));
}

void maybe_preempt() {
  if (machine.preempt == 0 || machine.random() % machine.preempt != 0) return;
  make_ready(*machine.current);
  suspend(machine.current->fiber);
}

uint3 block_index(std::uint32_t number) {
  const dim3 &cluster = machine.cluster_size, &grid = machine.grid;
  const unsigned rank = number % machine.ranks(), which = number / machine.ranks();
  const unsigned along_x = grid.x / cluster.x, along_y = grid.y / cluster.y;
  return {which % along_x * cluster.x + rank % cluster.x,
          which / along_x % along_y * cluster.y + rank / cluster.x % cluster.y,
          which / along_x / along_y * cluster.z + rank / cluster.x / cluster.y};
}

std::string name_of_thread(std::uint32_t block_number, unsigned thread_number) {
  const uint3 index = block_index(block_number);
  return "block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ") thread " + std::to_string(thread_number);
}

std::string to_string(const Thread& thread) { return name_of_thread(thread.block->number, thread.number); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*run)(const void*), const void* call,
                   std::size_t call_size) {
  machine.kernel = function_name(kernel);
  machine.grid = config.gridDim;
  machine.block_size = config.blockDim;
  machine.cluster_size = dim3(1, 1, 1);
  machine.dynamic_shared = config.dynamicSmemBytes;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const auto& attribute = config.attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = attribute.val.clusterDim;
    machine.cluster_size = dim3(size.x, size.y, size.z);
  }
  if (const cudaError_t status = check_launch(config, machine.cluster_size, kernel, call_size); status != cudaSuccess) {
    return status;
  }
  ++machine.launches;
  machine.log.push_back({machine.kernel, std::uint64_t{machine.grid.x} * machine.grid.y * machine.grid.z,
                         machine.block_size.x * machine.block_size.y * machine.block_size.z, machine.ranks(),
                         machine.dynamic_shared});
  ++machine.launch_number;
  machine.abandoned = false;
  machine.random.seed(machine.seed);
  blockDim = {config.blockDim.x, config.blockDim.y, config.blockDim.z};
  gridDim = {config.gridDim.x, config.gridDim.y, config.gridDim.z};
  entry = {run, call, call_size};
  run_grid(config.gridDim.x * config.gridDim.y * config.gridDim.z / machine.ranks());
  return machine.abandoned ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulator
