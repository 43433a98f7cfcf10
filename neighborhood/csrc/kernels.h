// What one instruction set offers: attention of bands of maps, forward and backward.
#ifndef NEIGHBORHOOD_KERNELS_H_
#define NEIGHBORHOOD_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "geometry.h"

namespace neighborhood {

// Numbers of 16 bits, as they are stored.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type in which stored numbers are computed with.
template <typename S>
struct ComputeType {
  typedef S Type;
};
template <>
struct ComputeType<Float16> {
  typedef float Type;
};
template <>
struct ComputeType<BFloat16> {
  typedef float Type;
};

// S is the type of the tensors of tokens, T the one that is computed in.
template <typename S>
struct ForwardArguments {
  typedef typename ComputeType<S>::Type T;
  const S *query, *key, *value;
  const T* bias;      // (heads, 2 kernel - 1 per axis), or null
  S* output;          // like query
  double* logsumexp;  // (batch, depth, height, width, heads), or null
  double scale;
};

template <typename S>
struct BackwardArguments {
  typedef typename ComputeType<S>::Type T;
  const S *query, *key, *value;
  const T* bias;  // or null
  const double* logsumexp;
  const S* grad_output;
  S *grad_query, *grad_key, *grad_value;
  // (bands, heads of a band, segments of a band, entries of a head's table), zero at first, or null: the sum over each
  // segment of a band's queries. These depend on the shape alone, and so do the bits of their sum.
  double* grad_bias;
  int64_t segment;  // length of a segment; bands begin at multiples of it
  double scale;
};

// Bands [begin, end) of a call, worked on with `scratch` bytes of the caller's memory, aligned to 64.
template <typename S>
struct Kernels {
  typedef typename ComputeType<S>::Type T;
  size_t (*forward_scratch)(const Shape&, const Bands&);
  void (*forward)(const Shape&, const ForwardArguments<S>&, const Bands&, int64_t begin, int64_t end, void* scratch);
  size_t (*backward_scratch)(const Shape&, const Bands&);
  void (*backward)(const Shape&, const BackwardArguments<S>&, const Bands&, int64_t begin, int64_t end, void* scratch);
  void (*widen)(const S* from, int64_t count, T* to);
  void (*narrow)(const T* from, int64_t count, S* to);
};

struct InstructionSet {
  const char* name;
  int64_t row_block;  // of a Shape
  bool (*supported)();
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<Float16> float16;
  Kernels<BFloat16> bfloat16;
};

}  // namespace neighborhood

#endif  // NEIGHBORHOOD_KERNELS_H_
