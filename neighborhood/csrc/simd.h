// Vectors of the instruction set that this is compiled for, and what the kernels do with them: reading and writing of
// the stored types, exponentials and logarithms, transposition.
//
// Included by kernels.cc alone, once per instruction set: NEIGHBORHOOD_INSTRUCTION_SET names it and
// NEIGHBORHOOD_VECTOR_BYTES is the width of its registers. Everything has internal linkage: were a function of the
// standard library emitted with wide instructions, the linker could pick it for machines without them.
#ifndef NEIGHBORHOOD_SIMD_H_
#define NEIGHBORHOOD_SIMD_H_

#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace neighborhood {
namespace NEIGHBORHOOD_INSTRUCTION_SET {
namespace {

constexpr int kBytes = NEIGHBORHOOD_VECTOR_BYTES;

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  typedef int32_t Integer;
};
template <>
struct Bits<double> {
  typedef int64_t Integer;
};

template <typename T>
struct Simd {
  static constexpr int kLanes = kBytes / sizeof(T);
  typedef typename Bits<T>::Integer Integer;
  typedef T Vector __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
  typedef Integer Integers __attribute__((vector_size(kBytes)));
};
template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
using Integers = typename Simd<T>::Integers;

template <typename T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

// The numbers of the lanes: 0, 1, ..
template <typename T>
inline Integers<T> lane_numbers() {
  Integers<T> numbers;
  for (int i = 0; i < Simd<T>::kLanes; i++) numbers[i] = i;
  return numbers;
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <typename T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

// Half types: 16 bits in memory, float in registers

typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

inline Vector<float> widen(BFloat16, Halves halves) {
  return (Vector<float>)(__builtin_convertvector(halves, Words) << 16);
}

inline Halves narrow(BFloat16, Vector<float> x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
  return __builtin_convertvector(x == x ? rounded : ((bits >> 16) | 0x40), Halves);
}

inline Vector<float> widen(Float16, Halves halves) {
#if NEIGHBORHOOD_VECTOR_BYTES == 64
  return (Vector<float>)_mm512_maskz_cvtph_ps(-1, (__m256i)halves);
#elif defined(__F16C__)
  return (Vector<float>)_mm256_cvtph_ps((__m128i)halves);
#else
  const Words bits = __builtin_convertvector(halves, Words), magnitude = bits & 0x7fff;
  const Vector<float> subnormal =
      __builtin_convertvector((Integers<float>)magnitude, Vector<float>) * 5.9604644775390625e-8f;  // of 2^-24
  Words wide = (magnitude << 13) + ((127 - 15) << 23);
  wide = magnitude >= 0x7c00 ? wide | 0x7f800000 : wide;  // infinity, or NaN
  wide = magnitude < 0x0400 ? (Words)subnormal : wide;
  return (Vector<float>)(wide | (bits & 0x8000) << 16);
#endif
}

inline Halves narrow(Float16, Vector<float> x) {
#if NEIGHBORHOOD_VECTOR_BYTES == 64
  return (Halves)_mm512_maskz_cvtps_ph(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Words bits = (Words)x, magnitude = bits & 0x7fffffff;
  Words half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - ((127 - 15) << 23)) >> 13;
  // what is added leaves in the lowest bits the number of steps of 2^-24
  const Words subnormal = (Words)((Vector<float>)magnitude + 0.5f) - (126u << 23);
  half = magnitude < (127 - 14) << 23 ? subnormal : half;
  half = magnitude >= 0x477ff000 ? (magnitude > 0x7f800000 ? Words{} + 0x7e00 : Words{} + 0x7c00) : half;
  return __builtin_convertvector(half | (bits >> 16 & 0x8000), Halves);
#endif
}

template <typename S>
using Computed = typename ComputeType<S>::Type;

inline Vector<float> load(const float* from) { return *reinterpret_cast<const Simd<float>::Unaligned*>(from); }
inline Vector<double> load(const double* from) { return *reinterpret_cast<const Simd<double>::Unaligned*>(from); }
inline void store(float* to, Vector<float> x) { *reinterpret_cast<Simd<float>::Unaligned*>(to) = x; }
inline void store(double* to, Vector<double> x) { *reinterpret_cast<Simd<double>::Unaligned*>(to) = x; }

// Keeps what is used several times in a register: compilers would fold a load into each of its uses, and loads that
// cross cache lines are then what products wait for.
template <typename V>
inline V in_register(V x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#endif
  return x;
}

template <typename S>
inline Vector<float> load(const S* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return widen(S(), halves);
}

template <typename S>
inline void store(S* to, Vector<float> x) {
  const Halves halves = narrow(S(), x);
  std::memcpy(to, &halves, sizeof(halves));
}

// `count` <= kLanes elements; the other lanes become 0.
template <typename S>
inline Vector<Computed<S>> load_some(const S* from, int64_t count) {
  alignas(64) S some[Simd<Computed<S>>::kLanes] = {};
  std::memcpy(some, from, count * sizeof(S));
  return load(some);
}

#if NEIGHBORHOOD_VECTOR_BYTES == 64
inline Vector<float> load_some(const float* from, int64_t count) {
  return (Vector<float>)_mm512_maskz_loadu_ps((1u << count) - 1, from);
}
inline Vector<double> load_some(const double* from, int64_t count) {
  return (Vector<double>)_mm512_maskz_loadu_pd((1u << count) - 1, from);
}
#endif

template <typename S>
inline void store_some(S* to, Vector<Computed<S>> x, int64_t count) {
  alignas(64) S some[Simd<Computed<S>>::kLanes];
  store(some, x);
  std::memcpy(to, some, count * sizeof(S));
}

// Reads and writes rows of numbers; those that are computed with are padded, with zeros, to whole vectors.

template <typename S>
inline void read_row(const S* from, int64_t count, int64_t padded, Computed<S>* to) {
  constexpr int n = Simd<Computed<S>>::kLanes;
  for (int64_t i = 0; i < padded; i += n)
    store(to + i, count - i >= n ? load(from + i) : load_some(from + i, larger<int64_t>(count - i, 0)));
}

template <typename S>
inline void write_row(const Computed<S>* from, Computed<S> factor, int64_t count, S* to) {
  constexpr int n = Simd<Computed<S>>::kLanes;
  for (int64_t i = 0; i < count; i += n) {
    const Vector<Computed<S>> x = load(from + i) * factor;
    if (count - i >= n)
      store(to + i, x);
    else
      store_some(to + i, x, count - i);
  }
}

// The elementary functions

inline Vector<float> exp_polynomial(Vector<float> f) {  // 2e-8 relative on |f| <= log(2) / 2
  Vector<float> p = f * 0.001384364441f + 0.008374162950f;
  p = p * f + 0.04166800156f;
  p = p * f + 0.1666643173f;
  p = p * f + 0.4999999404f;
  p = p * f + 1.0f;
  return p * f + 1.0f;
}

inline Vector<double> exp_polynomial(Vector<double> f) {  // Taylor, 4e-18 relative
  Vector<double> p = f * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  p = p * f + 1.0 / 39916800.0;
  p = p * f + 1.0 / 3628800.0;
  p = p * f + 1.0 / 362880.0;
  p = p * f + 1.0 / 40320.0;
  p = p * f + 1.0 / 5040.0;
  p = p * f + 1.0 / 720.0;
  p = p * f + 1.0 / 120.0;
  p = p * f + 1.0 / 24.0;
  p = p * f + 1.0 / 6.0;
  p = p * f + 0.5;
  p = p * f + 1.0;
  return p * f + 1.0;
}

template <typename T>
struct Format;
template <>
struct Format<float> {
  static constexpr int kMantissa = 23, kExponentBias = 127;
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  static constexpr float kLowest = -86.0f;        // exp of less is taken as exp of this, 4e-38
  static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  static constexpr int kLogTerms = 5;
};
template <>
struct Format<double> {
  static constexpr int kMantissa = 52, kExponentBias = 1023;
  static constexpr double kRounder = 6755399441055744.0;
  static constexpr double kLowest = -707.0;
  static constexpr double kLog2High = 0.693145751953125, kLog2Low = 1.42860682030941723212e-6;
  static constexpr int kLogTerms = 11;
};

// exp(x) for x <= 0 or so; NaN gives NaN.
template <typename T>
inline Vector<T> exponential(Vector<T> x) {
  typedef Format<T> F;
  x = splat(F::kLowest) > x ? splat(F::kLowest) : x;
  // the lowest bits of `shifted` are the exponent of the power of two, biased, and those above it leave the register
  const Vector<T> shifted = x * T(1.4426950408889634) + (F::kRounder + F::kExponentBias);
  const Vector<T> n = shifted - (F::kRounder + F::kExponentBias);
  const Vector<T> p = exp_polynomial((x - n * F::kLog2High) - n * F::kLog2Low);
  return p * (Vector<T>)((Integers<T>)shifted << F::kMantissa);
}

// log(x) for finite x >= 1; NaN gives NaN.
template <typename T>
inline Vector<T> logarithm(Vector<T> x) {
  typedef Format<T> F;
  typedef typename Simd<T>::Integer Integer;
  const Integers<T> bits = (Integers<T>)x;
  const Integer mantissa_mask = (Integer(1) << F::kMantissa) - 1;
  Integers<T> exponent = (bits >> F::kMantissa) - F::kExponentBias;
  Vector<T> mantissa = (Vector<T>)((bits & mantissa_mask) | (Integer(F::kExponentBias) << F::kMantissa));  // 1..2
  const auto large = mantissa > T(1.4142135623730951);
  mantissa = large ? mantissa * T(0.5) : mantissa;
  exponent = exponent - (Integers<T>)large;  // true is -1
  const Vector<T> s = (mantissa - T(1)) / (mantissa + T(1)), s2 = s * s;
  Vector<T> series = splat(T(2) / (2 * F::kLogTerms + 1));
  for (int i = F::kLogTerms - 1; i >= 0; i--) series = series * s2 + T(2) / (2 * i + 1);
  const Vector<T> n = __builtin_convertvector(exponent, Vector<T>);
  return n * F::kLog2High + (n * F::kLog2Low + series * s) + (x - x);
}

// Transposition of square blocks in registers, by as many perfect shuffles of the rows as a lane number has bits.

template <typename V, int... I>
inline V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? int(sizeof...(I)) + I / 2 : I / 2)...);
}

