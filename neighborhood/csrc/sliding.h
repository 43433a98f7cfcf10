// Attention over windows that slide along the rows of a map.
//
// A block of a few rows of queries meets the rows of keys that their windows cover; these are kept in a ring,
// transposed for scores. Maps of several planes keep whole planes. Wide maps are cut into strips of columns whose rings
// stay in the caches.
#ifndef NEIGHBORHOOD_SLIDING_H_
#define NEIGHBORHOOD_SLIDING_H_

#include <initializer_list>

#include "products.h"

namespace neighborhood {
namespace NEIGHBORHOOD_INSTRUCTION_SET {
namespace {

constexpr int64_t kPrefetchBytes = 1 << 20;  // of a sample
constexpr int64_t kMostSummed = 32;          // slopes in one sum of the bias' gradient: then sums of sums, in double

// The sizes of working memory, for the longest dilation groups.
template <typename T>
struct Sizes {
  bool volume;    // whether there are several planes
  bool prefetch;  // whether tensors outgrow the caches, so that rows are asked for before their turn
  int64_t height, head_dim;
  int64_t padded_dim;           // head_dim in whole vectors
  int64_t strip;                // tiles of a strip, at most
  int64_t width, padded_width;  // columns of a row of keys in a strip with its margins, at most; transposed
  int64_t planes, rows;         // of keys that a block of rows of queries meets, at most
  int64_t scores;               // vectors of scores of a tile of one row
  int64_t bias_rows, table;     // rows and entries of the bias table

  explicit Sizes(const Shape& shape) {
    constexpr int n = Simd<T>::kLanes;
    volume = shape.size[0] > 1;
    const int64_t elements = shape.size[1] * shape.size[2] * shape.heads * shape.head_dim;
    prefetch = !volume && elements * static_cast<int64_t>(sizeof(T)) > kPrefetchBytes;
    height = shape.longest(1);
    head_dim = shape.head_dim;
    padded_dim = round_up(head_dim, n);
    planes = shape.kernel[0];
    rows = volume ? height : smaller(height, shape.kernel[1] + kRowBlock - 1);
    const int64_t kernel = shape.kernel[2];
    strip = shape.strip_columns(sizeof(T)) / n;
    const int64_t around = kernel - 1 + kernel / 2;  // a narrow strip at a border needs more than one window's keys
    width = smaller(strip * n, shape.longest(2)) + around;
    padded_width = round_up(strip * n + around, n);
    scores = shape.window();
    bias_rows = (2 * shape.kernel[0] - 1) * (2 * shape.kernel[1] - 1);
    table = shape.table();
  }

  int64_t slots() const { return planes * rows; }
  // Divisions of 32 bits are several times as fast; what is in memory has no more rows.
  int64_t slot(int64_t plane, int64_t row) const {
    const uint32_t in_plane = static_cast<uint32_t>(row) % static_cast<uint32_t>(rows);
    return planes == 1 ? in_plane : plane % planes * rows + in_plane;
  }
  int64_t row_elements() const { return width * padded_dim; }
};

// Neighbouring queries of a row, one per lane.
template <typename T>
struct Tile {
  int64_t first, lanes;      // queries first..first + lanes
  const Margin<T>* margins;  // one per slot; null away from borders
  int64_t sums;              // where gradients of the bias are summed: 0 away from borders
};

// Neighbouring tiles, the columns of the keys that their windows cover, and these with margins.
template <typename T>
struct Strip {
  const Tile<T>*first, *last;
  int64_t first_key, end_key;
  int64_t first_column, end_column;

  const Tile<T>* begin() const { return first; }
  const Tile<T>* end() const { return last; }
};

// The tiles of a map's rows.
template <typename T>
class Tiles {
 public:
  Tiles(Carver& carver, const Shape& shape) {
    tiles_ = carver.take<Tile<T>>(shape.longest(2) / Simd<T>::kLanes + 1);
    margins_ = carver.take<Margin<T>>(most_sums(shape) * shape.kernel[2]);
  }

  // An upper bound of `Tile::sums`, plus one.
  static int64_t most_sums(const Shape& shape) {
    constexpr int n = Simd<T>::kLanes;
    return 1 + smaller(shape.longest(2) / n + 1, 2 * (shape.kernel[2] / n + 2));
  }

  void begin(const Axis& columns) {
    constexpr int n = Simd<T>::kLanes;
    typedef typename Simd<T>::Integer Integer;
    const int64_t length = columns.length, kernel = columns.kernel, before = kernel / 2;
    const Integers<T> lane = lane_numbers<T>();
    Margin<T>* margin = margins_;
    int64_t borders = 0;
    count_ = 0;
    for (int64_t x = 0; x < length; x += n) {
      const bool inside = x >= before && x + n - before + kernel <= length + 1;  // all lanes are queries, too
      tiles_[count_++] = {x, smaller<int64_t>(n, length - x), inside ? nullptr : margin, inside ? 0 : ++borders};
      for (int64_t t = 0; t < kernel && !inside; t++) {
        const Integers<T> column = lane + static_cast<Integer>(x - before + t);
        if (t < before)
          *margin++ = {column < 0, kernel};
        else
          *margin++ = {column >= static_cast<Integer>(length), t > before ? -kernel : 0};
      }
    }
  }

