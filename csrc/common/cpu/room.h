// Tensors of one type from a workspace, for what runs several stages.
#pragma once

#include <initializer_list>

#include "mirage/tensor.h"
#include "workspace.h"

namespace mirage::cpu {

// Memory of so many elements, handed out one tensor after the other.
class Room {
 public:
  Room(DType dtype, int64_t elements) : dtype_(dtype), memory_(take_workspace(size_t(elements * bytes_of(dtype)))) {}
  ~Room() { put_workspace(memory_); }
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;

  Tensor next(std::initializer_list<int64_t> shape) {
    Tensor t;
    t.data = static_cast<char*>(memory_.data) + used_ * bytes_of(dtype_);
    t.dtype = dtype_;
    for (int64_t n : shape) t.size[t.ndim++] = n;
    int64_t stride = 1;
    for (int d = t.ndim - 1; d >= 0; --d) {
      t.stride[d] = stride;
      stride *= t.size[d];
    }
    used_ += stride;
    return t;
  }

 private:
  const DType dtype_;
  const Workspace memory_;
  int64_t used_ = 0;
};

}  // namespace mirage::cpu
