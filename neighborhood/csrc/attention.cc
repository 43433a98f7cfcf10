// The C interface: checks, choice of the instruction set, and the division of the work among threads.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "kernels.h"
#include "neighborhood.h"
#include "thread_pool.h"

namespace neighborhood {

#ifdef __x86_64__
namespace avx512 {
extern const InstructionSet kInstructionSet;
}
namespace avx2 {
extern const InstructionSet kInstructionSet;
}
#endif
namespace baseline {
extern const InstructionSet kInstructionSet;
}

namespace {

const InstructionSet* const kInstructionSets[] = {
#ifdef __x86_64__
    &avx512::kInstructionSet, &avx2::kInstructionSet,
#endif
    &baseline::kInstructionSet};

thread_local char message[512];

template <typename... Parts>
const char* fail(const char* format, Parts... parts) {
  std::snprintf(message, sizeof(message), format, parts...);
  return message;
}

const char* select_instruction_set(const char* name, const InstructionSet** selected) {
  for (const InstructionSet* set : kInstructionSets) {
    if (name && std::strcmp(name, set->name) != 0) continue;
    if (set->supported()) {
      *selected = set;
      return nullptr;
    }
  }
  char allowed[64] = "";
  for (const InstructionSet* set : kInstructionSets)
    if (set->supported()) std::strcat(std::strcat(allowed, *allowed ? ", " : ""), set->name);
  return fail("the instruction set is '%s'; this machine has %s", name, allowed);
}

std::atomic<const InstructionSet*> instruction_set{nullptr};

const char* get_instruction_set(const InstructionSet** selected) {
  *selected = instruction_set.load();
  if (*selected) return nullptr;
  const char* name = std::getenv("NEIGHBORHOOD_INSTRUCTION_SET");
  if (const char* problem = select_instruction_set(name && *name ? name : nullptr, selected)) return problem;
  instruction_set.store(*selected);
  return nullptr;
}

const char* check_axis(const char* name, int64_t length, int64_t kernel, int64_t dilation) {
  if (kernel < 1) return fail("kernel_size is %lld along the %s; it must be 1 or more", (long long)kernel, name);
  if (dilation < 1) return fail("dilation is %lld along the %s; it must be 1 or more", (long long)dilation, name);
  if (kernel > length || dilation > length / kernel)
    return fail("kernel_size %lld times dilation %lld is more than the %lld positions of the %s", (long long)kernel,
                (long long)dilation, (long long)length, name);
  return nullptr;
}

const char* check(const NeighborhoodShape& s, bool* empty) {
  const int64_t sizes[] = {s.batch, s.height, s.width, s.heads, s.head_dim};
  *empty = false;
  for (const int64_t size : sizes) {
    if (size < 0) return fail("a size is negative: %lld", (long long)size);
    *empty = *empty || size == 0;
  }
  if (const char* problem = check_axis("height", s.height, s.kernel_height, s.dilation_height)) return problem;
  if (const char* problem = check_axis("width", s.width, s.kernel_width, s.dilation_width)) return problem;
  int64_t elements = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(elements, std::max<int64_t>(size, 1), &elements)) return fail("too many elements");
  const int64_t keys[] = {2 * s.kernel_height, 2 * s.kernel_width, 8 * kRowBlock, 64};
  int64_t window = 1;
  for (const int64_t size : keys)
    if (__builtin_mul_overflow(window, size, &window)) return fail("the window is too large");
  return nullptr;
}

Shape get_shape(const NeighborhoodShape& s) {
  return {s.batch,
          s.height,
          s.width,
          s.heads,
          s.head_dim,
          {s.kernel_height, s.kernel_width},
          {s.dilation_height, s.dilation_width}};
}

template <typename T>
const Kernels<T>& kernels_of(const InstructionSet& set);
template <>
const Kernels<float>& kernels_of(const InstructionSet& set) {
  return set.float32;
}
template <>
const Kernels<double>& kernels_of(const InstructionSet& set) {
  return set.float64;
}

// Bands of rows of the maps: `rows` each, the same for all.
struct Bands {
  int64_t maps, rows, per_map;