template <typename V, int... I>
inline V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I % 2 ? n + n / 2 + I / 2 : n / 2 + I / 2)...);
}

template <typename T>
inline void transpose_block(Vector<T>* rows) {
  constexpr int n = Simd<T>::kLanes;
  constexpr auto sequence = std::make_integer_sequence<int, n>();
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vector<T> shuffled[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; i++) {
      shuffled[2 * i] = interleave_low(rows[i], rows[i + n / 2], sequence);
      shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + n / 2], sequence);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) rows[i] = shuffled[i];
  }
}

// Writes the first `width` columns of a block of `count` <= kLanes rows, each as a vector, times a factor. Lanes beyond
// `count` repeat the last row. `AllRows` promises that there are kLanes.
template <bool AllRows, typename S, typename T = Computed<S>>
inline void write_transposed(const S* from, int64_t stride, [[maybe_unused]] int64_t count, T factor, int64_t width,
                             T* to, int64_t to_stride) {
  constexpr int n = Simd<T>::kLanes;
  Vector<T> rows[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; i++) {
    rows[i] = load(from);
    if (AllRows || i + 1 < count) from += stride;
  }
  transpose_block<T>(rows);
  if (width == n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) store(to + i * to_stride, rows[i] * factor);
  } else {
    for (int i = 0; i < width; i++) store(to + i * to_stride, rows[i] * factor);
  }
}

