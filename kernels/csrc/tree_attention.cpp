// SPDX-License-Identifier: Apache-2.0
// The plain C entries of the library, for ctypes: each takes the address of its packed arguments.
#include "argmax.hpp"
#include "head_layer.hpp"
#include "kv_compact.hpp"
#include "packed_linear.hpp"
#include "parallel_attend.hpp"
#include "tap_fusion.hpp"
#include "top_tokens.hpp"
#include "walk.hpp"

#define HETEROSPEC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// vLLM tiles bfloat16 caches only.
constexpr int64_t kVec = 0, kAmx = 1;

template <typename Call>
int with_types(int64_t dtype, int64_t isa, Call call) {
  using namespace heterospec;
  if (isa == kAmx && dtype == 1) return call(bf16{}, AmxPages{}), 0;
  if (isa != kVec) return 1;
  switch (dtype) {
    case 0: return call(float{}, VecPages{}), 0;
    case 1: return call(bf16{}, VecPages{}), 0;
    case 2: return call(f16{}, VecPages{}), 0;
    default: return 1;
  }
}

}  // namespace

// Returns 0, or 1 for a dtype or isa code it does not know.
HETEROSPEC_EXPORT int heterospec_tree_attention(const heterospec::Arguments* args) {
  return with_types(args->dtype, args->isa, [&](auto type, auto pages) {
    heterospec::run<decltype(type), decltype(pages)>(*args);
  });
}

// Returns 0, or 1 for a dtype or isa code it does not know.
HETEROSPEC_EXPORT int heterospec_head_layer(const heterospec::HeadArguments* args) {
  const heterospec::Arguments& attention = args->attention;
  return with_types(attention.dtype, attention.isa, [&](auto type, auto pages) {
    heterospec::HeadLayer<decltype(type), decltype(pages)>(*args).run();
  });
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

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_packed_linear(const heterospec::PackedLinearArguments* args) {
  switch (args->dtype) {
    case 0: heterospec::packed_linear<float>(*args); return 0;
    case 1: heterospec::packed_linear<heterospec::bf16>(*args); return 0;
    case 2: heterospec::packed_linear<heterospec::f16>(*args); return 0;
    default: return 1;
  }
}

// Returns 0, or 1 for an element size or isa code it does not know.
HETEROSPEC_EXPORT int heterospec_kv_compact(const heterospec::CompactArguments* args) {
  switch (args->isa) {
    case kVec: return heterospec::compact<heterospec::VecPages>(*args);
    case kAmx: return heterospec::compact<heterospec::AmxPages>(*args);
    default: return 1;
  }
}

// Returns 0, or 1 for an element size it does not know.
HETEROSPEC_EXPORT int heterospec_argmax_rows(const heterospec::ArgmaxArguments* args) {
  switch (args->element_size) {
    case 2: heterospec::argmax_rows<int16_t>(*args); return 0;
    case 4: heterospec::argmax_rows<int32_t>(*args); return 0;
    default: return 1;
  }
}

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_walk(const heterospec::WalkArguments* args) {
  switch (args->dtype) {
    case 0: heterospec::walk<float>(*args); return 0;
    case 1: heterospec::walk<heterospec::bf16>(*args); return 0;
    case 2: heterospec::walk<heterospec::f16>(*args); return 0;
    default: return 1;
  }
}

// What the library was built for, for messages.
HETEROSPEC_EXPORT const char* heterospec_tree_attention_isa() {
#if defined(HETEROSPEC_AMX)
  return "amx";
#elif defined(HETEROSPEC_BF16_DOT)
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
