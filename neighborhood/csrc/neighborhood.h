// The C interface of the library, for Python's ctypes and for the TensorFlow op.
#ifndef NEIGHBORHOOD_NEIGHBORHOOD_H_
#define NEIGHBORHOOD_NEIGHBORHOOD_H_

#include <cstddef>
#include <cstdint>

#define NEIGHBORHOOD_EXPORT extern "C" __attribute__((visibility("default")))

enum NeighborhoodType {
  kNeighborhoodFloat32 = 0,
  kNeighborhoodFloat64 = 1,
  kNeighborhoodFloat16 = 2,
  kNeighborhoodBFloat16 = 3,
};

// Sizes of a call. query, key, value, output and their gradients are (batch, depth, height, width, heads, head_dim),
// contiguous but for the distance from token to token of query, key, value and their gradients, `token_stride` in
// elements: these may lie beside each other, as one product leaves them. 0 stands for heads * head_dim. The bias is
// (heads, 2 kernel_depth - 1, 2 kernel_height - 1, 2 kernel_width - 1); logsumexp is (batch, depth, height, width,
// heads). Axes that a problem lacks have size 1 and kernel 1.
struct NeighborhoodShape {
  int64_t batch, depth, height, width, heads, head_dim;
  int64_t kernel_depth, kernel_height, kernel_width;
  int64_t dilation_depth, dilation_height, dilation_width;
  int64_t token_stride;
};

// Runs work(data) once on each of so many threads, the caller's among them, and returns when all are done: what
// runtimes of OpenMP offer as GOMP_parallel.
typedef void (*NeighborhoodParallel)(void (*work)(void*), void* data, unsigned int threads, unsigned int flags);

// Each returns null, or a message that says what was wrong; it is valid until the thread's next call. `bias`,
// `logsumexp` of the forward and `grad_bias` may be null. `threads` 0 stands for the default. `parallel` runs the
// threads: a caller whose own threads look out for work in between, as those of OpenMP do, gives them to us, since ours
// would have to share their cores with them; null stands for the library's threads.
NEIGHBORHOOD_EXPORT const char* neighborhood_forward(int type, const NeighborhoodShape* shape, const void* query,
                                                     const void* key, const void* value, const void* bias, void* output,
                                                     double* logsumexp, double scale, int threads,
                                                     NeighborhoodParallel parallel);
NEIGHBORHOOD_EXPORT const char* neighborhood_backward(int type, const NeighborhoodShape* shape, const void* query,
                                                      const void* key, const void* value, const void* bias,
                                                      const double* logsumexp, const void* grad_output,
                                                      void* grad_query, void* grad_key, void* grad_value,
                                                      void* grad_bias, double scale, int threads,
                                                      NeighborhoodParallel parallel);

// The instruction set in use: the best that the machine has, or the one that the environment variable
// NEIGHBORHOOD_INSTRUCTION_SET or the last call of the setter named. The setter returns null or a message.
NEIGHBORHOOD_EXPORT const char* neighborhood_instruction_set();
NEIGHBORHOOD_EXPORT const char* neighborhood_set_instruction_set(const char* name);

NEIGHBORHOOD_EXPORT void neighborhood_set_threads(int threads);
NEIGHBORHOOD_EXPORT int neighborhood_get_threads();

#endif  // NEIGHBORHOOD_NEIGHBORHOOD_H_
