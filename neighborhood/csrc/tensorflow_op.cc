// TensorFlow's ops Neighborhood>Attention and Neighborhood>AttentionGrad, through TensorFlow's C API.
//
// The API's functions are looked up in the TensorFlow that is already loaded, so that this library is built without
// TensorFlow and serves every version of it. The declarations below are of tensorflow/c/ops.h, kernels.h, tf_tensor.h
// and tf_status.h.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "neighborhood.h"

namespace {

struct TF_OpDefinitionBuilder;
struct TF_ShapeInferenceContext;
struct TF_ShapeHandle;
struct TF_KernelBuilder;
struct TF_OpKernelConstruction;
struct TF_OpKernelContext;
struct TF_Tensor;
struct TF_Status;

enum { kFloat = 1, kDouble = 2, kBFloat16 = 14, kHalf = 19 };    // TF_DataType
enum { kOk = 0, kInvalidArgument = 3, kResourceExhausted = 8 };  // TF_Code

// X(result, name, arguments)
#define TENSORFLOW_FUNCTIONS(X)                                                                              \
  X(TF_Status*, TF_NewStatus, ())                                                                            \
  X(void, TF_DeleteStatus, (TF_Status*))                                                                     \
  X(void, TF_SetStatus, (TF_Status*, int, const char*))                                                      \
  X(int, TF_GetCode, (const TF_Status*))                                                                     \
  X(const char*, TF_Message, (const TF_Status*))                                                             \
  X(TF_OpDefinitionBuilder*, TF_NewOpDefinitionBuilder, (const char*))                                       \
  X(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder*, const char*))                            \
  X(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder*, const char*))                           \
  X(void, TF_OpDefinitionBuilderAddAttr, (TF_OpDefinitionBuilder*, const char*))                             \
  X(void, TF_OpDefinitionBuilderSetShapeInferenceFunction,                                                   \
    (TF_OpDefinitionBuilder*, void (*)(TF_ShapeInferenceContext*, TF_Status*)))                              \
  X(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder*, TF_Status*))                                    \
  X(TF_ShapeHandle*, TF_NewShapeHandle, ())                                                                  \
  X(void, TF_DeleteShapeHandle, (TF_ShapeHandle*))                                                           \
  X(int64_t, TF_ShapeInferenceContextNumInputs, (TF_ShapeInferenceContext*))                                 \
  X(void, TF_ShapeInferenceContextGetInput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))   \
  X(void, TF_ShapeInferenceContextSetOutput, (TF_ShapeInferenceContext*, int, TF_ShapeHandle*, TF_Status*))  \
  X(int, TF_ShapeInferenceContextRankKnown, (TF_ShapeInferenceContext*, TF_ShapeHandle*))                    \
  X(void, TF_ShapeInferenceContextWithRankAtLeast,                                                           \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*, TF_Status*))                      \
  X(void, TF_ShapeInferenceContextWithRankAtMost,                                                            \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, TF_ShapeHandle*, TF_Status*))                      \
  X(void, TF_ShapeInferenceContextSubshape,                                                                  \
    (TF_ShapeInferenceContext*, TF_ShapeHandle*, int64_t, int64_t, TF_ShapeHandle*, TF_Status*))             \
  X(TF_KernelBuilder*, TF_NewKernelBuilder,                                                                  \
    (const char*, const char*, void* (*)(TF_OpKernelConstruction*), void (*)(void*, TF_OpKernelContext*),    \
     void (*)(void*)))                                                                                       \
  X(void, TF_KernelBuilder_TypeConstraint, (TF_KernelBuilder*, const char*, int, TF_Status*))                \
  X(void, TF_RegisterKernelBuilder, (const char*, TF_KernelBuilder*, TF_Status*))                            \
  X(void, TF_OpKernelConstruction_GetAttrSize,                                                               \
    (TF_OpKernelConstruction*, const char*, int32_t*, int32_t*, TF_Status*))                                 \
  X(void, TF_OpKernelConstruction_GetAttrInt64List,                                                          \
    (TF_OpKernelConstruction*, const char*, int64_t*, int, TF_Status*))                                      \
  X(void, TF_OpKernelConstruction_Failure, (TF_OpKernelConstruction*, TF_Status*))                           \
  X(int, TF_NumInputs, (TF_OpKernelContext*))                                                                \
  X(void, TF_GetInput, (TF_OpKernelContext*, int, TF_Tensor**, TF_Status*))                                  \
  X(TF_Tensor*, TF_AllocateOutput, (TF_OpKernelContext*, int, int, const int64_t*, int, size_t, TF_Status*)) \
  X(void, TF_OpKernelContext_Failure, (TF_OpKernelContext*, TF_Status*))                                     \
  X(int, TF_TensorType, (const TF_Tensor*))                                                                  \
  X(int, TF_NumDims, (const TF_Tensor*))                                                                     \
  X(int64_t, TF_Dim, (const TF_Tensor*, int))                                                                \
  X(void*, TF_TensorData, (const TF_Tensor*))                                                                \
  X(void, TF_DeleteTensor, (TF_Tensor*))

