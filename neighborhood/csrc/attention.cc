// The C interface: checks, choice of the instruction set, and the division of the work among threads.
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "neighborhood.h"
#include "thread_pool.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

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

[[gnu::format(printf, 1, 2)]] const char* fail(const char* format, ...) {
  va_list parts;
  va_start(parts, format);
  std::vsnprintf(message, sizeof(message), format, parts);
  va_end(parts);
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
  const int64_t sizes[] = {s.batch, s.depth, s.height, s.width, s.heads, s.head_dim};
  *empty = false;
  for (const int64_t size : sizes) {
    if (size < 0) return fail("a size is negative: %lld", (long long)size);
    *empty = *empty || size == 0;
  }
  if (const char* problem = check_axis("depth", s.depth, s.kernel_depth, s.dilation_depth)) return problem;
  if (const char* problem = check_axis("height", s.height, s.kernel_height, s.dilation_height)) return problem;
  if (const char* problem = check_axis("width", s.width, s.kernel_width, s.dilation_width)) return problem;
  // These bounds leave room for all sizes of working memory.
  int64_t window = s.kernel_width;
  if (window >> 20 || __builtin_mul_overflow(window, s.kernel_height, &window) ||
      __builtin_mul_overflow(window, s.kernel_depth, &window) || window >> 32)
    return fail("the window is too large");
  int64_t elements = 1;
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(elements, std::max<int64_t>(size, 1), &elements) || elements >> 46)
      return fail("too many elements");
  const int64_t tokens = s.batch * s.depth * s.height * s.width;
  if (s.token_stride && s.token_stride < s.heads * s.head_dim)
    return fail("token_stride is %lld; with %lld heads of %lld channels it must be %lld or more, or 0",
                (long long)s.token_stride, (long long)s.heads, (long long)s.head_dim,
                (long long)(s.heads * s.head_dim));
  if (__builtin_mul_overflow(s.token_stride, std::max<int64_t>(tokens, 1), &elements) || elements >> 46)
    return fail("too many elements between the first token and the last");
  return nullptr;
}

Shape get_shape(const NeighborhoodShape& s, const InstructionSet& set) {
  return {s.batch,
          {s.depth, s.height, s.width},
          s.heads,
          s.head_dim,
          {s.kernel_depth, s.kernel_height, s.kernel_width},
          {s.dilation_depth, s.dilation_height, s.dilation_width},
          set.row_block,
          s.token_stride ? s.token_stride : s.heads * s.head_dim};
}

template <typename S>
const Kernels<S>& kernels_of(const InstructionSet& set) {
  if constexpr (std::is_same<S, float>::value)
    return set.float32;
  else if constexpr (std::is_same<S, double>::value)
    return set.float64;
  else if constexpr (std::is_same<S, Float16>::value)
    return set.float16;
  else
    return set.bfloat16;
}

struct Threads {
  int count;
  NeighborhoodParallel parallel;
};

// Runs work(begin, end, memory) for all bands, in parallel.
template <typename Work>
const char* run(const Shape& shape, const Bands& bands, size_t bytes, const Threads& threads, Work work) {
  std::atomic<bool> failed{false};
  const int64_t count = bands.count(shape);
  // neighbouring small maps go together, so that a thread does not ask for work too often
  const int64_t chunk = std::max<int64_t>(1, count / (16 * std::max(threads.count, 1)));
  parallel_for((count + chunk - 1) / chunk, threads.count, threads.parallel, [&](int64_t part) {
    void* memory = working_memory(bytes);
    if (memory)
      work(part * chunk, std::min((part + 1) * chunk, count), memory);
    else
      failed = true;
    release_working_memory();
  });
  return failed ? fail("out of memory: %zu bytes of working memory per thread", bytes) : nullptr;
}

// A bias table in the type that is computed in.
template <typename S>
class Table {
 public:
  typedef typename ComputeType<S>::Type T;

  Table(const Kernels<S>& kernels, const void* table, int64_t count) {
    if constexpr (std::is_same<S, T>::value) {
      data_ = static_cast<const T*>(table);
    } else if (table) {
      converted_.resize(count);
      kernels.widen(static_cast<const S*>(table), count, converted_.data());
      data_ = converted_.data();
    }
  }
  const T* data() const { return data_; }

