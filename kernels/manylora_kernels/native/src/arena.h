// Scratch memory that a thread keeps from call to call: a step calls a kernel for every layer, and
// memory given back each time would have to be mapped and cleared by the system each time.
#pragma once

#include "runtime.h"

namespace manylora {

class Arena {
 public:
  Arena() = default;
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // At least `bytes`, aligned to a cache line, with undefined contents; null where memory is short.
  // What the last call returned is gone.
  char* reserve(int64_t bytes) {
    constexpr int64_t kAlignment = 64;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = quotient_up(bytes, kAlignment) * kAlignment;
      data_ = static_cast<char*>(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes_)));
      if (data_ == nullptr) bytes_ = 0;
    }
    if (data_ != nullptr && fill_scratch.load()) {
      float* floats = reinterpret_cast<float*>(data_);
      for (int64_t i = 0; i < bytes_ / int64_t{sizeof(float)}; ++i) floats[i] = scratch_fill.load();
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace manylora
