// The module rnnattn.native.kernels: what XLA calls, and which instruction sets run here.

#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>

#include "handlers.h"
#include "kernels.h"

namespace rnnattn {
namespace {

// The names of the instruction sets that run here, the best first, and the numbers they go by.
PyObject* instruction_sets(PyObject*, PyObject*) {
  PyObject* sets = PyDict_New();
  for (const int64_t i : PREFERENCE) {
    if (!sets) break;
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
      {"rnnattn.attention_forward.v5", rnnattn_attention_forward},
      {"rnnattn.attention_paged_forward.v5", rnnattn_attention_paged_forward},
      {"rnnattn.attention_backward.v5", rnnattn_attention_backward},
      {"rnnattn.lstm_forward.v2", rnnattn_lstm_forward},
      {"rnnattn.lstm_backward.v2", rnnattn_lstm_backward},
      {"rnnattn.gru_forward.v2", rnnattn_gru_forward},
      {"rnnattn.gru_backward.v2", rnnattn_gru_backward},
      {"rnnattn.rnn_forward.v1", rnnattn_rnn_forward},
      {"rnnattn.rnn_backward.v1", rnnattn_rnn_backward},
      {"rnnattn.linear_forward.v1", rnnattn_linear_forward},
      {"rnnattn.linear_backward.v1", rnnattn_linear_backward},
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
PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "kernels", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace rnnattn

PyMODINIT_FUNC PyInit_kernels() { return PyModuleDef_Init(&rnnattn::definition); }