 private:
  std::vector<T> converted_;
  const T* data_ = nullptr;
};

// Bands, of a multiple of `unit`, that keep all threads busy; whole maps if they do, or if some are plain attention.
// `heads` are worked on in step if threads have enough to do, and bands of them much more than at their borders.
Bands busy_bands(const Shape& shape, int threads, int64_t unit, int64_t heads) {
  const Bands whole(shape, INT64_MAX / 2, heads);
  const int64_t count = whole.count(shape), longest = shape.longest(whole.axis);
  if (count >= 4 * threads || count % threads == 0 || shape.has_dense_maps()) return whole;
  const int64_t wanted = (2 * threads + count - 1) / count, length = (longest + wanted - 1) / wanted;
  if (heads > 1 && length < 8 * unit) return busy_bands(shape, threads, unit, 1);
  return Bands(shape, (length + unit - 1) / unit * unit, heads);
}

// Asks for huge pages where a large tensor is to be written, as NumPy does for its own: memory that is new comes in
// fewer pieces then. A third of the time may go into these otherwise.
void ask_for_huge_pages([[maybe_unused]] void* tensor, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = 4 << 20, kPage = 4 << 10;
  if (bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(tensor) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(tensor) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // nothing is lost if it does not help
#endif
}

template <typename S>
const char* forward(const Kernels<S>& kernels, const Shape& shape, const ForwardArguments<S>& arguments,
                    const Threads& threads) {
  ask_for_huge_pages(arguments.output, shape.tokens() * shape.heads * shape.head_dim * sizeof(S));
  // results do not depend on the bands
  const int64_t heads = shape.heads_in_step(sizeof(typename ComputeType<S>::Type));
  const Bands bands = busy_bands(shape, threads.count, shape.kernel[shape.size[0] > 1 ? 0 : 1], heads);
  return run(
      shape, bands, kernels.forward_scratch(shape, bands), threads,
      [&](int64_t begin, int64_t end, void* memory) { kernels.forward(shape, arguments, bands, begin, end, memory); });
}

template <typename S>
const char* backward(const Kernels<S>& kernels, const Shape& shape, BackwardArguments<S> arguments, S* grad_bias,
                     const Threads& threads) {
  typedef typename ComputeType<S>::Type T;
  const int64_t bytes = ((shape.tokens() - 1) * shape.token_stride + shape.heads * shape.head_dim) * sizeof(S);
  for (S* grad : {arguments.grad_query, arguments.grad_key, arguments.grad_value}) ask_for_huge_pages(grad, bytes);
  const int axis = shape.size[0] > 1 ? 0 : 1;
  const bool whole = shape.maps() >= 32 || shape.has_dense_maps();
  arguments.segment = Bands(shape, whole ? INT64_MAX / 2 : std::max<int64_t>(24, 3 * shape.kernel[axis])).length;
  const int64_t heads = shape.heads_in_step(sizeof(T));
  const Bands bands =
      whole ? Bands(shape, INT64_MAX / 2, heads) : busy_bands(shape, threads.count, arguments.segment, heads);
  const int64_t segments = (bands.length + arguments.segment - 1) / arguments.segment;
  const int64_t table = shape.table(), count = bands.count(shape);
  std::vector<double> parts(grad_bias ? count * bands.heads * segments * table : 0);
  arguments.grad_bias = grad_bias ? parts.data() : nullptr;
  const char* problem = run(
      shape, bands, kernels.backward_scratch(shape, bands), threads,
      [&](int64_t begin, int64_t end, void* memory) { kernels.backward(shape, arguments, bands, begin, end, memory); });
  if (problem || !grad_bias) return problem;
  std::vector<double> sums(shape.heads * table);
  for (int64_t i = 0; i < count * bands.heads; i++) {
    const int64_t head = bands.map(shape, i / bands.heads, i % bands.heads).head;
    if (head >= shape.heads) continue;  // the last bands have fewer
    const double* part = parts.data() + i * segments * table;
    for (int64_t j = 0; j < segments * table; j++) sums[head * table + j % table] += part[j];
  }
  const std::vector<T> rounded(sums.begin(), sums.end());
  kernels.narrow(rounded.data(), shape.heads * table, grad_bias);
  return nullptr;
}

// Calls a function that may run out of memory.
template <typename Function>
const char* guard(Function function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return fail("out of memory");
  } catch (const std::length_error&) {
    return fail("out of memory");
  } catch (...) {
    return fail("an unexpected error");
  }
}

}  // namespace
}  // namespace neighborhood

