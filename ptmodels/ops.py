"""Neighborhood attention as an operation. Twin: `tfmodels/ops.py`.

Two implementations: `native`, C++ kernels for the CPU (`neighborhood/csrc`), and `composed`, of torch's own operations,
which runs anywhere. Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023 (arXiv:2204.07143).
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neighborhood import native
from neighborhood.arguments import check_arguments
from neighborhood.choice import choose
from neighborhood.windows import PerAxis
from ptmodels import composed_attention

try:
    from torch._C import _are_functorch_transforms_active as _is_transformed
    from torch._C import _len_torch_dispatch_stack

    def _is_dispatch_watched() -> bool:
        return _len_torch_dispatch_stack() > 0

except ImportError:  # not of the public interface

    def _is_transformed() -> bool:
        return False

    def _is_dispatch_watched() -> bool:
        return True


def _has_tangents() -> bool:
    """Whether forward-mode derivatives may be asked for: within `torch.autograd.forward_ad.dual_level`."""
    return getattr(forward_ad, "_current_level", -1) >= 0  # not of the public interface


_DTYPES = {getattr(torch, name): name for name in native.DTYPES}


@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = ...,
    *,
    rel_pos_bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout: Callable[[Tensor], Tensor] | None = ...,
    return_probabilities: Literal[False] = ...,
    implementation: str = ...,
) -> Tensor: ...
@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = ...,
    *,
    rel_pos_bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout: Callable[[Tensor], Tensor] | None = ...,
    return_probabilities: Literal[True],
    implementation: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = ...,
    *,
    rel_pos_bias: Tensor | None = ...,
    scale: float | None = ...,
    dropout: Callable[[Tensor], Tensor] | None = ...,
    return_probabilities: bool,
    implementation: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis = 1,
    *,
    rel_pos_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
    return_probabilities: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each position to a window of its neighbours, in one, two or three dimensions.

    Args:
        query, key, value: (B, *spatial, heads, head_dim), of one floating dtype.
        kernel_size: keys per query along each axis; a number, or one per axis.
        dilation: distance between neighbouring keys; a number, or one per axis. `kernel_size * dilation` may not
            exceed the axis.
        rel_pos_bias: (heads, 2 * kernel_size - 1 per axis), added to the logits by the distance from query to key.
        scale: factor on the dot products; head_dim**-0.5 by default.
        dropout: applied to the probabilities.
        return_probabilities: whether to return them too, after dropout.
        implementation: "native", "composed", or "auto": native on the CPU, in float32, float64, float16 or bfloat16
            (the last two computed in float32), outside of torch.func, when neither dropout nor probabilities are asked
            for.

    Returns:
        (B, *spatial, heads, head_dim); and, when asked for, the probabilities (B, *spatial, heads, keys), the keys of
        a window row by row.

    Raises:
        ValueError: arguments that do not go together, or a window that does not fit.
        RuntimeError: "native" is asked for and cannot be had.
    """
    _check_dtypes(query, key, value, rel_pos_bias)
    return _attend(
        None,
        query,
        key,
        value,
        kernel_size,
        dilation,
        rel_pos_bias=rel_pos_bias,
        scale=scale,
        dropout=dropout,
        return_probabilities=return_probabilities,
        implementation=implementation,
    )


