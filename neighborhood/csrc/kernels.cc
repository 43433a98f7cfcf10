// The kernels, compiled once per instruction set: NEIGHBORHOOD_INSTRUCTION_SET names it and NEIGHBORHOOD_VECTOR_BYTES
// is the width of its registers.
//
// Scores are kept as scores[row of the window][offset][lane]. A lane is a query; a tile is as many neighbouring queries
// of a row as a register has lanes. An offset is the distance from a query to a key along the row. So one offset is one
// unaligned load from the transposed keys for all lanes at once, and one scalar of the bias table. Windows that are
// shifted at the border need other offsets than those inside: a tile covers the offsets of all its lanes, and lanes
// for which an offset lies outside the window are masked.
//
// The products with values have channels in the lanes instead: neighbouring queries share each loaded value.
//
// Everything but what `instruction_set` returns has internal linkage: were a function of the standard library emitted
// here with wide instructions, the linker could pick it for machines without them.
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <utility>

namespace neighborhood {
namespace NEIGHBORHOOD_INSTRUCTION_SET {
namespace {

constexpr int kBytes = NEIGHBORHOOD_VECTOR_BYTES;
constexpr int kOffsets = kBytes == 64 ? 8 : 4;   // offsets per pass over head_dim: registers bound it
constexpr int kChannels = kBytes == 64 ? 4 : 2;  // vectors of channels per pass over a window
constexpr int kQueries = 4;                      // neighbouring queries that share a loaded value
constexpr int64_t kSumBlock = 16;                // products per sum, and then sums of sums: they round less

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
inline Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}

template <typename T>
inline void store(T* to, Vector<T> x) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = x;
}

template <typename T>
inline Vector<T> splat(T x) {
  return x - Vector<T>{};
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <typename T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

// The elementary functions

inline Vector<float> exp_polynomial(Vector<float> f) {  // 2e-9 relative on |f| <= log(2) / 2
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
  x = x < F::kLowest ? splat(F::kLowest) : x;
  const Vector<T> shifted = x * T(1.4426950408889634) + F::kRounder;
  const Vector<T> n = shifted - F::kRounder;
  const Vector<T> p = exp_polynomial((x - n * F::kLog2High) - n * F::kLog2Low);
  const Integers<T> exponent = (Integers<T>)shifted - (Integers<T>)splat(F::kRounder) + F::kExponentBias;
  return p * (Vector<T>)(exponent << F::kMantissa);
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

// Writes (channels, kLanes) of a row of `count` <= kLanes elements: `channels` numbers each, `stride` apart. Lanes
// beyond `count` become 0.
template <typename T>
void transpose(const T* from, int64_t stride, int64_t count, int64_t channels, T factor, T* to, int64_t to_stride) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t c = 0; c < channels; c += n) {
    const int64_t width = smaller<int64_t>(n, channels - c);
    Vector<T> rows[n];
    if (count == n && width == n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; i++) rows[i] = load(from + i * stride + c);
    } else {
      for (int i = 0; i < n; i++) {
        rows[i] = Vector<T>{};
        if (i < count) std::memcpy(&rows[i], from + i * stride + c, width * sizeof(T));
      }
    }
    transpose_block<T>(rows);
    for (int64_t i = 0; i < width; i++) store(to + (c + i) * to_stride, rows[i] * factor);
  }
}

// The products

template <typename T>
struct ScoreRow {
  const Vector<T>* query;  // (head_dim) vectors of lanes
  const T* bias;           // of the first offset, or null
  Vector<T>* scores;       // of the first offset
};

// Scores of `Rows` rows of queries with one row of keys at `Offsets` neighbouring offsets.
template <typename T, int Rows, int Offsets>
void score(const T* keys, int64_t key_stride, int64_t head_dim, const ScoreRow<T>* rows) {
  const Vector<T>* queries[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r++) queries[r] = rows[r].query;
  for (int64_t begin = 0; begin < head_dim; begin += kSumBlock) {
    const int64_t end = smaller(begin + kSumBlock, head_dim);
    Vector<T> sums[Rows][Offsets] = {};
    for (int64_t d = begin; d < end; d++, keys += key_stride) {
      Vector<T> query[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; r++) query[r] = queries[r][d];
#pragma GCC unroll 8
      for (int o = 0; o < Offsets; o++) {
        const Vector<T> key = load(keys + o);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) sums[r][o] += query[r] * key;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      const T* bias = end == head_dim ? rows[r].bias : nullptr;  // last: its size would round every step
#pragma GCC unroll 8
      for (int o = 0; o < Offsets; o++) {
        if (begin) sums[r][o] += rows[r].scores[o];
        rows[r].scores[o] = bias ? sums[r][o] + bias[o] : sums[r][o];
      }
    }
  }
}

