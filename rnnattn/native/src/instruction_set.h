// The instruction set that the -inl.h files are compiled for, as avx512.cc, avx2.cc and baseline.cc
// name it, once in each:
//
//     RNNATTN_SET      its namespace
//     RNNATTN_LANES    floats in a vector
//     RNNATTN_PAIRS    if one instruction multiplies pairs of bfloat16
//     RNNATTN_FIXED    if one multiplies pairs of integers as fast, beside RNNATTN_PAIRS
//     RNNATTN_TILES    if one instruction multiplies tiles of pairs, beside RNNATTN_PAIRS
//     RNNATTN_TARGET   what compilers may use beyond what every machine has, if anything
//
// Their code stands between the two macros below, and what they include outside: it must use no
// inline function or template of the standard library, and such a function must not be compiled for
// a target. The linker keeps one copy of it for all, and that might be one that this machine cannot
// run.

#ifndef RNNATTN_INSTRUCTION_SET_H_
#define RNNATTN_INSTRUCTION_SET_H_

// An -inl.h file that is opened alone, as by an editor.
#if !defined(RNNATTN_SET)
#define RNNATTN_SET baseline
#define RNNATTN_LANES 4
#endif

#define RNNATTN_PRAGMA_OF_TEXT(text) _Pragma(#text)
#define RNNATTN_PRAGMA(text) RNNATTN_PRAGMA_OF_TEXT(text)

#if !defined(RNNATTN_TARGET)
#define RNNATTN_BEFORE_NAMESPACE() static_assert(true)
#define RNNATTN_AFTER_NAMESPACE() static_assert(true)
#elif defined(__clang__)
#define RNNATTN_BEFORE_NAMESPACE()                                                        \
  RNNATTN_PRAGMA(                                                                         \
      clang attribute push(__attribute__((target(RNNATTN_TARGET))), apply_to = function)) \
  static_assert(true)
#define RNNATTN_AFTER_NAMESPACE()     \
  RNNATTN_PRAGMA(clang attribute pop) \
  static_assert(true)
#else
#define RNNATTN_BEFORE_NAMESPACE()           \
  RNNATTN_PRAGMA(GCC push_options)           \
  RNNATTN_PRAGMA(GCC target(RNNATTN_TARGET)) \
  static_assert(true)
#define RNNATTN_AFTER_NAMESPACE() \
  RNNATTN_PRAGMA(GCC pop_options) \
  static_assert(true)
#endif

#endif  // RNNATTN_INSTRUCTION_SET_H_
