#undef _FORTIFY_SOURCE  // whose longjmp refuses to change stacks
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace mirage::cuda::emulation {

thread_local int current_thread = 0;
thread_local int64_t current_block = 0;
thread_local unsigned char* shared = nullptr;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 256 << 10;

enum class State { ready, at_block, at_warp, done };

struct Fiber {
  State state;
  int exchanges;  // count; successive ones alternate between two buffers, so that one barrier each is enough
  jmp_buf where;
};

Order thread_order = Order::forward;
int multiprocessor_count = 4;

// The stacks are kept for later launches, each of which would otherwise map and unmap hundreds.
unsigned char* stack_of(int thread) {
  static thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
  while (stacks.size() <= size_t(thread)) stacks.emplace_back(new unsigned char[kStack]);
  return stacks[size_t(thread)].get();
}

// Runs one launch on this host thread.
class Machine {
 public:
  Machine(const Launch& launch, const std::function<void()>& body)
      : launch_(launch), body_(body), fibers_(size_t(launch.threads)), order_(size_t(launch.threads)),
        exchanged_(size_t(launch.threads) * 2 * kExchangedWords),
        shared_(new unsigned char[launch.shared_bytes + kAlignment]) {
    const auto address = reinterpret_cast<uintptr_t>(shared_.get());
    shared = shared_.get() + (kAlignment - address % kAlignment);
  }

  void run() {
    Machine* outer = running;
    running = this;
    for (current_block = 0; current_block < launch_.blocks && !error_; ++current_block) run_block();
    running = outer;
    if (error_) std::rethrow_exception(error_);
  }

  void wait(State state) {
    Fiber& fiber = fibers_[size_t(current_thread)];
    fiber.state = state;
    if (!_setjmp(fiber.where)) _longjmp(scheduler_, 1);
  }

  const uint32_t* exchange(const uint32_t* mine, int words) {
    const int thread = current_thread, warp = thread / kLanes;
    const int parity = fibers_[size_t(thread)].exchanges++ & 1;
    uint32_t* buffer = exchanged_.data() + size_t(2 * warp + parity) * kLanes * kExchangedWords;
    std::memcpy(buffer + thread % kLanes * words, mine, size_t(words) * sizeof(uint32_t));
    wait(State::at_warp);
    return buffer;
  }

  static thread_local Machine* running;

 private:
  static constexpr size_t kAlignment = 128;

  void run_block() {
    std::memset(shared, 0xff, launch_.shared_bytes);  // NaN in every floating-point type
    arrange();
    for (Fiber& fiber : fibers_) {
      fiber.state = State::ready;
      fiber.exchanges = 0;
    }
    started_ = false;
    for (;;) {
      run_warps();
      started_ = true;
      const auto of = [&](State s) { return std::count_if(fibers_.begin(), fibers_.end(), [s](const Fiber& f) { return f.state == s; }); };
      if (error_ || of(State::done) == launch_.threads) return;
      if (of(State::at_block) != launch_.threads) {
        fail("some threads wait at a barrier of the block that others never reach");
        return;
      }
      for (Fiber& fiber : fibers_) fiber.state = State::ready;
    }
  }

  // Runs each warp until all of its threads wait at a block barrier or have finished.
  void run_warps() {
    const int warps = (launch_.threads + kLanes - 1) / kLanes;
    for (int i = 0; i < warps && !error_; ++i) {
      const int first = (thread_order == Order::backward ? warps - 1 - i : i) * kLanes;
      const int last = std::min(first + kLanes, launch_.threads);
      bool enter = !started_;
      for (;;) {
        for (int position = first; position < last && !error_; ++position) {
          const int thread = order_[size_t(position)];
          if (fibers_[size_t(thread)].state == State::ready) resume(thread, enter);
        }
        enter = false;
        int waiting = 0;
        for (int t = first; t < last; ++t) waiting += fibers_[size_t(t)].state == State::at_warp;
        if (waiting == 0 || error_) break;
        if (waiting != last - first) {
          fail("some lanes of a warp exchange values while others do not");
          break;
        }
        for (int t = first; t < last; ++t) fibers_[size_t(t)].state = State::ready;
      }
    }
  }

  // Sets the order in which the lanes of each warp run.
  void arrange() {
    for (int t = 0; t < launch_.threads; ++t) order_[size_t(t)] = t;
    for (int first = 0; first < launch_.threads; first += kLanes) {
      const auto begin = order_.begin() + first, end = order_.begin() + std::min(first + kLanes, launch_.threads);
      if (thread_order == Order::backward) std::reverse(begin, end);
      if (thread_order == Order::shuffled) std::shuffle(begin, end, random_);
    }
  }

  void resume(int thread, bool enter) {
    current_thread = thread;
    if (_setjmp(scheduler_)) return;
    if (!enter) _longjmp(fibers_[size_t(thread)].where, 1);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack_of(thread);
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, &Machine::enter, 0);
    setcontext(&context);
  }

  static void enter() {
    Machine* machine = running;
    try {
      machine->body_();
    } catch (...) {
      machine->error_ = std::current_exception();
    }
    machine->fibers_[size_t(current_thread)].state = State::done;
    _longjmp(machine->scheduler_, 1);
  }

  void fail(const char* what) {
    error_ = std::make_exception_ptr(std::logic_error(std::string(launch_.name) + ": " + what));
  }

  const Launch& launch_;
  const std::function<void()>& body_;
  std::vector<Fiber> fibers_;
  std::vector<int> order_;
  std::vector<uint32_t> exchanged_;
  std::unique_ptr<unsigned char[]> shared_;
  std::mt19937 random_{0};
  std::exception_ptr error_;
  bool started_ = false;
  jmp_buf scheduler_;
};

thread_local Machine* Machine::running = nullptr;

}  // namespace

void set_order(Order order) { thread_order = order; }

void set_multiprocessors(int count) { multiprocessor_count = count; }

int multiprocessors() { return multiprocessor_count; }

void run(const Launch& launch, const std::function<void()>& body) { Machine(launch, body).run(); }

void wait_for_block() { Machine::running->wait(State::at_block); }

const uint32_t* exchange(const uint32_t* mine, int words) { return Machine::running->exchange(mine, words); }

}  // namespace mirage::cuda::emulation
