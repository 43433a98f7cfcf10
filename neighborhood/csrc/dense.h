// Attention over maps that are one window: plain attention of all positions to all, for small maps.
//
// Tokens are packed side by side. Scores are kept as scores[vector of queries][key][lane].
#ifndef NEIGHBORHOOD_DENSE_H_
#define NEIGHBORHOOD_DENSE_H_

#include "products.h"

namespace neighborhood {
namespace NEIGHBORHOOD_INSTRUCTION_SET {
namespace {

constexpr int kDenseVectors = kBytes == 64 ? 4 : 3;  // vectors of queries and keys of a product: registers bound them
constexpr int kDenseKeys = kBytes == 64 ? 6 : 4;
constexpr int kDenseRows = kBytes == 64 ? 8 : 4;  // rows of a sum of rows

// scores[v][key] = sum of query * key, plus the bias.
template <typename T, int Vectors, int Keys>
void dense_score(const Vector<T>* queries, const T* keys, int64_t head_dim, int64_t key_stride, int64_t tokens,
                 const Vector<T>* bias, Vector<T>* scores) {
  for (int64_t begin = 0; begin < head_dim; begin += kSumBlock) {
    const int64_t end = smaller(begin + kSumBlock, head_dim);
    Vector<T> sums[Vectors][Keys] = {};
    for (int64_t d = begin; d < end; d++) {
      Vector<T> query[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) query[v] = in_register(queries[v * head_dim + d]);
#pragma GCC unroll 6
      for (int k = 0; k < Keys; k++) {
        const T key = keys[k * key_stride + d];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sums[v][k] += query[v] * key;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 6
      for (int k = 0; k < Keys; k++) {
        if (begin) sums[v][k] += scores[v * tokens + k];
        if (bias && end == head_dim) sums[v][k] += bias[v * tokens + k];
        scores[v * tokens + k] = sums[v][k];
      }
  }
}

template <typename T>
using DenseScore = void (*)(const Vector<T>*, const T*, int64_t, int64_t, int64_t, const Vector<T>*, Vector<T>*);

template <typename T, int Vectors, int... I>
inline DenseScore<T> dense_score_of(int64_t keys, std::integer_sequence<int, I...>) {
  static constexpr DenseScore<T> functions[] = {dense_score<T, Vectors, I + 1>...};
  return functions[keys - 1];
}

template <typename T, int... I>
inline DenseScore<T> dense_score_function(int64_t vectors, int64_t keys, std::integer_sequence<int, I...>) {
  constexpr auto sequence = std::make_integer_sequence<int, kDenseKeys>();
  DenseScore<T> found = nullptr;
  ((vectors == I + 1 ? void(found = dense_score_of<T, I + 1>(keys, sequence)) : void()), ...);
  return found;
}

// to[r] (+)= sum over j of weights[r * row_stride + j * step] * rows[j], in vectors of channels.
template <typename T, int Rows, int Channels>
void sum_rows(const T* weights, int64_t row_stride, int64_t step, int64_t count, const T* rows, int64_t stride, T* to,
              bool add) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    Vector<T> sums[Rows][Channels] = {};
    for (int64_t j = begin; j < smaller(begin + kSumBlock, count); j++) {
      Vector<T> row[Channels];
#pragma GCC unroll 4
      for (int c = 0; c < Channels; c++) row[c] = in_register(load(rows + j * stride + c * n));
#pragma GCC unroll 8
      for (int r = 0; r < Rows; r++) {
        const T weight = weights[r * row_stride + j * step];
#pragma GCC unroll 4
        for (int c = 0; c < Channels; c++) sums[r][c] += weight * row[c];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
      for (int c = 0; c < Channels; c++) {
        T* sum = to + r * stride + c * n;
        store(sum, begin || add ? load(sum) + sums[r][c] : sums[r][c]);
      }
  }
}

template <typename T>
using SumRows = void (*)(const T*, int64_t, int64_t, int64_t, const T*, int64_t, T*, bool);

template <typename T, int Channels, int... I>
inline SumRows<T> sum_rows_of(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr SumRows<T> functions[] = {sum_rows<T, I + 1, Channels>...};
  return functions[rows - 1];
}

// As sum_rows, for any number of sums of `stride` numbers.
template <typename T>
void sum_all_rows(int64_t sums, const T* weights, int64_t row_stride, int64_t step, int64_t count, const T* rows,
                  int64_t stride, T* to, bool add) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t c = 0; c < stride;) {
    const int64_t channels = channels_at_once((stride - c) / n);
    const int64_t most = channels == 4 ? kDenseRows / 2 : kDenseRows, passes = (sums + most - 1) / most;
    for (int64_t pass = 0, r = 0; pass < passes; pass++) {
      const int64_t size = (sums - r) / (passes - pass);
      constexpr auto sequence = std::make_integer_sequence<int, kDenseRows>();
      SumRows<T> function = channels == 1 ? sum_rows_of<T, 1>(size, sequence) : sum_rows_of<T, 2>(size, sequence);
      if constexpr (kChannels == 4)
        if (channels == 4) function = sum_rows_of<T, 4>(size, std::make_integer_sequence<int, kDenseRows / 2>());
      function(weights + r * row_stride, row_stride, step, count, rows + c, stride, to + r * stride + c, add);
      r += size;
    }
    c += channels * n;
  }
}

// The tokens of one map, and the bias between them.
template <typename S>
struct DenseMap {
  typedef Computed<S> T;
  int64_t tokens, head_dim, padded_dim, vectors;
  int64_t *inputs, *output;  // (tokens) where each is, in query, key, value and their gradients, and in the output
  Vector<T>* bias;           // (vectors, tokens), or null
  T *reversed, *line;        // (table), each row reversed; (vectors) by lanes
  int64_t biased_head = -1;