#define DECLARE(result, name, arguments) result(*name) arguments = nullptr;
TENSORFLOW_FUNCTIONS(DECLARE)
#undef DECLARE

class Status {
 public:
  Status() : status_(TF_NewStatus()) {}
  ~Status() { TF_DeleteStatus(status_); }
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;
  operator TF_Status*() { return status_; }
  bool ok() const { return TF_GetCode(status_) == kOk; }
  void fail(const std::string& message, int code = kInvalidArgument) { TF_SetStatus(status_, code, message.c_str()); }

 private:
  TF_Status* status_;
};

// Kernels

struct Attributes {
  std::vector<int64_t> kernel_size, dilation;
};

std::vector<int64_t> get_list(TF_OpKernelConstruction* construction, const char* name, Status& status) {
  int32_t size = 0, bytes = 0;
  TF_OpKernelConstruction_GetAttrSize(construction, name, &size, &bytes, status);
  if (!status.ok()) return {};
  if (size < 1 || size > 3) {
    status.fail(std::string(name) + " has " + std::to_string(size) + " entries; give one per spatial axis, 1 to 3");
    return {};
  }
  std::vector<int64_t> values(size);
  TF_OpKernelConstruction_GetAttrInt64List(construction, name, values.data(), size, status);
  for (const int64_t value : values)
    if (status.ok() && value < 1)
      status.fail(std::string(name) + " has the entry " + std::to_string(value) + "; it must be 1 or more");
  return values;
}

void* create(TF_OpKernelConstruction* construction) {
  Status status;
  Attributes* attributes = new Attributes();
  attributes->kernel_size = get_list(construction, "kernel_size", status);
  if (status.ok()) attributes->dilation = get_list(construction, "dilation", status);
  if (status.ok() && attributes->kernel_size.size() != attributes->dilation.size())
    status.fail("kernel_size has " + std::to_string(attributes->kernel_size.size()) + " entries and dilation " +
                std::to_string(attributes->dilation.size()) + "; give as many of each");
  if (!status.ok()) TF_OpKernelConstruction_Failure(construction, status);
  return attributes;
}

void destroy(void* attributes) { delete static_cast<Attributes*>(attributes); }

typedef std::vector<int64_t> Dimensions;

std::string to_string(const Dimensions& dimensions) {
  std::string text = "(";
  for (size_t i = 0; i < dimensions.size(); i++) text += (i ? ", " : "") + std::to_string(dimensions[i]);
  return text + ")";
}

// The inputs of a kernel, freed at the end.
class Inputs {
 public:
  Inputs(TF_OpKernelContext* context, Status& status) {
    for (int i = 0; i < TF_NumInputs(context) && status.ok(); i++) {
      TF_Tensor* tensor = nullptr;
      TF_GetInput(context, i, &tensor, status);
      if (status.ok()) tensors_.push_back(tensor);
    }
  }
  ~Inputs() {
    for (TF_Tensor* tensor : tensors_) TF_DeleteTensor(tensor);
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  int size() const { return static_cast<int>(tensors_.size()); }
  int type(int i) const { return TF_TensorType(tensors_[i]); }
  const void* data(int i) const { return TF_TensorData(tensors_[i]); }
  Dimensions dimensions(int i) const {
    Dimensions dimensions(TF_NumDims(tensors_[i]));
    for (size_t d = 0; d < dimensions.size(); d++) dimensions[d] = TF_Dim(tensors_[i], static_cast<int>(d));
    return dimensions;
  }
  void check(int i, const char* name, const Dimensions& expected, Status& status) const {
    if (status.ok() && dimensions(i) != expected)
      status.fail(std::string(name) + " has shape " + to_string(dimensions(i)) + "; it must have " +
                  to_string(expected));
  }

 private:
  std::vector<TF_Tensor*> tensors_;
};

void* allocate(TF_OpKernelContext* context, int index, int type, const Dimensions& dimensions, Status& status) {
  if (!status.ok()) return nullptr;
  size_t bytes = type == kDouble ? 8 : type == kFloat ? 4 : 2;
  for (const int64_t size : dimensions) bytes *= size;
  TF_Tensor* tensor =
      TF_AllocateOutput(context, index, type, dimensions.data(), static_cast<int>(dimensions.size()), bytes, status);
  if (!status.ok()) return nullptr;
  void* data = TF_TensorData(tensor);
  TF_DeleteTensor(tensor);  // our reference to it
  return data;
}

// What both kernels check and need: inputs 0 to 2 are query, key and value, 3 may be the bias, the last is the scale.
struct Call {
  NeighborhoodShape shape;
  Dimensions query, logsumexp, bias;
  const void* bias_data = nullptr;
  double scale = 0.0;
  int type = 0;
  int after_bias = 3;  // the next input