template <typename T>
using ScoreFunction = void (*)(const T*, int64_t, int64_t, const ScoreRow<T>*);

template <typename T, int Rows, int... I>
inline ScoreFunction<T> score_of(int64_t offsets, std::integer_sequence<int, I...>) {
  static constexpr ScoreFunction<T> functions[] = {score<T, Rows, I + 1>...};
  return functions[offsets - 1];
}

template <typename T>
inline ScoreFunction<T> score_function(int64_t rows, int64_t offsets) {
  constexpr auto sequence = std::make_integer_sequence<int, kOffsets>();
  static_assert(kRowBlock == 3, "one case per number of rows");
  switch (rows) {
    case 1:
      return score_of<T, 1>(offsets, sequence);
    case 2:
      return score_of<T, 2>(offsets, sequence);
    default:
      return score_of<T, 3>(offsets, sequence);
  }
}

// A run of neighbouring queries of a tile whose windows either slide along with them (Shift 1) or, near a border, are
// the same (Shift 0). `weights` points at the first query's weight of its window's first key; a step to the next
// offset is kLanes further, a step to the next query one.
template <typename T>
struct Group {
  int64_t first_lane, size, shift;
  int64_t start;  // the first query's first key
};

template <typename T>
inline Group<T> next_group(const Axis& columns, int64_t tile, int64_t lane, int64_t lanes) {
  Group<T> group = {lane, 1, 0, columns.start(tile + lane)};
  // sliding windows that overlap too little would leave nothing to share
  const int64_t limit = smaller<int64_t>(kQueries, columns.kernel + 1);
  if (lane + 1 < lanes) group.shift = columns.start(tile + lane + 1) - group.start;
  while (group.size < (group.shift ? limit : kQueries) && lane + group.size < lanes &&
         columns.start(tile + lane + group.size) == group.start + group.shift * group.size)
    group.size++;
  return group;
}

// What a product over windows runs through: for each row of the window, a row of the map and a row of weights.
template <typename T>
struct WindowRows {
  T* const* rows;         // rows of the map, each at its first column
  int64_t column_stride;  // in elements
  int64_t count;          // rows of the window
  const T* weights;       // of the group's first query, for the window's first key
  int64_t weight_stride;  // from one row of the window to the next
};

// Calls column(c, first, end) for each column c that the group's windows cover: queries first..end of it meet there,
// with constants for a compiler that unrolls.
template <int Queries, int Shift, typename Column>
inline __attribute__((always_inline)) void over_columns(int64_t kernel, Column column) {
  constexpr int edge = Shift * (Queries - 1);
#pragma GCC unroll 4
  for (int c = 0; c < edge; c++) column(c, 0, c + 1);
  for (int64_t c = edge; c < kernel; c++) column(c, 0, Queries);
#pragma GCC unroll 4
  for (int c = 0; c < edge; c++) column(kernel + c, c + 1, Queries);
}

// sums[u][channel] = sum of weight * row over the windows of the group.
template <typename T, int Queries, int Shift, int Channels>
void weighted_sum(const WindowRows<T>& window, int64_t start, int64_t kernel, int64_t channel,
                  Vector<T> (*sums)[kChannels]) {
  constexpr int n = Simd<T>::kLanes;
  constexpr int64_t rows_at_once = 2;  // sums of sums round less
  for (int64_t begin = 0; begin < window.count; begin += rows_at_once) {
    Vector<T> sum[Queries][Channels] = {};
    for (int64_t a = begin; a < smaller(begin + rows_at_once, window.count); a++) {
      const T* row = window.rows[a] + start * window.column_stride + channel;
      const T* weights = window.weights + a * window.weight_stride;
      over_columns<Queries, Shift>(kernel, [&](int64_t c, int first, int end) __attribute__((always_inline)) {
        Vector<T> value[Channels];
#pragma GCC unroll 4
        for (int v = 0; v < Channels; v++) value[v] = load(row + c * window.column_stride + v * n);
#pragma GCC unroll 4
        for (int u = 0; u < Queries; u++) {
          if (u < first || u >= end) continue;
          const T weight = weights[(c - u) * n + u];  // one column further is one offset less
#pragma GCC unroll 4
          for (int v = 0; v < Channels; v++) sum[u][v] += weight * value[v];
        }
      });
    }
#pragma GCC unroll 4
    for (int u = 0; u < Queries; u++)
#pragma GCC unroll 4
      for (int v = 0; v < Channels; v++) sums[u][v] = begin ? sums[u][v] + sum[u][v] : sum[u][v];
  }
}

