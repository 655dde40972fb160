#include "arena.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "address_space.h"

namespace mirage::cpu {
namespace {

constexpr size_t kLeast = size_t(256) << 20;  // the smallest range that is worth reserving
constexpr size_t kCommit = size_t(32) << 20;  // made writable at a time
constexpr size_t kSlack = size_t(64) << 20;  // free pages beside the most that was in use: of small images all are kept

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace

Arena::Arena(size_t bytes, size_t bytes_limit) : limit(bytes_limit) {
  for (bytes = round_up(bytes, kUnit); bytes >= kLeast && base_ == nullptr; bytes = round_up(bytes / 2, kUnit)) {
    base_ = static_cast<char*>(reserve_addresses(bytes));
    size_ = bytes;
  }
  if (base_ == nullptr) {
    size_ = 0;
    return;
  }
  touched_.assign(size_ / kUnit, 0);
  free_.emplace(0, size_);
}

bool Arena::owns(const void* data) const {
  const auto at = reinterpret_cast<uintptr_t>(data), base = reinterpret_cast<uintptr_t>(base_);
  return at >= base && at < base + size_;
}

void* Arena::take(size_t bytes) {
  auto place = free_.begin();
  while (place != free_.end() && place->second - place->first < bytes) ++place;
  if (place == free_.end()) return nullptr;
  const size_t begin = place->first, end = begin + bytes, rest = place->second;
  if (!commit(end)) return nullptr;
  auto node = free_.extract(place);
  if (end < rest) {
    node.key() = end;
    free_.insert(std::move(node));
  }
  in_use_ += bytes;
  most_in_use_ = std::max(most_in_use_, in_use_);
  if (const size_t fresh = touch(begin, end)) {
    // Pages are free where this did not fit. All together stay close to the most that was in use.
    const size_t most = std::min(limit - std::min(limit, fresh), most_in_use_ - in_use_ + kSlack);
    if (kept_ > most) trim(most);
  }
  return base_ + begin;
}

void Arena::put(void* data, size_t bytes) {
  size_t begin = size_t(static_cast<char*>(data) - base_), end = begin + bytes;
  in_use_ -= bytes;
  kept_ += bytes;
  auto after = free_.lower_bound(begin);
  if (after != free_.end() && after->first == end) {
    end = after->second;
    after = free_.erase(after);
  }
  if (after != free_.begin()) {
    const auto before = std::prev(after);
    if (before->second == begin) {
      before->second = end;
      begin = end;  // nothing left to add
    }
  }
  if (begin < end) free_.emplace_hint(after, begin, end);
  if (kept_ > limit) trim(limit);
}

// Works from the top down: buffers are taken from the bottom up, so pages at the top are used the least.
size_t Arena::trim(size_t most) {
  const size_t before = kept_;
  if (most == 0) most_in_use_ = in_use_;
  for (auto range = free_.rbegin(); range != free_.rend() && kept_ > most; ++range) {
    const size_t first = round_up(range->first, kUnit) / kUnit;
    size_t top = std::min(range->second, committed_) / kUnit;
    while (top > first && kept_ > most) {
      size_t low = top;
      for (; low > first && touched_[low - 1] && kept_ > most; kept_ -= kUnit) touched_[--low] = 0;
      if (low < top) discard_pages(base_ + low * kUnit, (top - low) * kUnit);
      top = low < top ? low : top - 1;
    }
  }
  return before - kept_;
}

bool Arena::commit(size_t end) {
  if (end <= committed_) return true;
  const size_t up_to = std::min(size_, round_up(std::max(end, committed_ + kCommit), kUnit));
  if (!commit_memory(base_ + committed_, up_to - committed_)) return false;
  committed_ = up_to;
  return true;
}

// Subtracts the range from the free pages that are kept, and marks its units as having pages: a touched unit gets a
// whole huge page, whose free part counts as kept. Returns the bytes of those units that had no pages before.
size_t Arena::touch(size_t begin, size_t end) {
  size_t fresh = 0;
  for (size_t unit = begin / kUnit; unit * kUnit < end; ++unit) {
    const size_t part = std::min(end, (unit + 1) * kUnit) - std::max(begin, unit * kUnit);
    if (!touched_[unit]) {
      touched_[unit] = 1;
      kept_ += kUnit;
      fresh += kUnit;
    }
    kept_ -= part;
  }
  return fresh;
}

}  // namespace mirage::cpu
