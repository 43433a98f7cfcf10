// The products of a sliding window: scores of queries with keys, and sums of values by weights.
//
// Scores are kept as scores[row of the window][slot][lane]. A lane is a query; a tile is as many neighbouring queries
// of a row as a register has lanes; slot t holds the t-th column from where the query's window would begin if it were
// not pushed inwards at borders. A row of keys has margins for it: beyond a border lies what is one window's length
// further in, which is what pushing adds to a window in place of what it loses. So all windows slide along with their
// queries, and a slot's keys are one unaligned load from the transposed keys. Only the bias tells them apart.
//
// The products with values have channels in the lanes instead: neighbouring queries share each loaded value.
#ifndef NEIGHBORHOOD_PRODUCTS_H_
#define NEIGHBORHOOD_PRODUCTS_H_

#include <type_traits>

#include "simd.h"

namespace neighborhood {
namespace NEIGHBORHOOD_INSTRUCTION_SET {
namespace {

constexpr int64_t kRowBlock = kBytes == 64 ? 4 : 3;  // rows of queries in a product with one row of keys
constexpr int kSlots = kBytes == 64 ? 7 : 4;         // slots per pass over head_dim: registers bound both
constexpr int kChannels = kBytes == 64 ? 4 : 2;      // vectors of channels per pass over a window
constexpr int kQueries = 4;                          // neighbouring queries that share a loaded value
constexpr int64_t kChannelsAhead = 4;  // the nearest cache is asked for keys of so many channels further on
constexpr int64_t kSumBlock = 16;      // products per sum, and then sums of sums: they round less

template <int value>
using Constant = std::integral_constant<int, value>;

// Calls visit(count) with a constant: the number of rows of a block.
template <typename Visit>
inline void with_count(int64_t count, Visit visit) {
  static_assert(kRowBlock == 3 || kRowBlock == 4, "one case per number of rows");
  if constexpr (kRowBlock == 4)
    if (count == 4) return visit(Constant<4>());
  if (count == 3) return visit(Constant<3>());
  if (count == 2) return visit(Constant<2>());
  visit(Constant<1>());
}

// The lanes of a tile whose key of a slot lies in a margin, and how much further on the key is for which it stands.
template <typename T>
struct Margin {
  Integers<T> lanes;
  int64_t distance;
};

// One row of queries in a product with one row of keys.
template <typename T>
struct ScoreRow {
  const Vector<T>* query;  // (head_dim) vectors of lanes
  const T* bias;           // of slot 0, in the table's row, or null
  Vector<T>* scores;       // of slot 0
};

// Scores of `Rows` rows of queries with one row of keys at `Slots` neighbouring slots. `keys` is the transposed row at
// the first slot of the first lane. `margins` is one per slot, or null where no lane's key lies in a margin.
template <typename T, int Rows, int Slots>
void score(const T* keys, const Margin<T>* margins, int64_t key_stride, int64_t head_dim, const ScoreRow<T>* rows) {
  const Vector<T>* queries[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r++) queries[r] = rows[r].query;
  Vector<T> total[Rows][Slots] = {};
  for (int64_t begin = 0; begin < head_dim; begin += kSumBlock) {
    const int64_t end = smaller(begin + kSumBlock, head_dim);
    Vector<T> sums[Rows][Slots] = {};
    for (int64_t d = begin; d < end; d++) {
      if constexpr (kBytes == 64) {
        __builtin_prefetch(keys + kChannelsAhead * key_stride);
        __builtin_prefetch(keys + kChannelsAhead * key_stride + Simd<T>::kLanes);
      }
#pragma GCC unroll 8
      for (int t = 0; t < Slots; t++) {
        const Vector<T> key = in_register(load(keys + t));
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) sums[r][t] += queries[r][d] * key;
      }
      keys += key_stride;
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
      for (int t = 0; t < Slots; t++) total[r][t] += sums[r][t];
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; r++)
#pragma GCC unroll 8
    for (int t = 0; t < Slots; t++) {
      Vector<T> bias = {};  // last: its size would round every step
      if (rows[r].bias) bias = splat(rows[r].bias[t]);
      if (rows[r].bias && margins) bias = margins[t].lanes ? splat(rows[r].bias[t + margins[t].distance]) : bias;
      rows[r].scores[t] = total[r][t] + bias;
    }
}

template <typename T>
using ScoreFunction = void (*)(const T*, const Margin<T>*, int64_t, int64_t, const ScoreRow<T>*);

template <typename T, int Rows, int... I>
inline ScoreFunction<T> score_of(int64_t slots, std::integer_sequence<int, I...>) {
  static constexpr ScoreFunction<T> functions[] = {score<T, Rows, I + 1>...};
  return functions[slots - 1];
}

template <typename T>
inline ScoreFunction<T> score_function(int64_t rows, int64_t slots) {
  ScoreFunction<T> found = nullptr;
  with_count(rows, [&](auto count) { found = score_of<T, count()>(slots, std::make_integer_sequence<int, kSlots>()); });
  return found;
}

// Neighbouring queries of a tile: `count` times as many as share what is loaded.
struct Group {
  int64_t first_lane, count;
  int64_t column;  // of the first query's first key, in rows of keys
};

// What a product over windows runs through: for each row of the window, a row of the map and a row of weights.
template <typename T>
struct WindowRows {
  T* const* rows;         // rows of the map, each at its first column
  int64_t column_stride;  // in elements
  int64_t count;          // rows of the window
  const T* weights;       // of the group's first query, for the window's first key
  int64_t weight_stride;  // from one row of the window to the next
};

// Calls column(c, first, end) for each column c that the windows of `Queries` neighbours cover: queries first..end of
// them meet there, with constants for a compiler that unrolls; all of them where it knows the `Kernel`, which is 0
// else.
template <int Queries, int Kernel, typename Column>
inline __attribute__((always_inline)) void over_columns(int64_t kernel, Column column) {
  constexpr int edge = Queries - 1;
#pragma GCC unroll 4
  for (int c = 0; c < edge; c++) column(c, 0, c + 1);
  if constexpr (Kernel) {
#pragma GCC unroll 16
    for (int c = edge; c < Kernel; c++) column(c, 0, Queries);
#pragma GCC unroll 4
    for (int c = 0; c < edge; c++) column(Kernel + c, c + 1, Queries);
  } else {
    for (int64_t c = edge; c < kernel; c++) column(c, 0, Queries);
#pragma GCC unroll 4
    for (int c = 0; c < edge; c++) column(kernel + c, c + 1, Queries);
  }
}

// Writes factor * sum of weight * row over the window of each query of the group: `Channels` vectors of channels from
// `channel` on, of which `left` numbers are there. `to` and `factor` are the first query's. `Kernel` is `kernel` and
// `Stride` the vectors of a column, where the compiler is to know them, else 0. `ahead` asks for memory.
template <typename S, int Queries, int Channels, int Kernel, int Stride, typename Ahead, typename T = Computed<S>>
__attribute__((noinline)) void weighted_sum(const WindowRows<T>& window, const Group& group, int64_t kernel,
                                            int64_t channel, const T* factor, int64_t left, S* to, int64_t stride,
                                            Ahead& ahead) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t column_stride = Stride ? Stride * n : window.column_stride;
  constexpr int64_t rows_at_once = kSumBlock / (Kernel ? Kernel : kSumBlock / 2);  // sums of sums round less
  for (int64_t i = 0; i < group.count; i++, factor += Queries, to += Queries * stride) {
    ahead.step();
    const int64_t from = (group.column + i * Queries) * column_stride + channel;
    Vector<T> total[Queries][Channels] = {};
    for (int64_t begin = 0; begin < window.count; begin += rows_at_once) {
      Vector<T> sum[Queries][Channels] = {};
      for (int64_t a = begin; a < smaller(begin + rows_at_once, window.count); a++) {
        const T* row = window.rows[a] + from;
        const T* weights = window.weights + a * window.weight_stride + i * Queries;
        over_columns<Queries, Kernel>(kernel, [&](int64_t c, int first, int end) __attribute__((always_inline)) {
          Vector<T> value[Channels];
#pragma GCC unroll 4
          for (int v = 0; v < Channels; v++) value[v] = in_register(load(row + c * column_stride + v * n));
#pragma GCC unroll 4
          for (int u = 0; u < Queries; u++) {
            if (u < first || u >= end) continue;
            const T weight = weights[(c - u) * n + u];
#pragma GCC unroll 4
            for (int v = 0; v < Channels; v++) sum[u][v] += weight * value[v];
          }
        });
      }
#pragma GCC unroll 4
      for (int u = 0; u < Queries; u++)
#pragma GCC unroll 4
        for (int v = 0; v < Channels; v++) total[u][v] += sum[u][v];
    }
#pragma GCC unroll 4
    for (int u = 0; u < Queries; u++)
#pragma GCC unroll 4
      for (int v = 0; v < Channels; v++) {
        if (left >= (v + 1) * n)
          store(to + u * stride + v * n, total[u][v] * factor[u]);
        else
          store_some(to + u * stride + v * n, total[u][v] * factor[u], left - v * n);
      }
  }
}

// row += weight * vector at every key of every query of the group; `vectors` is the first query's.
template <typename S, int Queries, int Channels, int Kernel, int Stride, typename T = Computed<S>>
__attribute__((noinline)) void spread(const WindowRows<T>& window, const Group& group, int64_t kernel, int64_t channel,
                                      int64_t left, const S* vectors, int64_t stride) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t column_stride = Stride ? Stride * n : window.column_stride;
  for (int64_t i = 0; i < group.count; i++, vectors += Queries * stride) {
    const int64_t to = (group.column + i * Queries) * column_stride + channel;
    Vector<T> vector[Queries][Channels];
#pragma GCC unroll 4
    for (int u = 0; u < Queries; u++)
#pragma GCC unroll 4
      for (int v = 0; v < Channels; v++) {
        const S* from = vectors + u * stride + v * n;
        vector[u][v] = left >= (v + 1) * n ? load(from) : load_some(from, left - v * n);
      }
    for (int64_t a = 0; a < window.count; a++) {
      T* row = window.rows[a] + to;
      const T* weights = window.weights + a * window.weight_stride + i * Queries;
      over_columns<Queries, Kernel>(kernel, [&](int64_t c, int first, int end) __attribute__((always_inline)) {
        Vector<T> sum[Channels] = {};
#pragma GCC unroll 4
        for (int u = 0; u < Queries; u++) {
          if (u < first || u >= end) continue;
          const T weight = weights[(c - u) * n + u];
#pragma GCC unroll 4
          for (int v = 0; v < Channels; v++) sum[v] += weight * vector[u][v];
        }
#pragma GCC unroll 4
        for (int v = 0; v < Channels; v++) {
          T* sums = row + c * column_stride + v * n;
          store(sums, load(sums) + sum[v]);
        }
      });
    }
  }
}

inline int64_t channels_at_once(int64_t channels) {
  if (kChannels >= 4 && channels >= 4) return 4;
  return channels >= 2 ? 2 : 1;
}

template <int Queries, typename Visit>
inline void with_variant(int64_t channels, Visit visit) {
  if constexpr (kChannels >= 4)
    if (channels >= 4) return visit(Constant<Queries>(), Constant<4>());
  if (channels >= 2) return visit(Constant<Queries>(), Constant<2>());
  visit(Constant<Queries>(), Constant<1>());
}

// Calls visit(queries, channels) with constants: how many share what is loaded, and vectors of channels.
template <typename Visit>
inline void with_variant(int64_t queries, int64_t channels, Visit visit) {
  static_assert(kQueries == 4, "one case per number of queries");
  switch (queries) {
    case 1:
      return with_variant<1>(channels, visit);
    case 2:
      return with_variant<2>(channels, visit);
    case 3:
      return with_variant<3>(channels, visit);
    default:
      return with_variant<4>(channels, visit);
  }
}

// Calls visit(kernel, stride) with constants for the usual kernel sizes and vectors of a column, of queries that are
// most of a map, and with 0 otherwise.
template <int Queries, int Channels, typename Visit>
inline void with_sizes(int64_t kernel, int64_t stride, Visit visit) {
  const auto with_stride = [&](auto known) {
    if (stride == Channels) return visit(known, Constant<Channels>());
    if (stride == 2 * Channels) return visit(known, Constant<2 * Channels>());
    visit(known, Constant<0>());
  };
  if constexpr (Queries == kQueries) {
    if (kernel == 7) return with_stride(Constant<7>());
    if (kernel == 5) return with_stride(Constant<5>());
    if (kernel == 3) return with_stride(Constant<3>());
  }
  visit(Constant<0>(), Constant<0>());
}

}  // namespace
}  // namespace NEIGHBORHOOD_INSTRUCTION_SET
}  // namespace neighborhood

#endif  // NEIGHBORHOOD_PRODUCTS_H_