// row += weight * vectors[u] at every key of every query of the group.
template <typename T, int Queries, int Shift, int Channels>
void spread(const WindowRows<T>& window, int64_t start, int64_t kernel, int64_t channel,
            Vector<T> (*vectors)[kChannels]) {
  constexpr int n = Simd<T>::kLanes;
  Vector<T> vector[Queries][Channels];
#pragma GCC unroll 4
  for (int u = 0; u < Queries; u++)
#pragma GCC unroll 4
    for (int v = 0; v < Channels; v++) vector[u][v] = vectors[u][v];
  for (int64_t a = 0; a < window.count; a++) {
    T* row = window.rows[a] + start * window.column_stride + channel;
    const T* weights = window.weights + a * window.weight_stride;
    over_columns<Queries, Shift>(kernel, [&](int64_t c, int first, int end) __attribute__((always_inline)) {
      Vector<T> sum[Channels] = {};
#pragma GCC unroll 4
      for (int u = 0; u < Queries; u++) {
        if (u < first || u >= end) continue;
        const T weight = weights[(c - u) * n + u];  // one column further is one offset less
#pragma GCC unroll 4
        for (int v = 0; v < Channels; v++) sum[v] += weight * vector[u][v];
      }
#pragma GCC unroll 4
      for (int v = 0; v < Channels; v++) {
        T* to = row + c * window.column_stride + v * n;
        store(to, load(to) + sum[v]);
      }
    });
  }
}

template <typename T>
using GroupFunction = void (*)(const WindowRows<T>&, int64_t, int64_t, int64_t, Vector<T> (*)[kChannels]);

// The variant of weighted_sum or spread for a group, with `channels` vectors of channels.
template <typename T, bool Spread, int Queries, int Shift, int Channels>
constexpr GroupFunction<T> group_variant() {
  if constexpr (Spread)
    return spread<T, Queries, Shift, Channels>;
  else
    return weighted_sum<T, Queries, Shift, Channels>;
}

template <typename T, bool Spread, int Queries, int Shift>
inline GroupFunction<T> group_function(int64_t channels) {
  if constexpr (kChannels >= 4)
    if (channels >= 4) return group_variant<T, Spread, Queries, Shift, 4>();
  if (channels >= 2) return group_variant<T, Spread, Queries, Shift, 2>();
  return group_variant<T, Spread, Queries, Shift, 1>();
}

inline int64_t channels_at_once(int64_t channels) {
  if (kChannels >= 4 && channels >= 4) return 4;
  return channels >= 2 ? 2 : 1;
}

template <typename T, bool Spread>
inline GroupFunction<T> group_function(const Group<T>& group, int64_t channels) {
  static_assert(kQueries == 4, "one case per number of queries");
  switch (group.size * 2 + (group.shift && group.size > 1)) {
    case 2:
      return group_function<T, Spread, 1, 0>(channels);
    case 4:
      return group_function<T, Spread, 2, 0>(channels);
    case 5:
      return group_function<T, Spread, 2, 1>(channels);
    case 6:
      return group_function<T, Spread, 3, 0>(channels);
    case 7:
      return group_function<T, Spread, 3, 1>(channels);
    case 8:
      return group_function<T, Spread, 4, 0>(channels);
    default:
      return group_function<T, Spread, 4, 1>(channels);
  }
}

// Tiles

// Neighbouring queries of a row, one per lane, and the offsets that their windows need.
template <typename T>
struct Tile {
  int64_t first, lanes;  // queries first..first + lanes
  int64_t first_offset, offsets;
  bool border;        // whether some lane's window lacks some offset
  Integers<T> start;  // each lane's first key, as an offset from its query

  Tile(const Axis& columns, int64_t x) {
    constexpr int n = Simd<T>::kLanes;
    first = x;
    lanes = smaller<int64_t>(n, columns.length - x);
    int64_t low = 0, high = 0;
    for (int i = 0; i < n; i++) {
      start[i] = INT32_MAX / 2;  // a lane without a query has no keys
      if (i >= lanes) continue;
      const int64_t offset = columns.start(x + i) - (x + i);
      start[i] = static_cast<typename Simd<T>::Integer>(offset);
      if (i == 0 || offset < low) low = offset;
      if (i == 0 || offset > high) high = offset;
    }
    first_offset = low;
    offsets = high - low + columns.kernel;
    border = high > low;
  }

  // All ones where the window of a lane has the offset.
  Integers<T> has(int64_t offset, int64_t kernel) const {
    const Integers<T> slot = static_cast<typename Simd<T>::Integer>(offset) - start;
    return (slot >= 0) & (slot < static_cast<typename Simd<T>::Integer>(kernel));
  }

  // Where the weight of the group's first query for its window's first key is, in scores[offset][lane].
  int64_t weight_of(const Group<T>& group) const {
    return (group.start - (first + group.first_lane) - first_offset) * Simd<T>::kLanes + group.first_lane;
  }
};

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

