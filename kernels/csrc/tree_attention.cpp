// SPDX-License-Identifier: Apache-2.0
// The plain C entries of the library, for ctypes: each takes the address of its packed arguments.
#include "argmax.hpp"
#include "head_layer.hpp"
#include "kv_compact.hpp"
#include "parallel_attend.hpp"
#include "tap_fusion.hpp"
#include "top_tokens.hpp"
#include "walk.hpp"

#define HETEROSPEC_EXPORT extern "C" __attribute__((visibility("default")))

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_tree_attention(const heterospec::Arguments* args) {
  switch (args->dtype) {
    case 0: heterospec::run<float>(*args); return 0;
    case 1: heterospec::run<heterospec::bf16>(*args); return 0;
    case 2: heterospec::run<heterospec::f16>(*args); return 0;
    default: return 1;
  }
}

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_head_layer(const heterospec::HeadArguments* args) {
  switch (args->attention.dtype) {
    case 0: heterospec::HeadLayer<float>(*args).run(); return 0;
    case 1: heterospec::HeadLayer<heterospec::bf16>(*args).run(); return 0;
    case 2: heterospec::HeadLayer<heterospec::f16>(*args).run(); return 0;
    default: return 1;
  }
}

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_top_tokens(const heterospec::TopArguments* args) {
  switch (args->dtype) {
    case 0: heterospec::top_tokens<float>(*args); return 0;
    case 1: heterospec::top_tokens<heterospec::bf16>(*args); return 0;
    case 2: heterospec::top_tokens<heterospec::f16>(*args); return 0;
    default: return 1;
  }
}

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_fuse_taps(const heterospec::TapArguments* args) {
  switch (args->dtype) {
    case 0: heterospec::fuse_taps<float>(*args); return 0;
    case 1: heterospec::fuse_taps<heterospec::bf16>(*args); return 0;
    case 2: heterospec::fuse_taps<heterospec::f16>(*args); return 0;
    default: return 1;
  }
}

// Returns 0, or 1 for an element size it does not know.
HETEROSPEC_EXPORT int heterospec_kv_compact(const heterospec::CompactArguments* args) {
  return heterospec::compact(*args);
}

// Returns 0, or 1 for an element size it does not know.
HETEROSPEC_EXPORT int heterospec_argmax_rows(const heterospec::ArgmaxArguments* args) {
  switch (args->element_size) {
    case 2: heterospec::argmax_rows<int16_t>(*args); return 0;
    case 4: heterospec::argmax_rows<int32_t>(*args); return 0;
    default: return 1;
  }
}

// Returns 0, or 1 for an element size it does not know.
HETEROSPEC_EXPORT int heterospec_walk_greedy(const heterospec::WalkArguments* args) {
  switch (args->element_size) {
    case 2: heterospec::walk_greedy<int16_t>(*args); return 0;
    case 4: heterospec::walk_greedy<int32_t>(*args); return 0;
    default: return 1;
  }
}

// What the library was built for, for messages.
HETEROSPEC_EXPORT const char* heterospec_tree_attention_isa() {
#if defined(HETEROSPEC_BF16_DOT)
  return "avx512_bf16";
#elif defined(HETEROSPEC_AVX512)
  return "avx512";
#elif defined(HETEROSPEC_AVX2)
  return "avx2";
#else
  return "portable";
#endif
}

HETEROSPEC_EXPORT int heterospec_tree_attention_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}
