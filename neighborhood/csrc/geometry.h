// Where windows lie and where maps lie in memory: the index arithmetic of neighborhood/windows.py, for the kernels.
//
// Dilation splits an axis into groups of equal remainder; within a group a window is a run of neighbours. So a dilated
// problem is many undilated ones, one per group, whose elements lie further apart in memory: kernels see only those, as
// `Map`.
#ifndef NEIGHBORHOOD_GEOMETRY_H_
#define NEIGHBORHOOD_GEOMETRY_H_

#include <cstdint>

namespace neighborhood {

constexpr int kAxes = 3;  // planes, rows, columns

constexpr int64_t kRingBytes = 256 << 10;  // of the transposed keys that queries meet: they stay in a near cache
constexpr int64_t kNearBytes = 512 << 10;  // of a sample's tensor: beyond it comes from caches or memory further away
constexpr int64_t kMostHeads = 4;          // that are worked on in step

// The sizes of one call. Tensors are (batch, depth, height, width, heads, head_dim), contiguous but for the tokens of
// query, key, value and their gradients, which lie `token_stride` elements apart.
struct Shape {
  int64_t batch, size[kAxes], heads, head_dim;
  int64_t kernel[kAxes], dilation[kAxes];
  // Rows of queries that are worked on together. Bands begin at multiples of it, so that every key sums its
  // contributions in the same order however the map is cut.
  int64_t row_block;
  int64_t token_stride;

  // How many heads are best worked on in step, to read memory in larger pieces; fewer if threads lack work then.
  int64_t heads_in_step(int64_t bytes) const {
    const bool large = size[0] == 1 && size[1] * size[2] * heads * head_dim * bytes > kNearBytes;
    if (!large || has_dense_maps()) return 1;
    return heads < kMostHeads ? heads : kMostHeads;
  }

  // Of the longest dilation group.
  int64_t longest(int axis) const { return (size[axis] + dilation[axis] - 1) / dilation[axis]; }
  // Columns of a strip whose rows of keys, transposed, stay in a near cache, for numbers of so many bytes: a multiple
  // of the lanes of any register.
  int64_t strip_columns(int64_t bytes) const {
    constexpr int64_t kLanes = 16;
    const int64_t planes = kernel[0], rows = size[0] > 1 ? longest(1) : kernel[1] + row_block - 1;
    const int64_t most = kRingBytes / heads_in_step(bytes) / (planes * rows * (head_dim > 0 ? head_dim : 1) * bytes);
    const int64_t blocks = (longest(2) - 1) / kLanes + 1, wanted = (most - kernel[2]) / kLanes;
    const int64_t strips = (blocks - 1) / (wanted > 2 ? wanted : 2) + 1;
    return (blocks - 1) / strips * kLanes + kLanes;
  }

  int64_t tokens() const { return batch * size[0] * size[1] * size[2]; }
  int64_t groups() const { return dilation[0] * dilation[1] * dilation[2]; }
  int64_t maps() const { return batch * groups() * heads; }
  int64_t window() const { return kernel[0] * kernel[1] * kernel[2]; }
  // Whether some map is one window, and small enough for plain attention.
  bool has_dense_maps() const {
    for (int axis = 0; axis < kAxes; axis++)
      if (size[axis] / dilation[axis] != kernel[axis]) return false;
    return window() <= 1024;  // more would leave the caches
  }
  // Entries of one head's bias table.
  int64_t table() const { return (2 * kernel[0] - 1) * (2 * kernel[1] - 1) * (2 * kernel[2] - 1); }
};

// One axis of a dilation group.
struct Axis {
  int64_t length, kernel;

  // The first key of the query at `position`: centred, shifted inwards at the borders.
  int64_t start(int64_t position) const {
    int64_t first = position - kernel / 2;
    if (first > length - kernel) first = length - kernel;
    return first < 0 ? 0 : first;
  }

  // Beyond a border lies what is a kernel's length further in: then a window that begins at position - kernel / 2 and
  // is not pushed inwards has the same keys, in another order.
  int64_t inside(int64_t position) const {
    if (position < 0) return position + kernel;
    return position >= length ? position - kernel : position;
  }