// The sizes of working memory, for the longest group.
template <typename T>
struct Sizes {
  int64_t height, width, head_dim;
  int64_t padded_dim;    // head_dim in whole vectors
  int64_t margin;        // of a transposed row: offsets reach so far beyond the map
  int64_t padded_width;  // of a transposed row
  int64_t ring;          // rows of keys that a block of rows of queries meets, at most
  int64_t scores;        // vectors of scores of a tile of one row

  explicit Sizes(const Shape& shape) {
    constexpr int n = Simd<T>::kLanes;
    height = (shape.height + shape.dilation[0] - 1) / shape.dilation[0];
    width = (shape.width + shape.dilation[1] - 1) / shape.dilation[1];
    head_dim = shape.head_dim;
    padded_dim = round_up(head_dim, n);
    margin = shape.kernel[1] - 1;
    padded_width = round_up(margin + round_up(width, n) + margin, n);
    ring = smaller(height, shape.kernel[0] + kRowBlock - 1);
    scores = shape.kernel[0] * smaller(2 * shape.kernel[1] - 1, shape.kernel[1] + n);
  }
};

// Rows of a tensor that a block of queries meets: by channels for scores, by columns for products with weights.
template <typename T>
struct KeyRows {
  T* transposed;  // (ring, head_dim, padded_width), or null
  T* packed;      // (ring, width, padded_dim) where head_dim is no multiple of a vector, else null
  T** rows;       // (ring) rows by columns
  int64_t column_stride;
  const T* from;

  KeyRows(Carver& carver, const Sizes<T>& sizes, bool transposes, bool packs) {
    transposed = transposes ? carver.take<T>(sizes.ring * sizes.head_dim * sizes.padded_width) : nullptr;
    const bool copies = packs && sizes.padded_dim != sizes.head_dim;
    packed = copies ? carver.take<T>(sizes.ring * sizes.width * sizes.padded_dim) : nullptr;
    rows = carver.take<T*>(sizes.ring);
  }

  void begin(const Sizes<T>& sizes, const Map& map, const T* tensor) {
    from = tensor + map.offset;
    column_stride = packed ? sizes.padded_dim : map.column_stride;
  }

  void fetch(const Sizes<T>& sizes, const Map& map, int64_t row) {
    constexpr int n = Simd<T>::kLanes;
    const int64_t slot = row % sizes.ring;
    const T* source = from + row * map.row_stride;
    if (transposed) {
      T* to = transposed_row(sizes, row);
      for (int64_t x = 0; x < map.columns.length; x += n)
        transpose<T>(source + x * map.column_stride, map.column_stride, smaller<int64_t>(n, map.columns.length - x),
                     sizes.head_dim, T(1), to + x, sizes.padded_width);
    }
    rows[slot] = const_cast<T*>(source);
    if (packed) {
      rows[slot] = packed + slot * sizes.width * sizes.padded_dim;
      for (int64_t x = 0; x < map.columns.length; x++)
        std::memcpy(rows[slot] + x * sizes.padded_dim, source + x * map.column_stride, sizes.head_dim * sizeof(T));
    }
  }

  // The row's channels at column 0.
  T* transposed_row(const Sizes<T>& sizes, int64_t row) const {
    return transposed + (row % sizes.ring) * sizes.head_dim * sizes.padded_width + sizes.margin;
  }
};

// Scores of rows [y, y + count) of queries with keys, for one tile.
//
// `queries` is (count, head_dim) vectors; `scores` (count, sizes.scores) vectors, of which row r holds (rows of the
// window, tile.offsets).
template <typename T>
void score_tile(const Sizes<T>& sizes, const Map& map, const Tile<T>& tile, const KeyRows<T>& keys, const T* bias,
                int64_t y, int64_t count, const Vector<T>* queries, Vector<T>* scores) {
  const int64_t bias_width = 2 * map.columns.kernel - 1;
  const int64_t passes = (tile.offsets + kOffsets - 1) / kOffsets;
  const int64_t end = map.rows.start(y + count - 1) + map.rows.kernel;
  for (int64_t key = map.rows.start(y); key < end; key++) {
    ScoreRow<T> rows[kRowBlock];
    int64_t active = 0;
    for (int64_t r = 0; r < count; r++) {
      const int64_t a = key - map.rows.start(y + r);
      if (a < 0 || a >= map.rows.kernel) continue;
      const int64_t bias_row = key - (y + r) + map.rows.kernel - 1;
      rows[active].query = queries + r * sizes.head_dim;
      rows[active].bias = bias ? bias + bias_row * bias_width + tile.first_offset + map.columns.kernel - 1 : nullptr;
      rows[active].scores = scores + r * sizes.scores + a * tile.offsets;
      active++;
    }
    const T* row = keys.transposed_row(sizes, key) + tile.first + tile.first_offset;
    for (int64_t pass = 0, offset = 0; pass < passes; pass++) {
      const int64_t offsets = (tile.offsets - offset) / (passes - pass);
      score_function<T>(active, offsets)(row + offset, sizes.padded_width, sizes.head_dim, rows);
      offset += offsets;
      for (int64_t i = 0; i < active; i++) {
        if (rows[i].bias) rows[i].bias += offsets;
        rows[i].scores += offsets;
      }
    }
  }
}