#if NEIGHBORHOOD_VECTOR_BYTES == 64
// Loads put quarters of rows in their places, so that half of the shuffles are left.
template <bool AllRows>
inline void write_transposed(const float* from, int64_t stride, [[maybe_unused]] int64_t count, float factor,
                             int64_t width, float* to, int64_t to_stride) {
  constexpr __mmask16 quarters[] = {0x000f, 0x00f0, 0x0f00, 0xf000};
#pragma GCC unroll 1
  for (int64_t column = 0; column < width; column += 4, from += 4, to += 4 * to_stride) {
    __m512 part[4] = {};
    const float* row = from;
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; quarter++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        part[i] = _mm512_mask_broadcast_f32x4(part[i], quarters[quarter], _mm_loadu_ps(row));
        if (AllRows || 4 * quarter + i + 1 < count) row += stride;
      }
    const __m512d low = (__m512d)_mm512_maskz_unpacklo_ps(-1, part[0], part[1]);
    const __m512d high = (__m512d)_mm512_maskz_unpackhi_ps(-1, part[0], part[1]);
    const __m512d low2 = (__m512d)_mm512_maskz_unpacklo_ps(-1, part[2], part[3]);
    const __m512d high2 = (__m512d)_mm512_maskz_unpackhi_ps(-1, part[2], part[3]);
    const Vector<float> columns[4] = {(Vector<float>)_mm512_maskz_unpacklo_pd(-1, low, low2),
                                      (Vector<float>)_mm512_maskz_unpackhi_pd(-1, low, low2),
                                      (Vector<float>)_mm512_maskz_unpacklo_pd(-1, high, high2),
                                      (Vector<float>)_mm512_maskz_unpackhi_pd(-1, high, high2)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      if (column + i < width) store(to + i * to_stride, columns[i] * factor);
  }
}
#endif