def neighborhood_attention_qkvpacked(
    qkv: Tensor, kernel_size: PerAxis, dilation: PerAxis = 1, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """As `neighborhood_attention` of queries, keys and values that lie beside each other, as one product leaves them.

    The kernels need no copies then: neither of these nor of their gradients.

    Args:
        qkv: (B, *spatial, 3, heads, head_dim).
        kernel_size, dilation, options: of `neighborhood_attention`.
    """
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv is a {type(qkv).__name__}; give a torch.Tensor")
    if qkv.ndim < 5 or qkv.shape[-3] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; give (batch, *spatial, 3, heads, head_dim)")
    query, key, value = qkv.unbind(-3)
    _check_dtypes(query, key, value, options.get("rel_pos_bias"))
    return _attend(qkv, query, key, value, kernel_size, dilation, **options)


def _attend(
    qkv: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: PerAxis,
    dilation: PerAxis,
    *,
    rel_pos_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: Callable[[Tensor], Tensor] | None = None,
    return_probabilities: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    bias_shape = None if rel_pos_bias is None else rel_pos_bias.shape
    sizes = check_arguments(query.shape, key.shape, value.shape, kernel_size, dilation, bias_shape)
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else float(scale)

    def obstacle():
        if dropout is not None or return_probabilities:
            return "the kernels keep no probabilities, for dropout or to return them"
        if query.device.type != "cpu":
            return f"the kernels run on the CPU, and query is on {query.device}"
        if query.dtype not in _DTYPES:
            return f"the kernels take {', '.join(native.DTYPES)}, and query is {query.dtype}"
        if torch.onnx.is_in_onnx_export():
            return "ONNX has no such operator"
        if not torch.compiler.is_compiling() and _is_transformed():
            return "torch.func transforms torch's own operations"
        if not torch.compiler.is_compiling() and _has_tangents():
            return "forward-mode derivatives are those of torch's own operations"
        return None

    if choose(implementation, _why_unavailable(), obstacle) == "native":
        bias = None if rel_pos_bias is None else rel_pos_bias.to(query.dtype)
        if _is_plain(query, key, value, bias):
            if _needs_gradients(query, key, value, bias):
                if qkv is not None:
                    return _PackedAttention.apply(qkv.contiguous(), bias, *sizes, scale)
                return _Attention.apply(query, key, value, bias, *sizes, scale)
            return _forward(query, key, value, bias, *sizes, scale, keeps_logsumexp=False)[0]
        return _attention(query, key, value, bias, *map(list, sizes), scale)[0]
    arguments = (query, key, value, *sizes)
    may_be_fused = dropout is None and not return_probabilities and not _needs_gradients(*arguments[:3], rel_pos_bias)
    if may_be_fused and query.device.type == "cpu":  # another device would wait for the numbers
        is_plain = _is_plain(query, key, value, rel_pos_bias) and not _is_transformed() and not _has_tangents()
        if is_plain and composed_attention.can_be_fused(*arguments[:3], rel_pos_bias=rel_pos_bias, scale=scale):
            return composed_attention.fused_attention(*arguments, rel_pos_bias=rel_pos_bias, scale=scale)
    return composed_attention.neighborhood_attention(
        *arguments,
        rel_pos_bias=rel_pos_bias,
        scale=scale,
        dropout=dropout,
        return_probabilities=return_probabilities,
    )


def _why_unavailable() -> str | None:
    return native.why_unavailable()


# as torch.compiler.assume_constant_result does, which imports the whole compiler: two seconds of every start
_why_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_dtypes(query: Tensor, key: Tensor, value: Tensor, rel_pos_bias: Tensor | None) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value), ("rel_pos_bias", rel_pos_bias)):
        if name == "rel_pos_bias" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} is {tensor.dtype}; give a floating dtype")
        if tensor.dtype != query.dtype and name != "rel_pos_bias":
            raise TypeError(f"query is {query.dtype} and {name} {tensor.dtype}; they must be equal")
        if tensor.device != query.device:
            raise ValueError(f"query is on {query.device} and {name} on {tensor.device}; they must be on one device")


def _is_plain(*tensors: Tensor | None) -> bool:
    """Whether a call is to be run and no more: nothing traces, transforms or watches what torch dispatches."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_dispatch_watched():
        return False
    return all(
        tensor is None
        or (type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_neg())
        for tensor in tensors
    )


def _needs_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _Attention(torch.autograd.Function):
    """The kernels without torch's dispatch of an operator, which takes as long as they do on the smallest maps."""

    @staticmethod
    def forward(ctx, query, key, value, rel_pos_bias, kernel_size, dilation, scale):
        output, logsumexp = _forward(query, key, value, rel_pos_bias, kernel_size, dilation, scale)
        ctx.save_for_backward(query, key, value, rel_pos_bias, logsumexp)
        ctx.kernel_size, ctx.dilation, ctx.scale = kernel_size, dilation, scale
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() or not _is_plain(grad_output):
            return _backward(ctx, grad_output, None)
        query, key, value, rel_pos_bias, logsumexp = ctx.saved_tensors
        tensors = (grad_output, query, key, value, rel_pos_bias, logsumexp)
        *grads, grad_bias = _find_gradients(*tensors, ctx.kernel_size, ctx.dilation, ctx.scale)
        return *grads, grad_bias, None, None, None