  Call(const Attributes& attributes, const Inputs& inputs, int others, Status& status) {
    if (!status.ok()) return;
    const int biases = inputs.size() - 3 - others - 1;
    if (biases > 1) {
      status.fail("rel_pos_bias has " + std::to_string(biases) + " tensors; give one or none");
      return;
    }
    after_bias = 3 + biases;
    query = inputs.dimensions(0);
    const size_t axes = attributes.kernel_size.size();
    if (query.size() != axes + 3) {
      status.fail("query has shape " + to_string(query) + "; with kernel_size for " + std::to_string(axes) +
                  " axes it must be (batch, " +
                  (axes == 3   ? "depth, height, width"
                   : axes == 2 ? "height, width"
                               : "length") +
                  ", heads, head_dim)");
      return;
    }
    inputs.check(1, "key", query, status);
    inputs.check(2, "value", query, status);
    logsumexp.assign(query.begin(), query.end() - 1);
    bias = {query[axes + 1]};
    for (const int64_t kernel : attributes.kernel_size) bias.push_back(2 * kernel - 1);
    if (biases) {
      inputs.check(3, "rel_pos_bias", bias, status);
      bias_data = inputs.data(3);
    }
    inputs.check(inputs.size() - 1, "scale", {}, status);
    if (!status.ok()) return;
    scale = *static_cast<const double*>(inputs.data(inputs.size() - 1));
    type = inputs.type(0);
    // axes that are not there have one position
    int64_t size[3] = {1, 1, 1}, kernel[3] = {1, 1, 1}, dilation[3] = {1, 1, 1};
    for (size_t i = 0; i < axes; i++) {
      const size_t axis = 3 - axes + i;
      size[axis] = query[1 + i];
      kernel[axis] = attributes.kernel_size[i];
      dilation[axis] = attributes.dilation[i];
    }
    shape = {query[0],        size[0],     size[1],   size[2],   query[axes + 1],
             query[axes + 2], kernel[0],   kernel[1], kernel[2], dilation[0],
             dilation[1],     dilation[2], 0};
  }
  int kernel_type() const {
    return type == kDouble     ? kNeighborhoodFloat64
           : type == kHalf     ? kNeighborhoodFloat16
           : type == kBFloat16 ? kNeighborhoodBFloat16
                               : kNeighborhoodFloat32;
  }
};

void compute(void* attributes, TF_OpKernelContext* context) {
  Status status;
  const Inputs inputs(context, status);
  const Call call(*static_cast<Attributes*>(attributes), inputs, 0, status);
  void* output = allocate(context, 0, call.type, call.query, status);
  void* logsumexp = allocate(context, 1, kDouble, call.logsumexp, status);
  if (status.ok())
    if (const char* problem =
            neighborhood_forward(call.kernel_type(), &call.shape, inputs.data(0), inputs.data(1), inputs.data(2),
                                 call.bias_data, output, static_cast<double*>(logsumexp), call.scale, 0, nullptr))
      status.fail(problem);
  if (!status.ok()) TF_OpKernelContext_Failure(context, status);
}

void compute_gradient(void* attributes, TF_OpKernelContext* context) {
  Status status;
  const Inputs inputs(context, status);
  const Call call(*static_cast<Attributes*>(attributes), inputs, 2, status);
  const int logsumexp = call.after_bias, grad_output = logsumexp + 1;
  if (status.ok()) {
    inputs.check(logsumexp, "logsumexp", call.logsumexp, status);
    inputs.check(grad_output, "grad_output", call.query, status);
  }
  void* grads[3];
  for (int i = 0; i < 3; i++) grads[i] = allocate(context, i, call.type, call.query, status);
  void* grad_bias = call.bias_data ? allocate(context, 3, call.type, call.bias, status) : nullptr;
  if (status.ok())
    if (const char* problem = neighborhood_backward(
            call.kernel_type(), &call.shape, inputs.data(0), inputs.data(1), inputs.data(2), call.bias_data,
            static_cast<const double*>(inputs.data(logsumexp)), inputs.data(grad_output), grads[0], grads[1], grads[2],
            grad_bias, call.scale, 0, nullptr))
      status.fail(problem);
  if (!status.ok()) TF_OpKernelContext_Failure(context, status);
}

// Shape functions

class ShapeHandle {
 public:
  ShapeHandle() : handle_(TF_NewShapeHandle()) {}
  ~ShapeHandle() { TF_DeleteShapeHandle(handle_); }
  ShapeHandle(const ShapeHandle&) = delete;
  ShapeHandle& operator=(const ShapeHandle&) = delete;
  operator TF_ShapeHandle*() { return handle_; }