  const Tile<T>* begin() const { return tiles_; }
  const Tile<T>* end() const { return tiles_ + count_; }

  int64_t strips(const Sizes<T>& sizes) const { return (count_ + sizes.strip - 1) / sizes.strip; }

  Strip<T> strip(const Sizes<T>& sizes, const Axis& columns, int64_t index) const {
    const Tile<T>*first = tiles_ + index * sizes.strip, *last = smaller(first + sizes.strip, end());
    const Tile<T>& end_tile = last[-1];
    const int64_t kernel = columns.kernel, before = kernel / 2;
    const int64_t begin = first->first, end = end_tile.first + end_tile.lanes;
    const int64_t first_key = columns.start(begin), end_key = columns.start(end - 1) + kernel;
    return {first,
            last,
            first_key,
            end_key,
            smaller(begin - before, first_key),
            larger(end - 1 - before + kernel, end_key)};
  }

 private:
  Tile<T>* tiles_;
  Margin<T>* margins_;
  int64_t count_ = 0;
};

// Rows of a tensor that a block of queries meets, within a strip, with margins: by channels for scores, by columns for
// products with weights. These are copied too: in large tensors columns of neighbouring rows lie as far apart as makes
// them compete for few places of a cache.
template <typename S>
struct KeyRows {
  typedef Computed<S> T;
  T* transposed;  // (slots, head_dim, padded_width), or null
  T* packed;      // (slots, width, padded_dim), or null
  T* block;       // (kLanes, padded_dim): columns to transpose that do not follow one another in memory, or null
  int64_t first_column, end_column;
  const S* from;

  KeyRows(Carver& carver, const Sizes<T>& sizes, bool transposes, bool packs) {
    transposed = transposes ? carver.take<T>(sizes.slots() * sizes.head_dim * sizes.padded_width) : nullptr;
    packed = packs ? carver.take<T>(sizes.slots() * sizes.row_elements()) : nullptr;
    block = transposes ? carver.take<T>(Simd<T>::kLanes * sizes.padded_dim) : nullptr;
  }

  void begin(const Sizes<T>& sizes, const Map& map, const Strip<T>& strip, const S* tensor) {
    from = tensor + map.inputs.offset;
    first_column = strip.first_column;
    end_column = strip.end_column;
    const int64_t written = round_up(end_column - first_column, Simd<T>::kLanes);
    // lanes without a query meet what is never written: of numbers below the normal ones, products are slow
    for (int64_t row = 0; transposed && row < sizes.slots() * sizes.head_dim; row++)
      for (int64_t x = written; x < sizes.padded_width; x++) transposed[row * sizes.padded_width + x] = 0;
  }

  void fetch(const Sizes<T>& sizes, const Map& map, int64_t plane, int64_t row) {
    constexpr int n = Simd<T>::kLanes;
    const Axis& columns = map.columns();
    const int64_t slot = sizes.slot(plane, row), stride = map.inputs.stride[2];
    const S* source = from + plane * map.inputs.stride[0] + row * map.inputs.stride[1];
    const auto pack = [&](int64_t x, int64_t end, T* to) {
      for (; x < end; x++, to += sizes.padded_dim)
        read_row(source + columns.inside(x) * stride, sizes.head_dim, sizes.padded_dim, to);
    };
    if (packed) pack(first_column, end_column, packed + slot * sizes.row_elements());
    if (!transposed) return;
    T* to = transposed_row(sizes, slot);
    for (int64_t x = first_column; x < end_column; x += n, to += n) {
      const int64_t count = smaller<int64_t>(n, end_column - x);
      if (x >= 0 && x + count <= columns.length) {
        transpose<S>(source + x * stride, stride, count, sizes.head_dim, T(1), to, sizes.padded_width);
      } else {
        pack(x, x + count, block);
        transpose<T>(block, sizes.padded_dim, count, sizes.head_dim, T(1), to, sizes.padded_width);
      }
    }
  }

  T* row(const Sizes<T>& sizes, int64_t plane, int64_t row) const {
    return packed + sizes.slot(plane, row) * sizes.row_elements();
  }

  T* transposed_row(const Sizes<T>& sizes, int64_t slot) const {
    return transposed + slot * sizes.head_dim * sizes.padded_width;
  }
};

// Asks the caches for what the next block of queries reads, a few lines at a time: more at once would wait for memory.
template <typename S>
class Prefetcher {
  typedef Computed<S> T;

 public:
  struct Rows {
    const S* data;
    const Layout& layout;
  };