class _PackedAttention(torch.autograd.Function):
    """The same of queries, keys and values beside each other, whose gradients are written beside each other, too."""

    @staticmethod
    def forward(ctx, qkv, rel_pos_bias, kernel_size, dilation, scale):
        query, key, value = qkv.unbind(-3)
        output, logsumexp = _forward(query, key, value, rel_pos_bias, kernel_size, dilation, scale)
        ctx.save_for_backward(qkv, rel_pos_bias, logsumexp)
        ctx.kernel_size, ctx.dilation, ctx.scale = kernel_size, dilation, scale
        return output

    @staticmethod
    def backward(ctx, grad_output):
        qkv, rel_pos_bias, logsumexp = ctx.saved_tensors
        query, key, value = qkv.unbind(-3)
        tensors = (grad_output, query, key, value, rel_pos_bias, logsumexp)
        if torch.is_grad_enabled() or not _is_plain(grad_output):
            *grads, grad_bias = _attention_backward(*tensors, list(ctx.kernel_size), list(ctx.dilation), ctx.scale)
            return torch.stack(grads, -3), None if rel_pos_bias is None else grad_bias, None, None, None
        grads = qkv.new_empty(qkv.shape)
        *_, grad_bias = _find_gradients(*tensors, ctx.kernel_size, ctx.dilation, ctx.scale, grads)
        return grads, grad_bias, None, None, None


def _forward(query, key, value, rel_pos_bias, kernel_size, dilation, scale, keeps_logsumexp=True):
    """Returns the attention and, for the backward, the log-sum-exp of each query's logits (B, *spatial, heads)."""
    output = query.new_empty(query.shape)  # not where torch.set_default_device says
    token_stride = _token_stride(query, key, value)
    if not token_stride:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float64) if keeps_logsumexp else None
    bias = None if rel_pos_bias is None else rel_pos_bias.contiguous()
    tensors = (query, key, value, bias, output, logsumexp)
    _call("forward", tensors, token_stride, kernel_size, dilation, scale)
    return output, logsumexp


def _find_gradients(grad_output, query, key, value, rel_pos_bias, logsumexp, kernel_size, dilation, scale, packed=None):
    """Returns the gradients of query, key, value and the bias, or None without a bias.

    With `packed`, of the shape and layout of what query, key and value are views of, the first three are views of it.
    """
    token_stride = 0
    if packed is not None:
        token_stride, grads = 3 * query.shape[-2] * query.shape[-1], packed.unbind(-3)
    else:
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        grads = [query.new_empty(query.shape) for _ in range(3)]
    grad_bias = None if rel_pos_bias is None else query.new_empty(rel_pos_bias.shape)
    rel_pos_bias, logsumexp, grad_output = (
        None if tensor is None else tensor.contiguous() for tensor in (rel_pos_bias, logsumexp, grad_output)
    )
    tensors = (query, key, value, rel_pos_bias, logsumexp, grad_output, *grads, grad_bias)
    _call("backward", tensors, token_stride, kernel_size, dilation, scale)
    return *grads, grad_bias


def _token_stride(*tensors: Tensor) -> int:
    """Returns the distance from token to token where tensors are alike and dense but for it, else 0."""
    shape, strides = tensors[0].shape, tensors[0].stride()
    if any(tensor.stride() != strides for tensor in tensors) or strides[-2:] != (shape[-1], 1):
        return 0
    expected = strides[-3]
    for size, stride in zip(reversed(shape[:-2]), reversed(strides[:-2]), strict=True):
        if stride != expected:
            return 0
        expected *= size
    return strides[-3] if strides[-3] >= shape[-2] * shape[-1] else 0