  // The first query whose window reaches beyond `key`, that is, ends after it.
  int64_t first_query_of(int64_t key) const {
    if (key < kernel) return 0;
    return key - kernel + 1 + kernel / 2;
  }

  // One past the last query whose window starts at `key` or before.
  int64_t end_query_of(int64_t key) const {
    if (key >= length - kernel) return length;
    return key + kernel / 2 + 1;
  }
};

// Where the positions of a map are in a tensor, in elements.
struct Layout {
  int64_t offset;  // of the first
  int64_t stride[kAxes];

  int64_t at(int64_t plane, int64_t row) const { return offset + plane * stride[0] + row * stride[1]; }
};

// One head of one dilation group of one sample.
struct Map {
  int64_t head;
  int64_t place, heads;  // which of its band's heads it is, of how many
  Layout inputs;         // of query, key, value and their gradients
  Layout output;         // and its gradient
  Axis axis[kAxes];

  const Axis& planes() const { return axis[0]; }
  const Axis& rows() const { return axis[1]; }
  const Axis& columns() const { return axis[2]; }
  // Whether every window is the whole map.
  bool is_dense() const {
    for (const Axis& a : axis)
      if (a.length != a.kernel) return false;
    return true;
  }
};

// `group` numbers the dilation groups of a sample.
inline Map get_map(const Shape& shape, int64_t sample, int64_t group, int64_t head) {
  Map map;
  int64_t groups[kAxes];
  for (int axis = kAxes - 1; axis >= 0; axis--) {
    groups[axis] = group % shape.dilation[axis];
    group /= shape.dilation[axis];
  }
  map.head = head;
  int64_t position = sample;
  for (int axis = 0; axis < kAxes; axis++) {
    position = position * shape.size[axis] + groups[axis];
    map.axis[axis] = {(shape.size[axis] - groups[axis] + shape.dilation[axis] - 1) / shape.dilation[axis],
                      shape.kernel[axis]};
  }
  const auto layout = [&](int64_t stride) {
    Layout found = {position * stride + head * shape.head_dim, {}};
    for (int axis = kAxes - 1; axis >= 0; axis--) {
      found.stride[axis] = stride * shape.dilation[axis];
      stride *= shape.size[axis];
    }
    return found;
  };
  map.inputs = layout(shape.token_stride);
  map.output = layout(shape.heads * shape.head_dim);
  return map;
}

// A call's work, cut into bands: of planes where there are several, else of rows, of one head or of neighbouring ones.
struct Bands {
  int axis;                 // that is cut
  int64_t length, per_map;  // of a band; bands of a map
  int64_t heads;            // of a band, at most
  int64_t head_groups;      // so many bands hold all heads

  Bands(const Shape& shape, int64_t wanted, int64_t heads = 1) : axis(shape.size[0] > 1 ? 0 : 1), heads(heads) {
    const int64_t longest = shape.longest(axis);
    const int64_t multiple = axis == 0 ? 1 : shape.row_block;
    length = ((wanted > 1 ? wanted : 1) + multiple - 1) / multiple * multiple;
    if (length > longest) length = longest;
    per_map = (longest + length - 1) / length;
    head_groups = (shape.heads + heads - 1) / heads;
  }

  int64_t count(const Shape& shape) const { return shape.batch * shape.groups() * head_groups * per_map; }

  // The map of the i-th head of a band. Whole maps are numbered with dilation groups the fastest, which share a bias;
  // parts of maps with heads the fastest, which share what caches fetch.
  Map map(const Shape& shape, int64_t band, int64_t i) const {
    const int64_t of_sample = shape.groups() * per_map * head_groups;
    const int64_t sample = band / of_sample, rest = band % of_sample;
    const bool whole = per_map == 1;
    const int64_t group = whole ? rest % shape.groups() : rest / head_groups / per_map;
    const int64_t first_head = (whole ? rest / shape.groups() : rest % head_groups) * heads;
    Map map = get_map(shape, sample, group, first_head + i);
    map.place = i;
    map.heads = first_head + heads > shape.heads ? shape.heads - first_head : heads;
    return map;
  }

  // Which of its map's bands it is.
  int64_t part(int64_t band) const { return per_map == 1 ? 0 : band / head_groups % per_map; }
};

}  // namespace neighborhood

#endif  // NEIGHBORHOOD_GEOMETRY_H_