  // To ask, in `steps` steps, while a tile of the block of queries at `y` is worked on, for its share: its own queries
  // from `of_queries`, and from `of_keys` the keys that are new.
  void begin(const Sizes<T>& sizes, const Map& map, const Strip<T>& strip, const Tile<T>& tile, int64_t y, int64_t end,
             std::initializer_list<Rows> of_queries, std::initializer_list<Rows> of_keys, int64_t steps) {
    count_ = 0;
    const Axis& rows = map.rows();
    const int64_t next = y + kRowBlock, count = smaller(kRowBlock, end - next), half = map.columns().kernel / 2;
    if (!sizes.prefetch || count <= 0) return;
    elements_ = map.heads * sizes.head_dim;
    place_ = map.place;
    heads_ = map.heads;
    const int64_t offset = map.place * sizes.head_dim;  // the band's first head is where tokens are asked for
    for (const Rows& tensor : of_queries)
      for (int64_t r = next; r < next + count; r++)
        add(tensor, tensor.layout.at(0, r) - offset, tile.first, tile.first + tile.lanes);
    const int64_t first = &tile == strip.first ? strip.first_key : tile.first + half;
    const int64_t last = smaller(tile.first + tile.lanes + half, strip.end_key);
    for (const Rows& tensor : of_keys)
      for (int64_t r = rows.start(next - 1) + rows.kernel; r < rows.start(next + count - 1) + rows.kernel; r++)
        add(tensor, tensor.layout.at(0, r) - offset, first, last);
    int64_t tokens = 0;
    for (int i = 0; i < count_; i++) tokens += runs_[i].tokens;
    per_step_ = (tokens + steps - 1) / steps;
    run_ = 0;
  }

  void step() {
    if (run_ < count_) ask();
  }

 private:
  struct Run {
    const S* next;
    int64_t tokens, stride;
  };

  __attribute__((noinline)) void ask() {
    constexpr int64_t line = 64 / sizeof(S);
    for (int64_t i = 0; i < per_step_; i++) {
      Run& run = runs_[run_];
      for (int64_t c = 0; c < elements_; c += line) __builtin_prefetch(run.next + c);
      run.next += run.stride;
      if (--run.tokens == 0 && ++run_ == count_) return;
    }
  }

  // The heads of a band each ask for their part of the tokens, for all of them.
  void add(const Rows& tensor, int64_t row, int64_t first, int64_t end) {
    const int64_t tokens = end - first, stride = tensor.layout.stride[2];
    end = first + tokens * (place_ + 1) / heads_;
    first += tokens * place_ / heads_;
    if (first < end) runs_[count_++] = {tensor.data + row + first * stride, end - first, stride};
  }

