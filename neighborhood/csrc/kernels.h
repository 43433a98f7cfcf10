// What one instruction set offers: attention of a band of rows of one map, forward and backward.
#ifndef NEIGHBORHOOD_KERNELS_H_
#define NEIGHBORHOOD_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace neighborhood {

// Rows of queries that are worked on together. Bands of the backward begin at multiples of it, so that every key sums
// its contributions in the same order however the map is cut.
constexpr int64_t kRowBlock = 3;

template <typename T>
struct ForwardArguments {
  const T *query, *key, *value;
  const T* bias;  // (heads, 2 kernel - 1, 2 kernel - 1), or null
  T* output;      // like query
  T* logsumexp;   // (batch, height, width, heads), or null
  double scale;
};

template <typename T>
struct BackwardArguments {
  const T *query, *key, *value;
  const T* bias;  // or null
  const T *logsumexp, *grad_output;
  T *grad_query, *grad_key, *grad_value;
  double scale;
};

// All functions work on rows [begin, end) of one map and need `scratch` bytes of their own, aligned to 64.
template <typename T>
struct Kernels {
  size_t (*forward_scratch)(const Shape&);
  void (*forward)(const Shape&, const ForwardArguments<T>&, const Map&, int64_t begin, int64_t end, void* scratch);
  size_t (*backward_scratch)(const Shape&);
  // Gradients of the band's queries and of its keys and values; `grad_bias`, of (2 kernel - 1) squared, or null, is
  // set to the part of the band's queries.
  void (*backward)(const Shape&, const BackwardArguments<T>&, const Map&, int64_t begin, int64_t end, T* grad_bias,
                   void* scratch);
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernels<float> float32;
  Kernels<double> float64;
};

}  // namespace neighborhood

#endif  // NEIGHBORHOOD_KERNELS_H_