 private:
  TF_ShapeHandle* handle_;
};

// Reads an input that must be (batch, length, heads, head_dim) or have one or two axes more.
void get_tokens(TF_ShapeInferenceContext* context, int input, TF_ShapeHandle* shape, TF_Status* status) {
  TF_ShapeInferenceContextGetInput(context, input, shape, status);
  if (TF_GetCode(status) != kOk || !TF_ShapeInferenceContextRankKnown(context, shape)) return;
  TF_ShapeInferenceContextWithRankAtLeast(context, shape, 4, shape, status);
  if (TF_GetCode(status) == kOk) TF_ShapeInferenceContextWithRankAtMost(context, shape, 6, shape, status);
}

void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  ShapeHandle query, logsumexp;
  get_tokens(context, 0, query, status);
  if (TF_GetCode(status) != kOk) return;
  TF_ShapeInferenceContextSetOutput(context, 0, query, status);
  if (TF_GetCode(status) != kOk || !TF_ShapeInferenceContextRankKnown(context, query)) return;
  TF_ShapeInferenceContextSubshape(context, query, 0, -1, logsumexp, status);
  if (TF_GetCode(status) == kOk) TF_ShapeInferenceContextSetOutput(context, 1, logsumexp, status);
}

void infer_gradient_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  const int64_t outputs = 3 + TF_ShapeInferenceContextNumInputs(context) - 6;
  for (int i = 0; i < outputs && TF_GetCode(status) == kOk; i++) {
    ShapeHandle shape;
    if (i < 3)
      get_tokens(context, i, shape, status);
    else
      TF_ShapeInferenceContextGetInput(context, i, shape, status);
    if (TF_GetCode(status) == kOk) TF_ShapeInferenceContextSetOutput(context, i, shape, status);
  }
}

// Registration

bool look_up_functions() {
  // a server may hold TensorFlow in its own executable
  void* library = dlopen("libtensorflow_framework.so.2", RTLD_NOW | RTLD_NOLOAD);
  void* where = library ? library : RTLD_DEFAULT;
  if (!dlsym(where, "TF_NewOpDefinitionBuilder")) return false;  // no TensorFlow here: somebody else loads us
#define LOOK_UP(result, name, arguments)                                                                  \
  name = reinterpret_cast<result(*) arguments>(dlsym(where, #name));                                      \
  if (!name) {                                                                                            \
    std::fprintf(stderr, "neighborhood: this TensorFlow has no %s; its ops are not registered\n", #name); \
    return false;                                                                                         \
  }
  TENSORFLOW_FUNCTIONS(LOOK_UP)
#undef LOOK_UP
  return true;
}

void register_op(const char* name, const std::vector<const char*>& inputs, const std::vector<const char*>& outputs,
                 void (*infer)(TF_ShapeInferenceContext*, TF_Status*), void (*compute)(void*, TF_OpKernelContext*)) {
  Status status;
  TF_OpDefinitionBuilder* builder = TF_NewOpDefinitionBuilder(name);
  for (const char* input : inputs) TF_OpDefinitionBuilderAddInput(builder, input);
  for (const char* output : outputs) TF_OpDefinitionBuilderAddOutput(builder, output);
  for (const char* attribute : {"T: {half, bfloat16, float, double}", "num_bias: int >= 0",
                                "kernel_size: list(int) >= 1", "dilation: list(int) >= 1"})
    TF_OpDefinitionBuilderAddAttr(builder, attribute);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, infer);
  TF_RegisterOpDefinition(builder, status);
  for (const int type : {kHalf, kBFloat16, kFloat, kDouble}) {
    if (!status.ok()) break;
    TF_KernelBuilder* kernel = TF_NewKernelBuilder(name, "CPU", create, compute, destroy);
    TF_KernelBuilder_TypeConstraint(kernel, "T", type, status);
    if (status.ok()) TF_RegisterKernelBuilder(name, kernel, status);
  }
  if (!status.ok()) std::fprintf(stderr, "neighborhood: %s is not registered: %s\n", name, TF_Message(status));
}

[[maybe_unused]] const bool registered = [] {
  if (!look_up_functions()) return false;
  register_op("Neighborhood>Attention",
              {"query: T", "key: T", "value: T", "rel_pos_bias: num_bias * T", "scale: double"},
              {"output: T", "logsumexp: double"}, infer_shapes, compute);
  register_op("Neighborhood>AttentionGrad",
              {"query: T", "key: T", "value: T", "rel_pos_bias: num_bias * T", "logsumexp: double", "grad_output: T",
               "scale: double"},
              {"grad_query: T", "grad_key: T", "grad_value: T", "grad_rel_pos_bias: num_bias * T"},
              infer_gradient_shapes, compute_gradient);
  return true;
}();

}  // namespace