  Run runs_[4 * kRowBlock];
  int count_ = 0, run_ = 0;
  int64_t elements_, place_, heads_, per_step_;
};

// Calls visit(plane, row) for what is new of the rows before `end_row` or, of a volume, of the planes before
// `end_plane`; `next` is the first that is new.
template <typename Visit>
inline void advance(bool volume, int64_t height, int64_t end_plane, int64_t end_row, int64_t* next, Visit visit) {
  if (volume) {
    for (; *next < end_plane; ++*next)
      for (int64_t row = 0; row < height; row++) visit(*next, row);
  } else {
    for (; *next < end_row; ++*next) visit(0, *next);
  }
}

// Scores of rows [y, y + count) of queries of plane z, for one tile.
//
// `bias` is the head's table, or null; `queries` is (count, head_dim) vectors; `scores` (count, sizes.scores) vectors,
// of which row r holds (planes of the window, rows of the window, slots).
template <typename S, typename T = Computed<S>>
void score_tile(const Sizes<T>& sizes, const Map& map, const Tile<T>& tile, const KeyRows<S>& keys, const T* bias,
                int64_t z, int64_t y, int64_t count, const Vector<T>* queries, Vector<T>* scores,
                Prefetcher<S>& prefetcher) {
  const Axis& axis = map.rows();
  const int64_t planes = map.planes().kernel, kernel = map.columns().kernel, first_plane = map.planes().start(z);
  const int64_t passes = (kernel + kSlots - 1) / kSlots;
  const int64_t end = axis.start(y + count - 1) + axis.kernel;
  for (int64_t plane = 0; plane < planes; plane++) {
    const int64_t first_bias_row = (first_plane + plane - z + planes - 1) * (2 * axis.kernel - 1);
    for (int64_t key = axis.start(y); key < end; key++) {
      prefetcher.step();
      ScoreRow<T> rows[kRowBlock];
      int64_t active = 0;
      for (int64_t r = 0; r < count; r++) {
        const int64_t a = key - axis.start(y + r);
        if (a < 0 || a >= axis.kernel) continue;
        const int64_t bias_row = first_bias_row + key - (y + r) + axis.kernel - 1;
        ScoreRow<T>& row = rows[active++];
        row.query = queries + r * sizes.head_dim;
        row.scores = scores + r * sizes.scores + (plane * axis.kernel + a) * kernel;
        row.bias = bias ? bias + bias_row * (2 * kernel - 1) + kernel - 1 - kernel / 2 : nullptr;
      }
      const T* row = keys.transposed_row(sizes, sizes.slot(first_plane + plane, key));
      row += tile.first - kernel / 2 - keys.first_column;
      for (int64_t pass = 0, slot = 0; pass < passes; pass++) {
        const int64_t slots = passes == 1 ? kernel : (kernel - slot) / (passes - pass);
        score_function<T>(active, slots)(row + slot, tile.margins ? tile.margins + slot : nullptr, sizes.padded_width,
                                         sizes.head_dim, rows);
        slot += slots;
        for (int64_t i = 0; i < active && pass + 1 < passes; i++) {
          rows[i].scores += slots;
          if (rows[i].bias) rows[i].bias += slots;
        }
      }
    }
  }
}

// How many neighbouring queries share what is loaded: windows of more would overlap too little.
inline int64_t queries_at_once(const Map& map) { return smaller<int64_t>(kQueries, map.columns().kernel + 1); }

template <typename T>
inline int64_t groups(const Map& map, const Tile<T>& tile) {
  return (tile.lanes + queries_at_once(map) - 1) / queries_at_once(map);
}

// Calls visit(group, queries) for all queries of a tile.
template <typename T, typename Visit>
inline void over_groups(const Map& map, const Tile<T>& tile, int64_t first_column, Visit visit) {
  const int64_t at_once = queries_at_once(map), rest = tile.lanes % at_once;
  const int64_t first = tile.first - map.columns().kernel / 2 - first_column;
  if (tile.lanes > rest) visit(Group{0, tile.lanes / at_once, first}, at_once);
  if (rest) visit(Group{tile.lanes - rest, 1, first + tile.lanes - rest}, rest);
}

// For each query of a tile: factor * sum of weight * row over its window, whose rows are given from `first_column` on.
// `to` is of the row's first query, and `stride` from one to the next.
template <typename S, typename T = Computed<S>>
void weigh(const Sizes<T>& sizes, const Map& map, const Tile<T>& tile, T* const* rows, int64_t first_column,
           const Vector<T>* weights, const T* factor, S* to, int64_t stride, Prefetcher<S>& prefetcher) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t kernel = map.columns().kernel;
  WindowRows<T> window = {rows, sizes.padded_dim, sizes.scores / kernel, nullptr, kernel * n};
  over_groups(map, tile, first_column, [&](const Group& group, int64_t queries_of_group) {
    window.weights = reinterpret_cast<const T*>(weights) + group.first_lane;
    for (int64_t c = 0; c < sizes.padded_dim;) {
      const int64_t channels = channels_at_once((sizes.padded_dim - c) / n);
      S* first = to + (tile.first + group.first_lane) * stride + c;
      with_variant(queries_of_group, channels, [&](auto queries, auto vectors) {
        with_sizes<queries(), vectors()>(kernel, sizes.padded_dim / n, [&](auto known, auto vectors_of_column) {
          weighted_sum<S, queries(), vectors(), known(), vectors_of_column()>(
              window, group, kernel, c, factor + group.first_lane, sizes.head_dim - c, first, stride, prefetcher);
        });
      });
      c += channels * n;
    }
  });
}

// Adds weight * vector of each query of a tile to the given rows of its window, of which there are `count`; they begin
// at `first_column`. `vectors` is of the row's first query, and `stride` from one to the next.
template <typename S, typename T = Computed<S>>
void scatter(const Sizes<T>& sizes, const Map& map, const Tile<T>& tile, T* const* rows, int64_t first_column,
             int64_t count, const Vector<T>* weights, const S* vectors, int64_t stride) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t kernel = map.columns().kernel;
  WindowRows<T> window = {rows, sizes.padded_dim, count, nullptr, kernel * n};
  over_groups(map, tile, first_column, [&](const Group& group, int64_t queries_of_group) {
    window.weights = reinterpret_cast<const T*>(weights) + group.first_lane;
    for (int64_t c = 0; c < sizes.padded_dim;) {
      const int64_t channels = channels_at_once((sizes.padded_dim - c) / n);
      const S* first = vectors + (tile.first + group.first_lane) * stride + c;
      with_variant(queries_of_group, channels, [&](auto queries, auto parts) {
        with_sizes<queries(), parts()>(kernel, sizes.padded_dim / n, [&](auto known, auto parts_of_column) {
          spread<S, queries(), parts(), known(), parts_of_column()>(window, group, kernel, c, sizes.head_dim - c, first,
                                                                    stride);
        });
      });
      c += channels * n;
    }
  });
}

// The part of a map that a band holds, or that its queries make up.
struct Region {
  int64_t first_plane, end_plane, first_row, end_row;

