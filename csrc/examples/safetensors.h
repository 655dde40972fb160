// The tensors of a .safetensors file: a length, a header of JSON that names them, and their bytes
// (https://github.com/huggingface/safetensors).
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "mirage/tensor.h"

namespace mirage::example {

class SafeTensors {
 public:
  // Throws std::runtime_error where the file cannot be read or is none.
  explicit SafeTensors(const std::string& path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error(path + ": cannot be opened");
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    uint64_t length = 0;
    if (bytes_.size() < sizeof(length)) broken("shorter than its header's length");
    std::memcpy(&length, bytes_.data(), sizeof(length));
    if (length > bytes_.size() - sizeof(length)) broken("shorter than its header");
    at_ = bytes_.data() + sizeof(length);
    end_ = at_ + length;
    read_header();
  }

  bool has(const std::string& name) const { return tensors_.count(name) != 0; }

  // Contiguous, as long as this object lives. Throws std::runtime_error where there is none of that name.
  const Tensor& operator[](const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::runtime_error(path_ + ": has no tensor " + name);
    return found->second;
  }

 private:
  void read_header() {
    char* const data = end_;
    const int64_t available = bytes_.data() + bytes_.size() - data;
    object([&](const std::string& name) {
      if (name == "__metadata__") return skip();
      Tensor t;
      int64_t begin = 0, end = 0;
      bool known = true;
      object([&](const std::string& key) {
        if (key == "dtype") {
          const std::string dtype = text();
          known = dtype == "F32" || dtype == "F64" || dtype == "F16" || dtype == "BF16";
          t.dtype = dtype == "F64" ? DType::f64 : dtype == "F16" ? DType::f16 : dtype == "BF16" ? DType::bf16 : DType::f32;
        } else if (key == "shape") {
          for (int64_t size : numbers()) {
            if (t.ndim == kMaxDims) broken(name + " has more than 5 dimensions");
            t.size[t.ndim++] = size;
          }
        } else if (key == "data_offsets") {
          const auto offsets = numbers();
          if (offsets.size() != 2) broken(name + " has no two offsets");
          begin = offsets[0], end = offsets[1];
        } else {
          skip();
        }
      });
      if (!known) return;  // such as counters of batches
      int64_t stride = 1;
      for (int d = t.ndim - 1; d >= 0; --d) t.stride[d] = stride, stride *= t.size[d];
      if (begin < 0 || end > available || end - begin != stride * bytes_of(t.dtype)) broken(name + " is not all there");
      t.data = data + begin;
      tensors_[name] = t;
    });
  }

  // ---- as much of JSON as the header has ----

  char peek() {
    while (at_ < end_ && std::strchr(" \t\r\n", *at_)) ++at_;
    if (at_ == end_) broken("its header ends too soon");
    return *at_;
  }

  void expect(char c) {
    if (peek() != c) broken(std::string("its header has no '") + c + "' where one belongs");
    ++at_;
  }

  bool next(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  std::string text() {
    expect('"');
    std::string result;
    for (; at_ < end_ && *at_ != '"'; ++at_) {
      if (*at_ == '\\' && ++at_ == end_) break;
      result += *at_;
    }
    expect('"');
    return result;
  }

  std::vector<int64_t> numbers() {
    std::vector<int64_t> result;
    expect('[');
    if (next(']')) return result;
    do {
      int64_t value = 0;
      if (peek() < '0' || *at_ > '9') broken("its header has no number where one belongs");
      for (; at_ < end_ && *at_ >= '0' && *at_ <= '9'; ++at_) value = 10 * value + (*at_ - '0');
      result.push_back(value);
    } while (next(','));
    expect(']');
    return result;
  }

  template <class Member>
  void object(Member member) {
    expect('{');
    if (next('}')) return;
    do {
      const std::string key = text();
      expect(':');
      member(key);
    } while (next(','));
    expect('}');
  }

  void skip() {
    if (peek() == '{') return object([&](const std::string&) { skip(); });
    if (peek() == '[') { numbers(); return; }
    text();
  }

  [[noreturn]] void broken(const std::string& why) const { throw std::runtime_error(path_ + ": " + why); }

  std::string path_;
  std::vector<char> bytes_;
  char *at_ = nullptr, *end_ = nullptr;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace mirage::example
