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

// Rows of queries that are worked on together. Bands begin at multiples of it, so that every key sums its contributions
// in the same order however the map is cut.
constexpr int64_t kRowBlock = 3;

// The sizes of one call. Tensors are contiguous: (batch, depth, height, width, heads, head_dim).
struct Shape {
  int64_t batch, size[kAxes], heads, head_dim;
  int64_t kernel[kAxes], dilation[kAxes];

  // Of the longest dilation group.
  int64_t longest(int axis) const { return (size[axis] + dilation[axis] - 1) / dilation[axis]; }
  // Columns of a strip whose rows of keys, transposed, stay in a near cache, for numbers of so many bytes: a multiple
  // of the lanes of any register.
  int64_t strip_columns(int64_t bytes) const {
    constexpr int64_t kRingBytes = 128 << 10, kLanes = 16;
    const int64_t planes = kernel[0], rows = size[0] > 1 ? longest(1) : kernel[1] + kRowBlock - 1;
    const int64_t most = kRingBytes / (planes * rows * (head_dim > 0 ? head_dim : 1) * bytes);
    const int64_t blocks = (longest(2) - 1) / kLanes + 1, wanted = (most - kernel[2]) / kLanes;
    const int64_t strips = (blocks - 1) / (wanted > 2 ? wanted : 2) + 1;
    return (blocks - 1) / strips * kLanes + kLanes;
  }

  int64_t maps() const { return batch * dilation[0] * dilation[1] * dilation[2] * heads; }
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

// One head of one dilation group of one sample.
struct Map {
  int64_t head;
  int64_t offset;         // of its first element, in a tensor of tokens
  int64_t stride[kAxes];  // in elements of that tensor
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
  int64_t position = sample, stride = shape.heads * shape.head_dim;
  for (int axis = 0; axis < kAxes; axis++) position = position * shape.size[axis] + groups[axis];
  map.offset = (position * shape.heads + map.head) * shape.head_dim;
  for (int axis = kAxes - 1; axis >= 0; axis--) {
    map.stride[axis] = stride * shape.dilation[axis];
    map.axis[axis] = {(shape.size[axis] - groups[axis] + shape.dilation[axis] - 1) / shape.dilation[axis],
                      shape.kernel[axis]};
    stride *= shape.size[axis];
  }
  return map;
}

// A call's work, cut into bands: of planes where there are several, else of rows; perhaps within strips of columns.
struct Bands {
  int axis;                 // that is cut
  int64_t length, per_map;  // of a band; bands of a map
  int64_t strips;           // of a map, each cut into bands; 1 if bands hold all columns

  Bands(const Shape& shape, int64_t wanted, int64_t columns = INT64_MAX / 2) : axis(shape.size[0] > 1 ? 0 : 1) {
    const int64_t longest = shape.longest(axis);
    const int64_t multiple = axis == 0 ? 1 : kRowBlock;
    length = ((wanted > 1 ? wanted : 1) + multiple - 1) / multiple * multiple;
    if (length > longest) length = longest;
    strips = (shape.longest(2) - 1) / columns + 1;
    per_map = (longest + length - 1) / length * strips;
  }

  int64_t count(const Shape& shape) const { return shape.maps() * per_map; }

  // Whole maps are numbered with dilation groups the fastest, which share a bias; parts of maps with heads the fastest,
  // which share what caches fetch.
  Map map(const Shape& shape, int64_t band) const {
    const int64_t groups = shape.dilation[0] * shape.dilation[1] * shape.dilation[2];
    const int64_t sample = band / (groups * per_map * shape.heads), rest = band % (groups * per_map * shape.heads);
    if (per_map == 1) return get_map(shape, sample, rest % groups, rest / groups);
    return get_map(shape, sample, rest / shape.heads / per_map, rest % shape.heads);
  }

  // Which of its map's bands it is, along the axis that is cut, and which strip.
  int64_t part(const Shape& shape, int64_t band) const {
    return per_map == 1 ? 0 : band / shape.heads % per_map / strips;
  }
  int64_t strip(const Shape& shape, int64_t band) const {
    return per_map == 1 ? 0 : band / shape.heads % per_map % strips;
  }
};

}  // namespace neighborhood

#endif  // NEIGHBORHOOD_GEOMETRY_H_
