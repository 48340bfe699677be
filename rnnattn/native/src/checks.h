// What the handlers share: checks of what XLA gives them, and the call of a kernel.
//
// A handler checks its buffers and fills in the arguments of a kernel; what is wrong comes back as
// an error of XLA.

#ifndef RNNATTN_CHECKS_H_
#define RNNATTN_CHECKS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "pool_threads.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace rnnattn {

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

// A binding with so many buffers more, as arguments or as results. A binding cannot be moved, so
// that the last is handed on as it is made.
template <int count, class Binding>
auto arguments(Binding&& binding) {
  if constexpr (count == 1)
    return std::move(binding).template Arg<Buffer>();
  else
    return arguments<count - 1>(std::move(binding).template Arg<Buffer>());
}
template <int count, class Binding>
auto results(Binding&& binding) {
  if constexpr (count == 1)
    return std::move(binding).template Ret<Buffer>();
  else
    return results<count - 1>(std::move(binding).template Ret<Buffer>());
}

inline ffi::Error wrong(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rnnattn: " + message);
}

using Shape = std::initializer_list<int64_t>;

// Collects the first thing that is off.
class Checks {
 public:
  // The data of a buffer of this shape; −1 is any size.
  template <class T>
  T* data(const char* name, const Buffer& buffer, Shape shape) {
    check(name, buffer, type_of<std::remove_const_t<T>>(), shape);
    return error_ ? nullptr : static_cast<T*>(buffer.untyped_data());
  }

  // The same; an argument that is absent comes as an array without elements, and is null.
  template <class T>
  T* optional(const char* name, const Buffer& buffer, Shape shape) {
    return buffer.element_count() == 0 ? nullptr : data<T>(name, buffer, shape);
  }

  // Of five axes, each of its size or of size 1.
  template <class T>
  OfLogits<T> of_logits(const char* name, const Buffer& buffer, Shape shape) {
    if (buffer.element_count() == 0) return {};
    const auto sizes = buffer.dimensions();
    bool fits = sizes.size() == 5;
    for (size_t i = 0; fits && i < 5; ++i) fits = sizes[i] == 1 || sizes[i] == shape.begin()[i];
    if (!fits) fail(name, "a shape that does not broadcast to the logits");
    T* data = fits ? this->data<T>(name, buffer, {-1, -1, -1, -1, -1}) : nullptr;
    if (!data) return {};
    int64_t strides[5];
    for (int64_t i = 4, stride = 1; i >= 0; stride *= sizes[i--])
      strides[i] = sizes[i] == 1 ? 0 : stride;
    return {data, strides[0], strides[1], strides[2], strides[3], strides[4]};
  }

  void require(bool holds, const char* name, const char* what) {
    if (!holds) fail(name, what);
  }

  const std::optional<std::string>& error() const { return error_; }

 private:
  template <class T>
  static ffi::DataType type_of() {
    if (std::is_same_v<T, float>) return ffi::F32;
    if (std::is_same_v<T, Bfloat16>) return ffi::BF16;
    if (std::is_same_v<T, Float16>) return ffi::F16;
    return std::is_same_v<T, int32_t> ? ffi::S32 : ffi::PRED;
  }

  void fail(const char* name, const char* what) {
    if (!error_) error_ = std::string(name) + ": " + what;
  }

  void check(const char* name, const Buffer& buffer, ffi::DataType type, Shape shape) {
    const auto sizes = buffer.dimensions();
    bool fits = sizes.size() == shape.size();
    for (size_t i = 0; fits && i < sizes.size(); ++i)
      fits = shape.begin()[i] == -1 || sizes[i] == shape.begin()[i];
    if (buffer.element_type() != type) fail(name, "another dtype than expected");
    if (!fits) fail(name, "another shape than expected");
  }

  std::optional<std::string> error_;
};

// Run a kernel, `name` in an error, with arguments that were checked: `kernel`, of an instruction
// set, is a member of its table or a function of it.
template <class Kernel, class Arguments, class Options>
ffi::Error run(const char* name, Kernel kernel, const Checks& checks, ffi::ThreadPool pool,
               const Options& options, const Arguments& p) {
  if (checks.error()) return wrong(*checks.error());
  const Kernels* kernels = kernels_of(options.instruction_set);
  if (!kernels) return wrong("instruction_set: one that does not run here");
  PoolThreads threads(pool, options.threads);
  if (std::invoke(kernel, *kernels)(threads, p)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    std::string("rnnattn: no memory for ") + name + " kernel");
}

// By the dtype of the first buffer, which all the other numbers are held against:
// of(number, pool, first, others...).
template <class Of, class... Others>
ffi::Error by_dtype(Of of, ffi::ThreadPool pool, Buffer first, Others... others) {
  switch (first.element_type()) {
    case ffi::BF16: return of(Bfloat16{}, pool, first, others...);
    case ffi::F16: return of(Float16{}, pool, first, others...);
    default: return of(0.0f, pool, first, others...);
  }
}

// The threads of a kernel: as many as are asked for, or of so much work, of which `share` pays for
// waking one.
inline int64_t threads_for(ffi::ThreadPool pool, int64_t asked_for, int64_t work, int64_t share) {
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  return std::min(threads, asked_for > 0 ? asked_for : 1 + work / share);
}

}  // namespace rnnattn

#endif  // RNNATTN_CHECKS_H_
