// The module rnnattn.native.kernels: what XLA calls, and which instruction sets run here.
//
// A handler checks what it is given and fills in the arguments of a kernel; what is off comes back
// as an error of XLA.

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace rnnattn {
namespace {

namespace ffi = xla::ffi;

// In the order of preference; null where it does not run here.
const Kernels* kernels_of(int64_t set) {
  switch (set) {
    case 0: return avx512_kernels();
    case 1: return avx2_kernels();
    case 2: return baseline_kernels();
    default: return nullptr;
  }
}
constexpr int64_t SETS = 3;

// ----------------------------------------------------------------------------------------- threads

// XLA's pool. A helper that the pool starts too late finds nothing to do and touches nothing of the
// call's, so that a call waits for items, never for a place in the pool: it cannot block it.
class PoolThreads final : public Threads {
 public:
  PoolThreads(ffi::ThreadPool pool, int64_t limit) : pool_(pool), limit_(limit) {}

  bool run(int64_t items, int64_t limit, int64_t floats, Work work, void* argument) override {
    if (items <= 0) return true;
    int64_t threads = std::min({items, limit, pool_.num_threads() + 1});
    if (limit_ > 0) threads = std::min(threads, limit_);
    threads = std::max<int64_t>(threads, 1);
    floats = (floats + 15) / 16 * 16;
    std::unique_ptr<float, void (*)(void*)> memory(nullptr, std::free);
    if (floats > 0) {
      memory.reset(static_cast<float*>(std::aligned_alloc(64, threads * floats * sizeof(float))));
      if (!memory) return false;
    }
    auto call = std::make_shared<Call>();
    call->items = items;
    call->work = work;
    call->argument = argument;
    call->memory = memory.get();
    call->floats = floats;
    for (int64_t i = 1; i < threads; ++i) pool_.Schedule([call] { call->take_part(); });
    call->take_part();
    call->wait();
    return true;
  }

 private:
  struct Call {
    int64_t items, floats;
    Work work;
    void* argument;
    float* memory;
    std::atomic<int64_t> next{0}, threads{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;

    void take_part() {
      int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= items) return;
      float* mine = memory + threads.fetch_add(1, std::memory_order_relaxed) * floats;
      int64_t count = 0;
      for (; item < items; item = next.fetch_add(1, std::memory_order_relaxed), ++count)
        work(argument, item, mine);
      if (done.fetch_add(count, std::memory_order_acq_rel) + count == items) {
        std::lock_guard<std::mutex> lock(mutex);
        all_done.notify_one();
      }
    }

    void wait() {
      const auto finished = [this] { return done.load(std::memory_order_acquire) == items; };
      // most often the others are about to be done, and waking up would take longer
      for (int i = 0; i < 100; ++i, std::this_thread::yield())
        if (finished()) return;
      std::unique_lock<std::mutex> lock(mutex);
      all_done.wait(lock, finished);
    }
  };

  ffi::ThreadPool pool_;
  int64_t limit_;
};

// ------------------------------------------------------------------------------------------ checks

ffi::Error wrong(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "rnnattn: " + message);
}

using Shape = std::initializer_list<int64_t>;

// Collects the first thing that is off.
class Checks {
 public:
  // The data of a buffer of this shape; −1 is any size.
  template <class T, class Buffer>
  T* data(const char* name, Buffer& buffer, Shape shape) {
    check(name, buffer, type_of<std::remove_const_t<T>>(), shape);
    return error_ ? nullptr : static_cast<T*>(buffer.untyped_data());
  }

  // The same; an argument that is absent comes as an array without elements, and is null.
  template <class T, class Buffer>
  T* optional(const char* name, Buffer& buffer, Shape shape) {
    return buffer.element_count() == 0 ? nullptr : data<T>(name, buffer, shape);
  }

  // Of five axes, each of its size or of size 1.
  template <class T, class Buffer>
  OfLogits<T> of_logits(const char* name, Buffer& buffer, Shape shape) {
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
    return std::is_same_v<T, int32_t> ? ffi::S32 : ffi::PRED;
  }

  void fail(const char* name, const char* what) {
    if (!error_) error_ = std::string(name) + ": " + what;
  }

  template <class Buffer>
  void check(const char* name, Buffer& buffer, ffi::DataType type, Shape shape) {
    const auto sizes = buffer.dimensions();
    bool fits = sizes.size() == shape.size();
    for (size_t i = 0; fits && i < sizes.size(); ++i)
      fits = shape.begin()[i] == -1 || sizes[i] == shape.begin()[i];
    if (buffer.element_type() != type) fail(name, "another dtype than expected");
    if (!fits) fail(name, "another shape than expected");
  }

  std::optional<std::string> error_;
};

// --------------------------------------------------------------------------------------- attention

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

struct AttentionOptions {
  bool is_causal;
  int64_t left, right;
  float soft_cap;
  int64_t instruction_set, threads;
};

void fill(Checks& checks, Attention& p, Buffer query, Buffer key, Buffer value, Buffer bias,
          Buffer mask, Buffer offset, Buffer query_lengths, Buffer key_lengths,
          Buffer query_segments, Buffer key_segments, const AttentionOptions& options) {
  checks.require(query.dimensions().size() == 5, "query", "another rank than 5");
  checks.require(key.dimensions().size() == 4, "key", "another rank than 4");
  checks.require(value.dimensions().size() == 4, "value", "another rank than 4");
  if (checks.error()) return;
  const auto q = query.dimensions();
  p.B = q[0], p.T = q[1], p.M = q[2], p.G = q[3], p.K = q[4];
  p.S = key.dimensions()[1], p.V = value.dimensions()[3];
  checks.require(query.element_count() > 0 && p.S > 0 && p.V > 0, "query, key, value", "empty");
  checks.require(p.T < INT32_MAX && p.S < INT32_MAX, "query, key", "too long");
  p.query = checks.data<const float>("query", query, {p.B, p.T, p.M, p.G, p.K});
  p.key = checks.data<const float>("key", key, {p.B, p.S, p.M, p.K});
  p.value = checks.data<const float>("value", value, {p.B, p.S, p.M, p.V});
  p.bias = checks.of_logits<const float>("bias", bias, {p.B, p.M, p.G, p.T, p.S});
  p.mask = checks.of_logits<const uint8_t>("mask", mask, {p.B, p.M, p.G, p.T, p.S});
  p.offset_stride = offset.element_count() == 1 ? 0 : 1;
  p.offset = checks.data<const int32_t>("offset", offset, {p.offset_stride ? p.B : 1});
  p.query_lengths = checks.optional<const int32_t>("query_lengths", query_lengths, {p.B});
  p.key_lengths = checks.optional<const int32_t>("key_lengths", key_lengths, {p.B});
  p.query_segments = checks.optional<const int32_t>("query_segments", query_segments, {p.B, p.T});
  p.key_segments = checks.optional<const int32_t>("key_segments", key_segments, {p.B, p.S});
  checks.require(!p.query_segments == !p.key_segments, "segments", "one without the other");
  p.is_causal = options.is_causal;
  p.left = options.left, p.right = options.right;
  p.soft_cap = options.soft_cap;
}

// Run a kernel with arguments that were checked.
template <class Arguments>
ffi::Error run(const Checks& checks, ffi::ThreadPool pool, const AttentionOptions& options,
               bool (*Kernels::*kernel)(Threads&, const Arguments&), const Arguments& p) {
  if (checks.error()) return wrong(*checks.error());
  const Kernels* kernels = kernels_of(options.instruction_set);
  if (!kernels) return wrong("instruction_set: one that does not run here");
  PoolThreads threads(pool, options.threads);
  if ((kernels->*kernel)(threads, p)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "rnnattn: no memory for an attention kernel");
}

ffi::Error attention_forward(ffi::ThreadPool pool, Buffer query, Buffer key, Buffer value,
                             Buffer bias, Buffer mask, Buffer offset, Buffer query_lengths,
                             Buffer key_lengths, Buffer query_segments, Buffer key_segments,
                             Buffer sinks, Result o, Result lse, AttentionOptions options) {
  Checks checks;
  AttentionForward p{};
  fill(checks, p, query, key, value, bias, mask, offset, query_lengths, key_lengths,
       query_segments, key_segments, options);
  p.sinks = checks.optional<const float>("sinks", sinks, {1, p.M, p.G, 1});
  p.o = checks.data<float>("o", *o, {p.B, p.T, p.M, p.G, p.V});
  p.lse = checks.data<float>("lse", *lse, {p.B, p.M, p.G, p.T});
  return run(checks, pool, options, &Kernels::attention_forward, p);
}

ffi::Error attention_backward(ffi::ThreadPool pool, Buffer query, Buffer key, Buffer value,
                              Buffer bias, Buffer mask, Buffer offset, Buffer query_lengths,
                              Buffer key_lengths, Buffer query_segments, Buffer key_segments,
                              Buffer o, Buffer lse, Buffer d_o, Buffer dlse, Result dq, Result dk,
                              Result dv, Result dbias, AttentionOptions options) {
  Checks checks;
  AttentionBackward p{};
  fill(checks, p, query, key, value, bias, mask, offset, query_lengths, key_lengths,
       query_segments, key_segments, options);
  p.o = checks.data<const float>("o", o, {p.B, p.T, p.M, p.G, p.V});
  p.lse = checks.data<const float>("lse", lse, {p.B, p.M, p.G, p.T});
  p.d_o = checks.data<const float>("do", d_o, {p.B, p.T, p.M, p.G, p.V});
  p.dlse = checks.data<const float>("dlse", dlse, {p.B, p.M, p.G, p.T});
  p.dq = checks.data<float>("dq", *dq, {p.B, p.T, p.M, p.G, p.K});
  p.dk = checks.data<float>("dk", *dk, {p.B, p.S, p.M, p.K});
  p.dv = checks.data<float>("dv", *dv, {p.B, p.S, p.M, p.V});
  p.dbias = checks.of_logits<float>("dbias", *dbias, {p.B, p.M, p.G, p.T, p.S});
  p.dbias_size = dbias->element_count();
  return run(checks, pool, options, &Kernels::attention_backward, p);
}

}  // namespace
}  // namespace rnnattn

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    rnnattn::AttentionOptions, xla::ffi::StructMember<bool>("is_causal"),
    xla::ffi::StructMember<int64_t>("left"), xla::ffi::StructMember<int64_t>("right"),
    xla::ffi::StructMember<float>("soft_cap"), xla::ffi::StructMember<int64_t>("instruction_set"),
    xla::ffi::StructMember<int64_t>("threads"));

