// The kernels, compiled once per instruction set.
#include "kernels.h"

#include <new>
#include <type_traits>

#include "dense.h"
#include "sliding.h"

#if NEIGHBORHOOD_VECTOR_BYTES > 16
#include <cpuid.h>
#endif

namespace neighborhood {
namespace NEIGHBORHOOD_INSTRUCTION_SET {
namespace {

// Working memory holds what either kind of map needs, one at a time.
template <typename Sliding, typename Dense>
size_t scratch(const Shape& shape, const Bands& bands) {
  Carver sliding(nullptr), dense(nullptr);
  for (int64_t i = 0; i < bands.heads; i++) (void)Sliding(sliding, shape);
  if (shape.has_dense_maps()) (void)Dense(dense, shape);
  return larger(sliding.used(), dense.used());
}

// Runs, for each band, begin(sliding, map, region, part) of each of its heads and then these in step; or
// attend(dense, map, part).
template <typename Sliding, typename Dense, typename Begin, typename Attend>
void over_bands(const Shape& shape, const Bands& bands, int64_t first, int64_t end, void* memory, Begin begin,
                Attend attend) {
  const bool may_be_dense = shape.has_dense_maps() && bands.per_map == 1;
  alignas(Dense) char dense_place[sizeof(Dense)];
  alignas(Sliding) char sliding_places[kMostHeads][sizeof(Sliding)];
  Dense* dense = nullptr;  // kept from map to map, for the bias of a head
  for (int64_t band = first; band < end; band++) {
    const Map map = bands.map(shape, band, 0);
    if (may_be_dense && map.is_dense()) {  // of one head
      Carver carver(memory);
      if (!dense) dense = new (dense_place) Dense(carver, shape);
      attend(*dense, map, band);
      continue;
    }
    dense = nullptr;
    const Region region(map, bands, bands.part(band));
    if (region.empty()) continue;
    Carver carver(memory);
    Sliding* sliding = reinterpret_cast<Sliding*>(sliding_places);
    for (int64_t i = 0; i < map.heads; i++)
      begin(*new (sliding + i) Sliding(carver, shape), bands.map(shape, band, i), region, band * bands.heads + i);
    run_in_step(sliding, map.heads);
  }
}

template <typename S>
void forward(const Shape& shape, const ForwardArguments<S>& arguments, const Bands& bands, int64_t begin, int64_t end,
             void* memory) {
  over_bands<SlidingForward<S>, DenseForward<S>>(
      shape, bands, begin, end, memory,
      [&](auto& sliding, const Map& map, const Region& region, int64_t) {
        sliding.begin(shape, arguments, map, region);
      },
      [&](auto& dense, const Map& map, int64_t) { dense.run(shape, arguments, map); });
}

template <typename S>
void backward(const Shape& shape, const BackwardArguments<S>& arguments, const Bands& bands, int64_t begin, int64_t end,
              void* memory) {
  const int64_t segments = (bands.length + arguments.segment - 1) / arguments.segment;
  const auto bias_part = [&](int64_t part) {
    return arguments.grad_bias ? arguments.grad_bias + part * segments * shape.table() : nullptr;
  };
  over_bands<SlidingBackward<S>, DenseBackward<S>>(
      shape, bands, begin, end, memory,
      [&](auto& sliding, const Map& map, const Region& region, int64_t part) {
        sliding.begin(shape, arguments, map, region, bias_part(part));
      },
      [&](auto& dense, const Map& map, int64_t part) { dense.run(shape, arguments, map, bias_part(part)); });
}

template <typename From, typename To>
void convert(const From* from, int64_t count, To* to) {
  constexpr int64_t n = Simd<Computed<From>>::kLanes;
  for (int64_t i = 0; i < count; i += n) {
    const int64_t size = smaller(n, count - i);
    store_some(to + i, load_some(from + i, size), size);
  }
}

// Whether the machine has the instructions and its system keeps the registers. The processor itself is asked:
// __builtin_cpu_supports says no to everything where the compiler's runtime has but a stub of it (zig's).
bool supported() {
#if NEIGHBORHOOD_VECTOR_BYTES > 16
  const auto has = [](unsigned int bits, unsigned int needed) { return (bits & needed) == needed; };
  unsigned int eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !has(ecx, bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C)) return false;
  unsigned int kept;  // by the system when it switches processes: XCR0
  __asm__("xgetbv" : "=a"(kept), "=d"(edx) : "c"(0));
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
#if NEIGHBORHOOD_VECTOR_BYTES == 64
  return has(kept, 0xe6) && has(ebx, bit_AVX2 | bit_AVX512F | bit_AVX512VL | bit_AVX512BW | bit_AVX512DQ);
#else
  return has(kept, 0x06) && has(ebx, bit_AVX2);
#endif
#else
  return true;
#endif
}

template <typename S>
constexpr Kernels<S> kernels() {
  return {scratch<SlidingForward<S>, DenseForward<S>>,
          forward<S>,
          scratch<SlidingBackward<S>, DenseBackward<S>>,
          backward<S>,
          convert<S, Computed<S>>,
          convert<Computed<S>, S>};
}

#define NEIGHBORHOOD_QUOTE(name) #name
#define NEIGHBORHOOD_NAME(name) NEIGHBORHOOD_QUOTE(name)

}  // namespace

extern const InstructionSet kInstructionSet;
constexpr InstructionSet kInstructionSet = {NEIGHBORHOOD_NAME(NEIGHBORHOOD_INSTRUCTION_SET),
                                            kRowBlock,
                                            supported,
                                            kernels<float>(),
                                            kernels<double>(),
                                            kernels<Float16>(),
                                            kernels<BFloat16>()};

}  // namespace NEIGHBORHOOD_INSTRUCTION_SET
}  // namespace neighborhood