  Region() = default;
  Region(const Map& map, const Bands& bands, int64_t part) {
    const int64_t length = map.axis[bands.axis].length;
    const int64_t begin = smaller(part * bands.length, length), end = smaller(begin + bands.length, length);
    first_plane = bands.axis == 0 ? begin : 0;
    end_plane = bands.axis == 0 ? end : map.planes().length;
    first_row = bands.axis == 1 ? begin : 0;
    end_row = bands.axis == 1 ? end : map.rows().length;
  }
  bool empty() const { return first_plane == end_plane || first_row == end_row; }
};

// Runs `count` heads in step, a few rows of each in turn: heads lie side by side, and memory is read in larger pieces
// than those of one head.
template <typename Sliding>
void run_in_step(Sliding* heads, int64_t count) {
  const int64_t strips = heads->strips();
  for (int64_t i = 0; i < strips; i++) {
    for (Sliding* head = heads; head < heads + count; head++) head->begin_strip(i);
    const Region region = heads->queries_region;
    for (int64_t z = region.first_plane; z < region.end_plane; z++)
      for (int64_t block = region.first_row / kRowBlock * kRowBlock; block < region.end_row; block += kRowBlock) {
        const int64_t y = larger(block, region.first_row), end = smaller(block + kRowBlock, region.end_row);
        for (Sliding* head = heads; head < heads + count; head++) head->run_rows(z, y, end - y);
      }
    for (Sliding* head = heads; head < heads + count; head++) head->end_strip();
  }
}

// The forward

template <typename S>
struct SlidingForward {
  typedef Computed<S> T;
  const Sizes<T> sizes;
  KeyRows<S> keys, values;
  Tiles<T> tiles;
  Prefetcher<S> prefetcher;
  const T* bias;  // the head's table, or null
  Vector<T>*queries, *scores;
  T** rows;
  ForwardArguments<S> arguments;
  Map map;
  Region queries_region;
  Strip<T> strip;
  int64_t fetched;  // keys before this row, or plane, are in the ring

  SlidingForward(Carver& carver, const Shape& shape)
      : sizes(shape), keys(carver, sizes, true, false), values(carver, sizes, false, true), tiles(carver, shape) {
    queries = carver.take<Vector<T>>(kRowBlock * sizes.head_dim);
    scores = carver.take<Vector<T>>(kRowBlock * sizes.scores);
    rows = carver.take<T*>(sizes.scores);
  }

  void begin(const Shape& shape, const ForwardArguments<S>& of_call, const Map& of_head, const Region& region) {
    arguments = of_call;
    map = of_head;
    queries_region = region;
    tiles.begin(map.columns());
    bias = arguments.bias ? arguments.bias + map.head * shape.table() : nullptr;
  }

  int64_t strips() const { return tiles.strips(sizes); }

  void begin_strip(int64_t index) {
    strip = tiles.strip(sizes, map.columns(), index);
    keys.begin(sizes, map, strip, arguments.key);
    values.begin(sizes, map, strip, arguments.value);
    fetched =
        sizes.volume ? map.planes().start(queries_region.first_plane) : map.rows().start(queries_region.first_row);
  }

  void run_rows(int64_t z, int64_t y, int64_t count) {
    advance(sizes.volume, map.rows().length, map.planes().start(z) + map.planes().kernel,
            map.rows().start(y + count - 1) + map.rows().kernel, &fetched, [&](int64_t plane, int64_t row) {
              keys.fetch(sizes, map, plane, row);
              values.fetch(sizes, map, plane, row);
            });
    for (const Tile<T>& tile : strip) {
      prefetcher.begin(sizes, map, strip, tile, y, queries_region.end_row, {{arguments.query, map.inputs}},
                       {{arguments.key, map.inputs}, {arguments.value, map.inputs}},
                       map.rows().kernel + count * groups(map, tile));
      run_tile(tile, z, y, count);
    }
  }

  void end_strip() {}