#if NEIGHBORHOOD_VECTOR_BYTES == 32
// Loads put halves of rows in their places, so that a third of the shuffles is left.
template <bool AllRows>
inline void write_transposed(const float* from, int64_t stride, [[maybe_unused]] int64_t count, float factor,
                             int64_t width, float* to, int64_t to_stride) {
#pragma GCC unroll 1
  for (int64_t column = 0; column < width; column += 4, from += 4, to += 4 * to_stride) {
    __m128 half[8];
    const float* row = from;
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      half[i] = _mm_loadu_ps(row);
      if (AllRows || i + 1 < count) row += stride;
    }
    __m256 part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) part[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(half[i]), half[i + 4], 1);
    const __m256d low = (__m256d)_mm256_unpacklo_ps(part[0], part[1]);
    const __m256d high = (__m256d)_mm256_unpackhi_ps(part[0], part[1]);
    const __m256d low2 = (__m256d)_mm256_unpacklo_ps(part[2], part[3]);
    const __m256d high2 = (__m256d)_mm256_unpackhi_ps(part[2], part[3]);
    const Vector<float> columns[4] = {
        (Vector<float>)_mm256_unpacklo_pd(low, low2), (Vector<float>)_mm256_unpackhi_pd(low, low2),
        (Vector<float>)_mm256_unpacklo_pd(high, high2), (Vector<float>)_mm256_unpackhi_pd(high, high2)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      if (column + i < width) store(to + i * to_stride, columns[i] * factor);
  }
}
#endif

// Writes (channels, kLanes) of a row of `count` <= kLanes elements: `channels` numbers each, `stride` apart. Lanes
// beyond `count` repeat the last.
template <typename S, typename T = Computed<S>>
void transpose(const S* from, int64_t stride, int64_t count, int64_t channels, T factor, T* to, int64_t to_stride) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t c = 0; c < channels; c += n, to += n * to_stride) {
    const int64_t width = smaller<int64_t>(n, channels - c);
    if (width == n) {
      if (count == n)
        write_transposed<true>(from + c, stride, count, factor, width, to, to_stride);
      else
        write_transposed<false>(from + c, stride, count, factor, width, to, to_stride);
      continue;
    }
    alignas(64) T block[n * n];
    const S* row = from + c;
    for (int64_t i = 0; i < n; i++) {
      store(block + i * n, load_some(row, width));
      if (i + 1 < count) row += stride;
    }
    write_transposed<true>(block, n, n, factor, width, to, to_stride);
  }
}