  DenseMap(Carver& carver, const Shape& shape) {
    constexpr int n = Simd<T>::kLanes;
    tokens = shape.window();
    head_dim = shape.head_dim;
    padded_dim = round_up(head_dim, n);
    vectors = (tokens + n - 1) / n;
    inputs = carver.take<int64_t>(tokens);
    output = carver.take<int64_t>(tokens);
    bias = carver.take<Vector<T>>(vectors * tokens);
    reversed = carver.take<T>(shape.table());
    line = carver.take<T>(vectors * n);
  }

  void begin(const Shape& shape, const Map& map, const T* table) {
    int64_t token = 0;
    for (int64_t z = 0; z < map.planes().length; z++)
      for (int64_t y = 0; y < map.rows().length; y++)
        for (int64_t x = 0; x < map.columns().length; x++, token++) {
          inputs[token] = map.inputs.at(z, y) + x * map.inputs.stride[2];
          output[token] = map.output.at(z, y) + x * map.output.stride[2];
        }
    if (!table || biased_head == map.head) return;
    biased_head = map.head;
    table += map.head * shape.table();
    const int64_t width = 2 * map.columns().kernel - 1;
    for (int64_t row = 0; row < shape.table(); row += width)
      for (int64_t j = 0; j < width; j++) reversed[row + j] = table[row + width - 1 - j];
    constexpr int n = Simd<T>::kLanes;
    std::memset(line, 0, vectors * sizeof(Vector<T>));
    over_rows(
        map,
        [&](int64_t query, int64_t, int64_t entry) {
          std::memcpy(line + query, reversed + entry, map.columns().length * sizeof(T));
        },
        [&](int64_t key) {
          for (int64_t v = 0; v < vectors; v++) bias[v * tokens + key] = load(line + v * n);
        });
  }

  // For each key, calls row(first query, key, entry) for each row of queries, whose entries of the reversed table
  // follow one another, and then end(key).
  template <typename Row, typename End>
  void over_rows(const Map& map, Row row, End end) const {
    const int64_t planes = map.planes().length, height = map.rows().length, width = map.columns().length;
    int64_t key = 0;
    for (int64_t p = 0; p < planes; p++)
      for (int64_t a = 0; a < height; a++)
        for (int64_t c = 0; c < width; c++, key++) {
          int64_t query = 0;
          for (int64_t z = 0; z < planes; z++)
            for (int64_t y = 0; y < height; y++, query += width)
              row(query, key,
                  ((p - z + planes - 1) * (2 * height - 1) + a - y + height - 1) * (2 * width - 1) + width - 1 - c);
          end(key);
        }
  }

  // Packs the tokens of a tensor.
  void read(const int64_t* places, const S* tensor, T* to) const {
    for (int64_t t = 0; t < tokens; t++) read_row(tensor + places[t], head_dim, padded_dim, to + t * padded_dim);
  }

  int64_t lanes(int64_t v) const { return smaller<int64_t>(Simd<T>::kLanes, tokens - v * Simd<T>::kLanes); }

