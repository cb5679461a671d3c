// SPDX-License-Identifier: Apache-2.0
// The plain C entries of the library, for ctypes: each takes the address of its packed arguments.
#include <cstring>

#include "argmax.hpp"
#include "aux_fusion.hpp"
#include "gather_rows.hpp"
#include "head_layer.hpp"
#include "kv_compact.hpp"
#include "packed_linear.hpp"
#include "parallel_attend.hpp"
#include "product_speed.hpp"
#include "threads.hpp"
#include "top_tokens.hpp"
#include "walk.hpp"

#define HETEROSPEC_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using heterospec::bf16, heterospec::f16, heterospec::AmxPages, heterospec::VecPages;

// Whether bfloat16 rows are multiplied in pairs, as weights and pages hold them, or as floats.
bool in_pairs() {
#if defined(HETEROSPEC_PAIRS)  // a build for tests
  return true;
#elif defined(HETEROSPEC_AMX)
  return heterospec::Tiles::permitted() || heterospec::pairs_are_fast();
#elif defined(HETEROSPEC_BF16_DOT)
  return heterospec::pairs_are_fast();
#else
  return false;
#endif
}

// Calls with a value of the type that a code stands for and one of the type that rows of it are multiplied as.
// Returns 0, or 1 for a code it does not know.
template <typename Call>
int by_dtype(int64_t dtype, Call call) {
  switch (dtype) {
    case 0: return call(float{}, float{}), 0;
    case 1:
#if defined(HETEROSPEC_BF16_DOT)
      if (in_pairs()) return call(bf16{}, bf16{}), 0;
#endif
      return call(bf16{}, float{}), 0;
    case 2: return call(f16{}, float{}), 0;
    default: return 1;
  }
}

// vLLM tiles bfloat16 caches only.
constexpr int64_t kVec = 0, kAmx = 1, kBf16 = 1;

// As above, with the layout of the pages between the two types.
template <typename Call>
int by_dtype_and_pages(int64_t dtype, int64_t isa, Call call) {
  if (isa != kVec && (isa != kAmx || dtype != kBf16)) return 1;
  return by_dtype(dtype, [&](auto type, auto left) {
    if constexpr (std::is_same_v<decltype(type), bf16>)
      if (isa == kAmx) return call(type, AmxPages{}, left);
    call(type, VecPages{}, left);
  });
}

struct NamedSize {
  const char* name;
  int64_t bytes;
};

#define HETEROSPEC_SIZE(type) {#type, sizeof(heterospec::type)}
constexpr NamedSize kSizes[] = {
    HETEROSPEC_SIZE(LayerArguments),     HETEROSPEC_SIZE(RequestArguments),
    HETEROSPEC_SIZE(RowArguments),       HETEROSPEC_SIZE(HeadWeights),
    HETEROSPEC_SIZE(HeadInputs),         HETEROSPEC_SIZE(GatherArguments),
    HETEROSPEC_SIZE(RowSource),          HETEROSPEC_SIZE(ArgmaxArguments),
    HETEROSPEC_SIZE(CompactArguments),   HETEROSPEC_SIZE(PackedLinearArguments),
    HETEROSPEC_SIZE(AuxFusionArguments), HETEROSPEC_SIZE(TopArguments),
    HETEROSPEC_SIZE(WalkArguments),      HETEROSPEC_SIZE(RowRules),
};
#undef HETEROSPEC_SIZE

}  // namespace

// Bytes of a struct that the entries take, -1 for a name that is none of them.
HETEROSPEC_EXPORT int64_t heterospec_size_of(const char* name) {
  for (const NamedSize& size : kSizes)
    if (std::strcmp(size.name, name) == 0) return size.bytes;
  return -1;
}

// Returns 0, or 1 for a dtype or isa code it does not know.
HETEROSPEC_EXPORT int heterospec_tree_attention(const heterospec::Arguments* args) {
  return by_dtype_and_pages(args->dtype, args->isa, [&](auto type, auto pages, auto left) {
    heterospec::run<decltype(type), decltype(pages), decltype(left)>(*args);
  });
}

// Returns 0, or 1 for a dtype or isa code it does not know.
HETEROSPEC_EXPORT int heterospec_head_layer(const heterospec::HeadArguments* args) {
  const heterospec::Arguments& attention = args->attention;
  return by_dtype_and_pages(attention.dtype, attention.isa, [&](auto type, auto pages, auto left) {
    heterospec::HeadLayer<decltype(type), decltype(pages), decltype(left)>(*args).run();
  });
}

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_top_tokens(const heterospec::TopArguments* args) {
  return by_dtype(args->dtype, [&](auto type, auto left) {
    heterospec::top_tokens<decltype(type), decltype(left)>(*args);
  });
}

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_fuse_aux(const heterospec::AuxFusionArguments* args) {
  return by_dtype(args->dtype, [&](auto type, auto left) {
    heterospec::fuse_aux<decltype(type), decltype(left)>(*args);
  });
}

// Returns 0, or 1 for a dtype code it does not know.
HETEROSPEC_EXPORT int heterospec_packed_linear(const heterospec::PackedLinearArguments* args) {
  return by_dtype(args->dtype, [&](auto type, auto left) {
    heterospec::packed_linear<decltype(type), decltype(left)>(*args);
  });
}

// Returns 0, or 1 for an element size or isa code it does not know.
HETEROSPEC_EXPORT int heterospec_kv_compact(const heterospec::CompactArguments* args) {
  switch (args->isa) {
    case kVec: return heterospec::compact<heterospec::VecPages>(*args);
    case kAmx: return heterospec::compact<heterospec::AmxPages>(*args);
    default: return 1;
  }
}

HETEROSPEC_EXPORT int heterospec_gather_rows(const heterospec::GatherArguments* args) {
  return heterospec::gather_rows(*args), 0;
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
  return by_dtype(args->dtype, [&](auto type, auto) { heterospec::walk<decltype(type)>(*args); });
}

// What the library was built for, for messages.
HETEROSPEC_EXPORT const char* heterospec_instruction_set() {
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

HETEROSPEC_EXPORT int heterospec_max_threads() { return heterospec::max_threads(); }