// Softmax

// Softmax of `Count` neighbouring queries per lane at once: one alone would wait for its own results.

// Replaces (rows, columns) scores by exp(score - maximum); returns the sum of these and the maximum, per lane. The
// scores of the next of `Count` lie `stride` vectors further on.
template <typename T, int Count>
inline void soften(int64_t rows, int64_t columns, Vector<T>* scores, int64_t stride, Vector<T>* sums,
                   Vector<T>* maxima) {
  Vector<T> largest[Count];
#pragma GCC unroll 4
  for (int r = 0; r < Count; r++) largest[r] = scores[r * stride];
  for (int64_t j = 1; j < rows * columns; j++)
#pragma GCC unroll 4
    for (int r = 0; r < Count; r++) {
      const Vector<T> score = scores[r * stride + j];
      largest[r] = largest[r] > score ? largest[r] : score;
    }
  Vector<T> total[Count] = {};
  for (int64_t a = 0; a < rows; a++) {
    Vector<T> sum[Count] = {};  // sums of sums round less
    for (const Vector<T>* end = scores + columns; scores < end; scores++)
#pragma GCC unroll 4
      for (int r = 0; r < Count; r++) {
        const Vector<T> weight = exponential<T>(scores[r * stride] - largest[r]);
        scores[r * stride] = weight;
        sum[r] += weight;
      }
#pragma GCC unroll 4
    for (int r = 0; r < Count; r++) total[r] += sum[r];
  }
#pragma GCC unroll 4
  for (int r = 0; r < Count; r++) {
    sums[r] = total[r];
    maxima[r] = largest[r];
  }
}

// Turns (rows, columns) logits and gradients of probabilities into probabilities and gradients of logits.
template <typename T, int Count>
inline void slope(int64_t rows, int64_t columns, const Vector<T>* logsumexp, Vector<T>* weights, Vector<T>* slopes,
                  int64_t stride) {
  Vector<T> delta[Count] = {}, total[Count] = {};
  for (int64_t a = 0; a < rows; a++) {
    Vector<T> row_delta[Count] = {}, row_total[Count] = {};
    for (int64_t j = a * columns; j < (a + 1) * columns; j++)
#pragma GCC unroll 4
      for (int r = 0; r < Count; r++) {
        const Vector<T> weight = exponential<T>(weights[r * stride + j] - logsumexp[r]);
        weights[r * stride + j] = weight;
        row_delta[r] += weight * slopes[r * stride + j];
        row_total[r] += weight;
      }
#pragma GCC unroll 4
    for (int r = 0; r < Count; r++) {
      delta[r] += row_delta[r];
      total[r] += row_total[r];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Count; r++) {
    // The total is 1 but for the rounding of the log-sum-exp, which all weights of a query share.
    const Vector<T> factor = T(1) / total[r];
    delta[r] *= factor;
    Vector<T>*own_weights = weights + r * stride, *own_slopes = slopes + r * stride;
    for (int64_t j = 0; j < rows * columns; j++) {
      own_weights[j] *= factor;
      own_slopes[j] = own_weights[j] * (own_slopes[j] - delta[r]);
    }
  }
}

// Hands out parts of a buffer; with a null buffer only counts.
class Carver {
 public:
  explicit Carver(void* buffer) : buffer_(static_cast<char*>(buffer)) {}

  template <typename T>
  T* take(int64_t count) {
    T* part = buffer_ ? reinterpret_cast<T*>(buffer_ + used_) : nullptr;
    used_ += round_up(count * sizeof(T), 64);
    return part;
  }
  size_t used() const { return used_; }

 private:
  char* buffer_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace NEIGHBORHOOD_INSTRUCTION_SET
}  // namespace neighborhood

#endif  // NEIGHBORHOOD_SIMD_H_