// Sets scores of keys outside the window to minus infinity.
template <typename T>
void mask(const Tile<T>& tile, int64_t kernel, int64_t rows, Vector<T>* scores) {
  const Vector<T> never = splat(-static_cast<T>(INFINITY));
  for (int64_t o = 0; o < tile.offsets; o++) {
    const Integers<T> has = tile.has(tile.first_offset + o, kernel);
    for (int64_t a = 0; a < rows; a++) {
      Vector<T>& score = scores[a * tile.offsets + o];
      score = has ? score : never;
    }
  }
}

// Replaces (rows, offsets) scores by exp(score - maximum); returns the sum of these and the maximum, per lane.
template <typename T>
inline void soften(int64_t rows, int64_t offsets, Vector<T>* scores, Vector<T>* sum, Vector<T>* maximum) {
  const int64_t count = rows * offsets;
  Vector<T> largest[2] = {scores[0], scores[0]};
  for (int64_t j = 0; j + 1 < count; j += 2) {
    largest[0] = largest[0] > scores[j] ? largest[0] : scores[j];
    largest[1] = largest[1] > scores[j + 1] ? largest[1] : scores[j + 1];
  }
  largest[0] = largest[0] > scores[count - 1] ? largest[0] : scores[count - 1];
  *maximum = largest[0] > largest[1] ? largest[0] : largest[1];
  *sum = Vector<T>{};
  for (int64_t a = 0; a < rows; a++, scores += offsets) {
    Vector<T> row = {};  // sums of sums round less
    for (int64_t o = 0; o < offsets; o++) {
      scores[o] = exponential<T>(scores[o] - *maximum);
      row += scores[o];
    }
    *sum += row;
  }
}

// Writes `channels` <= kChannels vectors of one query, the last one perhaps in part.
template <typename T>
inline void write(const Vector<T>* from, int64_t channels, int64_t left, T* to) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t v = 0; v < channels; v++, left -= n) {
    if (left >= n)
      store(to + v * n, from[v]);
    else
      std::memcpy(to + v * n, &from[v], left * sizeof(T));
  }
}

// For each query of a tile: factor * sum of weight * row over its window.
template <typename T>
void weigh(const Sizes<T>& sizes, const Map& map, const Tile<T>& tile, const KeyRows<T>& values, int64_t y,
           const Vector<T>* weights, const T* factor, T** rows, T* to) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t start = map.rows.start(y);
  for (int64_t a = 0; a < map.rows.kernel; a++) rows[a] = values.rows[(start + a) % sizes.ring];
  const T* scalars = reinterpret_cast<const T*>(weights);
  WindowRows<T> window = {rows, values.column_stride, map.rows.kernel, nullptr, tile.offsets * n};
  for (int64_t lane = 0; lane < tile.lanes;) {
    const Group<T> group = next_group<T>(map.columns, tile.first, lane, tile.lanes);
    window.weights = scalars + tile.weight_of(group);
    for (int64_t c = 0; c < sizes.padded_dim;) {
      const int64_t channels = channels_at_once((sizes.padded_dim - c) / n);
      Vector<T> sums[kQueries][kChannels];
      group_function<T, false>(group, channels)(window, group.start, map.columns.kernel, c, sums);
      for (int64_t u = 0; u < group.size; u++) {
        for (int64_t v = 0; v < channels; v++) sums[u][v] *= factor[lane + u];
        write<T>(sums[u], channels, sizes.head_dim - c, to + (tile.first + lane + u) * map.column_stride + c);
      }
      c += channels * n;
    }
    lane += group.size;
  }
}

// The forward

template <typename T>
struct ForwardScratch {
  KeyRows<T> keys, values;
  Vector<T>*queries, *scores;
  T** rows;

  ForwardScratch(Carver& carver, const Sizes<T>& sizes, const Shape& shape)
      : keys(carver, sizes, true, false), values(carver, sizes, false, true) {
    queries = carver.take<Vector<T>>(kRowBlock * sizes.head_dim);
    scores = carver.take<Vector<T>>(kRowBlock * sizes.scores);
    rows = carver.take<T*>(shape.kernel[0]);
  }
};

template <typename T>
size_t forward_scratch(const Shape& shape) {
  Carver carver(nullptr);
  ForwardScratch<T>(carver, Sizes<T>(shape), shape);
  return carver.used();
}