using namespace neighborhood;  // NOLINT: the functions below have C names

// Calls function(zero) with a zero of the type of that number.
template <typename Function>
static const char* with_type(int type, Function function) {
  switch (type) {
    case kNeighborhoodFloat32:
      return guard([&] { return function(float()); });
    case kNeighborhoodFloat64:
      return guard([&] { return function(double()); });
    case kNeighborhoodFloat16:
      return guard([&] { return function(Float16()); });
    case kNeighborhoodBFloat16:
      return guard([&] { return function(BFloat16()); });
    default:
      return fail("the type is %d; it must be 0 to 3", type);
  }
}

static const char* check_pointers(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (!pointer) return fail("a tensor that is needed is null");
  return nullptr;
}

const char* neighborhood_forward(int type, const NeighborhoodShape* shape, const void* query, const void* key,
                                 const void* value, const void* bias, void* output, double* logsumexp, double scale,
                                 int threads, NeighborhoodParallel parallel) {
  const InstructionSet* set;
  bool empty;
  if (const char* problem = get_instruction_set(&set)) return problem;
  if (const char* problem = check_pointers({shape})) return problem;
  if (const char* problem = check(*shape, &empty)) return problem;
  if (threads <= 0) threads = default_threads();
  const Shape sizes = get_shape(*shape, *set);
  return with_type(type, [&](auto zero) -> const char* {
    typedef decltype(zero) S;
    if (empty) return nullptr;
    if (const char* problem = check_pointers({query, key, value, output})) return problem;
    const Kernels<S>& kernels = kernels_of<S>(*set);
    const Table<S> table(kernels, bias, sizes.heads * sizes.table());
    return forward<S>(kernels, sizes,
                      {static_cast<const S*>(query), static_cast<const S*>(key), static_cast<const S*>(value),
                       table.data(), static_cast<S*>(output), logsumexp, scale},
                      {threads, parallel});
  });
}

const char* neighborhood_backward(int type, const NeighborhoodShape* shape, const void* query, const void* key,
                                  const void* value, const void* bias, const double* logsumexp, const void* grad_output,
                                  void* grad_query, void* grad_key, void* grad_value, void* grad_bias, double scale,
                                  int threads, NeighborhoodParallel parallel) {
  const InstructionSet* set;
  bool empty;
  if (const char* problem = get_instruction_set(&set)) return problem;
  if (const char* problem = check_pointers({shape})) return problem;
  if (const char* problem = check(*shape, &empty)) return problem;
  if (threads <= 0) threads = default_threads();
  const Shape sizes = get_shape(*shape, *set);
  return with_type(type, [&](auto zero) -> const char* {
    typedef decltype(zero) S;
    if (empty) {  // nothing depends on the bias
      if (grad_bias) std::memset(grad_bias, 0, sizes.heads * sizes.table() * sizeof(S));
      return nullptr;
    }
    if (const char* problem =
            check_pointers({query, key, value, logsumexp, grad_output, grad_query, grad_key, grad_value}))
      return problem;
    const Kernels<S>& kernels = kernels_of<S>(*set);
    const Table<S> table(kernels, bias, sizes.heads * sizes.table());
    return backward<S>(kernels, sizes,
                       {static_cast<const S*>(query), static_cast<const S*>(key), static_cast<const S*>(value),
                        table.data(), logsumexp, static_cast<const S*>(grad_output), static_cast<S*>(grad_query),
                        static_cast<S*>(grad_key), static_cast<S*>(grad_value), nullptr, 0, scale},
                       static_cast<S*>(grad_bias), {threads, parallel});
  });
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