  // (vectors, head_dim) vectors of lanes, of packed tokens.
  void transpose_all(const T* packed, T factor, Vector<T>* to) const {
    constexpr int n = Simd<T>::kLanes;
    for (int64_t v = 0; v < vectors; v++)
      transpose<T>(packed + v * n * padded_dim, padded_dim, lanes(v), head_dim, factor,
                   reinterpret_cast<T*>(to + v * head_dim), n);
  }

  // Scores of vectors [begin, end) of queries with all keys, into (end - begin, tokens) vectors.
  void score(const Vector<T>* queries, const T* keys, int64_t begin, int64_t end, bool biased,
             Vector<T>* scores) const {
    const int64_t count = end - begin, passes = (tokens + kDenseKeys - 1) / kDenseKeys;
    for (int64_t pass = 0, key = 0; pass < passes; pass++) {
      const int64_t size = (tokens - key) / (passes - pass);
      const auto function = dense_score_function<T>(count, size, std::make_integer_sequence<int, kDenseVectors>());
      function(queries + begin * head_dim, keys + key * padded_dim, head_dim, padded_dim, tokens,
               biased ? bias + begin * tokens + key : nullptr, scores + key);
      key += size;
    }
  }

  // Calls work(begin, end) for vectors of queries, as many at once as a product takes.
  template <typename Work>
  void over_vectors(Work work) const {
    const int64_t passes = (vectors + kDenseVectors - 1) / kDenseVectors;
    for (int64_t pass = 0, begin = 0; pass < passes; pass++) {
      const int64_t size = (vectors - begin) / (passes - pass);
      work(begin, begin + size);
      begin += size;
    }
  }
};

template <typename S>
struct DenseForward {
  typedef Computed<S> T;
  DenseMap<S> dense;
  T *packed, *keys, *values, *result;
  Vector<T>*queries, *scores;

  DenseForward(Carver& carver, const Shape& shape) : dense(carver, shape) {
    constexpr int n = Simd<T>::kLanes;
    packed = carver.take<T>(dense.tokens * dense.padded_dim);
    keys = carver.take<T>(dense.tokens * dense.padded_dim);
    values = carver.take<T>(dense.tokens * dense.padded_dim);
    result = carver.take<T>(n * dense.padded_dim);
    queries = carver.take<Vector<T>>(dense.vectors * dense.head_dim);
    scores = carver.take<Vector<T>>(kDenseVectors * dense.tokens);
  }

  void run(const Shape& shape, const ForwardArguments<S>& arguments, const Map& map) {
    constexpr int n = Simd<T>::kLanes;
    const int64_t tokens = dense.tokens, padded_dim = dense.padded_dim, width = map.columns().kernel;
    dense.begin(shape, map, arguments.bias);
    dense.read(dense.inputs, arguments.query, packed);
    dense.read(dense.inputs, arguments.key, keys);
    dense.read(dense.inputs, arguments.value, values);
    dense.transpose_all(packed, static_cast<T>(arguments.scale), queries);
    dense.over_vectors([&](int64_t begin, int64_t end) {
      dense.score(queries, keys, begin, end, arguments.bias, scores);
      for (int64_t v = begin; v < end; v++) {
        Vector<T>* own = scores + (v - begin) * tokens;
        Vector<T> sum, maximum;
        soften<T, 1>(tokens / width, width, own, 0, &sum, &maximum);
        const Vector<T> factor = T(1) / sum;
        const int64_t lanes = dense.lanes(v);
        sum_all_rows<T>(lanes, reinterpret_cast<const T*>(own), 1, n, tokens, values, padded_dim, result, false);
        const Vector<T> logsumexp = arguments.logsumexp ? maximum + logarithm<T>(sum) : Vector<T>{};
        for (int64_t i = 0; i < lanes; i++) {
          const int64_t offset = dense.output[v * n + i];
          write_row(result + i * padded_dim, factor[i], dense.head_dim, arguments.output + offset);
          if (arguments.logsumexp) arguments.logsumexp[offset / dense.head_dim] = logsumexp[i];
        }
      }
    });
  }
};

template <typename S>
struct DenseBackward {
  typedef Computed<S> T;
  DenseMap<S> dense;
  T *queries, *keys, *values, *grads, *grad_keys, *grad_values, *result;
  Vector<T>*query_lanes, *grad_lanes, *weights, *slopes;