namespace rnnattn {
namespace {

// The operands and the masking, in the order of `fill`.
auto attention_arguments() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>()
      .Arg<Buffer>();
}

XLA_FFI_DEFINE_HANDLER(attention_forward_handler, attention_forward,
                       attention_arguments()
                           .Arg<Buffer>()
                           .Ret<Buffer>()
                           .Ret<Buffer>()
                           .Attrs<AttentionOptions>());

XLA_FFI_DEFINE_HANDLER(attention_backward_handler, attention_backward,
                       attention_arguments()
                           .Arg<Buffer>()
                           .Arg<Buffer>()
                           .Arg<Buffer>()
                           .Arg<Buffer>()
                           .Ret<Buffer>()
                           .Ret<Buffer>()
                           .Ret<Buffer>()
                           .Ret<Buffer>()
                           .Attrs<AttentionOptions>());

// -------------------------------------------------------------------------------------------- LSTM

#include "lstm_handlers.inc"

// ------------------------------------------------------------------------------------------ module

// The names of the instruction sets that run here, the best first, and the numbers they go by.
PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* sets = PyDict_New();
  for (int64_t i = 0; sets && i < SETS; ++i) {
    const Kernels* kernels = kernels_of(i);
    if (!kernels) continue;
    PyObject* number = PyLong_FromLongLong(i);
    if (!number || PyDict_SetItemString(sets, kernels->name, number) < 0) Py_CLEAR(sets);
    Py_XDECREF(number);
  }
  return sets;
}

