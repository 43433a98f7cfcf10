"""One case of neighborhood attention and all that compute it: ours, and what a user of torch has without us."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf
import torch
from torch.nn.attention import flex_attention as flex

from neighborhood import native
from neighborhood.tiles import known_tiles
from neighborhood.windows import bias_positions, key_positions
from ptmodels.ops import neighborhood_attention as torch_attention
from tfmodels.ops import neighborhood_attention as keras_attention

DENSE_TOKENS = 4096  # a mask of more does not fit
GATHER_TOKENS = 60_000  # nor do the gathered windows of more


class Case:
    """The inputs of one case: batch 1, float32.

    Contenders return the output as a NumPy array; with `backward` they find the gradients of query, key, value and bias
    too. flex_attention and NATTEN have no bias and no backward on the CPU: they do less.
    """

    def __init__(self, heads: int, height: int, width: int, kernel_size: int, dilation: int, head_dim: int):
        self.kernel_size, self.dilation = kernel_size, dilation
        self.name = f"{heads}x{height}x{width}x{head_dim} k{kernel_size} d{dilation}"
        self.height, self.width, self.head_dim = height, width, head_dim
        self.tokens = height * width
        self.flops = 4 * heads * self.tokens * kernel_size**2 * head_dim
        generator = np.random.default_rng(0)
        self.arrays = generator.standard_normal((4, 1, height, width, heads, head_dim), np.float32)
        self.table = generator.standard_normal((heads, *(2 * kernel_size - 1,) * 2), np.float32)
        if self.tokens <= GATHER_TOKENS:
            axes = [(length, kernel_size, dilation) for length in (height, width)]
            rows, columns = (key_positions(*axis) for axis in axes)
            row_entries, column_entries = (bias_positions(*axis) for axis in axes)
            flat = rows[:, None, :, None] * width + columns[None, :, None, :]
            self.keys = torch.tensor(flat.reshape(self.tokens, -1))
            flat = row_entries[:, None, :, None] * (2 * kernel_size - 1) + column_entries[None, :, None, :]
            self.entries = torch.tensor(flat.reshape(self.tokens, -1))
        known_tiles((height, width), (kernel_size,) * 2, (dilation,) * 2)

    def contenders(self, backward: bool) -> dict[str, Callable[[], np.ndarray]]:
        found = {"kernels": self._kernels(backward)}
        for implementation in ("native", "composed"):
            found[f"torch {implementation}"] = self._torch(self._ours(implementation), backward)
            found[f"keras {implementation}"] = self._keras(implementation, backward)
        if self.tokens <= DENSE_TOKENS:
            found["sdpa"] = self._torch(self._sdpa if backward else self._sdpa_of_known_mask(), backward)
        if self.tokens <= GATHER_TOKENS:
            found["gather"] = self._torch(self._gather, backward)
        if self.tokens <= DENSE_TOKENS and not backward:
            found["flex"] = self._torch(self._flex(flex.flex_attention), backward)
            torch.compiler.reset()  # else it is wrong from the second case on
            found["flex compiled"] = self._torch(self._flex(torch.compile(flex.flex_attention)), backward)
            found["natten"] = self._torch(self._natten, backward)
        return found

    def has_bias(self, contender: str) -> bool:
        return contender not in ("flex", "flex compiled", "natten")

    def reference(self) -> Callable[[bool], np.ndarray]:
        """A function that returns the right output, with the bias or without."""
        return lambda biased: self._torch(self._gather, False, None if biased else np.zeros_like(self.table))()

    def _kernels(self, backward: bool) -> Callable:
        query, key, value, grad = self.arrays
        output, logsumexp = np.empty_like(query), np.empty(query.shape[:-1])
        grads = [np.empty_like(array) for array in (query, key, value, self.table)]
        inputs = (query, key, value, self.table)
        self.buffers = (output, logsumexp, grads)  # they live on: `run` knows where they are, and no more
        sizes = ("float32", query.shape, (self.kernel_size,) * 2, (self.dilation,) * 2, query.shape[-1] ** -0.5)
        threads = torch.get_num_threads()

        def addresses(*arrays):
            return [array.ctypes.data for array in (*inputs, *arrays)]

        forward = [*addresses(output), addresses(logsumexp)[-1] if backward else None]
        of_backward = addresses(logsumexp, grad, *grads)

        def run():
            native.run_at("forward", forward, *sizes, threads)
            if backward:
                native.run_at("backward", of_backward, *sizes, threads)
            return output

        return run

    def _ours(self, implementation: str) -> Callable:
        def attention(query, key, value, table):
            sizes = (self.kernel_size, self.dilation)
            return torch_attention(query, key, value, *sizes, rel_pos_bias=table, implementation=implementation)

        return attention

    def _mask(self, table):
        heads = table.shape[0]
        mask = table.new_full((heads, self.tokens, self.tokens), -torch.inf)
        return mask.scatter(2, self.keys.expand(heads, -1, -1), table.flatten(1)[:, self.entries])

    def _sdpa_of_known_mask(self) -> Callable:
        mask = self._mask(torch.tensor(self.table))  # in training the bias changes from step to step
        return lambda query, key, value, table: self._sdpa(query, key, value, table, mask)

    def _sdpa(self, query, key, value, table, mask=None):
        mask = self._mask(table) if mask is None else mask
        output = torch.nn.functional.scaled_dot_product_attention(*_by_head(query, key, value), attn_mask=mask[None])
        return output.transpose(1, 2).reshape(query.shape)

    def _gather(self, query, key, value, table):
        shape = query.shape
        query, key, value = _by_head(query, key, value)
        logits = torch.einsum("bhnd,bhnkd->bhnk", query * query.shape[-1] ** -0.5, key[:, :, self.keys])
        weights = (logits + table.flatten(1)[:, self.entries]).softmax(-1)
        output = torch.einsum("bhnk,bhnkd->bhnd", weights, value[:, :, self.keys])
        return output.transpose(1, 2).reshape(shape)

    def _flex(self, attend: Callable) -> Callable:
        kernel_size, dilation = self.kernel_size, self.dilation

        def sees(query, key, length):  # arithmetic alone: compiled for the CPU, it may not look anything up
            group, position = query % dilation, query // dilation
            last = (length - group + dilation - 1) // dilation - kernel_size
            start = torch.clamp(torch.minimum(position - kernel_size // 2, last), min=0)
            slot = key // dilation - start
            return (key % dilation == group) & (slot >= 0) & (slot < kernel_size)

        def mask(batch, head, query, key):
            rows = sees(query // self.width, key // self.width, self.height)
            return rows & sees(query % self.width, key % self.width, self.width)

        known = flex.create_block_mask(mask, None, None, self.tokens, self.tokens, device="cpu")

        def attention(query, key, value, table):
            output = attend(*_by_head(query, key, value), block_mask=known)
            return output.transpose(1, 2).reshape(query.shape)

        return attention

    def _natten(self, query, key, value, table):
        import natten

        return natten.na2d(query, key, value, kernel_size=self.kernel_size, dilation=self.dilation)

    def _torch(self, attention: Callable, backward: bool, table: np.ndarray | None = None) -> Callable:
        arrays = (*self.arrays[:3], self.table if table is None else table)
        inputs = [torch.tensor(x, requires_grad=backward) for x in arrays]
        grad = torch.tensor(self.arrays[3])

        def run():
            if not backward:
                with torch.no_grad():
                    return attention(*inputs).numpy()
            output = attention(*inputs)
            torch.autograd.grad(output, inputs, grad)
            return output.detach().numpy()

        return run

    def _keras(self, implementation: str, backward: bool) -> Callable:
        inputs = [tf.constant(x) for x in (*self.arrays[:3], self.table)]
        grad = tf.constant(self.arrays[3])

        @tf.function
        def attention(query, key, value, table):
            with tf.GradientTape() as tape:
                tape.watch((query, key, value, table))
                sizes = (self.kernel_size, self.dilation)
                output = keras_attention(query, key, value, *sizes, rel_pos_bias=table, implementation=implementation)
            if not backward:
                return output
            return output, tape.gradient(output, (query, key, value, table), output_gradients=grad)

        def run():
            output = attention(*inputs)[0] if backward else attention(*inputs)
            return np.asarray(memoryview(output))  # `numpy()` would copy, which torch's does not

        return run


def _by_head(*tensors) -> list:
    """(B, H, W, heads, head_dim) to (B, heads, tokens, head_dim)."""
    return [x.flatten(1, 2).transpose(1, 2) for x in tensors]
