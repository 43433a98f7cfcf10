// Where windows lie and where maps lie in memory: the index arithmetic of neighborhood/windows.py, for the kernels.
//
// Dilation splits an axis into groups of equal remainder; within a group a window is a run of neighbours. So a dilated
// problem is many undilated ones, one per group, whose rows and columns lie further apart in memory: kernels see only
// those, as `Map`.
#ifndef NEIGHBORHOOD_GEOMETRY_H_
#define NEIGHBORHOOD_GEOMETRY_H_

#include <cstdint>

namespace neighborhood {

// The sizes of one call. Tensors are contiguous: (batch, height, width, heads, head_dim).
struct Shape {
  int64_t batch, height, width, heads, head_dim;
  int64_t kernel[2], dilation[2];  // height, width
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
  int64_t offset;                     // of its first element, in a (batch, height, width, heads, head_dim) tensor
  int64_t row_stride, column_stride;  // in elements of that tensor
  int64_t head;
  Axis rows, columns;
};

inline int64_t count_maps(const Shape& shape) {
  return shape.batch * shape.dilation[0] * shape.dilation[1] * shape.heads;
}

inline Map get_map(const Shape& shape, int64_t index) {
  Map map;
  map.head = index % shape.heads;
  index /= shape.heads;
  const int64_t group_column = index % shape.dilation[1];
  index /= shape.dilation[1];
  const int64_t group_row = index % shape.dilation[0];
  const int64_t sample = index / shape.dilation[0];
  const int64_t position = (sample * shape.height + group_row) * shape.width + group_column;
  map.offset = (position * shape.heads + map.head) * shape.head_dim;
  map.column_stride = shape.dilation[1] * shape.heads * shape.head_dim;
  map.row_stride = shape.dilation[0] * shape.width * shape.heads * shape.head_dim;
  map.rows = {(shape.height - group_row + shape.dilation[0] - 1) / shape.dilation[0], shape.kernel[0]};
  map.columns = {(shape.width - group_column + shape.dilation[1] - 1) / shape.dilation[1], shape.kernel[1]};
  return map;
}

}  // namespace neighborhood

#endif  // NEIGHBORHOOD_GEOMETRY_H_