// What XLA may call, by name.
PyObject* targets(PyObject*, PyObject*) {
  const struct {
    const char* name;
    XLA_FFI_Handler* handler;
  } all[] = {
      {"rnnattn.attention_forward.v1", attention_forward_handler},
      {"rnnattn.attention_backward.v1", attention_backward_handler},
      {"rnnattn.lstm_forward.v1", lstm_forward_handler},
      {"rnnattn.lstm_backward.v1", lstm_backward_handler},
  };
  PyObject* targets = PyDict_New();
  for (const auto& [name, handler] : all) {
    if (!targets) break;
    PyObject* capsule = PyCapsule_New(reinterpret_cast<void*>(handler), nullptr, nullptr);
    if (!capsule || PyDict_SetItemString(targets, name, capsule) < 0) Py_CLEAR(targets);
    Py_XDECREF(capsule);
  }
  return targets;
}

// The version of the foreign function interface of XLA that all of this is built for.
PyObject* ffi_version(PyObject*, PyObject*) {
  return Py_BuildValue("(ii)", XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

PyMethodDef methods[] = {
    {"ffi_version", ffi_version, METH_NOARGS, nullptr},
    {"instruction_sets", instruction_sets, METH_NOARGS, nullptr},
    {"targets", targets, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef_Slot slots[] = {{0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "kernels", nullptr, 0, methods, slots,
                          nullptr, nullptr, nullptr};

}  // namespace
}  // namespace rnnattn

PyMODINIT_FUNC PyInit_kernels() { return PyModuleDef_Init(&rnnattn::definition); }
