// Emulates the blocks, warps and threads of a GPU on the host. Where device.h is not read by a CUDA compiler it maps to
// this, so any C++17 compiler builds the kernels' own sources and tests run them.
//
// Each thread of a block is a fiber with a stack of its own. Blocks run one after the other, and so do the threads of a
// block, each up to its next barrier, in a selectable order. Shared memory starts as NaN. A missing barrier therefore
// changes results from one order to another. A barrier that only some threads reach throws an error instead of hanging.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace mirage::cuda::emulation {

enum class Order { forward, backward, shuffled };

// Sets the order in which threads run between two barriers, for all later launches of the process.
void set_order(Order order);

// Sets the SM count that `multiprocessors()` reports (default 4), for all later launches. Kernels derive from it into
// how many parts they split their work.
void set_multiprocessors(int count);
int multiprocessors();

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

// Runs `body` for every thread of the launch. Throws std::logic_error if threads of a block wait at different barriers.
void run(const Launch& launch, const std::function<void()>& body);

extern thread_local int current_thread;     // index in its block
extern thread_local int64_t current_block;  // index in the launch
extern thread_local unsigned char* shared;  // shared memory of the current block

void wait_for_block();

// Warp-wide exchange, to be called by all lanes together: publishes `words` words of each lane and returns the array of
// all lanes' words, lane by lane.
const uint32_t* exchange(const uint32_t* mine, int words);
constexpr int kExchangedWords = 8;  // the most that one call may publish

}  // namespace mirage::cuda::emulation