 private:
  void run_tile(const Tile<T>& tile, int64_t z, int64_t y, int64_t count) {
    constexpr int n = Simd<T>::kLanes;
    const int64_t stride = map.inputs.stride[2], output_stride = map.output.stride[2];
    const int64_t planes = map.planes().kernel, height = map.rows().kernel;
    for (int64_t r = 0; r < count; r++)
      transpose<S>(arguments.query + map.inputs.at(z, y + r) + tile.first * stride, stride, tile.lanes, sizes.head_dim,
                   static_cast<T>(arguments.scale), reinterpret_cast<T*>(queries + r * sizes.head_dim), n);
    score_tile<S, T>(sizes, map, tile, keys, bias, z, y, count, queries, scores, prefetcher);
    Vector<T> sums[kRowBlock], maxima[kRowBlock];
    with_count(count, [&](auto rows_at_once) {
      soften<T, rows_at_once()>(planes * height, map.columns().kernel, scores, sizes.scores, sums, maxima);
    });
    for (int64_t r = 0; r < count; r++) {
      const Vector<T> factor = T(1) / sums[r];
      for (int64_t p = 0; p < planes; p++)
        for (int64_t a = 0; a < height; a++)
          rows[p * height + a] = values.row(sizes, map.planes().start(z) + p, map.rows().start(y + r) + a);
      const int64_t row = map.output.at(z, y + r);
      weigh<S>(sizes, map, tile, rows, values.first_column, scores + r * sizes.scores,
               reinterpret_cast<const T*>(&factor), arguments.output + row, output_stride, prefetcher);
      if (!arguments.logsumexp) continue;
      const Vector<T> logsumexp = maxima[r] + logarithm<T>(sums[r]);
      const int64_t token = output_stride / sizes.head_dim;
      double* to = arguments.logsumexp + row / sizes.head_dim + tile.first * token;
      for (int64_t i = 0; i < tile.lanes; i++) to[i * token] = logsumexp[i];
    }
  }
};

// The backward: with P the probabilities, dP = dO V^T and delta the sum of P * dP over a window,
// dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO, and dS summed by distance is the bias' part.
// (delta is also the sum of dO * O, but that rounds differently from dP, and their difference is small.)
//
// A band owns keys. Queries outside of it whose windows reach into it are worked out again, for its keys alone.
template <typename S>
struct SlidingBackward {
  typedef Computed<S> T;
  const Sizes<T> sizes;
  KeyRows<S> keys, values;
  Tiles<T> tiles;
  Prefetcher<S> prefetcher;
  const T* bias;               // the head's table, or null
  T *grad_keys, *grad_values;  // (slots, width, padded_dim)
  Vector<T>*queries, *grads;   // (kRowBlock, head_dim), by channels
  Vector<T>*weights, *slopes;  // P and dS, like scores
  Vector<T>* logsumexp;
  Vector<T>* bias_sums;              // (Tiles::most_sums, bias_rows, slots)
  int64_t sums, most_sums;           // vectors of one of these; how many there are
  int64_t summed;                    // slopes that a lane of these holds
  T *carried_keys, *carried_values;  // (planes, rows, kernel, padded_dim): sums that the next strip goes on with
  T** rows;
  BackwardArguments<S> arguments;
  Map map;
  double* grad_bias;           // the band's part, or null
  int64_t begin_own, end_own;  // the band's rows of keys, or planes
  Region queries_region;       // of queries that reach them
  Strip<T> strip;
  int64_t end_known, end_done;  // of columns: those that have sums already, those that will not get more in this strip
  int64_t fetched, written;     // rows of keys, or planes: before these they are in the ring, they are done

  SlidingBackward(Carver& carver, const Shape& shape)
      : sizes(shape), keys(carver, sizes, true, true), values(carver, sizes, true, false), tiles(carver, shape) {
    grad_keys = carver.take<T>(sizes.slots() * sizes.row_elements());
    grad_values = carver.take<T>(sizes.slots() * sizes.row_elements());
    queries = carver.take<Vector<T>>(kRowBlock * sizes.head_dim);
    grads = carver.take<Vector<T>>(kRowBlock * sizes.head_dim);
    weights = carver.take<Vector<T>>(kRowBlock * sizes.scores);
    slopes = carver.take<Vector<T>>(kRowBlock * sizes.scores);
    logsumexp = carver.take<Vector<T>>(kRowBlock);
    sums = sizes.bias_rows * shape.kernel[2];
    bias_sums = carver.take<Vector<T>>(Tiles<T>::most_sums(shape) * sums);
    rows = carver.take<T*>(sizes.scores);
    const bool one_strip = sizes.strip * Simd<T>::kLanes >= shape.longest(2);
    const int64_t carried = one_strip ? 0 : shape.longest(0) * sizes.height * shape.kernel[2] * sizes.padded_dim;
    carried_keys = carver.take<T>(carried);
    carried_values = carver.take<T>(carried);
  }

  void begin(const Shape& shape, const BackwardArguments<S>& of_call, const Map& of_head, const Region& region,
             double* bias_part) {
    arguments = of_call;
    map = of_head;
    grad_bias = bias_part;
    tiles.begin(map.columns());
    bias = arguments.bias ? arguments.bias + map.head * shape.table() : nullptr;
    most_sums = Tiles<T>::most_sums(shape);
    if (grad_bias) std::memset(bias_sums, 0, most_sums * sums * sizeof(Vector<T>));
    summed = 0;
    begin_own = sizes.volume ? region.first_plane : region.first_row;
    end_own = sizes.volume ? region.end_plane : region.end_row;
    const int64_t first = cut_axis().first_query_of(begin_own), end = cut_axis().end_query_of(end_own - 1);
    queries_region.first_plane = sizes.volume ? first : 0;
    queries_region.end_plane = sizes.volume ? end : 1;
    queries_region.first_row = sizes.volume ? 0 : first;
    queries_region.end_row = sizes.volume ? map.rows().length : end;
    end_known = 0;
  }

  int64_t strips() const { return tiles.strips(sizes); }

  void begin_strip(int64_t index) {
    strip = tiles.strip(sizes, map.columns(), index);
    // the next strip goes on with the sums from this column on
    const bool last = index + 1 == strips();
    end_done = last ? map.columns().length : tiles.strip(sizes, map.columns(), index + 1).first_key;
    keys.begin(sizes, map, strip, arguments.key);
    values.begin(sizes, map, strip, arguments.value);
    fetched = cut_axis().start(sizes.volume ? queries_region.first_plane : queries_region.first_row);
    written = begin_own;
  }

