// The partition of a convolution among threads.
#pragma once

#include "cpu/panel_product.h"
#include "cpu/parallel.h"

namespace ddpm_fast::DDPM_FAST_ISA {

// A thread takes one block at a time, for all panels of the output. If there are fewer blocks than threads, it takes
// some of the panels, and so reads its own part of the weights. A block consists of strips: rows of the output.
struct ConvPartition {
  Index strips, blocks, panels;
  Index parts;  // parts of the panels
};

inline ConvPartition partition_strips(Index strips, Index strips_in_block, Index out_channels, int threads) {
  const Index panels = (out_channels + kPanel - 1) / kPanel;
  Index blocks = (strips + strips_in_block - 1) / strips_in_block, parts = 1;
  if (blocks >= threads) {
    blocks = smaller(strips, round_up(blocks, threads));
  } else if (blocks > 0) {
    parts = smaller(panels, (threads + blocks - 1) / blocks);
  }
  return {strips, blocks, panels, parts};
}

// Returns the number of strips of the largest block.
inline Index largest_block(const ConvPartition& p) { return (p.strips + p.blocks - 1) / p.blocks; }

// One thread's item.
struct ConvShare {
  Index first_strip, end_strip, first_panel, end_panel;
};

// Calls body(share) for every item. multiplications: those of the whole convolution, which decide on threads.
template <class Body>
void for_each_share(const ConvPartition& p, double multiplications, const StreamOrThreads& where, Body body) {
  constexpr double kWorthAThread = 1 << 18;
  const Index count = p.blocks * p.parts, grain = multiplications < kWorthAThread * 2 ? count : 1;
  parallel_for(count, grain, where, [&](Index i) {
    const Index block = i / p.parts, part = i % p.parts;
    body(ConvShare{block * p.strips / p.blocks, (block + 1) * p.strips / p.blocks, part * p.panels / p.parts,
                   (part + 1) * p.panels / p.parts});
  });
}

}  // namespace ddpm_fast::DDPM_FAST_ISA
