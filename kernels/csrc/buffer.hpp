// SPDX-License-Identifier: Apache-2.0
// Memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace heterospec {

// Grows, never shrinks; contents are not kept when it grows.
template <typename T>
class Buffer {
 public:
  T* at_least(size_t count) {
    if (count > size_) {
      data_.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})));
      size_ = count;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

}  // namespace heterospec
