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

// Sizes of a call. query, key, value, output and their gradients are contiguous (batch, depth, height, width, heads,
// head_dim); the bias is (heads, 2 kernel_depth - 1, 2 kernel_height - 1, 2 kernel_width - 1); logsumexp is (batch,
// depth, height, width, heads). Axes that a problem lacks have size 1 and kernel 1.
struct NeighborhoodShape {
  int64_t batch, depth, height, width, heads, head_dim;
  int64_t kernel_depth, kernel_height, kernel_width;
  int64_t dilation_depth, dilation_height, dilation_width;
};

// Each returns null, or a message that says what was wrong; it is valid until the thread's next call. `bias`,
// `logsumexp` of the forward and `grad_bias` may be null. `threads` 0 stands for the default.
NEIGHBORHOOD_EXPORT const char* neighborhood_forward(int type, const NeighborhoodShape* shape, const void* query,
                                                     const void* key, const void* value, const void* bias, void* output,
                                                     double* logsumexp, double scale, int threads);
NEIGHBORHOOD_EXPORT const char* neighborhood_backward(int type, const NeighborhoodShape* shape, const void* query,
                                                      const void* key, const void* value, const void* bias,
                                                      const double* logsumexp, const void* grad_output,
                                                      void* grad_query, void* grad_key, void* grad_value,
                                                      void* grad_bias, double scale, int threads);

// The instruction set in use: the best that the machine has, or the one that the environment variable
// NEIGHBORHOOD_INSTRUCTION_SET or the last call of the setter named. The setter returns null or a message.
NEIGHBORHOOD_EXPORT const char* neighborhood_instruction_set();
NEIGHBORHOOD_EXPORT const char* neighborhood_set_instruction_set(const char* name);

NEIGHBORHOOD_EXPORT void neighborhood_set_threads(int threads);
NEIGHBORHOOD_EXPORT int neighborhood_get_threads();

#endif  // NEIGHBORHOOD_NEIGHBORHOOD_H_