  Bands(const Shape& shape, int64_t rows_wanted) : maps(count_maps(shape)) {
    const int64_t height = (shape.height + shape.dilation[0] - 1) / shape.dilation[0];
    rows = std::min(height, (std::max<int64_t>(rows_wanted, 1) + kRowBlock - 1) / kRowBlock * kRowBlock);
    per_map = (height + rows - 1) / rows;
  }
  int64_t count() const { return maps * per_map; }
};

// Runs work(map, band, begin, end, memory) for every band, in parallel.
template <typename Work>
const char* run(const Shape& shape, const Bands& bands, size_t bytes, int threads, Work work) {
  std::atomic<bool> failed{false};
  // neighbouring small maps go together, so that a thread does not ask for work too often
  const int64_t chunk = std::max<int64_t>(1, bands.count() / (16 * std::max(threads, 1)));
  parallel_for((bands.count() + chunk - 1) / chunk, threads, [&](int64_t part) {
    void* memory = working_memory(bytes);
    if (!memory) failed = true;
    for (int64_t i = part * chunk; i < std::min((part + 1) * chunk, bands.count()) && !failed; i++) {
      const Map map = get_map(shape, i / bands.per_map);
      const int64_t begin = i % bands.per_map * bands.rows;
      const int64_t end = std::min(begin + bands.rows, map.rows.length);
      if (begin < end) work(map, i, begin, end, memory);
    }
    release_working_memory();
  });
  return failed ? fail("out of memory: %zu bytes of working memory per thread", bytes) : nullptr;
}

template <typename T>
const char* forward(const InstructionSet& set, const Shape& shape, const ForwardArguments<T>& arguments, int threads) {
  const Kernels<T>& kernels = kernels_of<T>(set);
  // whole maps if they keep all threads busy; results do not depend on it
  const int64_t maps = count_maps(shape), height = (shape.height + shape.dilation[0] - 1) / shape.dilation[0];
  const int64_t wanted = (4 * threads + maps - 1) / maps;
  const bool whole = threads == 1 || maps >= 4 * threads;
  const Bands bands(shape, whole ? height : std::max<int64_t>((height + wanted - 1) / wanted, shape.kernel[0]));
  return run(shape, bands, kernels.forward_scratch(shape), threads,
             [&](const Map& map, int64_t, int64_t begin, int64_t end, void* memory) {
               kernels.forward(shape, arguments, map, begin, end, memory);
             });
}

template <typename T>
const char* backward(const InstructionSet& set, const Shape& shape, const BackwardArguments<T>& arguments, T* grad_bias,
                     int threads) {
  const Kernels<T>& kernels = kernels_of<T>(set);
  // Sums of the bias' gradient depend on the bands, so these depend on the shape alone.
  const int64_t rows = std::max<int64_t>(24, 3 * shape.kernel[0]);
  const Bands bands(shape, count_maps(shape) >= 32 ? shape.height : rows);
  const int64_t table = (2 * shape.kernel[0] - 1) * (2 * shape.kernel[1] - 1);
  std::vector<T> parts(grad_bias ? bands.count() * table : 0);
  const char* problem = run(shape, bands, kernels.backward_scratch(shape), threads,
                            [&](const Map& map, int64_t band, int64_t begin, int64_t end, void* memory) {
                              T* part = grad_bias ? parts.data() + band * table : nullptr;
                              kernels.backward(shape, arguments, map, begin, end, part, memory);
                            });
  if (problem || !grad_bias) return problem;
  std::vector<double> sums(shape.heads * table);
  for (int64_t band = 0; band < bands.count(); band++)
    for (int64_t i = 0; i < table; i++) sums[band / bands.per_map % shape.heads * table + i] += parts[band * table + i];
  std::copy(sums.begin(), sums.end(), grad_bias);
  return nullptr;
}

// Calls a function that may run out of memory.
template <typename Function>
const char* guard(Function function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return fail("out of memory");
  } catch (...) {
    return fail("an unexpected error");
  }
}

}  // namespace
}  // namespace neighborhood

using namespace neighborhood;  // NOLINT: the functions below have C names

const char* neighborhood_forward(int type, const NeighborhoodShape* shape, const void* query, const void* key,
                                 const void* value, const void* bias, void* output, void* logsumexp, double scale,
                                 int threads) {
  const InstructionSet* set;
  bool empty;
  if (const char* problem = get_instruction_set(&set)) return problem;
  if (const char* problem = check(*shape, &empty)) return problem;
  if (empty) return nullptr;
  if (threads <= 0) threads = default_threads();
  const Shape sizes = get_shape(*shape);
  const auto run = [&](auto zero) {
    typedef decltype(zero) T;
    return forward<T>(*set, sizes,
                      {static_cast<const T*>(query), static_cast<const T*>(key), static_cast<const T*>(value),
                       static_cast<const T*>(bias), static_cast<T*>(output), static_cast<T*>(logsumexp), scale},
                      threads);
  };
  return guard([&] { return type == kNeighborhoodFloat64 ? run(0.0) : run(0.0f); });
}

const char* neighborhood_backward(int type, const NeighborhoodShape* shape, const void* query, const void* key,
                                  const void* value, const void* bias, const void* logsumexp, const void* grad_output,
                                  void* grad_query, void* grad_key, void* grad_value, void* grad_bias, double scale,
                                  int threads) {
  const InstructionSet* set;
  bool empty;
  if (const char* problem = get_instruction_set(&set)) return problem;
  if (const char* problem = check(*shape, &empty)) return problem;
  if (threads <= 0) threads = default_threads();
  const Shape sizes = get_shape(*shape);
  const auto run = [&](auto zero) {
    typedef decltype(zero) T;
    if (empty) {  // nothing depends on the bias
      const int64_t table = (2 * sizes.kernel[0] - 1) * (2 * sizes.kernel[1] - 1);
      if (grad_bias) std::fill_n(static_cast<T*>(grad_bias), sizes.heads * table, zero);
      return static_cast<const char*>(nullptr);
    }
    return backward<T>(
        *set, sizes,
        {static_cast<const T*>(query), static_cast<const T*>(key), static_cast<const T*>(value),
         static_cast<const T*>(bias), static_cast<const T*>(logsumexp), static_cast<const T*>(grad_output),
         static_cast<T*>(grad_query), static_cast<T*>(grad_key), static_cast<T*>(grad_value), scale},
        static_cast<T*>(grad_bias), threads);
  };
  return guard([&] { return type == kNeighborhoodFloat64 ? run(0.0) : run(0.0f); });
}

const char* neighborhood_instruction_set() {
  const InstructionSet* set;
  const char* problem = get_instruction_set(&set);
  return problem ? problem : set->name;
}

const char* neighborhood_set_instruction_set(const char* name) {
  const InstructionSet* set;
  if (const char* problem = select_instruction_set(name, &set)) return problem;
  instruction_set.store(set);
  return nullptr;
}

void neighborhood_set_threads(int threads) { set_default_threads(threads); }

int neighborhood_get_threads() { return default_threads(); }
