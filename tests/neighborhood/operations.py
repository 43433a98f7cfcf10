"""The operation of either half, on NumPy arrays: every case runs through both, and through both implementations."""

import numpy as np


def _to_torch(array):
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.tensor(array)


def _from_torch(tensor):
    import ml_dtypes
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class Torch:
    name = "torch"

    def operation(self, query, key, value, kernel_size, dilation=1, *, table=None, **options):
        """Returns the results as NumPy arrays."""
        import torch

        from ptmodels.ops import neighborhood_attention

        with torch.no_grad():
            bias = None if table is None else torch.as_tensor(table)
            tensors = map(torch.as_tensor, (query, key, value))
            outputs = neighborhood_attention(*tensors, kernel_size, dilation, rel_pos_bias=bias, **options)
        return [x.numpy() for x in outputs] if isinstance(outputs, tuple) else outputs.numpy()

    def with_gradients(self, query, key, value, grad_output, table, **options):
        """Returns the output and the gradients of query, key, value and, with a bias, of it."""
        import torch

        from ptmodels.ops import neighborhood_attention

        inputs = [_to_torch(x).requires_grad_() for x in (query, key, value, table) if x is not None]
        bias = inputs[3] if table is not None else None
        output = neighborhood_attention(*inputs[:3], rel_pos_bias=bias, **options)
        grads = torch.autograd.grad(output, inputs, _to_torch(grad_output))
        return [_from_torch(x) for x in (output, *grads)]


class Keras:
    name = "keras"

    def operation(self, query, key, value, kernel_size, dilation=1, *, table=None, **options):
        from tfmodels.ops import neighborhood_attention

        outputs = neighborhood_attention(query, key, value, kernel_size, dilation, rel_pos_bias=table, **options)
        return [x.numpy() for x in outputs] if isinstance(outputs, tuple) else outputs.numpy()

    def with_gradients(self, query, key, value, grad_output, table, **options):
        import tensorflow as tf

        from tfmodels.ops import neighborhood_attention

        inputs = [tf.constant(x) for x in (query, key, value, table) if x is not None]
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            bias = inputs[3] if table is not None else None
            output = neighborhood_attention(*inputs[:3], rel_pos_bias=bias, **options)
        grads = tape.gradient(output, inputs, output_gradients=tf.constant(grad_output))
        return [output.numpy(), *(np.asarray(tf.convert_to_tensor(grad)) for grad in grads)]


HALVES = [Torch(), Keras()]