  void run_rows(int64_t z, int64_t y, int64_t count) {
    const bool volume = sizes.volume;
    const int64_t end_row = queries_region.end_row;
    advance(volume, map.rows().length, map.planes().start(z) + map.planes().kernel,
            map.rows().start(y + count - 1) + map.rows().kernel, &fetched, [&](int64_t plane, int64_t row) {
              keys.fetch(sizes, map, plane, row);
              values.fetch(sizes, map, plane, row);
              begin_sums(plane, row, carried_keys, grad_keys);
              begin_sums(plane, row, carried_values, grad_values);
            });
    const int64_t query = volume ? z : y, end_query = volume ? z + 1 : y + count;
    const bool own = query >= begin_own && query < end_own;  // bands and segments begin at multiples of kRowBlock
    for (const Tile<T>& tile : strip) {
      prefetcher.begin(sizes, map, strip, tile, y, end_row,
                       {{arguments.query, map.inputs}, {arguments.grad_output, map.output}},
                       {{arguments.key, map.inputs}, {arguments.value, map.inputs}},
                       2 * map.rows().kernel + count * groups(map, tile));
      run_tile(tile, z, y, count, own);
    }
    const bool plane_ends = volume && y + count == end_row;
    if (grad_bias && own) {
      const bool segment_ends = (plane_ends || !volume) && (end_query % arguments.segment == 0 || end_query == end_own);
      summed += count * (strip.last - strip.first);
      if (segment_ends || summed >= kMostSummed)
        add_bias_sums(grad_bias + (query - begin_own) / arguments.segment * sizes.table);
    }
    // no later query reaches keys before the next one's first
    if (!volume && y + count < end_row) write_until(map.rows().start(y + count));
    if (plane_ends && z + 1 < queries_region.end_plane) write_until(map.planes().start(z + 1));
  }

  void end_strip() {
    write_until(end_own);
    end_known = strip.end_key;
  }

 private:
  const Axis& cut_axis() const { return sizes.volume ? map.planes() : map.rows(); }

  void write_until(int64_t first_needed) {
    const int64_t done = smaller(first_needed, end_own);
    advance(sizes.volume, map.rows().length, done, done, &written, [&](int64_t plane, int64_t row) {
      end_sums(plane, row, grad_keys, static_cast<T>(arguments.scale), carried_keys, arguments.grad_key);
      end_sums(plane, row, grad_values, T(1), carried_values, arguments.grad_value);
    });
  }

  // `own` queries get their gradients, and add to the bias'; keys [begin_own, end_own) get theirs.
  void run_tile(const Tile<T>& tile, int64_t z, int64_t y, int64_t count, bool own) {
    constexpr int n = Simd<T>::kLanes;
    const T scale = static_cast<T>(arguments.scale);
    const Vector<T> scales = splat(scale);
    const int64_t stride = map.inputs.stride[2], output_stride = map.output.stride[2];
    const int64_t kernel = map.columns().kernel, token = output_stride / sizes.head_dim;
    const int64_t planes = map.planes().kernel, height = map.rows().kernel, first_plane = map.planes().start(z);
    for (int64_t r = 0; r < count; r++) {
      transpose<S>(arguments.grad_output + map.output.at(z, y + r) + tile.first * output_stride, output_stride,
                   tile.lanes, sizes.head_dim, T(1), reinterpret_cast<T*>(grads + r * sizes.head_dim), n);
      transpose<S>(arguments.query + map.inputs.at(z, y + r) + tile.first * stride, stride, tile.lanes, sizes.head_dim,
                   scale, reinterpret_cast<T*>(queries + r * sizes.head_dim), n);
      logsumexp[r] = Vector<T>{};
      const double* sums = arguments.logsumexp + map.output.at(z, y + r) / sizes.head_dim + tile.first * token;
      for (int64_t i = 0; i < tile.lanes; i++) logsumexp[r][i] = static_cast<T>(sums[i * token]);
    }
    score_tile<S, T>(sizes, map, tile, keys, bias, z, y, count, queries, weights, prefetcher);
    score_tile<S, T>(sizes, map, tile, values, nullptr, z, y, count, grads, slopes, prefetcher);
    with_count(count, [&](auto rows_at_once) {
      slope<T, rows_at_once()>(planes * height, kernel, logsumexp, weights, slopes, sizes.scores);
    });
    for (int64_t r = 0; r < count; r++) {
      Vector<T>*row_weights = weights + r * sizes.scores, *row_slopes = slopes + r * sizes.scores;
      const int64_t row = map.inputs.at(z, y + r), first_key = map.rows().start(y + r);
      if (own) {
        for (int64_t p = 0; p < planes; p++)
          for (int64_t a = 0; a < height; a++) rows[p * height + a] = keys.row(sizes, first_plane + p, first_key + a);
        weigh<S>(sizes, map, tile, rows, keys.first_column, row_slopes, reinterpret_cast<const T*>(&scales),
                 arguments.grad_query + row, stride, prefetcher);
        if (grad_bias) add_bias(tile, z, y + r, row_slopes);
      }
      // the rows of the window that the band owns follow one another
      const int64_t start = sizes.volume ? first_plane : first_key;
      const int64_t skipped = larger<int64_t>(begin_own - start, 0);
      const int64_t kept = smaller(start + (sizes.volume ? planes : height), end_own) - start - skipped;
      const int64_t per_step = sizes.volume ? height : 1;
      for (T* sums : {grad_keys, grad_values}) {
        for (int64_t i = 0; i < kept * per_step; i++) {
          const int64_t j = skipped * per_step + i;
          rows[i] = sums + sizes.slot(first_plane + j / height, first_key + j % height) * sizes.row_elements();
        }
        const Vector<T>* factors = (sums == grad_keys ? row_slopes : row_weights) + skipped * per_step * kernel;
        if (sums == grad_keys)
          scatter<S>(sizes, map, tile, rows, keys.first_column, kept * per_step, factors, arguments.query + row,
                     stride);
        else
          scatter<S>(sizes, map, tile, rows, keys.first_column, kept * per_step, factors,
                     arguments.grad_output + map.output.at(z, y + r), output_stride);
      }
    }
  }

