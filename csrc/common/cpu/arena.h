// The address range behind workspace.h: which parts are free, and which have pages. One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace mirage::cpu {

class Arena {
 public:
  static constexpr size_t kStep = size_t(64) << 10;  // buffers begin and end at multiples of it

  // Reserves `bytes` of addresses, or fewer if the system has no more. At most `bytes_limit` bytes of free pages are
  // kept.
  Arena(size_t bytes, size_t bytes_limit);

  // Takes a buffer of `bytes`, a multiple of kStep. Where it needs new pages, free ones are given back until both are
  // within the limit, and all there are exceed the most that was in use at once by little. Returns null if nothing fits
  // or the system refuses.
  void* take(size_t bytes);
  void put(void* data, size_t bytes);
  // Returns free pages to the system until at most `most` bytes of them are kept. Returns how many bytes that was.
  size_t trim(size_t most);

  bool owns(const void* data) const;
  size_t kept() const { return kept_; }
  size_t limit = 0;

 private:
  using Free = std::map<size_t, size_t>;  // begin -> end, in bytes from the beginning; no two touch

  bool commit(size_t end);
  size_t touch(size_t begin, size_t end);

  char* base_ = nullptr;
  size_t size_ = 0, committed_ = 0;
  size_t kept_ = 0;  // bytes that are free and have pages
  size_t in_use_ = 0, most_in_use_ = 0;  // bytes; the most since all was given back
  Free free_;
  std::vector<uint8_t> touched_;  // per unit: whether it has pages, as far as is known
};

}  // namespace mirage::cpu