  DenseBackward(Carver& carver, const Shape& shape) : dense(carver, shape) {
    constexpr int n = Simd<T>::kLanes;
    for (T** packed : {&queries, &keys, &values, &grads, &grad_keys, &grad_values})
      *packed = carver.take<T>(dense.tokens * dense.padded_dim);
    result = carver.take<T>(n * dense.padded_dim);
    query_lanes = carver.take<Vector<T>>(dense.vectors * dense.head_dim);
    grad_lanes = carver.take<Vector<T>>(dense.vectors * dense.head_dim);
    weights = carver.take<Vector<T>>(dense.vectors * dense.tokens);
    slopes = carver.take<Vector<T>>(dense.vectors * dense.tokens);
  }

  void run(const Shape& shape, const BackwardArguments<S>& arguments, const Map& map, double* grad_bias) {
    constexpr int n = Simd<T>::kLanes;
    const int64_t tokens = dense.tokens, padded_dim = dense.padded_dim, width = map.columns().kernel;
    const T scale = static_cast<T>(arguments.scale);
    dense.begin(shape, map, arguments.bias);
    dense.read(dense.inputs, arguments.query, queries);
    dense.read(dense.inputs, arguments.key, keys);
    dense.read(dense.inputs, arguments.value, values);
    dense.read(dense.output, arguments.grad_output, grads);
    dense.transpose_all(queries, scale, query_lanes);
    dense.transpose_all(grads, T(1), grad_lanes);
    dense.over_vectors([&](int64_t begin, int64_t end) {
      dense.score(query_lanes, keys, begin, end, arguments.bias, weights + begin * tokens);
      dense.score(grad_lanes, values, begin, end, false, slopes + begin * tokens);
    });
    for (int64_t v = 0; v < dense.vectors; v++) {
      const int64_t lanes = dense.lanes(v);
      const T *probabilities = reinterpret_cast<const T*>(weights + v * tokens),
              *gradients = reinterpret_cast<const T*>(slopes + v * tokens);
      Vector<T> logsumexp = {};
      for (int64_t i = 0; i < lanes; i++)
        logsumexp[i] = static_cast<T>(arguments.logsumexp[dense.output[v * n + i] / dense.head_dim]);
      slope<T, 1>(tokens / width, width, &logsumexp, weights + v * tokens, slopes + v * tokens, 0);
      sum_all_rows<T>(lanes, gradients, 1, n, tokens, keys, padded_dim, result, false);
      for (int64_t i = 0; i < lanes; i++)
        write_row(result + i * padded_dim, scale, dense.head_dim, arguments.grad_query + dense.inputs[v * n + i]);
      const int64_t first = v * n * padded_dim;
      sum_all_rows<T>(tokens, gradients, n, 1, lanes, queries + first, padded_dim, grad_keys, v > 0);
      sum_all_rows<T>(tokens, probabilities, n, 1, lanes, grads + first, padded_dim, grad_values, v > 0);
    }
    for (int64_t t = 0; t < tokens; t++) {
      const int64_t offset = dense.inputs[t];
      write_row(grad_keys + t * padded_dim, scale, dense.head_dim, arguments.grad_key + offset);
      write_row(grad_values + t * padded_dim, T(1), dense.head_dim, arguments.grad_value + offset);
    }
    if (grad_bias) write_bias(shape, map, grad_bias);
  }

 private:
  void write_bias(const Shape& shape, const Map& map, double* grad_bias) const {
    constexpr int n = Simd<T>::kLanes;
    const int64_t length = map.columns().length, width = 2 * length - 1;
    T* reversed = dense.reversed;  // its bias is of no use any more
    std::memset(reversed, 0, shape.table() * sizeof(T));
    dense.over_rows(
        map,
        [&](int64_t query, int64_t key, int64_t entry) {
          if (query == 0)
            for (int64_t v = 0; v < dense.vectors; v++) store(dense.line + v * n, slopes[v * dense.tokens + key]);
          for (int64_t i = 0; i < length; i++) reversed[entry + i] += dense.line[query + i];
        },
        [](int64_t) {});
    for (int64_t row = 0; row < shape.table(); row += width)
      for (int64_t j = 0; j < width; j++) grad_bias[row + j] = reversed[row + width - 1 - j];
  }
};

}  // namespace
}  // namespace NEIGHBORHOOD_INSTRUCTION_SET
}  // namespace neighborhood

#endif  // NEIGHBORHOOD_DENSE_H_