  void add_bias(const Tile<T>& tile, int64_t z, int64_t y, const Vector<T>* row_slopes) {
    const int64_t kernel = map.columns().kernel, planes = map.planes().kernel, height = map.rows().kernel;
    for (int64_t p = 0; p < planes; p++) {
      const int64_t bias_plane = map.planes().start(z) + p - z + planes - 1;
      const int64_t bias_row = bias_plane * (2 * height - 1) + map.rows().start(y) - y + height - 1;
      Vector<T>* to = bias_sums + tile.sums * sums + bias_row * kernel;
      for (int64_t j = 0; j < height * kernel; j++) to[j] += row_slopes[p * height * kernel + j];
    }
  }

  // Adds the sums of a strip's tiles to a table, and clears them.
  void add_bias_sums(double* part) {
    constexpr int n = Simd<T>::kLanes;
    const int64_t kernel = map.columns().kernel, width = 2 * kernel - 1;
    for (int64_t j = 0; j < sums; j++) {
      double sum = 0;
      for (int i = 0; i < n; i++) sum += bias_sums[j][i];
      part[j / kernel * width + j % kernel + kernel - 1 - kernel / 2] += sum;
    }
    for (const Tile<T>& tile : strip) {
      if (tile.sums == 0) continue;
      for (int64_t j = 0; j < sums; j++) {
        const Margin<T>& margin = tile.margins[j % kernel];
        double* to = part + j / kernel * width + j % kernel + kernel - 1 - kernel / 2;
        for (int64_t i = 0; i < tile.lanes; i++)
          to[margin.lanes[i] ? margin.distance : 0] += bias_sums[tile.sums * sums + j][i];
      }
    }
    std::memset(bias_sums, 0, most_sums * sums * sizeof(Vector<T>));
    summed = 0;
  }

  // Sums of a row: zero, or what the strip before left, in the columns before `end_known`.
  void begin_sums(int64_t plane, int64_t row, const T* from, T* sums) {
    T* to = sums + sizes.slot(plane, row) * sizes.row_elements();
    std::memset(to, 0, (strip.end_column - strip.first_column) * sizes.padded_dim * sizeof(T));
    const int64_t known = larger<int64_t>(end_known - strip.first_key, 0) * sizes.padded_dim;
    if (known) std::memcpy(column(to, strip.first_key), from + carried_at(plane, row), known * sizeof(T));
  }

  // Writes a row's gradients in the columns before `end_done`, and leaves the sums of the others for the next strip.
  void end_sums(int64_t plane, int64_t row, T* sums, T factor, T* carried, S* to) {
    T* columns = sums + sizes.slot(plane, row) * sizes.row_elements();
    for (int64_t x = strip.first_column; x < 0; x++) add_column(columns, x);
    for (int64_t x = map.columns().length; x < strip.end_column; x++) add_column(columns, x);
    const T* from = column(columns, strip.first_key);
    to += map.inputs.at(plane, row);
    int64_t x = strip.first_key;
    for (; x < smaller(end_done, strip.end_key); x++, from += sizes.padded_dim)
      write_row(from, factor, sizes.head_dim, to + x * map.inputs.stride[2]);
    if (x < strip.end_key)
      std::memcpy(carried + carried_at(plane, row), from, (strip.end_key - x) * sizes.padded_dim * sizeof(T));
  }

  // Adds a column of a margin to that for which it stands.
  void add_column(T* columns, int64_t x) const {
    const T* from = column(columns, x);
    T* to = column(columns, map.columns().inside(x));
    for (int64_t c = 0; c < sizes.padded_dim; c++) to[c] += from[c];
  }

  T* column(T* columns, int64_t x) const { return columns + (x - strip.first_column) * sizes.padded_dim; }

  int64_t carried_at(int64_t plane, int64_t row) const {
    return (plane * map.rows().length + row) * map.columns().kernel * sizes.padded_dim;
  }
};

}  // namespace
}  // namespace NEIGHBORHOOD_INSTRUCTION_SET
}  // namespace neighborhood

#endif  // NEIGHBORHOOD_SLIDING_H_