template <typename T>
void forward(const Shape& shape, const ForwardArguments<T>& arguments, const Map& map, int64_t begin, int64_t end,
             void* buffer) {
  constexpr int n = Simd<T>::kLanes;
  const Sizes<T> sizes(shape);
  Carver carver(buffer);
  ForwardScratch<T> scratch(carver, sizes, shape);
  scratch.keys.begin(sizes, map, arguments.key);
  scratch.values.begin(sizes, map, arguments.value);
  const int64_t table = (2 * map.rows.kernel - 1) * (2 * map.columns.kernel - 1);
  const T* bias = arguments.bias ? arguments.bias + map.head * table : nullptr;
  int64_t fetched = map.rows.start(begin);
  for (int64_t y = begin; y < end; y += kRowBlock) {
    const int64_t count = smaller(kRowBlock, end - y);
    for (const int64_t last = map.rows.start(y + count - 1) + map.rows.kernel; fetched < last; fetched++) {
      scratch.keys.fetch(sizes, map, fetched);
      scratch.values.fetch(sizes, map, fetched);
    }
    for (int64_t x = 0; x < map.columns.length; x += n) {
      const Tile<T> tile(map.columns, x);
      for (int64_t r = 0; r < count; r++)
        transpose<T>(arguments.query + map.offset + (y + r) * map.row_stride + x * map.column_stride, map.column_stride,
                     tile.lanes, sizes.head_dim, static_cast<T>(arguments.scale),
                     reinterpret_cast<T*>(scratch.queries + r * sizes.head_dim), n);
      score_tile<T>(sizes, map, tile, scratch.keys, bias, y, count, scratch.queries, scratch.scores);
      for (int64_t r = 0; r < count; r++) {
        Vector<T>* scores = scratch.scores + r * sizes.scores;
        if (tile.border) mask<T>(tile, map.columns.kernel, map.rows.kernel, scores);
        Vector<T> sum, maximum;
        soften<T>(map.rows.kernel, tile.offsets, scores, &sum, &maximum);
        const Vector<T> factor = T(1) / sum;
        const int64_t row = map.offset + (y + r) * map.row_stride;
        weigh<T>(sizes, map, tile, scratch.values, y + r, scores, reinterpret_cast<const T*>(&factor), scratch.rows,
                 arguments.output + row);
        if (!arguments.logsumexp) continue;
        const Vector<T> logsumexp = maximum + logarithm<T>(sum);
        for (int64_t i = 0; i < tile.lanes; i++)
          arguments.logsumexp[(row + (x + i) * map.column_stride) / sizes.head_dim] = logsumexp[i];
      }
    }
  }
}

// The backward: with P the probabilities, dP = dO V^T and delta the sum of P * dP over a window,
// dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, and dS summed by distance is the bias' part.
// (delta is also the sum of dO * O, but that rounds differently from dP, and their difference is small.)
//
// A band owns rows of keys. Rows of queries outside of it that reach into it are worked out again, for its keys alone.
template <typename T>
struct BackwardScratch {
  KeyRows<T> keys, values;
  T *grad_keys, *grad_values;  // (ring, width, padded_dim)
  Vector<T>*queries, *grads;   // (kRowBlock, head_dim), by channels
  Vector<T>*weights, *slopes;  // P and dS, like scores
  Vector<T>* logsumexp;
  Vector<T>* bias;  // (2 kernel - 1) squared
  T** rows;

  BackwardScratch(Carver& carver, const Sizes<T>& sizes, const Shape& shape)
      : keys(carver, sizes, true, true), values(carver, sizes, true, false) {
    grad_keys = carver.take<T>(sizes.ring * sizes.width * sizes.padded_dim);
    grad_values = carver.take<T>(sizes.ring * sizes.width * sizes.padded_dim);
    queries = carver.take<Vector<T>>(kRowBlock * sizes.head_dim);
    grads = carver.take<Vector<T>>(kRowBlock * sizes.head_dim);
    weights = carver.take<Vector<T>>(kRowBlock * sizes.scores);
    slopes = carver.take<Vector<T>>(kRowBlock * sizes.scores);
    logsumexp = carver.take<Vector<T>>(kRowBlock);
    bias = carver.take<Vector<T>>((2 * shape.kernel[0] - 1) * (2 * shape.kernel[1] - 1));
    rows = carver.take<T*>(shape.kernel[0]);
  }
};

template <typename T>
size_t backward_scratch(const Shape& shape) {
  Carver carver(nullptr);
  BackwardScratch<T>(carver, Sizes<T>(shape), shape);
  return carver.used();
}

