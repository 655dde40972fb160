// The blocks, threads and warps of a GPU on the host: what device.h means where no CUDA compiler reads it, so that any
// C++17 compiler compiles the kernels' own source and tests can run it.
//
// Each thread of a block is a fiber with a stack of its own. Blocks run one after the other, and so do their threads,
// each up to its next barrier; `order` says which goes first, and shared memory is NaN before the first write, so what
// a missing barrier would change shows. Barriers that not all threads reach are an error here, not a hang.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace mirage::cuda::emulation {

enum class Order { forward, backward, shuffled };

// Of the threads between two barriers; for all later launches of the process.
void set_order(Order order);

// That the GPU has, as the host is told: how many parts kernels cut their work into. 4 at first; for all later launches.
void set_multiprocessors(int count);
int multiprocessors();

struct Launch {
  const char* name;
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

// Runs `body` for every thread. Throws std::logic_error where threads wait at different barriers.
void run(const Launch& launch, const std::function<void()>& body);

// What has been launched.
struct Recorded {
  std::string name;
  int64_t blocks;
  int threads;
  int64_t tensor_core_flop;
};

// Of this host thread, from now on. Without `execute` launches are recorded only, and read and write no memory.
void start_record(bool execute);
std::vector<Recorded> stop_record();
void count_tensor_core_flop(int64_t flop);

extern thread_local int current_thread;     // of the block
extern thread_local int64_t current_block;  // of the launch
extern thread_local unsigned char* shared;  // the block's

void wait_for_block();

// All lanes of a warp call this together: copies `words` words of each to a place where the others see them, and
// returns that place, lane after lane.
const uint32_t* exchange(const uint32_t* mine, int words);
constexpr int kExchangedWords = 8;  // at most

}  // namespace mirage::cuda::emulation