@functools.cache
def _parallel() -> int | None:
    """Returns where the function is that runs the threads of torch's own operations, or None."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"), os.RTLD_NOLOAD)
        return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # another system, or another runtime
        return None


def _call(direction: str, tensors: Sequence[Any], token_stride: int, kernel_size, dilation, scale: float) -> None:
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    query = tensors[0]
    sizes = (query.shape, kernel_size, dilation)
    dtype, threads = _DTYPES[query.dtype], torch.get_num_threads()
    native.run_at(direction, addresses, dtype, *sizes, scale, threads, token_stride, _parallel())


# The same as operators of torch, which torch.compile, torch.export and torch.func can follow


@torch.library.custom_op("neighborhood::attention", mutates_args=(), device_types="cpu")
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_operands(query, key, value, rel_pos_bias, kernel_size, dilation)
    return _forward(query, key, value, rel_pos_bias, tuple(kernel_size), tuple(dilation), scale)


@_attention.register_fake
def _(query, key, value, rel_pos_bias, kernel_size, dilation, scale):
    return query.new_empty(query.shape), query.new_empty(query.shape[:-1], dtype=torch.float64)


@torch.library.custom_op("neighborhood::attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_pos_bias: Tensor | None,
    logsumexp: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of query, key, value and the bias; the last is empty without a bias."""
    _check_operands(query, key, value, rel_pos_bias, kernel_size, dilation)
    for name, tensor, shape, dtype in (
        ("grad_output", grad_output, query.shape, query.dtype),
        ("logsumexp", logsumexp, query.shape[:-1], torch.float64),
    ):
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, {tensor.dtype}; it must be {tuple(shape)}, {dtype}")
    tensors = (grad_output, query, key, value, rel_pos_bias, logsumexp)
    *grads, grad_bias = _find_gradients(*tensors, tuple(kernel_size), tuple(dilation), scale)
    return *grads, query.new_empty(0) if grad_bias is None else grad_bias


@_attention_backward.register_fake
def _(grad_output, query, key, value, rel_pos_bias, logsumexp, kernel_size, dilation, scale):
    grads = [query.new_empty(query.shape) for _ in range(3)]
    return *grads, query.new_empty(0 if rel_pos_bias is None else rel_pos_bias.shape)


def _check_operands(query, key, value, rel_pos_bias, kernel_size, dilation) -> None:
    """For who calls the operator itself."""
    _check_dtypes(query, key, value, rel_pos_bias)
    if query.dtype not in _DTYPES or (rel_pos_bias is not None and rel_pos_bias.dtype != query.dtype):
        raise TypeError(f"the kernels take one of {', '.join(native.DTYPES)} for all tensors; query is {query.dtype}")
    bias_shape = None if rel_pos_bias is None else rel_pos_bias.shape
    check_arguments(query.shape, key.shape, value.shape, kernel_size, dilation, bias_shape)


def _save_forward(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, grad_output, _):
    query, key, value, rel_pos_bias, logsumexp = ctx.saved_tensors
    tensors = (grad_output, query, key, value, rel_pos_bias, logsumexp)
    *grads, grad_bias = _attention_backward(*tensors, list(ctx.kernel_size), list(ctx.dilation), ctx.scale)
    return *grads, None if rel_pos_bias is None else grad_bias, None, None, None


def _save_backward(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:5])


def _double_backward(ctx, *grads):
    """Differentiates the gradients, through the composed implementation.

    `logsumexp` follows from the other inputs, whose second derivatives hold its part.
    """
    saved: list[Any] = [None if tensor is None else tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
    grad_output, query, key, value, rel_pos_bias = saved
    inputs = [tensor for tensor in saved if tensor is not None]
    grads = grads if rel_pos_bias is not None else grads[:3]
    with torch.enable_grad():
        output = composed_attention.neighborhood_attention(
            *(query, key, value, tuple(ctx.kernel_size), tuple(ctx.dilation)),
            rel_pos_bias=rel_pos_bias,
            scale=ctx.scale,
        )
        first = torch.autograd.grad(output, inputs[1:], grad_output, create_graph=True)
        second = iter(torch.autograd.grad(first, inputs, grads, allow_unused=True))
    return *(None if tensor is None else next(second) for tensor in saved), None, None, None, None


_attention.register_autograd(_backward, setup_context=_save_forward)
_attention_backward.register_autograd(_double_backward, setup_context=_save_backward)