// Adds weight * vector of each query of a tile to the rows of `sums` in its window, within rows [first, end) of it.
template <typename T>
void scatter(const Sizes<T>& sizes, const Map& map, const Tile<T>& tile, int64_t y, int64_t first_key, int64_t end_key,
             const Vector<T>* weights, const T* vectors, T* sums, T** rows) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t start = map.rows.start(y);
  const int64_t begin = start < first_key ? first_key : start;
  const int64_t end = smaller(start + map.rows.kernel, end_key);
  for (int64_t key = begin; key < end; key++)
    rows[key - begin] = sums + (key % sizes.ring) * sizes.width * sizes.padded_dim;
  const T* scalars = reinterpret_cast<const T*>(weights + (begin - start) * tile.offsets);
  WindowRows<T> window = {rows, sizes.padded_dim, end - begin, nullptr, tile.offsets * n};
  for (int64_t lane = 0; lane < tile.lanes;) {
    const Group<T> group = next_group<T>(map.columns, tile.first, lane, tile.lanes);
    window.weights = scalars + tile.weight_of(group);
    for (int64_t c = 0; c < sizes.padded_dim;) {
      const int64_t channels = channels_at_once((sizes.padded_dim - c) / n);
      Vector<T> parts[kQueries][kChannels] = {};
      for (int64_t u = 0; u < group.size; u++) {
        const T* from = vectors + (tile.first + lane + u) * map.column_stride + c;
        const int64_t left = smaller(channels * n, sizes.head_dim - c);
        std::memcpy(parts[u], from, left * sizeof(T));
      }
      group_function<T, true>(group, channels)(window, group.start, map.columns.kernel, c, parts);
      c += channels * n;
    }
    lane += group.size;
  }
}

// Turns (rows, offsets) logits and dP into P and dS; both become 0 outside the window.
template <typename T>
void slope(const Tile<T>& tile, int64_t kernel, int64_t rows, Vector<T> logsumexp, Vector<T>* weights,
           Vector<T>* slopes) {
  Vector<T> delta = {}, total = {};
  for (int64_t a = 0; a < rows; a++) {
    Vector<T> row_delta = {}, row_total = {};
    for (int64_t o = 0; o < tile.offsets; o++) {
      const int64_t j = a * tile.offsets + o;
      const Integers<T> has = tile.has(tile.first_offset + o, kernel);
      weights[j] = has ? exponential<T>(weights[j] - logsumexp) : Vector<T>{};
      slopes[j] = has ? slopes[j] : Vector<T>{};
      row_delta += weights[j] * slopes[j];
      row_total += weights[j];
    }
    delta += row_delta;
    total += row_total;
  }
  // The total is 1 but for the rounding of the log-sum-exp, which all weights of a query share; lanes without a query
  // have nothing.
  const Vector<T> factor = T(1) / (total == T(0) ? splat(T(1)) : total);
  delta *= factor;
  for (int64_t j = 0; j < rows * tile.offsets; j++) {
    weights[j] *= factor;
    slopes[j] = weights[j] * (slopes[j] - delta);
  }
}

template <typename T>
void clear_row(const Sizes<T>& sizes, int64_t row, T* sums) {
  std::memset(sums + (row % sizes.ring) * sizes.width * sizes.padded_dim, 0,
              sizes.width * sizes.padded_dim * sizeof(T));
}

template <typename T>
void write_row(const Sizes<T>& sizes, const Map& map, int64_t row, const T* sums, T factor, T* to) {
  const T* from = sums + (row % sizes.ring) * sizes.width * sizes.padded_dim;
  to += map.offset + row * map.row_stride;
  for (int64_t x = 0; x < map.columns.length; x++)
    for (int64_t c = 0; c < sizes.head_dim; c++)
      to[x * map.column_stride + c] = factor * from[x * sizes.padded_dim + c];
}

template <typename T>
void backward(const Shape& shape, const BackwardArguments<T>& arguments, const Map& map, int64_t begin, int64_t end,
              T* grad_bias, void* buffer) {
  constexpr int n = Simd<T>::kLanes;
  const Sizes<T> sizes(shape);
  Carver carver(buffer);
  BackwardScratch<T> scratch(carver, sizes, shape);
  scratch.keys.begin(sizes, map, arguments.key);
  scratch.values.begin(sizes, map, arguments.value);
  const int64_t kernel = map.columns.kernel, bias_width = 2 * kernel - 1;
  const int64_t table = (2 * map.rows.kernel - 1) * bias_width;
  const T* bias = arguments.bias ? arguments.bias + map.head * table : nullptr;
  if (grad_bias) std::memset(scratch.bias, 0, table * sizeof(Vector<T>));
  const T scale = static_cast<T>(arguments.scale);
  T scales[n];
  for (int i = 0; i < n; i++) scales[i] = scale;

  const int64_t first_query = map.rows.first_query_of(begin), end_query = map.rows.end_query_of(end - 1);
  int64_t fetched = map.rows.start(first_query), written = begin;
  for (int64_t block = first_query / kRowBlock * kRowBlock; block < end_query; block += kRowBlock) {
    const int64_t y = block < first_query ? first_query : block;
    const int64_t count = smaller(block + kRowBlock, end_query) - y;
    const bool own = y >= begin && y < end;  // bands begin at multiples of kRowBlock
    for (const int64_t last = map.rows.start(y + count - 1) + map.rows.kernel; fetched < last; fetched++) {
      scratch.keys.fetch(sizes, map, fetched);
      scratch.values.fetch(sizes, map, fetched);
      clear_row(sizes, fetched, scratch.grad_keys);
      clear_row(sizes, fetched, scratch.grad_values);
    }
    for (int64_t x = 0; x < map.columns.length; x += n) {
      const Tile<T> tile(map.columns, x);
      for (int64_t r = 0; r < count; r++) {
        const int64_t from = map.offset + (y + r) * map.row_stride + x * map.column_stride;
        Vector<T>*queries = scratch.queries + r * sizes.head_dim, *grads = scratch.grads + r * sizes.head_dim;
        transpose<T>(arguments.grad_output + from, map.column_stride, tile.lanes, sizes.head_dim, T(1),
                     reinterpret_cast<T*>(grads), n);
        scratch.logsumexp[r] = Vector<T>{};
        for (int64_t i = 0; i < tile.lanes; i++)
          scratch.logsumexp[r][i] = arguments.logsumexp[(from + i * map.column_stride) / sizes.head_dim];
        transpose<T>(arguments.query + from, map.column_stride, tile.lanes, sizes.head_dim, scale,
                     reinterpret_cast<T*>(queries), n);
      }
      score_tile<T>(sizes, map, tile, scratch.keys, bias, y, count, scratch.queries, scratch.weights);
      score_tile<T>(sizes, map, tile, scratch.values, nullptr, y, count, scratch.grads, scratch.slopes);
      for (int64_t r = 0; r < count; r++) {
        Vector<T>*weights = scratch.weights + r * sizes.scores, *slopes = scratch.slopes + r * sizes.scores;
        const int64_t start = map.rows.start(y + r);
        slope<T>(tile, kernel, map.rows.kernel, scratch.logsumexp[r], weights, slopes);
        const int64_t row = map.offset + (y + r) * map.row_stride;
        if (own) {
          weigh<T>(sizes, map, tile, scratch.keys, y + r, slopes, scales, scratch.rows, arguments.grad_query + row);
          if (grad_bias)
            for (int64_t a = 0; a < map.rows.kernel; a++) {
              const int64_t bias_row = start + a - (y + r) + map.rows.kernel - 1;
              Vector<T>* sums = scratch.bias + bias_row * bias_width + tile.first_offset + kernel - 1;
              for (int64_t o = 0; o < tile.offsets; o++) sums[o] += slopes[a * tile.offsets + o];
            }
        }
        scatter<T>(sizes, map, tile, y + r, begin, end, slopes, arguments.query + row, scratch.grad_keys, scratch.rows);
        scatter<T>(sizes, map, tile, y + r, begin, end, weights, arguments.grad_output + row, scratch.grad_values,
                   scratch.rows);
      }
    }
    // no later query reaches keys before the next block's first one
    const int64_t next = block + kRowBlock;
    const int64_t done = next < end_query ? smaller(map.rows.start(next), end) : end;
    for (; written < done; written++) {
      write_row<T>(sizes, map, written, scratch.grad_keys, scale, arguments.grad_key);
      write_row<T>(sizes, map, written, scratch.grad_values, T(1), arguments.grad_value);
    }
  }
  if (!grad_bias) return;
  for (int64_t j = 0; j < table; j++) {
    T sum = 0;
    for (int i = 0; i < n; i++) sum += scratch.bias[j][i];
    grad_bias[j] = sum;
  }
}

bool supported() {
#if NEIGHBORHOOD_VECTOR_BYTES == 64
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif NEIGHBORHOOD_VECTOR_BYTES == 32
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

template <typename T>
constexpr Kernels<T> kernels() {
  return {forward_scratch<T>, forward<T>, backward_scratch<T>, backward<T>};
}

#define NEIGHBORHOOD_QUOTE(name) #name
#define NEIGHBORHOOD_NAME(name) NEIGHBORHOOD_QUOTE(name)

}  // namespace

extern const InstructionSet kInstructionSet;
constexpr InstructionSet kInstructionSet = {NEIGHBORHOOD_NAME(NEIGHBORHOOD_INSTRUCTION_SET), supported,
                                            kernels<float>(), kernels<double>()};

}  // namespace NEIGHBORHOOD_INSTRUCTION_SET
}  // namespace neighborhood
